// Placing: codes that a checkpoint brings with it, into panels of tiles (format.h). The codes stay, and so do zero
// points; the scales of their blocks, float32 there, become a float32 a panel and an E4M3 byte a block as
// docs/format.md section 4 states.
#pragma once
#include <cstddef>
#include <cstdint>

#include "format.h"
#include "pack.h"

namespace fourfold {

// A matrix (n, k) of a scaled format, k a multiple of 64: value = scale of its block * (codebook[code] - zero point).
struct PlaceArgs {
    const uint8_t* codes;       // (n, k): below 16; of int8 the bytes of -127..127
    const float* block_scales;  // (n, k / 64): finite, of either sign
    const int8_t* zeros;        // (n, k / 64): zero points; null where the format has none
    size_t n, k;
    Format format;
    uint8_t* panels;      // panels_of(n) panels of panel_bytes(format, k / 64)
    float* panel_scales;  // (panels_of(n))
};

// Writes the panels; the sums are over the values that codes and block scales stand for. Throws std::invalid_argument
// for a code that the format does not have, and for a scale that is not finite.
PackSums place(const PlaceArgs& args);

}  // namespace fourfold
