// The vector dialect: the small vocabulary that rowwise.inl and attention.inl are written in. A file defines one of the
// three below by its flags, in an anonymous namespace, so that no two ISAs share a symbol.
//
//   kLanes floats a Vec; load and store need no alignment; fma(a, b, c) = a * b + c, fnma(a, b, c) = c - a * b.
//   add_pairs adds the products of the two bfloat16 in each of kLanes 32-bit words with the two in x, rounding in an
//   order of its own. exp is within 2 units in the last place for x <= 0 (all it is used for), exp(-87) = 1.6e-38 below
//   -87, and NaN of NaN. max(a, b) is b where one of them is NaN. store_bf16 rounds 2 kLanes floats to bfloat16,
//   store_pair_order 32 of them in kPairOrder; subnormals may become zero, as which the products take them. extremes
//   finds the least and the largest of each 32 of 64 floats that are numbers; store_bytes rounds floats of 0 to 255 to
//   nearest even.
#pragma once
#include <bit>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "kernels/kernels.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fourfold {
namespace {

// To nearest even. A NaN stays one.
inline uint16_t to_bf16(float x) {
    const auto bits = std::bit_cast<uint32_t>(x);
    const uint32_t nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16, quiet = bits >> 16 | 0x40;
    return static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? quiet : nearest);
}

#if defined(__AVX512F__)

using Vec = __m512;
constexpr size_t kLanes = 16;
inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec set1(float x) { return _mm512_set1_ps(x); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
#if defined(__AVX512BF16__)
inline __m512 add_pairs(__m512 sum, __m512i pairs, __m512i x) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(pairs), reinterpret_cast<__m512bh>(x));
}
inline __m512i bf16_words(const float* x) {
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(load(x + 16), load(x)));
}
#else
inline __m512 add_pairs(__m512 sum, __m512i pairs, __m512i x) {
    const auto even = [](__m512i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)); };
    const auto odd = [](__m512i v) { return _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(~0xFFFF))); };
    return _mm512_fmadd_ps(odd(pairs), odd(x), _mm512_fmadd_ps(even(pairs), even(x), sum));
}
inline __m512i bf16_words(const float* x) {
    const auto nearest = [](__m512 v) {  // as to_bf16
        const __m512i bits = _mm512_castps_si512(v), high = _mm512_srli_epi32(bits, 16);
        const __m512i half = _mm512_add_epi32(_mm512_set1_epi32(0x7FFF), _mm512_and_si512(high, _mm512_set1_epi32(1)));
        const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
        const __m512i quiet = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
        return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), quiet));
    };
    return _mm512_inserti64x4(_mm512_castsi256_si512(nearest(load(x))), nearest(load(x + 16)), 1);
}
#endif
inline Vec add_pairs(Vec sum, const uint32_t* p, uint32_t x) {
    return add_pairs(sum, _mm512_loadu_si512(p), _mm512_set1_epi32(static_cast<int>(x)));
}
inline Vec load_int8(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline Vec load_half(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store_half(uint16_t* p, Vec v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline Vec load_bf16(const uint16_t* p) {
    const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
}
inline void store_bf16(void* to, const float* x) { _mm512_storeu_si512(to, bf16_words(x)); }
inline void store_pair_order(uint16_t* to, const float* x) {
    static_assert(kPairOrder == std::array<uint8_t, 8>{0, 2, 4, 6, 1, 3, 5, 7});
    const __m128i order = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
    _mm512_storeu_si512(to, _mm512_shuffle_epi8(bf16_words(x), _mm512_broadcast_i32x4(order)));
}
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec fnma(Vec a, Vec b, Vec c) { return _mm512_fnmadd_ps(a, b, c); }
inline Vec round_even(Vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec times_power_of_two(Vec a, Vec n) { return _mm512_scalef_ps(a, n); }
inline float sum(Vec v) { return _mm512_reduce_add_ps(v); }
inline float largest(Vec v) { return _mm512_reduce_max_ps(v); }
// `fold` over each 32 of 64 floats.
template <class Fold>
inline void fold_32(const float* x, float* out, Fold fold) {
    const __m512 a = fold(load(x), load(x + 16)), b = fold(load(x + 32), load(x + 48));
    __m512 v = fold(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
    v = fold(v, _mm512_shuffle_f32x4(v, v, 0xB1));
    v = fold(v, _mm512_permute_ps(v, 0x4E));
    v = fold(v, _mm512_permute_ps(v, 0xB1));
    out[0] = _mm512_cvtss_f32(v);
    out[1] = _mm_cvtss_f32(_mm512_extractf32x4_ps(v, 2));
}
inline void extremes(const float* x, float* least, float* most) {
    fold_32(x, least, [](__m512 a, __m512 b) { return _mm512_min_ps(a, b); });
    fold_32(x, most, [](__m512 a, __m512 b) { return _mm512_max_ps(a, b); });
}
inline void store_bytes(uint8_t* p, Vec v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
}

#elif defined(__AVX2__)

using Vec = __m256;
constexpr size_t kLanes = 8;
inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec set1(float x) { return _mm256_set1_ps(x); }
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
inline Vec add_pairs(Vec sum, const uint32_t* p, uint32_t x) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i high = _mm256_set1_epi32(static_cast<int>(0xFFFF0000));
    const auto even = [](__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); };
    const auto odd = [&](__m256i pairs) { return _mm256_castsi256_ps(_mm256_and_si256(pairs, high)); };
    const __m256i both = _mm256_set1_epi32(static_cast<int>(x));
    return _mm256_fmadd_ps(odd(v), odd(both), _mm256_fmadd_ps(even(v), even(both), sum));
}
inline Vec load_int8(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline Vec load_half(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void store_half(uint16_t* p, Vec v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline Vec load_bf16(const uint16_t* p) {
    const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
}
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec fnma(Vec a, Vec b, Vec c) { return _mm256_fnmadd_ps(a, b, c); }
inline Vec round_even(Vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec times_power_of_two(Vec a, Vec n) {  // n in -126 .. 127
    const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(a, _mm256_castsi256_ps(exponent));
}
inline float sum(Vec v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float largest(Vec v) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

#else

using Vec = float;
constexpr size_t kLanes = 1;
inline Vec zero() { return 0; }
inline Vec set1(float x) { return x; }
inline Vec load(const float* p) { return *p; }
inline void store(float* p, Vec v) { *p = v; }
inline Vec add_pairs(Vec sum, const uint32_t* p, uint32_t x) {
    const auto even = [](uint32_t pair) { return std::bit_cast<float>(pair << 16); };
    const auto odd = [](uint32_t pair) { return std::bit_cast<float>(pair & 0xFFFF0000); };
    return sum + even(*p) * even(x) + odd(*p) * odd(x);
}
inline Vec load_int8(const int8_t* p) { return *p; }
inline Vec load_half(const uint16_t* p) { return from_half(*p); }
inline void store_half(uint16_t* p, Vec v) { *p = to_half(v); }
inline Vec load_bf16(const uint16_t* p) { return std::bit_cast<float>(static_cast<uint32_t>(*p) << 16); }
inline Vec add(Vec a, Vec b) { return a + b; }
inline Vec sub(Vec a, Vec b) { return a - b; }
inline Vec mul(Vec a, Vec b) { return a * b; }
inline Vec div(Vec a, Vec b) { return a / b; }
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline float sum(Vec v) { return v; }
inline float largest(Vec v) { return v; }

#endif

#if defined(__AVX2__)
// exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln 2 / 2; r in two steps (Cody and Waite), exp(r) by its Taylor
// polynomial of degree 7, whose remainder is below 2^-24 exp(r) there.
inline Vec exp(Vec x) {
    x = max(set1(-87.0f), x);  // in this order a NaN stays one
    const Vec n = round_even(mul(x, set1(1.44269504f)));
    const Vec r = fnma(n, set1(-2.12194440e-4f), fnma(n, set1(0.693359375f), x));
    Vec y = set1(1.0f / 5040);
    for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) y = fma(y, r, set1(c));
    return times_power_of_two(y, n);
}
#else
inline Vec exp(Vec x) { return std::exp(x); }
#endif

#if !defined(__AVX512F__)
inline void extremes(const float* x, float* least, float* most) {
    for (size_t i = 0; i < 2; ++i, x += 32) {
        least[i] = most[i] = x[0];
        for (size_t k = 1; k < 32; ++k) {
            least[i] = x[k] < least[i] ? x[k] : least[i];
            most[i] = x[k] > most[i] ? x[k] : most[i];
        }
    }
}
inline void store_bytes(uint8_t* p, Vec v) {
    float values[kLanes];
    store(values, v);
    // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
    for (size_t i = 0; i < kLanes; ++i) p[i] = static_cast<uint8_t>(std::bit_cast<uint32_t>(values[i] + 0x1.8p23f));
}
inline void store_bf16(void* to, const float* x) {
    uint16_t words[2 * kLanes];
    for (size_t i = 0; i < 2 * kLanes; ++i) words[i] = to_bf16(x[i]);
    std::memcpy(to, words, sizeof(words));
}
inline void store_pair_order(uint16_t* to, const float* x) {
    for (size_t i = 0; i < 32; ++i) to[i] = to_bf16(x[i / 8 * 8 + kPairOrder[i % 8]]);
}
#endif

}  // namespace
}  // namespace fourfold
