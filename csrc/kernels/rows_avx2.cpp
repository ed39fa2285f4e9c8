// Everything that is not a matrix, avx2: the dialect of this file's flags.
#include "kernels/dialect.h"
#include "kernels/linear_rows.h"

namespace fourfold {
namespace {
#include "kernels/attention.inl"
#include "kernels/numbers.inl"
#include "kernels/rowwise.inl"
}  // namespace

extern const RowKernels kRowsAvx2 = {Isa::avx2,     rms_factor, scale_row,  rope,  silu_mul,
                                     gelu_tanh_mul, add_parts,  attend,     merge, kv_store,
                                     kv_clear,      pack,       unpack_row, widen, narrow};

}  // namespace fourfold
