// linear, AVX2: the table's rows, and the float32 kernel. A tile's weights become float32 in the L1 cache, then are
// multiplied with a few rows of x at once. The other kernel is linear_avx2_i16.inl.
//
//   registers  4 rows x 16 outputs of sums (8), the weights of one input (2), one broadcast x
//   reuse      a decoded tile (4 KB) serves every row of x before the next is decoded
//   bound      by arithmetic: decoding costs about 3 operations a weight
//   accuracy   float32 throughout
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "kernels/bytes.h"
#include "kernels/linear_rows.h"
#include "kernels/read_ahead.h"

namespace fourfold {
namespace {

struct Decoded {
    alignas(64) float w[kTileK][kTileN];
};

// 16 outputs' scales of a tile as two vectors.
struct Scales {
    __m256 lo, hi;
    Scales(const uint8_t* bytes, float panel_scale) {
        lo = decode(bytes, panel_scale);
        hi = decode(bytes + 8, panel_scale);
    }
    static __m256 decode(const uint8_t* bytes, float panel_scale) {
        const __m256i b = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
        const __m256i bits =
            _mm256_and_si256(_mm256_slli_epi32(b, 20), _mm256_set1_epi32(static_cast<int>(0x87F00000)));
        const __m256 e4m3 = _mm256_mul_ps(_mm256_castsi256_ps(bits), _mm256_set1_ps(0x1p120f));
        return _mm256_mul_ps(_mm256_set1_ps(panel_scale), e4m3);
    }
};

// The zero points of 8 outputs, whose scales are at `scales`.
template <Format F>
__m256i zeros8(const uint8_t* scales) {
    if constexpr (!has_zeros(F)) return _mm256_setzero_si256();
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(scales + kTileN)));
}

// table[index], 16 entries in two registers; the low 4 bits of each lane count.
__m256 lookup16(__m256 low, __m256 high, __m256i index) {
    const __m256 a = _mm256_permutevar8x32_ps(low, index), b = _mm256_permutevar8x32_ps(high, index);
    return _mm256_blendv_ps(a, b, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}

template <Format F>
void decode_tile(const uint8_t* codes, const uint8_t* scales, float panel_scale, Decoded& out) {
    if constexpr (F == Format::f32) {
        std::memcpy(&out, codes, sizeof out);
    } else if constexpr (F == Format::bf16) {
        for (size_t g = 0; g < 8; ++g)
            for (size_t t = 0; t < 4; ++t)
                for (size_t half = 0; half < 2; ++half) {
                    const __m256i v =
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + (g * 4 + t) * 64 + half * 32));
                    float* even = &out.w[g * 8 + kPairOrder[2 * t]][half * 8];
                    float* odd = &out.w[g * 8 + kPairOrder[2 * t + 1]][half * 8];
                    _mm256_store_ps(even, _mm256_castsi256_ps(_mm256_slli_epi32(v, 16)));
                    _mm256_store_ps(odd, _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(~0xFFFF))));
                }
    } else {
        const Scales s(scales, panel_scale);
        for (size_t half = 0; half < 2; ++half) {
            const __m256 scale = half ? s.hi : s.lo;
            if constexpr (F == Format::int8) {
                const __m256 step = _mm256_div_ps(scale, _mm256_set1_ps(127.0f));
                for (size_t q = 0; q < 16; ++q) {
                    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + q * 64 + half * 32));
                    for (int byte = 0; byte < 4; ++byte) {
                        const __m256i lane = _mm256_srai_epi32(_mm256_slli_epi32(v, 24 - 8 * byte), 24);
                        _mm256_store_ps(&out.w[q * 4 + byte][half * 8], _mm256_mul_ps(step, _mm256_cvtepi32_ps(lane)));
                    }
                }
            } else {
                const __m256 low = _mm256_loadu_ps(codebook(F).data()), high = _mm256_loadu_ps(codebook(F).data() + 8);
                const __m256i zero = zeros8<F>(scales + half * 8), nibble = _mm256_set1_epi32(15);
                constexpr size_t kInput[8] = {0, 4, 1, 5, 2, 6, 3, 7};  // of the nibbles of a lane, lowest first
                for (size_t g = 0; g < 8; ++g) {
                    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + g * 64 + half * 32));
                    for (int i = 0; i < 8; ++i) {
                        const __m256i code = _mm256_srli_epi32(v, 4 * i);
                        const __m256 w = has_zeros(F) ? _mm256_cvtepi32_ps(_mm256_sub_epi32(code & nibble, zero))
                                                      : lookup16(low, high, code);
                        _mm256_store_ps(&out.w[g * 8 + kInput[i]][half * 8], _mm256_mul_ps(scale, w));
                    }
                }
            }
        }
    }
}

template <size_t ROWS>
void multiply(const Decoded& tile, const float* x, size_t x_stride, float* y, size_t y_stride, bool first) {
    __m256 lo[ROWS], hi[ROWS];
    for (size_t r = 0; r < ROWS; ++r) {
        lo[r] = first ? _mm256_setzero_ps() : _mm256_loadu_ps(y + r * y_stride);
        hi[r] = first ? _mm256_setzero_ps() : _mm256_loadu_ps(y + r * y_stride + 8);
    }
    for (size_t k = 0; k < kTileK; ++k) {
        const __m256 w0 = _mm256_load_ps(tile.w[k]), w1 = _mm256_load_ps(tile.w[k] + 8);
        for (size_t r = 0; r < ROWS; ++r) {
            const __m256 v = _mm256_broadcast_ss(x + r * x_stride + k);
            lo[r] = _mm256_fmadd_ps(w0, v, lo[r]);
            hi[r] = _mm256_fmadd_ps(w1, v, hi[r]);
        }
    }
    for (size_t r = 0; r < ROWS; ++r) {
        _mm256_storeu_ps(y + r * y_stride, lo[r]);
        _mm256_storeu_ps(y + r * y_stride + 8, hi[r]);
    }
}

template <Format F>
void linear(const LinearArgs& a) {
    auto& tile = *reinterpret_cast<Decoded*>(a.scratch);
    const size_t x_stride = a.k_tiles * kTileK;
    for (size_t p = 0; p < a.n_panels; ++p) {
        const uint8_t* panel = a.panels + p * panel_bytes(F, a.k_tiles);
        for (size_t t = 0; t < a.k_tiles; ++t) {
            decode_tile<F>(panel + code_offset(F, t, a.k_tiles), panel + scale_offset(F, t),
                           has_scales(F) ? a.panel_scales[p] : 1.0f, tile);
            const float* x = reinterpret_cast<const float*>(a.x) + t * kTileK;
            float* y = a.y + p * kTileN;
            size_t m = 0;
            for (; m + 4 <= a.m; m += 4)
                multiply<4>(tile, x + m * x_stride, x_stride, y + m * a.y_stride, a.y_stride, !t);
            for (; m < a.m; ++m) multiply<1>(tile, x + m * x_stride, x_stride, y + m * a.y_stride, a.y_stride, !t);
        }
    }
}

#include "kernels/linear_avx2_i16.inl"

template <Format F>
constexpr LinearKernel i16_row(std::string_view name) {
    return {name, Isa::avx2,     F, Activation::i16_words, 1, SIZE_MAX, of_i16::linear<F>,
            0,    byte_error(F), 0, 0.5f / 32512};
}
template <Format F>
constexpr LinearKernel f32_row(std::string_view name) {
    return {name, Isa::avx2, F, Activation::f32, 1, SIZE_MAX, linear<F>, 0, 0, 0, 0};
}
constexpr LinearKernel kRows[] = {
    i16_row<Format::nf4>("linear_nf4_i16_avx2"),
    i16_row<Format::int4>("linear_int4_i16_avx2"),
    i16_row<Format::fp4>("linear_fp4_i16_avx2"),
    i16_row<Format::fp4_bnb>("linear_fp4_bnb_i16_avx2"),
    i16_row<Format::uint4>("linear_uint4_i16_avx2"),
    i16_row<Format::int8>("linear_int8_i16_avx2"),
    f32_row<Format::bf16>("linear_bf16_f32_avx2"),
    f32_row<Format::f32>("linear_f32_f32_avx2"),
    // The more exact rows of the scaled formats, chosen by name.
    f32_row<Format::nf4>("linear_nf4_f32_avx2"),
    f32_row<Format::int4>("linear_int4_f32_avx2"),
    f32_row<Format::fp4>("linear_fp4_f32_avx2"),
    f32_row<Format::fp4_bnb>("linear_fp4_bnb_f32_avx2"),
    f32_row<Format::uint4>("linear_uint4_f32_avx2"),
    f32_row<Format::int8>("linear_int8_f32_avx2"),
};

}  // namespace

std::span<const LinearKernel> linear_rows_avx2() { return kRows; }

}  // namespace fourfold
