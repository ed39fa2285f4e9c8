// linear, AVX-512 with VNNI alone. The algorithms are linear_avx512_*.inl.
#include <algorithm>
#include <utility>

#include "kernels/bytes_avx512.h"
#include "kernels/linear_rows.h"

namespace fourfold {
namespace {

#include "kernels/linear_avx512_f32.inl"
#include "kernels/linear_avx512_i16.inl"
#include "kernels/linear_avx512_u8.inl"

// Tokens up to which i16 is the faster one: linear_avx512.cpp.
constexpr size_t kFew = 12;

constexpr Isa kIsa = Isa::avx512_vnni;
constexpr LinearKernel kRows[] = {
    i16_row<Format::nf4>("linear_nf4_i16_avx512_vnni", kIsa, kFew),
    i16_row<Format::int4>("linear_int4_i16_avx512_vnni", kIsa, kFew),
    i16_row<Format::fp4>("linear_fp4_i16_avx512_vnni", kIsa, kFew),
    i16_row<Format::fp4_bnb>("linear_fp4_bnb_i16_avx512_vnni", kIsa, kFew),
    i16_row<Format::uint4>("linear_uint4_i16_avx512_vnni", kIsa, kFew),
    i16_row<Format::int8>("linear_int8_i16_avx512_vnni", kIsa, SIZE_MAX),  // bytes of activations would lose more
    f32_row<Format::bf16>("linear_bf16_f32_avx512_vnni", kIsa, SIZE_MAX),
    f32_row<Format::f32>("linear_f32_f32_avx512_vnni", kIsa, SIZE_MAX),
    u8_row<Format::nf4>("linear_nf4_u8_avx512_vnni", kIsa),
    u8_row<Format::int4>("linear_int4_u8_avx512_vnni", kIsa),
    u8_row<Format::fp4>("linear_fp4_u8_avx512_vnni", kIsa),
    u8_row<Format::fp4_bnb>("linear_fp4_bnb_u8_avx512_vnni", kIsa),
    u8_row<Format::uint4>("linear_uint4_u8_avx512_vnni", kIsa),
    // The more exact rows of the scaled formats, chosen by name.
    f32_row<Format::nf4>("linear_nf4_f32_avx512_vnni", kIsa, SIZE_MAX),
    f32_row<Format::int4>("linear_int4_f32_avx512_vnni", kIsa, SIZE_MAX),
    f32_row<Format::fp4>("linear_fp4_f32_avx512_vnni", kIsa, SIZE_MAX),
    f32_row<Format::fp4_bnb>("linear_fp4_bnb_f32_avx512_vnni", kIsa, SIZE_MAX),
    f32_row<Format::uint4>("linear_uint4_f32_avx512_vnni", kIsa, SIZE_MAX),
    f32_row<Format::int8>("linear_int8_f32_avx512_vnni", kIsa, SIZE_MAX),
};

}  // namespace

std::span<const LinearKernel> linear_rows_avx512_vnni() { return kRows; }

}  // namespace fourfold
