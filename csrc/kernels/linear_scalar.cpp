// linear, scalar: the definition of correct. One weight at a time, summed in double; every format, any M.
#include <bit>
#include <cstring>

#include "kernels/linear_rows.h"

namespace fourfold {
namespace {

// Code of (n, k) within the codes of a tile, as its codebook value less the output's zero point.
template <Format F>
float code_value(const uint8_t* codes, size_t n, size_t k, float zero) {
    if constexpr (is_4bit(F)) {
        const uint8_t byte = codes[nibble_byte(n, k)];
        return codebook(F)[nibble_is_high(k) ? byte >> 4 : byte & 15] - zero;
    } else if constexpr (F == Format::int8) {
        return static_cast<float>(static_cast<int8_t>(codes[int8_byte(n, k)])) / 127.0f;
    } else if constexpr (F == Format::bf16) {
        uint16_t bits;
        std::memcpy(&bits, codes + 2 * bf16_word(n, k), 2);
        return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
    } else {
        float value;
        std::memcpy(&value, codes + 4 * (k * kTileN + n), 4);
        return value;
    }
}

template <Format F>
void linear(const LinearArgs& a) {
    const auto* x = reinterpret_cast<const float*>(a.x);
    for (size_t p = 0; p < a.n_panels; ++p) {
        const uint8_t* panel = a.panels + p * panel_bytes(F, a.k_tiles);
        for (size_t m = 0; m < a.m; ++m) {
            double sums[kTileN] = {};
            for (size_t t = 0; t < a.k_tiles; ++t) {
                const uint8_t* codes = panel + code_offset(F, t, a.k_tiles);
                for (size_t n = 0; n < kTileN; ++n) {
                    const uint8_t* at = panel + scale_offset(F, t) + n;
                    float scale = 1.0f;
                    if constexpr (has_scales(F)) scale = a.panel_scales[p] * e4m3(*at);
                    const float zero = zero_point(F, at);
                    double sum = 0;
                    for (size_t k = 0; k < kTileK; ++k)
                        sum += static_cast<double>(x[(m * a.k_tiles + t) * kTileK + k]) *
                               static_cast<double>(scale * code_value<F>(codes, n, k, zero));
                    sums[n] += sum;
                }
            }
            for (size_t n = 0; n < kTileN; ++n) a.y[m * a.y_stride + p * kTileN + n] = static_cast<float>(sums[n]);
        }
    }
}

constexpr LinearKernel row(Format f, LinearFn fn, std::string_view name) {
    return {name, Isa::scalar, f, Activation::f32, 1, SIZE_MAX, fn, 0, 0, 0, 0};
}
constexpr LinearKernel kRows[] = {
    row(Format::nf4, linear<Format::nf4>, "linear_nf4_f32_scalar"),
    row(Format::int4, linear<Format::int4>, "linear_int4_f32_scalar"),
    row(Format::fp4, linear<Format::fp4>, "linear_fp4_f32_scalar"),
    row(Format::fp4_bnb, linear<Format::fp4_bnb>, "linear_fp4_bnb_f32_scalar"),
    row(Format::uint4, linear<Format::uint4>, "linear_uint4_f32_scalar"),
    row(Format::int8, linear<Format::int8>, "linear_int8_f32_scalar"),
    row(Format::bf16, linear<Format::bf16>, "linear_bf16_f32_scalar"),
    row(Format::f32, linear<Format::f32>, "linear_f32_f32_scalar"),
};

}  // namespace

std::span<const LinearKernel> linear_rows_scalar() { return kRows; }

}  // namespace fourfold
