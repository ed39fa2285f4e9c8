// The tile unit under the names that the AMX kernels are written in; included only by files compiled for it. A kernel
// includes this or tiles_emulated.h, never both.
#pragma once
#include <immintrin.h>

#include <array>
#include <cstddef>
#include <cstdint>

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

}  // namespace
}  // namespace fourfold
