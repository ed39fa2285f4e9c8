// Attention over tiles in ordinary memory: never selected (m_max is 0), only called by name. The algorithm is
// attention_amx.inl.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "kernels/decode_avx512.h"
#include "kernels/linear_rows.h"
#include "kernels/tiles_emulated.h"

namespace fourfold {
namespace {

#include "kernels/attention_amx.inl"

constexpr AttendKernel kAttend[] = {
    {"attend_bf16_amx_emulated", Isa::avx512, KvFormat::bf16, 1, 0, attend_tiles<KvFormat::bf16>, 0x1p-8f},
    {"attend_int8_amx_emulated", Isa::avx512, KvFormat::int8, 1, 0, attend_tiles<KvFormat::int8>, 0x1p-8f},
};

}  // namespace

std::span<const AttendKernel> attend_rows_amx_emulated() { return kAttend; }

}  // namespace fourfold
