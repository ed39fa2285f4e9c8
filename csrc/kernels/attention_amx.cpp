// Attention on the AMX tile unit. The algorithm is attention_amx.inl.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "kernels/decode_avx512.h"
#include "kernels/linear_rows.h"
#include "kernels/tiles_amx.h"

namespace fourfold {
namespace {

#include "kernels/attention_amx.inl"

// Rows of a step: fewer are decoding, where reading the pages once is the limit; as the linears', which then take
// tiles.
constexpr size_t kMany = 33;

constexpr AttendKernel kAttend[] = {
    {"attend_bf16_amx", Isa::amx, KvFormat::bf16, kMany, SIZE_MAX, attend_tiles<KvFormat::bf16>, 0x1p-8f},
    {"attend_int8_amx", Isa::amx, KvFormat::int8, kMany, SIZE_MAX, attend_tiles<KvFormat::int8>, 0x1p-8f},
};

}  // namespace

std::span<const AttendKernel> attend_rows_amx() { return kAttend; }

}  // namespace fourfold
