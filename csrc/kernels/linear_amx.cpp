// linear on the AMX tile unit. The algorithms are linear_amx.inl and linear_amx_i16.inl.
#include <algorithm>
#include <cstring>
#include <span>
#include <utility>

#include "kernels/bytes_avx512.h"
#include "kernels/linear_rows.h"
#include "kernels/tiles_amx.h"

namespace fourfold {
namespace {

#include "kernels/linear_amx.inl"
#include "kernels/linear_amx_i16.inl"

constexpr float kBf16 = 0x1p-8f;
// Tokens: from 4 the vector unit's byte products no longer hide behind the memory; from 33 (bf16: 17) rounding the
// weights to bfloat16 once costs less than scaling every tile's sums.
constexpr size_t kFew = 4, kManyScaled = 33, kManyBf16 = 17;

template <Format F>
constexpr LinearKernel i16_row(std::string_view name) {
    return {name, Isa::amx,      F, Activation::i16, kFew, kManyScaled - 1, linear_i16<F>,
            0,    byte_error(F), 0, 0.5f / 32512};
}
template <Format F>
constexpr LinearKernel bf16_row(std::string_view name) {
    const bool is_bf16 = F == Format::bf16;
    return {name,
            Isa::amx,
            F,
            Activation::bf16,
            is_bf16 ? kManyBf16 : kManyScaled,
            SIZE_MAX,
            linear<F>,
            is_bf16 ? 0 : kBf16,
            0,
            kBf16,
            0};
}
constexpr LinearKernel kRows[] = {
    i16_row<Format::nf4>("linear_nf4_i16_amx"),       i16_row<Format::int4>("linear_int4_i16_amx"),
    i16_row<Format::fp4>("linear_fp4_i16_amx"),       i16_row<Format::fp4_bnb>("linear_fp4_bnb_i16_amx"),
    i16_row<Format::uint4>("linear_uint4_i16_amx"),   i16_row<Format::int8>("linear_int8_i16_amx"),
    bf16_row<Format::nf4>("linear_nf4_bf16_amx"),     bf16_row<Format::int4>("linear_int4_bf16_amx"),
    bf16_row<Format::fp4>("linear_fp4_bf16_amx"),     bf16_row<Format::fp4_bnb>("linear_fp4_bnb_bf16_amx"),
    bf16_row<Format::uint4>("linear_uint4_bf16_amx"), bf16_row<Format::int8>("linear_int8_bf16_amx"),
    bf16_row<Format::bf16>("linear_bf16_bf16_amx"),
};

}  // namespace

std::span<const LinearKernel> linear_rows_amx() { return kRows; }

}  // namespace fourfold
