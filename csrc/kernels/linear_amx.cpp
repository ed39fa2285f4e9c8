// linear on the AMX tile unit. The algorithms are linear_amx.inl and linear_amx_i16.inl.
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>

#include "kernels/bytes_avx512.h"
#include "kernels/linear_rows.h"

namespace fourfold {
namespace {

// The operand of ldtilecfg (Intel SDM vol. 2, LDTILECFG): palette 1, eight tiles of up to 16 rows x 64 bytes.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64 && offsetof(TileConfig, bytes_per_row) == 16 &&
              offsetof(TileConfig, rows) == 48);

inline void configure_tiles(std::array<size_t, 8> rows) {
    TileConfig config;
    for (size_t i = 0; i < rows.size(); ++i) config.rows[i] = static_cast<uint8_t>(rows[i]);
    // gcc 12's _tile_loadconfig declares 8 of the 64 bytes as read: without this the other stores may be dropped.
    __asm__ volatile("" ::"r"(&config) : "memory");
    _tile_loadconfig(&config);
}
inline void release_tiles() { _tile_release(); }

// In assembly, because gcc's intrinsics are macros that want the register's number spelled out.
template <int T>
inline void tile_zero() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
inline void tile_load(const void* p, size_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
// For what this core will not read again soon: the lines need not stay in the L1 cache.
template <int T>
inline void tile_load_once(const void* p, size_t stride) {
    __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void tile_store(void* p, size_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int C, int A, int B>
inline void tile_dot() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// Signed bytes of A times unsigned bytes of B.
template <int C, int A, int B>
inline void tile_dot_bytes() {
    __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#include "kernels/linear_amx.inl"
#include "kernels/linear_amx_i16.inl"

constexpr float kBf16 = 0x1p-8f;
// Tokens: from 5 the vector unit's byte products no longer hide behind the memory; from 33 (bf16: 17) rounding the
// weights to bfloat16 once costs less than scaling every tile's sums.
constexpr size_t kFew = 5, kManyScaled = 33, kManyBf16 = 17;

template <Format F>
constexpr LinearKernel i16_row(std::string_view name, float codebook_error) {
    return {name, Isa::amx,       F, Activation::i16, kFew, kManyScaled - 1, linear_i16<F>,
            0,    codebook_error, 0, 0.5f / 32512};
}
template <Format F>
constexpr LinearKernel bf16_row(std::string_view name) {
    const bool is_bf16 = F == Format::bf16;
    return {name,
            Isa::amx,
            F,
            Activation::bf16,
            is_bf16 ? kManyBf16 : kManyScaled,
            SIZE_MAX,
            linear<F>,
            is_bf16 ? 0 : kBf16,
            0,
            kBf16,
            0};
}
constexpr LinearKernel kRows[] = {
    i16_row<Format::nf4>("linear_nf4_i16_amx", 0.5f / 112.05f),
    i16_row<Format::int4>("linear_int4_i16_amx", 0),
    i16_row<Format::fp4>("linear_fp4_i16_amx", 0),
    i16_row<Format::fp4_bnb>("linear_fp4_bnb_i16_amx", 0.375f / 120),
    i16_row<Format::uint4>("linear_uint4_i16_amx", 0),
    i16_row<Format::int8>("linear_int8_i16_amx", 0),
    bf16_row<Format::nf4>("linear_nf4_bf16_amx"),
    bf16_row<Format::int4>("linear_int4_bf16_amx"),
    bf16_row<Format::fp4>("linear_fp4_bf16_amx"),
    bf16_row<Format::fp4_bnb>("linear_fp4_bnb_bf16_amx"),
    bf16_row<Format::uint4>("linear_uint4_bf16_amx"),
    bf16_row<Format::int8>("linear_int8_bf16_amx"),
    bf16_row<Format::bf16>("linear_bf16_bf16_amx"),
};

}  // namespace

std::span<const LinearKernel> linear_rows_amx() { return kRows; }

}  // namespace fourfold
