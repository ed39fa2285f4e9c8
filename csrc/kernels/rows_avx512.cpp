// Everything that is not a matrix, avx512: the dialect of this file's flags.
#include "kernels/dialect.h"
#include "kernels/linear_rows.h"

namespace fourfold {
namespace {
#include "kernels/attention.inl"
#include "kernels/numbers.inl"
#include "kernels/rowwise.inl"

constexpr AttendKernel kAttend[] = {
    attend_row("attend_bf16_avx512", Isa::avx512, KvFormat::bf16),
    attend_row("attend_int8_avx512", Isa::avx512, KvFormat::int8),
    attend_row("attend_f32_avx512", Isa::avx512, KvFormat::f32),
};

}  // namespace

std::span<const AttendKernel> attend_rows_avx512() { return kAttend; }

extern const RowKernels kRowsAvx512 = {Isa::avx512, rms_factor, scale_row, rope, silu_mul,   gelu_tanh_mul, add_parts,
                                       merge,       kv_store,   kv_clear,  pack, unpack_row, widen,         narrow};

}  // namespace fourfold
