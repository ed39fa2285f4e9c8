// Everything that is not a matrix, scalar: the dialect of this file's flags.
#include "kernels/dialect.h"
#include "kernels/linear_rows.h"

namespace fourfold {
namespace {
#include "kernels/attention.inl"
#include "kernels/numbers.inl"
#include "kernels/rowwise.inl"

constexpr AttendKernel kAttend[] = {
    attend_row("attend_bf16_scalar", Isa::scalar, KvFormat::bf16),
    attend_row("attend_int8_scalar", Isa::scalar, KvFormat::int8),
    attend_row("attend_f32_scalar", Isa::scalar, KvFormat::f32),
};

}  // namespace

std::span<const AttendKernel> attend_rows_scalar() { return kAttend; }

extern const RowKernels kRowsScalar = {Isa::scalar, rms_factor, scale_row, rope, silu_mul,   gelu_tanh_mul, add_parts,
                                       merge,       kv_store,   kv_clear,  pack, unpack_row, widen,         narrow};

}  // namespace fourfold
