// The names of tiles_amx.h over tiles kept in ordinary memory, so that what is written in them can be tested on any
// AVX-512 machine. Where the tile unit would fault, so does this.
#pragma once
#include <array>
#include <cstdint>
#include <cstring>

#include "kernels/decode_avx512.h"

namespace fourfold {
namespace {

struct Tile {
    alignas(64) uint8_t rows[16][64];
    size_t n_rows;  // 0: not configured
};
thread_local Tile tiles[8];

// What the unit answers with an exception, #UD, ends in the same one.
inline void require(bool holds) {
    if (!holds) __builtin_trap();
}

inline void configure_tiles(std::array<size_t, 8> rows) {
    std::memset(tiles, 0, sizeof tiles);
    for (size_t i = 0; i < rows.size(); ++i) require(rows[i] <= 16), tiles[i].n_rows = rows[i];
}
inline void release_tiles() { std::memset(tiles, 0, sizeof tiles); }
template <int T>
inline void tile_zero() {
    require(tiles[T].n_rows > 0);
    std::memset(tiles[T].rows, 0, sizeof tiles[T].rows);
}
template <int T>
inline void tile_load(const void* p, size_t stride) {
    tile_zero<T>();
    for (size_t r = 0; r < tiles[T].n_rows; ++r)
        std::memcpy(tiles[T].rows[r], static_cast<const uint8_t*>(p) + r * stride, 64);
}
template <int T>
inline void tile_load_once(const void* p, size_t stride) {
    tile_load<T>(p, stride);
}
template <int T>
inline void tile_store(void* p, size_t stride) {
    require(tiles[T].n_rows > 0);
    for (size_t r = 0; r < tiles[T].n_rows; ++r)
        std::memcpy(static_cast<uint8_t*>(p) + r * stride, tiles[T].rows[r], 64);
}
template <int C, int A, int B>
inline void require_operands() {
    static_assert(C != A && C != B && A != B);
    require(tiles[C].n_rows > 0 && tiles[A].n_rows == tiles[C].n_rows && tiles[B].n_rows == 16);
}

// While one lives, floats are rounded as the unit does, to nearest even, subnormals taken for zero and made zero. What
// is computed meanwhile comes from memory and goes to memory: that alone keeps it in its place.
class UnitRounding {
  public:
    UnitRounding() { set(0x9FC0); }  // all exceptions masked, DAZ, FTZ
    ~UnitRounding() { set(before_); }
    UnitRounding(const UnitRounding&) = delete;

  private:
    static void set(uint32_t mxcsr) { __asm__ volatile("ldmxcsr %0" : : "m"(mxcsr) : "memory"); }
    const uint32_t before_ = _mm_getcsr();
};

// TDPBF16PS (Intel SDM vol. 2): C[m][n] += sum of A[m][2k] B[k][2n] + sum of A[m][2k+1] B[k][2n+1], k = 0 .. 15. The
// two sums are made apart, from zero, and added to each other before they are added to C.
template <int C, int A, int B>
inline void tile_dot() {
    require_operands<C, A, B>();
    const UnitRounding rounding;
    for (size_t m = 0; m < tiles[C].n_rows; ++m) {
        __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
        for (size_t k = 0; k < 16; ++k) {
            const __m512i b = _mm512_load_si512(tiles[B].rows[k]);
            int32_t pair;
            std::memcpy(&pair, tiles[A].rows[m] + 4 * k, 4);
            const __m512i a = _mm512_set1_epi32(pair);
            even = _mm512_fmadd_ps(bf16_even(a), bf16_even(b), even);
            odd = _mm512_fmadd_ps(bf16_odd(a), bf16_odd(b), odd);
        }
        _mm512_store_ps(tiles[C].rows[m], _mm512_add_ps(_mm512_load_ps(tiles[C].rows[m]), _mm512_add_ps(even, odd)));
    }
}

// TDPBSUD (the same): C[m][n] += the 4 signed bytes A[m][4k..] times the 4 unsigned bytes B[k][4n..], k = 0 .. 15.
template <int C, int A, int B>
inline void tile_dot_bytes() {
    require_operands<C, A, B>();
    for (size_t m = 0; m < tiles[C].n_rows; ++m) {
        __m512i sum = _mm512_load_si512(tiles[C].rows[m]);
        for (size_t k = 0; k < 16; ++k) {
            int32_t four;
            std::memcpy(&four, tiles[A].rows[m] + 4 * k, 4);
            sum = _mm512_dpbusd_epi32(sum, _mm512_load_si512(tiles[B].rows[k]), _mm512_set1_epi32(four));
        }
        _mm512_store_si512(tiles[C].rows[m], sum);
    }
}

}  // namespace
}  // namespace fourfold
