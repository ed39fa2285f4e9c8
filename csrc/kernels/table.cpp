// The kernel table: every row, and how one is chosen.
#include <algorithm>
#include <vector>

#include "kernels/linear_rows.h"

namespace fourfold {

size_t packed_bytes(Activation a, size_t m, size_t k_tiles) {
    switch (a) {
        case Activation::f32:
            return m * k_tiles * kTileK * sizeof(float);
        case Activation::i16:
            return m * I16Row::bytes(k_tiles);
        case Activation::bf16:
            return (m + 15) / 16 * 16 * k_tiles * kTileK * sizeof(uint16_t);
    }
    return 0;
}

std::span<const LinearKernel> linear_kernels() {
    static const std::vector<LinearKernel> rows = [] {
        std::vector<LinearKernel> all;
        for (auto file : {linear_rows_amx(), linear_rows_avx512(), linear_rows_avx2(), linear_rows_scalar(),
                          linear_rows_amx_emulated()})
            all.insert(all.end(), file.begin(), file.end());
        return all;
    }();
    return rows;
}

const LinearKernel& choose_linear(Isa isa, Format format, size_t m) {
    const auto rows = linear_kernels();
    return *std::find_if(rows.begin(), rows.end(), [&](const LinearKernel& row) {
        return row.isa <= isa && row.format == format && row.m_min <= m && m <= row.m_max;
    });  // the scalar rows take every format and M, so there always is one
}

const LinearKernel& choose_linear(Isa isa, Format format, size_t m, RowClass row_class) {
    if (row_class == RowClass::few) m = std::min(m, kFewRows);
    if (row_class == RowClass::many) m = std::max(m, kManyRows);
    return choose_linear(isa, format, m);
}

const LinearKernel* find_linear(std::string_view name) {
    for (const LinearKernel& row : linear_kernels())
        if (row.name == name) return &row;
    return nullptr;
}

const RowKernels& row_kernels(Isa isa) {
    return isa >= Isa::avx512 ? kRowsAvx512 : isa == Isa::avx2 ? kRowsAvx2 : kRowsScalar;
}

}  // namespace fourfold
