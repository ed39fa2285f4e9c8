// C (16 x 16, float32) += A (16 rows of 32 bfloat16) * B (16 rows of 16 pairs): 16 cycles a product, about 52 until its
// sum may be added to, so at least 4 accumulators. Tiles 0-5 accumulate, 6 is A, 7 is B.
//
// gcc 12 describes the memory behind its tile intrinsics badly: _tile_loadconfig names 8 of its 64 bytes as read, and
// _tile_loadd none, so stores before them may be dropped or moved. keep_stores stands before each.
#include <immintrin.h>

#include "kernels/probe.h"

namespace fourfold {
namespace {

constexpr int kRows = 16, kRowBytes = 64;  // a whole tile
constexpr int kProducts = 16 * 16 * 32;    // in one tdpbf16ps
constexpr int kAccumulators = 6;
constexpr int kTiles = kAccumulators + 2;

// The operand of ldtilecfg for palette 1: 8 tiles; what stands for tiles 8 to 15 must be zero.
struct alignas(64) TileConfig {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64 && offsetof(TileConfig, row_bytes) == 16 && offsetof(TileConfig, rows) == 48);

// Everything stored so far is in memory, as far as the compiler can tell.
void keep_stores(const void* p) { __asm__ volatile("" : : "r"(p) : "memory"); }

double peak_bf16() {
    TileConfig config;
    for (int tile = 0; tile < kTiles; ++tile) {
        config.row_bytes[tile] = kRowBytes;
        config.rows[tile] = kRows;
    }
    alignas(64) uint16_t ones[kRows * kRowBytes / sizeof(uint16_t)];
    for (uint16_t& one : ones) one = 0x3F80;  // 1 as bfloat16
    keep_stores(&config);
    _tile_loadconfig(&config);
    keep_stores(ones);
    _tile_loadd(6, ones, kRowBytes);
    _tile_loadd(7, ones, kRowBytes);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    for (int64_t i = 0; i < kPeakIterations; ++i) {
        _tile_dpbf16ps(0, 6, 7);
        _tile_dpbf16ps(1, 6, 7);
        _tile_dpbf16ps(2, 6, 7);
        _tile_dpbf16ps(3, 6, 7);
        _tile_dpbf16ps(4, 6, 7);
        _tile_dpbf16ps(5, 6, 7);
    }
    constexpr size_t kElements = kRows * kRowBytes / sizeof(float);
    alignas(64) float sums[kAccumulators * kElements];
    _tile_stored(0, sums, kRowBytes);
    _tile_stored(1, sums + kElements, kRowBytes);
    _tile_stored(2, sums + 2 * kElements, kRowBytes);
    _tile_stored(3, sums + 3 * kElements, kRowBytes);
    _tile_stored(4, sums + 4 * kElements, kRowBytes);
    _tile_stored(5, sums + 5 * kElements, kRowBytes);
    _tile_release();
    double total = 0;
    for (float sum : sums) total += sum;
    return total;
}

}  // namespace

constinit const PeakProbe kPeakAmxBf16 = {"amx_bf16", Isa::amx, 2.0 * kProducts * kAccumulators * kPeakIterations,
                                          peak_bf16};

}  // namespace fourfold
