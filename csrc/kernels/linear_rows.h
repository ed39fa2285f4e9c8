// The tables' rows, by file; table.cpp joins them.
#pragma once
#include "kernels/kernels.h"

namespace fourfold {

std::span<const LinearKernel> linear_rows_scalar();
std::span<const LinearKernel> linear_rows_avx2();
std::span<const LinearKernel> linear_rows_avx512_vnni();
std::span<const LinearKernel> linear_rows_avx512();
std::span<const LinearKernel> linear_rows_amx();
std::span<const LinearKernel> linear_rows_amx_emulated();

std::span<const AttendKernel> attend_rows_scalar();
std::span<const AttendKernel> attend_rows_avx2();
std::span<const AttendKernel> attend_rows_avx512_vnni();
std::span<const AttendKernel> attend_rows_avx512();
std::span<const AttendKernel> attend_rows_amx();
std::span<const AttendKernel> attend_rows_amx_emulated();

extern const RowKernels kRowsScalar, kRowsAvx2, kRowsAvx512Vnni, kRowsAvx512;

}  // namespace fourfold
