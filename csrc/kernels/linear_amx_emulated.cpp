// The AMX kernels over tiles kept in ordinary memory: the same algorithm and data layout, testable on any AVX-512
// machine. Never selected (m_max is 0), only called by name.
#include <algorithm>
#include <array>
#include <cstring>

#include "kernels/bytes_avx512.h"
#include "kernels/linear_rows.h"

namespace fourfold {
namespace {

struct Tile {
    alignas(64) uint8_t rows[16][64];
    size_t n_rows;
};
thread_local Tile tiles[8];

inline void configure_tiles(std::array<size_t, 8> rows) {
    std::memset(tiles, 0, sizeof tiles);
    for (size_t i = 0; i < rows.size(); ++i) tiles[i].n_rows = rows[i];
}
inline void release_tiles() {}
template <int T>
inline void tile_zero() {
    std::memset(tiles[T].rows, 0, sizeof tiles[T].rows);
}
template <int T>
inline void tile_load(const void* p, size_t stride) {
    for (size_t r = 0; r < tiles[T].n_rows; ++r)
        std::memcpy(tiles[T].rows[r], static_cast<const uint8_t*>(p) + r * stride, 64);
}
template <int T>
inline void tile_load_once(const void* p, size_t stride) {
    tile_load<T>(p, stride);
}
template <int T>
inline void tile_store(void* p, size_t stride) {
    for (size_t r = 0; r < tiles[T].n_rows; ++r)
        std::memcpy(static_cast<uint8_t*>(p) + r * stride, tiles[T].rows[r], 64);
}
// TDPBF16PS (Intel SDM vol. 2): C[m][n] += A[m][2k] B[k][2n] + A[m][2k+1] B[k][2n+1], k = 0 .. 15.
template <int C, int A, int B>
inline void tile_dot() {
    for (size_t m = 0; m < tiles[C].n_rows; ++m) {
        __m512 sum = _mm512_load_ps(tiles[C].rows[m]);
        for (size_t k = 0; k < 16; ++k) {
            const __m512i b = _mm512_load_si512(tiles[B].rows[k]);
            int32_t pair;
            std::memcpy(&pair, tiles[A].rows[m] + 4 * k, 4);
            const __m512i a = _mm512_set1_epi32(pair);
            sum = _mm512_fmadd_ps(bf16_even(a), bf16_even(b), sum);
            sum = _mm512_fmadd_ps(bf16_odd(a), bf16_odd(b), sum);
        }
        _mm512_store_ps(tiles[C].rows[m], sum);
    }
}

// TDPBSUD (the same): C[m][n] += the 4 signed bytes A[m][4k..] times the 4 unsigned bytes B[k][4n..], k = 0 .. 15.
template <int C, int A, int B>
inline void tile_dot_bytes() {
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

#include "kernels/linear_amx.inl"
#include "kernels/linear_amx_i16.inl"

constexpr float kBf16 = 0x1p-8f;

template <Format F>
constexpr LinearKernel i16_row(std::string_view name, float codebook_error) {
    return {name, Isa::avx512, F, Activation::i16, 1, 0, linear_i16<F>, 0, codebook_error, 0, 0.5f / 32512};
}
template <Format F>
constexpr LinearKernel bf16_row(std::string_view name) {
    return {name, Isa::avx512, F, Activation::bf16, 1, 0, linear<F>, F == Format::bf16 ? 0 : kBf16, 0, kBf16, 0};
}
constexpr LinearKernel kRows[] = {
    i16_row<Format::nf4>("linear_nf4_i16_amx_emulated", 0.5f / 112.05f),
    i16_row<Format::int4>("linear_int4_i16_amx_emulated", 0),
    i16_row<Format::fp4>("linear_fp4_i16_amx_emulated", 0),
    i16_row<Format::fp4_bnb>("linear_fp4_bnb_i16_amx_emulated", 0.375f / 120),
    i16_row<Format::uint4>("linear_uint4_i16_amx_emulated", 0),
    i16_row<Format::int8>("linear_int8_i16_amx_emulated", 0),
    bf16_row<Format::nf4>("linear_nf4_bf16_amx_emulated"),
    bf16_row<Format::int4>("linear_int4_bf16_amx_emulated"),
    bf16_row<Format::fp4>("linear_fp4_bf16_amx_emulated"),
    bf16_row<Format::fp4_bnb>("linear_fp4_bnb_bf16_amx_emulated"),
    bf16_row<Format::uint4>("linear_uint4_bf16_amx_emulated"),
    bf16_row<Format::int8>("linear_int8_bf16_amx_emulated"),
    bf16_row<Format::bf16>("linear_bf16_bf16_amx_emulated"),
};

}  // namespace

std::span<const LinearKernel> linear_rows_amx_emulated() { return kRows; }

}  // namespace fourfold
