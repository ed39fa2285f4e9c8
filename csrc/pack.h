// Packing: from rows of a checkpoint to panels of tiles (format.h), codes chosen as docs/format.md section 4 states,
// bit for bit the same on every instruction set. Unpacking is the inverse: value = panel scale * block scale *
// (codebook[code] - zero point).
#pragma once
#include <cstddef>
#include <cstdint>
#include <optional>

#include "format.h"
#include "isa.h"

namespace fourfold {

using SourceType = NumberType;

// Rows of a matrix (n, k), one after another, and where their panels go.
struct PackArgs {
    const void* rows;
    SourceType type;
    size_t n, k;
    Format format;
    uint8_t* panels;      // panels_of(n) panels of panel_bytes(format, tiles_of(k))
    float* panel_scales;  // (panels_of(n)); left alone for bf16 and f32
};

// Sums over weights: of (weight - stored value)^2 and of weight^2. Relative RMS error = sqrt(error / reference).
struct PackSums {
    double error = 0, reference = 0;
};

struct PackResult {
    PackSums sums;  // added panel by panel: independent of the number of threads
    std::optional<size_t>
        non_finite_row;  // the first row that holds a NaN or an infinity; the panels are then undefined
};
PackResult pack(const PackArgs& args, Isa isa, size_t n_threads);

// The matrix (n, k) as float32. `panel_scales` may be null for bf16 and f32.
void unpack(Format format, const uint8_t* panels, const float* panel_scales, size_t n, size_t k, float* out);

// The kernels: one panel. `columns` is (64 k_tiles, 16) float32, finite: input k of output n at 16 k + n, zero beyond K
// and N. Writes panel_bytes(format, k_tiles) bytes and, for a scaled format, the panel's scale.
using PackPanelFn = PackSums (*)(Format, const float* columns, size_t k_tiles, uint8_t* panel, float* panel_scale);
PackSums pack_panel_scalar(Format, const float* columns, size_t k_tiles, uint8_t* panel, float* panel_scale);
PackSums pack_panel_avx2(Format, const float* columns, size_t k_tiles, uint8_t* panel, float* panel_scale);
PackSums pack_panel_avx512(Format, const float* columns, size_t k_tiles, uint8_t* panel, float* panel_scale);

}  // namespace fourfold
