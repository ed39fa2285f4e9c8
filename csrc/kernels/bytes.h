// Codebooks as bytes, for the kernels that multiply integers.
#pragma once
#include "format.h"

namespace fourfold {
namespace {

// Bytes a unit of the codebook: where 16 rounded values lie closest to the true ones (NF4: rms 0.0017 against 0.0036 at
// the worst factor between 90 and 127); exact for int4, uint4 and fp4, and for fp4_bnb but for its least, which is
// 0.625 units.
constexpr float units(Format f) {
    switch (f) {
        case Format::nf4:
            return 112.05f;
        case Format::int4:
            return 112.0f;
        case Format::fp4:
            return 108.0f;
        case Format::fp4_bnb:
            return 120.0f;
        case Format::uint4:
            return 1.0f;
        default:
            return 127.0f;
    }
}

// The furthest that a codebook's bytes are from it, of the scale.
constexpr float byte_error(Format f) {
    return f == Format::nf4 ? 0.5f / units(f) : f == Format::fp4_bnb ? 0.375f / units(f) : 0.0f;
}

// The bytes round(units * codebook) + 128 of the 16 codes (uint4's are not signed: they stay as they are), four times
// over.
template <Format F>
alignas(64) constexpr auto kCodeBytes = [] {
    std::array<uint8_t, 64> table{};
    for (size_t i = 0; is_4bit(F) && i < 64; ++i)
        table[i] = static_cast<uint8_t>(codebook(F)[i % 16] * units(F) + (has_zeros(F) ? 0.0f : 128.0f) + 0.5f);
    return table;
}();

// Bytes of codes that 8 inputs take.
template <Format F>
constexpr size_t kGroupBytes = code_bytes(F) / 8;

}  // namespace
}  // namespace fourfold
