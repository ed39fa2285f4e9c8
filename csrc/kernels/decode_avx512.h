// Codes to numbers with AVX-512; included only by files compiled for it.
#pragma once
#include <immintrin.h>

#include <cstring>
#include <utility>

#include "format.h"

namespace fourfold {
namespace {

inline __m512i load64(const void* p) { return _mm512_loadu_si512(p); }

// The 16 scales of a tile as float32: panel_scale * e4m3(byte). See e4m3() in format.h; the sign bit moves to bit 31.
inline __m512 tile_scales(const uint8_t* bytes, __m512 panel_scale) {
    const __m512i b = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    const __m512i bits = _mm512_and_si512(_mm512_slli_epi32(b, 20), _mm512_set1_epi32(static_cast<int>(0x87F00000)));
    return _mm512_mul_ps(panel_scale, _mm512_mul_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(0x1p120f)));
}

// The 16 zero points of a tile whose scales are at `scales`.
template <Format F>
inline __m512i tile_zeros(const uint8_t* scales) {
    if constexpr (!has_zeros(F)) return _mm512_setzero_si512();
    return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales + kTileN)));
}

// What makes weights of a tile's codes: scale * (codebook[code] - zero).
struct TileUnits {
    __m512 scale, zero;
};
template <Format F>
inline TileUnits tile_units(const uint8_t* scales, float panel_scale) {
    return {tile_scales(scales, _mm512_set1_ps(panel_scale)), _mm512_cvtepi32_ps(tile_zeros<F>(scales))};
}

// The inputs of a 32-bit lane of 4-bit codes, lowest nibble first, within their group of 8.
constexpr size_t kNibbleInput[8] = {0, 4, 1, 5, 2, 6, 3, 7};

// Nibble I of each lane, through the codebook and less the zero point. vpermps reads the low 4 bits of a lane and
// ignores the rest.
template <Format F, int I>
inline __m512 nibble(__m512 table, __m512i lanes, __m512 zero) {
    const __m512 value = _mm512_permutexvar_ps(_mm512_srli_epi32(lanes, 4 * I), table);
    return has_zeros(F) ? _mm512_sub_ps(value, zero) : value;
}

template <int BYTE>
inline __m512 signed_byte(__m512i lanes) {
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(lanes, 24 - 8 * BYTE), 24));
}

inline __m512 bf16_even(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
inline __m512 bf16_odd(__m512i pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xFFFF0000))));
}

#if defined(__AVX512BF16__)
// 16 lanes of two bfloat16 from two rows of 16 signed bytes, exactly.
inline __m512i bf16_lanes(const uint8_t* even, const uint8_t* odd) {
    const auto bits = [](const uint8_t* bytes) {
        return _mm512_castps_si512(
            _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)))));
    };
    constexpr __mmask32 kOdd = 0xAAAAAAAA;
    return _mm512_mask_blend_epi16(kOdd, _mm512_srli_epi32(bits(even), 16), bits(odd));
}

// Lane n of the result is the bfloat16 pair (even[n], odd[n]), each rounded to nearest even.
inline __m512i bf16_pairs(__m512 even, __m512 odd) {
    const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                                6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even));  // even in the low half
    return _mm512_permutexvar_epi16(interleave, halves);
}

// Group g of 8 inputs of a tile as its 4 vectors of a bf16 tile (format.h), scaled; `out` is the tile, 64-byte aligned.
template <Format F>
inline void group_to_bf16(const uint8_t* codes, const TileUnits& units, size_t g, uint8_t* out) {
    auto* to = reinterpret_cast<__m512i*>(out) + g * 4;
    if constexpr (F == Format::int8) {
        const __m512 step = _mm512_mul_ps(units.scale, _mm512_set1_ps(1.0f / 127.0f));
        const __m512i a = load64(codes + g * 128), b = load64(codes + g * 128 + 64);  // inputs 0-3, 4-7
        const auto pair = [&](__m512 even, __m512 odd) {
            return bf16_pairs(_mm512_mul_ps(step, even), _mm512_mul_ps(step, odd));
        };
        to[0] = pair(signed_byte<0>(a), signed_byte<2>(a));
        to[1] = pair(signed_byte<0>(b), signed_byte<2>(b));
        to[2] = pair(signed_byte<1>(a), signed_byte<3>(a));
        to[3] = pair(signed_byte<1>(b), signed_byte<3>(b));
    } else {
        const __m512 table = _mm512_loadu_ps(codebook(F).data());
        const __m512i v = load64(codes + g * 64);
        const auto pair = [&](__m512 even, __m512 odd) {
            return bf16_pairs(_mm512_mul_ps(units.scale, even), _mm512_mul_ps(units.scale, odd));
        };
        to[0] = pair(nibble<F, 0>(table, v, units.zero), nibble<F, 4>(table, v, units.zero));
        to[1] = pair(nibble<F, 1>(table, v, units.zero), nibble<F, 5>(table, v, units.zero));
        to[2] = pair(nibble<F, 2>(table, v, units.zero), nibble<F, 6>(table, v, units.zero));
        to[3] = pair(nibble<F, 3>(table, v, units.zero), nibble<F, 7>(table, v, units.zero));
    }
}
#endif

// Calls f(number of rows, first row) over M rows in blocks of 8, 4, 2 and 1; the number is a compile-time constant.
template <class F>
inline void by_rows(size_t m, F f) {
    size_t i = 0;
    for (; i + 8 <= m; i += 8) f(std::integral_constant<size_t, 8>{}, i);
    if (i + 4 <= m) f(std::integral_constant<size_t, 4>{}, i), i += 4;
    if (i + 2 <= m) f(std::integral_constant<size_t, 2>{}, i), i += 2;
    if (i < m) f(std::integral_constant<size_t, 1>{}, i);
}

}  // namespace
}  // namespace fourfold
