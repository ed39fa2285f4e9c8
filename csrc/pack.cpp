#include "pack.h"

#include <emmintrin.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <limits>
#include <system_error>
#include <thread>
#include <type_traits>
#include <vector>

#include "arithmetic.h"

namespace fourfold {
namespace {

// Numbers as they lie; those from kInfinity on, the sign aside, are not finite.
template <SourceType type>
using Word = std::conditional_t<type == SourceType::f32, uint32_t, uint16_t>;
template <SourceType type>
constexpr int32_t kInfinity = type == SourceType::f32   ? 0x7F800000
                              : type == SourceType::f16 ? 0x7C00
                                                        : 0x7F80;

template <SourceType type>
float to_float(Word<type> word) {
    if constexpr (type == SourceType::f16) return from_half(word);
    return std::bit_cast<float>(static_cast<uint32_t>(word) << (type == SourceType::bf16 ? 16 : 0));
}

// 8 rows and 8 inputs of 16-bit words, turned: the 8 rows' words of input i at to + 16 i. A word's place is its row's 3
// bits and its column's; weaving rows i and i + 4 moves the first bit to the end, so three times swap row and column.
void turn_square(const uint16_t* from, size_t stride, uint16_t* to) {
    __m128i a[8], b[8];
    for (size_t n = 0; n < 8; ++n) a[n] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + n * stride));
    for (size_t i = 0; i < 4; ++i) {
        b[2 * i] = _mm_unpacklo_epi16(a[i], a[i + 4]);
        b[2 * i + 1] = _mm_unpackhi_epi16(a[i], a[i + 4]);
    }
    for (size_t i = 0; i < 4; ++i) {
        a[2 * i] = _mm_unpacklo_epi16(b[i], b[i + 4]);
        a[2 * i + 1] = _mm_unpackhi_epi16(b[i], b[i + 4]);
    }
    for (size_t i = 0; i < 4; ++i) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 2 * i * kTileN), _mm_unpacklo_epi16(a[i], a[i + 4]));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + (2 * i + 1) * kTileN), _mm_unpackhi_epi16(a[i], a[i + 4]));
    }
}

// Up to 16 rows of a tile to words[k][n].
template <class W>
void turn_tile(const W* rows, size_t stride, size_t n_rows, size_t width, W* words) {
    if constexpr (sizeof(W) == 2)
        if (n_rows == kTileN && width == kTileK) {
            for (size_t n = 0; n < kTileN; n += 8)
                for (size_t k = 0; k < kTileK; k += 8)
                    turn_square(rows + n * stride + k, stride, words + k * kTileN + n);
            return;
        }
    for (size_t n = 0; n < n_rows; ++n)
        for (size_t k = 0; k < width; ++k) words[k * kTileN + n] = rows[n * stride + k];
}

// Up to 16 rows to `columns`: input k of output n at 16 k + n, 0 for outputs that are not there. False if a number is
// NaN or infinite.
template <SourceType type>
bool gather(const void* source, size_t n_rows, size_t k, float* columns) {
    using W = Word<type>;
    const auto* rows = static_cast<const W*>(source);
    std::make_signed_t<W> largest = 0;
    for (size_t k0 = 0; k0 < k; k0 += kTileK) {  // by tiles, which the first level cache holds
        W words[kTileK * kTileN] = {};
        const size_t width = std::min(kTileK, k - k0);
        turn_tile(rows + k0, k, n_rows, width, words);
        for (size_t i = 0; i < width * kTileN; ++i) {
            const auto magnitude = static_cast<std::make_signed_t<W>>(words[i] & (W(~W{}) >> 1));
            largest = std::max(largest, magnitude);
            columns[k0 * kTileN + i] = to_float<type>(words[i]);
        }
    }
    return largest < kInfinity<type>;
}

using GatherFn = bool (*)(const void*, size_t, size_t, float*);
constexpr GatherFn kGather[] = {gather<SourceType::f32>, gather<SourceType::f16>, gather<SourceType::bf16>};

// The first of the rows of a panel that `gather` refuses.
size_t first_non_finite(GatherFn gather, const uint8_t* rows, size_t row_bytes, size_t k, float* columns) {
    size_t n = 0;
    while (gather(rows + n * row_bytes, 1, k, columns)) ++n;
    return n;
}

constexpr PackPanelFn kPackPanel[kIsas] = {pack_panel_scalar, pack_panel_avx2, pack_panel_avx512, pack_panel_avx512,
                                           pack_panel_avx512};

}  // namespace

PackResult pack(const PackArgs& a, Isa isa, size_t n_threads) {
    constexpr size_t none = std::numeric_limits<size_t>::max();
    const size_t n_panels = panels_of(a.n), k_tiles = tiles_of(a.k), bytes = panel_bytes(a.format, k_tiles);
    const size_t row_bytes = a.k * (a.type == SourceType::f32 ? 4 : 2);
    const GatherFn gather_rows = kGather[static_cast<size_t>(a.type)];
    std::vector<PackSums> sums(n_panels);
    std::atomic<size_t> next = 0, first_bad = none;

    const size_t n_workers = std::clamp<size_t>(n_panels, 1, std::max<size_t>(n_threads, 1));
    const size_t panel_columns = k_tiles * kTileK * kTileN;
    std::vector<float> all_columns(n_workers * panel_columns);  // before there are threads: in one, none may be thrown
    const auto work = [&](size_t worker) {
        const OwnArithmetic while_computing;
        float* const columns = all_columns.data() + worker * panel_columns;
        for (size_t p; (p = next++) < n_panels;) {
            const size_t n_rows = std::min(kTileN, a.n - p * kTileN);
            const uint8_t* rows = static_cast<const uint8_t*>(a.rows) + p * kTileN * row_bytes;
            if (!gather_rows(rows, n_rows, a.k, columns)) {
                const size_t bad = p * kTileN + first_non_finite(gather_rows, rows, row_bytes, a.k, columns);
                for (size_t seen = first_bad; bad < seen && !first_bad.compare_exchange_weak(seen, bad);) {
                }
                continue;
            }
            float scale = 0;
            sums[p] = kPackPanel[static_cast<size_t>(isa)](a.format, columns, k_tiles, a.panels + p * bytes, &scale);
            if (has_scales(a.format)) a.panel_scales[p] = scale;
        }
    };
    {
        std::vector<std::jthread> others;
        try {
            for (size_t i = 1; i < n_workers; ++i) others.emplace_back(work, i);
        } catch (const std::system_error&) {  // the system gives no more; those that there are do it too
        }
        work(0);
    }

    PackResult result;
    for (const PackSums& s : sums) result.sums.error += s.error, result.sums.reference += s.reference;
    if (first_bad != none) result.non_finite_row = first_bad;
    return result;
}

void unpack(Format format, const uint8_t* panels, const float* panel_scales, size_t n, size_t k, float* out) {
    const OwnArithmetic while_computing;
    const size_t k_tiles = tiles_of(k), bytes = panel_bytes(format, k_tiles);
    for (size_t row = 0; row < n; ++row)
        for (size_t i = 0; i < k; ++i) {
            const size_t lane = row % kTileN, in_tile = i % kTileK;
            const uint8_t* panel = panels + row / kTileN * bytes;
            const uint8_t* codes = panel + code_offset(format, i / kTileK, k_tiles);
            const uint8_t* scale = panel + scale_offset(format, i / kTileK) + lane;  // where there is one
            float value = 0;
            switch (format) {
                case Format::nf4:
                case Format::int4:
                case Format::fp4:
                case Format::fp4_bnb:
                case Format::uint4: {
                    const uint8_t byte = codes[nibble_byte(lane, in_tile)];
                    value =
                        codebook(format)[nibble_is_high(in_tile) ? byte >> 4 : byte & 15] - zero_point(format, scale);
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
            if (has_scales(format)) value = panel_scales[row / kTileN] * e4m3(*scale) * value;
            out[row * k + i] = value;
        }
}

}  // namespace fourfold
