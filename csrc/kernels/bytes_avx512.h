// Codes to unsigned bytes with AVX-512, for the kernels whose dot products are of 8-bit integers; included only by
// files compiled for it.
#pragma once
#include "kernels/bytes.h"
#include "kernels/decode_avx512.h"
#include "kernels/read_ahead.h"

namespace fourfold {
namespace {

template <Format F>
inline __m512i byte_table() {
    return _mm512_load_si512(kCodeBytes<F>.data());
}

// What a tile's sums of (256 hi + lo) * u begin with, so that they are those of the weights: see I16Row.
template <Format F>
inline __m512i sums_begin(int32_t offset, __m512i zeros) {
    if constexpr (has_zeros(F)) return _mm512_mullo_epi32(zeros, _mm512_set1_epi32(offset / 128));
    return _mm512_set1_epi32(offset);
}

// Weights of 8 inputs as unsigned bytes: inputs 0-3 and 4-7, 4 inputs a 32-bit lane, a lane an output.
template <Format F>
inline void group_to_bytes(const uint8_t* at, __m512i table, __m512i& first, __m512i& second) {
    if constexpr (F == Format::int8) {
        const __m512i to_unsigned = _mm512_set1_epi8(static_cast<char>(0x80));
        first = _mm512_xor_si512(load64(at), to_unsigned);
        second = _mm512_xor_si512(load64(at + 64), to_unsigned);
    } else {
        const __m512i v = load64(at);
#if defined(__AVX512VBMI__)  // vpermb reads 6 bits of an index, so neither nibble needs a mask
        first = _mm512_permutexvar_epi8(v, table);
        second = _mm512_permutexvar_epi8(_mm512_srli_epi16(v, 4), table);
#else
        const __m512i nibble = _mm512_set1_epi8(15);
        first = _mm512_shuffle_epi8(table, _mm512_and_si512(v, nibble));
        second = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(v, 4), nibble));
#endif
    }
}

}  // namespace
}  // namespace fourfold
