// C (16 x 16, float32) += A (16 rows of 32 bfloat16) * B (16 rows of 16 pairs): 16 cycles a product, about 52 until its
// sum may be added to, so at least 4 accumulators. Tiles 0-5 accumulate, 6 is A, 7 is B.
#include "kernels/probe.h"
#include "kernels/tiles_amx.h"

namespace fourfold {
namespace {

constexpr int kRows = 16, kRowBytes = 64;  // a whole tile
constexpr int kProducts = 16 * 16 * 32;    // in one tdpbf16ps
constexpr int kAccumulators = 6;

double peak_bf16() {
    alignas(64) uint16_t ones[kRows * kRowBytes / sizeof(uint16_t)];
    for (uint16_t& one : ones) one = 0x3F80;  // 1 as bfloat16
    configure_tiles({kRows, kRows, kRows, kRows, kRows, kRows, kRows, kRows});
    tile_load<6>(ones, kRowBytes);
    tile_load<7>(ones, kRowBytes);
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
    tile_zero<4>();
    tile_zero<5>();
    for (int64_t i = 0; i < kPeakIterations; ++i) {
        tile_dot<0, 6, 7>();
        tile_dot<1, 6, 7>();
        tile_dot<2, 6, 7>();
        tile_dot<3, 6, 7>();
        tile_dot<4, 6, 7>();
        tile_dot<5, 6, 7>();
    }
    constexpr size_t kElements = kRows * kRowBytes / sizeof(float);
    alignas(64) float sums[kAccumulators * kElements];
    tile_store<0>(sums, kRowBytes);
    tile_store<1>(sums + kElements, kRowBytes);
    tile_store<2>(sums + 2 * kElements, kRowBytes);
    tile_store<3>(sums + 3 * kElements, kRowBytes);
    tile_store<4>(sums + 4 * kElements, kRowBytes);
    tile_store<5>(sums + 5 * kElements, kRowBytes);
    release_tiles();
    double total = 0;
    for (float sum : sums) total += sum;
    return total;
}

}  // namespace

constinit const PeakProbe kPeakAmxBf16 = {"amx_bf16", Isa::amx, 2.0 * kProducts * kAccumulators * kPeakIterations,
                                          peak_bf16};

}  // namespace fourfold
