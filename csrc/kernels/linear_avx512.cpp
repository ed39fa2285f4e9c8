// linear, AVX-512 with VBMI and BF16. The algorithms are linear_avx512_*.inl.
#include <algorithm>
#include <utility>

#include "kernels/bytes_avx512.h"
#include "kernels/linear_rows.h"

namespace fourfold {
namespace {

#include "kernels/linear_avx512_bf16.inl"
#include "kernels/linear_avx512_f32.inl"
#include "kernels/linear_avx512_i16.inl"
#include "kernels/linear_avx512_u8.inl"

// Tokens up to which these rows are the faster ones: i16 pays its decoding every 8 tokens but rounds less and needs no
// scratch; bf16 weights have nothing to decode, and float32 sums half as many a cycle.
constexpr size_t kFew4bit = 12, kFewInt8 = 32, kFewBf16 = 8;

constexpr Isa kIsa = Isa::avx512;
constexpr LinearKernel kRows[] = {
    i16_row<Format::nf4>("linear_nf4_i16_avx512", kIsa, kFew4bit),
    i16_row<Format::int4>("linear_int4_i16_avx512", kIsa, kFew4bit),
    i16_row<Format::fp4>("linear_fp4_i16_avx512", kIsa, kFew4bit),
    i16_row<Format::fp4_bnb>("linear_fp4_bnb_i16_avx512", kIsa, kFew4bit),
    i16_row<Format::uint4>("linear_uint4_i16_avx512", kIsa, kFew4bit),
    i16_row<Format::int8>("linear_int8_i16_avx512", kIsa, kFewInt8),
    f32_row<Format::bf16>("linear_bf16_f32_avx512", kIsa, kFewBf16),
    f32_row<Format::f32>("linear_f32_f32_avx512", kIsa, SIZE_MAX),
    u8_row<Format::nf4>("linear_nf4_u8_avx512", kIsa),
    u8_row<Format::int4>("linear_int4_u8_avx512", kIsa),
    u8_row<Format::fp4>("linear_fp4_u8_avx512", kIsa),
    u8_row<Format::fp4_bnb>("linear_fp4_bnb_u8_avx512", kIsa),
    u8_row<Format::uint4>("linear_uint4_u8_avx512", kIsa),
    bf16_row<Format::int8>("linear_int8_bf16_avx512", kIsa),  // which loses less than bytes of activations would
    bf16_row<Format::bf16>("linear_bf16_bf16_avx512", kIsa),
    // The more exact rows of the scaled formats, chosen by name.
    bf16_row<Format::nf4>("linear_nf4_bf16_avx512", kIsa),
    bf16_row<Format::int4>("linear_int4_bf16_avx512", kIsa),
    bf16_row<Format::fp4>("linear_fp4_bf16_avx512", kIsa),
    bf16_row<Format::fp4_bnb>("linear_fp4_bnb_bf16_avx512", kIsa),
    bf16_row<Format::uint4>("linear_uint4_bf16_avx512", kIsa),
    f32_row<Format::nf4>("linear_nf4_f32_avx512", kIsa, SIZE_MAX),
    f32_row<Format::int4>("linear_int4_f32_avx512", kIsa, SIZE_MAX),
    f32_row<Format::fp4>("linear_fp4_f32_avx512", kIsa, SIZE_MAX),
    f32_row<Format::fp4_bnb>("linear_fp4_bnb_f32_avx512", kIsa, SIZE_MAX),
    f32_row<Format::uint4>("linear_uint4_f32_avx512", kIsa, SIZE_MAX),
    f32_row<Format::int8>("linear_int8_f32_avx512", kIsa, SIZE_MAX),
};

}  // namespace

std::span<const LinearKernel> linear_rows_avx512() { return kRows; }

}  // namespace fourfold
