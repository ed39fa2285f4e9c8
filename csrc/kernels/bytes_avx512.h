// Codes to unsigned bytes with AVX-512, for the kernels whose dot products are of 8-bit integers; included only by
// files compiled for it.
#pragma once
#include "kernels/decode_avx512.h"

namespace fourfold {
namespace {

// Bytes a unit of the codebook: where 16 rounded values lie closest to the true ones (NF4: rms 0.0017 against 0.0036 at
// the worst factor between 90 and 127); exact for int4 and fp4.
constexpr float units(Format f) {
    return f == Format::nf4 ? 112.05f : f == Format::int4 ? 112.0f : f == Format::fp4 ? 108.0f : 127.0f;
}

// The bytes round(units * codebook) + 128 of the 16 codes, four times over: vpermb reads 6 bits of an index, so neither
// nibble needs a mask.
template <Format F>
inline __m512i byte_table() {
    alignas(64) static constexpr auto kTable = [] {
        std::array<uint8_t, 64> table{};
        for (size_t i = 0; is_4bit(F) && i < 64; ++i)
            table[i] = static_cast<uint8_t>(codebook(F)[i % 16] * units(F) + 128.0f + 0.5f);
        return table;
    }();
    return _mm512_load_si512(kTable.data());
}

// Bytes ahead of its load that a line is asked into the L2 cache, and into L1: one core has too few L1 misses in flight
// (24 on Zen 4) to cover the memory's latency with those alone.
constexpr size_t kFar = 6144, kNear = 1024;

inline void prefetch(const uint8_t* at) {
    _mm_prefetch(reinterpret_cast<const char*>(at + kFar), _MM_HINT_T1);
    _mm_prefetch(reinterpret_cast<const char*>(at + kNear), _MM_HINT_T0);
}

// Vectors of codes a group of 8 inputs takes, and bytes.
template <Format F>
constexpr size_t kGroupBytes = code_bytes(F) / 8;

// A group's weights as unsigned bytes: inputs 0-3 and 4-7, 4 inputs a 32-bit lane, a lane an output.
template <Format F>
inline void group_to_bytes(const uint8_t* at, __m512i table, __m512i& first, __m512i& second) {
    prefetch(at);
    if constexpr (F == Format::int8) {
        prefetch(at + 64);
        const __m512i to_unsigned = _mm512_set1_epi8(static_cast<char>(0x80));
        first = _mm512_xor_si512(load64(at), to_unsigned);
        second = _mm512_xor_si512(load64(at + 64), to_unsigned);
    } else {
        const __m512i v = load64(at);
        first = _mm512_permutexvar_epi8(v, table);
        second = _mm512_permutexvar_epi8(_mm512_srli_epi16(v, 4), table);
    }
}

}  // namespace
}  // namespace fourfold
