// linear on the AMX tile unit. The algorithm is linear_amx.inl.
#include <algorithm>
#include <cstddef>
#include <cstring>

#include "kernels/decode_avx512.h"
#include "kernels/linear_rows.h"

namespace fourfold {
namespace {

// The operand of ldtilecfg (Intel SDM vol. 2, LDTILECFG): palette 1, eight tiles of 16 rows x 64 bytes.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64 && offsetof(TileConfig, bytes_per_row) == 16 &&
              offsetof(TileConfig, rows) == 48);

inline void configure_tiles() {
    const TileConfig config;
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
template <int T>
inline void tile_store(void* p, size_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int C, int A, int B>
inline void tile_dot() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#include "kernels/linear_amx.inl"

constexpr float kBf16 = 0x1p-8f;
constexpr size_t kMany = 17;  // tokens from which a tile of 16 is not mostly padding

template <Format F>
constexpr LinearKernel row(std::string_view name) {
    return {name, Isa::amx, F, Activation::bf16, kMany, SIZE_MAX, linear<F>, F == Format::bf16 ? 0 : kBf16,
            0,    kBf16,    0};
}
constexpr LinearKernel kRows[] = {
    row<Format::nf4>("linear_nf4_bf16_amx"),   row<Format::int4>("linear_int4_bf16_amx"),
    row<Format::fp4>("linear_fp4_bf16_amx"),   row<Format::int8>("linear_int8_bf16_amx"),
    row<Format::bf16>("linear_bf16_bf16_amx"),
};

}  // namespace

std::span<const LinearKernel> linear_rows_amx() { return kRows; }

}  // namespace fourfold
