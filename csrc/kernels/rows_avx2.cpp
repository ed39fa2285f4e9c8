// Everything that is not a matrix, avx2: the dialect of this file's flags.
#include "kernels/dialect.h"
#include "kernels/linear_rows.h"

namespace fourfold {
namespace {
#include "kernels/attention.inl"
#include "kernels/numbers.inl"
#include "kernels/rowwise.inl"

constexpr AttendKernel kAttend[] = {
    attend_row("attend_bf16_avx2", Isa::avx2, KvFormat::bf16),
    attend_row("attend_int8_avx2", Isa::avx2, KvFormat::int8),
    attend_row("attend_f32_avx2", Isa::avx2, KvFormat::f32),
};

}  // namespace

std::span<const AttendKernel> attend_rows_avx2() { return kAttend; }

extern const RowKernels kRowsAvx2 = {Isa::avx2, rms_factor, scale_row, rope, silu_mul,   gelu_tanh_mul, add_parts,
                                     merge,     kv_store,   kv_clear,  pack, unpack_row, widen,         narrow};

}  // namespace fourfold
