// Everything that is not a matrix, avx512_vnni: the dialect of this file's flags.
#include "kernels/dialect.h"
#include "kernels/linear_rows.h"

namespace fourfold {
namespace {
#include "kernels/attention.inl"
#include "kernels/numbers.inl"
#include "kernels/rowwise.inl"

constexpr AttendKernel kAttend[] = {
    attend_row("attend_bf16_avx512_vnni", Isa::avx512_vnni, KvFormat::bf16),
    attend_row("attend_int8_avx512_vnni", Isa::avx512_vnni, KvFormat::int8),
    attend_row("attend_f32_avx512_vnni", Isa::avx512_vnni, KvFormat::f32),
};

}  // namespace

std::span<const AttendKernel> attend_rows_avx512_vnni() { return kAttend; }

extern const RowKernels kRowsAvx512Vnni = {
    Isa::avx512_vnni, rms_factor, scale_row, rope,       silu_mul, gelu_tanh_mul, add_parts, merge,
    kv_store,         kv_clear,   pack,      unpack_row, widen,    narrow};

}  // namespace fourfold
