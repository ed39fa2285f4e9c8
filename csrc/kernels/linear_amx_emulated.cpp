// The AMX kernels over tiles kept in ordinary memory: the same algorithm and data layout, testable on any AVX-512
// machine. Never selected (m_max is 0), only called by name.
#include <algorithm>
#include <cstring>
#include <span>
#include <utility>

#include "kernels/bytes_avx512.h"
#include "kernels/linear_rows.h"
#include "kernels/tiles_emulated.h"

namespace fourfold {
namespace {

#include "kernels/linear_amx.inl"
#include "kernels/linear_amx_i16.inl"

constexpr float kBf16 = 0x1p-8f;

template <Format F>
constexpr LinearKernel i16_row(std::string_view name) {
    return {name, Isa::avx512, F, Activation::i16, 1, 0, linear_i16<F>, 0, byte_error(F), 0, 0.5f / 32512};
}
template <Format F>
constexpr LinearKernel bf16_row(std::string_view name) {
    return {name, Isa::avx512, F, Activation::bf16, 1, 0, linear<F>, F == Format::bf16 ? 0 : kBf16, 0, kBf16, 0};
}
constexpr LinearKernel kRows[] = {
    i16_row<Format::nf4>("linear_nf4_i16_amx_emulated"),
    i16_row<Format::int4>("linear_int4_i16_amx_emulated"),
    i16_row<Format::fp4>("linear_fp4_i16_amx_emulated"),
    i16_row<Format::fp4_bnb>("linear_fp4_bnb_i16_amx_emulated"),
    i16_row<Format::uint4>("linear_uint4_i16_amx_emulated"),
    i16_row<Format::int8>("linear_int8_i16_amx_emulated"),
    bf16_row<Format::nf4>("linear_nf4_bf16_amx_emulated"),
    bf16_row<Format::int4>("linear_int4_bf16_amx_emulated"),
    bf16_row<Format::fp4>("linear_fp4_bf16_amx_emulated"),
    bf16_row<Format::fp4_bnb>("linear_fp4_bnb_bf16_amx_emulated"),
    bf16_row<Format::uint4>("linear_uint4_bf16_amx_emulated"),
    bf16_row<Format::int8>("linear_int8_bf16_amx_emulated"),
    bf16_row<Format::bf16>("linear_bf16_bf16_amx_emulated"),
};

}  // namespace

std::span<const LinearKernel> linear_rows_amx_emulated() { return kRows; }

}  // namespace fourfold
