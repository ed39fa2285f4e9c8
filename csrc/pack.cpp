#include "pack.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

namespace fourfold {
namespace {

uint32_t float_bits_of_half(uint16_t h) {
    const uint32_t sign = (h & 0x8000u) << 16, rest = h & 0x7FFFu;
    if (rest >= 0x7C00) return sign | 0x7F800000 | (rest & 0x3FF) << 13;
    // As if it were a float32 of the same fields, its exponent is 112 too small; this mends the subnormals too.
    return sign | std::bit_cast<uint32_t>(std::bit_cast<float>(rest << 13) * 0x1p112f);
}

// The bits of element i as a float32.
uint32_t float_bits(const void* row, SourceType type, size_t i) {
    if (type == SourceType::f32) return static_cast<const uint32_t*>(row)[i];
    const uint16_t word = static_cast<const uint16_t*>(row)[i];
    return type == SourceType::bf16 ? uint32_t{word} << 16 : float_bits_of_half(word);
}

// Up to 16 rows to `columns`: input k of output n at 16 k + n. False if a number is NaN or infinite.
template <SourceType type>
bool gather(const uint8_t* rows, size_t row_bytes, size_t n_rows, size_t k, float* columns) {
    uint32_t largest = 0;
    for (size_t k0 = 0; k0 < k; k0 += kTileK)  // by tiles, which the first level cache holds
        for (size_t n = 0; n < n_rows; ++n)
            for (size_t i = k0; i < std::min(k, k0 + kTileK); ++i) {
                const uint32_t bits = float_bits(rows + n * row_bytes, type, i);
                columns[i * kTileN + n] = std::bit_cast<float>(bits);
                largest = std::max(largest, bits & 0x7FFFFFFF);
            }
    return largest < 0x7F800000;
}

using GatherFn = bool (*)(const uint8_t*, size_t, size_t, size_t, float*);
constexpr GatherFn kGather[] = {gather<SourceType::f32>, gather<SourceType::f16>, gather<SourceType::bf16>};

size_t first_non_finite(const uint8_t* rows, SourceType type, size_t row_bytes, size_t k) {
    for (size_t n = 0;; ++n)
        for (size_t i = 0; i < k; ++i)
            if ((float_bits(rows + n * row_bytes, type, i) & 0x7FFFFFFF) >= 0x7F800000) return n;
}

constexpr PackPanelFn kPackPanel[kIsas] = {pack_panel_scalar, pack_panel_avx2, pack_panel_avx512, pack_panel_avx512};

}  // namespace

PackResult pack(const PackArgs& a, Isa isa, size_t n_threads) {
    constexpr size_t none = std::numeric_limits<size_t>::max();
    const size_t n_panels = panels_of(a.n), k_tiles = tiles_of(a.k), bytes = panel_bytes(a.format, k_tiles);
    const size_t row_bytes = a.k * (a.type == SourceType::f32 ? 4 : 2);
    std::vector<PackSums> sums(n_panels);
    std::atomic<size_t> next = 0, first_bad = none;

    const auto work = [&] {
        std::vector<float> columns(k_tiles * kTileK * kTileN);
        for (size_t p; (p = next++) < n_panels;) {
            const size_t n_rows = std::min(kTileN, a.n - p * kTileN);
            const uint8_t* rows = static_cast<const uint8_t*>(a.rows) + p * kTileN * row_bytes;
            if (n_rows < kTileN) std::fill(columns.begin(), columns.end(), 0.0f);
            if (!kGather[static_cast<size_t>(a.type)](rows, row_bytes, n_rows, a.k, columns.data())) {
                const size_t bad = p * kTileN + first_non_finite(rows, a.type, row_bytes, a.k);
                for (size_t seen = first_bad; bad < seen && !first_bad.compare_exchange_weak(seen, bad);) {
                }
                continue;
            }
            float scale = 0;
            sums[p] =
                kPackPanel[static_cast<size_t>(isa)](a.format, columns.data(), k_tiles, a.panels + p * bytes, &scale);
            if (has_scales(a.format)) a.panel_scales[p] = scale;
        }
    };
    {
        std::vector<std::jthread> others;
        for (size_t i = 1; i < std::min(n_threads, n_panels); ++i) others.emplace_back(work);
        work();
    }

    PackResult result;
    for (const PackSums& s : sums) result.sums.error += s.error, result.sums.reference += s.reference;
    if (first_bad != none) result.non_finite_row = first_bad;
    return result;
}

void unpack(Format format, const uint8_t* panels, const float* panel_scales, size_t n, size_t k, float* out) {
    const size_t k_tiles = tiles_of(k), bytes = panel_bytes(format, k_tiles);
    for (size_t row = 0; row < n; ++row)
        for (size_t i = 0; i < k; ++i) {
            const size_t lane = row % kTileN, in_tile = i % kTileK;
            const uint8_t* panel = panels + row / kTileN * bytes;
            const uint8_t* codes = panel + code_offset(format, i / kTileK, k_tiles);
            float value = 0;
            switch (format) {
                case Format::nf4:
                case Format::int4:
                case Format::fp4: {
                    const uint8_t byte = codes[nibble_byte(lane, in_tile)];
                    value = codebook(format)[nibble_is_high(in_tile) ? byte >> 4 : byte & 15];
                    break;
                }
                case Format::int8:
                    value = static_cast<float>(static_cast<int8_t>(codes[int8_byte(lane, in_tile)])) / 127.0f;
                    break;
                case Format::bf16: {
                    uint16_t word;
                    std::memcpy(&word, codes + 2 * bf16_word(lane, in_tile), 2);
                    value = std::bit_cast<float>(uint32_t{word} << 16);
                    break;
                }
                case Format::f32:
                    std::memcpy(&value, codes + 4 * (in_tile * kTileN + lane), 4);
                    break;
            }
            if (has_scales(format)) {
                const uint8_t byte = panel[scale_offset(format, i / kTileK) + lane];
                value = panel_scales[row / kTileN] * e4m3(byte) * value;
            }
            out[row * k + i] = value;
        }
}

}  // namespace fourfold
