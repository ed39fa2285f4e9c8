// The kernel tables: every row, and how one is chosen.
#include <algorithm>
#include <vector>

#include "kernels/linear_rows.h"

namespace fourfold {
namespace {

template <class Row>
std::vector<Row> joined(std::initializer_list<std::span<const Row>> files) {
    std::vector<Row> all;
    for (const auto file : files) all.insert(all.end(), file.begin(), file.end());
    return all;
}

template <class Row, class Format>
const Row& choose(std::span<const Row> rows, Isa isa, Format format, size_t m) {
    return *std::find_if(rows.begin(), rows.end(), [&](const Row& row) {
        return row.isa <= isa && row.format == format && row.m_min <= m && m <= row.m_max;
    });  // the scalar rows take every format and M, so there always is one
}

template <class Row>
const Row* find(std::span<const Row> rows, std::string_view name) {
    const auto found = std::find_if(rows.begin(), rows.end(), [&](const Row& row) { return row.name == name; });
    return found == rows.end() ? nullptr : &*found;
}

// The M by which rows are chosen for M rows of a class.
size_t rows_of_class(size_t m, RowClass row_class) {
    return row_class == RowClass::few    ? std::min(m, kFewRows)
           : row_class == RowClass::many ? std::max(m, kManyRows)
                                         : m;
}

}  // namespace

size_t packed_offset(Activation a, size_t m, size_t k_tiles) {
    if (const Bands* bands = bands_of(a)) return m / bands->rows * bands->bytes(k_tiles);
    return m * (a == Activation::f32 ? k_tiles * kTileK * sizeof(float) : I16Row::bytes(k_tiles));
}

size_t packed_bytes(Activation a, size_t m, size_t k_tiles) {
    const Bands* bands = bands_of(a);
    if (!bands || m == 0) return packed_offset(a, m, k_tiles);
    return packed_offset(a, m - 1, k_tiles) + k_tiles * bands->tile_bytes;
}

std::span<const LinearKernel> linear_kernels() {
    static const auto rows =
        joined<LinearKernel>({linear_rows_amx(), linear_rows_avx512(), linear_rows_avx512_vnni(), linear_rows_avx2(),
                              linear_rows_scalar(), linear_rows_amx_emulated()});
    return rows;
}

const LinearKernel& choose_linear(Isa isa, Format format, size_t m) { return choose(linear_kernels(), isa, format, m); }

const LinearKernel& choose_linear(Isa isa, Format format, size_t m, RowClass row_class) {
    return choose_linear(isa, format, rows_of_class(m, row_class));
}

const LinearKernel* find_linear(std::string_view name) { return find(linear_kernels(), name); }

size_t most_packed_bytes(Format format, size_t m, size_t k_tiles) {
    size_t most = 0;
    for (const LinearKernel& k : linear_kernels())
        if (k.format == format) most = std::max(most, packed_bytes(k.activation, m, k_tiles));
    return most;
}

std::span<const AttendKernel> attend_kernels() {
    static const auto rows =
        joined<AttendKernel>({attend_rows_amx(), attend_rows_avx512(), attend_rows_avx512_vnni(), attend_rows_avx2(),
                              attend_rows_scalar(), attend_rows_amx_emulated()});
    return rows;
}

const AttendKernel& choose_attend(Isa isa, KvFormat format, size_t m, RowClass row_class) {
    return choose(attend_kernels(), isa, format, rows_of_class(m, row_class));
}

const AttendKernel* find_attend(std::string_view name) { return find(attend_kernels(), name); }

const RowKernels& row_kernels(Isa isa) {
    static constexpr const RowKernels* kOf[kIsas] = {&kRowsScalar, &kRowsAvx2, &kRowsAvx512Vnni, &kRowsAvx512,
                                                     &kRowsAvx512};
    return *kOf[static_cast<size_t>(isa)];
}

}  // namespace fourfold
