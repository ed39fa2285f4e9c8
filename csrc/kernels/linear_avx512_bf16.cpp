// linear, AVX-512 BF16, many tokens: where there is no AMX, and the table's AVX-512 rows.
//
//   blocks     a panel's codes become bf16 tiles for 512 inputs at a time (16 KB of scratch, L1), and multiply every
//              row of x before the next: decoding is paid once for all M
//   registers  16 rows x 16 outputs of sums, one vector of 16 weight pairs; x pairs are broadcast from memory
//   bound      by vdpbf16ps: 16 a weight vector, one load of weights and 16 broadcasts beside them
//   accuracy   x and w rounded to bfloat16 (2^-8 each), sums in float32
#include <algorithm>
#include <utility>

#include "kernels/decode_avx512.h"
#include "kernels/linear_rows.h"

namespace fourfold {
namespace {

constexpr size_t kBlockTiles = 8;  // 512 inputs

// Tiles [t0, t1) of a panel as bf16 tiles; bf16 weights are used where they lie.
template <Format F>
const uint8_t* panel_to_bf16(const uint8_t* panel, float panel_scale, size_t k_tiles, size_t t0, size_t t1,
                             uint8_t* scratch) {
    if constexpr (F == Format::bf16) {
        return panel + code_offset(F, t0, k_tiles);
    } else {
        for (size_t t = t0; t < t1; ++t) {
            const TileUnits units = tile_units<F>(panel + scale_offset(F, t), panel_scale);
            for (size_t g = 0; g < 8; ++g)
                group_to_bf16<F>(panel + code_offset(F, t, k_tiles), units, g,
                                 scratch + (t - t0) * code_bytes(Format::bf16));
        }
        return scratch;
    }
}

// y[r][n] (+)= over the tiles of a block; x is A tiles of this 16-row band, w bf16 tiles. Only `rows` rows are stored.
void multiply(const uint8_t* x, const uint8_t* w, size_t tiles, float* y, size_t y_stride, size_t rows, bool first) {
    __m512 sums[16];
    for (size_t r = 0; r < 16; ++r)
        sums[r] = first || r >= rows ? _mm512_setzero_ps() : _mm512_loadu_ps(y + r * y_stride);
    for (size_t chunk = 0; chunk < 2 * tiles; ++chunk, x += 1024, w += 1024)
        for (size_t pair = 0; pair < 16; ++pair) {
            const auto b = reinterpret_cast<__m512bh>(load64(w + pair * 64));
            for (size_t r = 0; r < 16; ++r) {
                int32_t bits;
                std::memcpy(&bits, x + r * 64 + pair * 4, 4);
                sums[r] = _mm512_dpbf16_ps(sums[r], reinterpret_cast<__m512bh>(_mm512_set1_epi32(bits)), b);
            }
        }
    for (size_t r = 0; r < rows; ++r) _mm512_storeu_ps(y + r * y_stride, sums[r]);
}

template <Format F>
void linear(const LinearArgs& a) {
    for (size_t t0 = 0; t0 < a.k_tiles; t0 += kBlockTiles) {
        const size_t t1 = std::min(t0 + kBlockTiles, a.k_tiles);
        for (size_t p = 0; p < a.n_panels; ++p) {
            const uint8_t* w = panel_to_bf16<F>(a.panels + p * panel_bytes(F, a.k_tiles),
                                                has_scales(F) ? a.panel_scales[p] : 1.0f, a.k_tiles, t0, t1, a.scratch);
            for (size_t m = 0; m < a.m; m += 16)
                multiply(a.x + m / 16 * kBf16Bands.bytes(a.k_tiles) + t0 * 2048, w, t1 - t0,
                         a.y + m * a.y_stride + p * kTileN, a.y_stride, std::min<size_t>(16, a.m - m), t0 == 0);
        }
    }
}

}  // namespace

template <Format F>
void linear_f32_avx512(const LinearArgs&);
template <Format F>
void linear_i16_avx512(const LinearArgs&);
template <Format F>
void linear_u8_avx512(const LinearArgs&);

namespace {

constexpr float kBf16 =
    0x1p-8f;  // half a unit in the last place of 8 significant bits, relative, twice for double rounding

template <Format F>
constexpr LinearKernel f32_row(std::string_view name, size_t m_max) {
    return {name, Isa::avx512, F, Activation::f32, 1, m_max, linear_f32_avx512<F>, 0, 0, 0, 0};
}
template <Format F>
constexpr LinearKernel i16_row(std::string_view name, float codebook_error, size_t m_max) {
    return {name, Isa::avx512, F, Activation::i16, 1, m_max, linear_i16_avx512<F>, 0, codebook_error, 0, 0.5f / 32512};
}
template <Format F>
constexpr LinearKernel u8_row(std::string_view name, float codebook_error) {
    // Half a step is at most a 255th of the block's largest.
    return {name, Isa::avx512, F, Activation::u8, 1, SIZE_MAX, linear_u8_avx512<F>, 0, codebook_error, 0, 1.0f / 255};
}
template <Format F>
constexpr LinearKernel bf16_row(std::string_view name) {
    return {name, Isa::avx512, F, Activation::bf16, 1, SIZE_MAX, linear<F>, F == Format::bf16 ? 0 : kBf16, 0, kBf16, 0};
}
constexpr float kNf4Bytes = 0.5f / 112.05f, kFp4BnbBytes = 0.375f / 120;  // what codebooks lose as bytes, of the scale
// Tokens up to which these rows are the faster ones: i16 pays its decoding every 8 tokens but rounds less and needs no
// scratch; bf16 weights have nothing to decode, and float32 sums half as many a cycle.
constexpr size_t kFew4bit = 12, kFewInt8 = 32, kFewBf16 = 8;

constexpr LinearKernel kRows[] = {
    i16_row<Format::nf4>("linear_nf4_i16_avx512", kNf4Bytes, kFew4bit),
    i16_row<Format::int4>("linear_int4_i16_avx512", 0, kFew4bit),
    i16_row<Format::fp4>("linear_fp4_i16_avx512", 0, kFew4bit),
    i16_row<Format::fp4_bnb>("linear_fp4_bnb_i16_avx512", kFp4BnbBytes, kFew4bit),
    i16_row<Format::uint4>("linear_uint4_i16_avx512", 0, kFew4bit),
    i16_row<Format::int8>("linear_int8_i16_avx512", 0, kFewInt8),
    f32_row<Format::bf16>("linear_bf16_f32_avx512", kFewBf16),
    f32_row<Format::f32>("linear_f32_f32_avx512", SIZE_MAX),
    u8_row<Format::nf4>("linear_nf4_u8_avx512", kNf4Bytes),
    u8_row<Format::int4>("linear_int4_u8_avx512", 0),
    u8_row<Format::fp4>("linear_fp4_u8_avx512", 0),
    u8_row<Format::fp4_bnb>("linear_fp4_bnb_u8_avx512", kFp4BnbBytes),
    u8_row<Format::uint4>("linear_uint4_u8_avx512", 0),
    bf16_row<Format::int8>("linear_int8_bf16_avx512"),  // which loses less than bytes of activations would
    bf16_row<Format::bf16>("linear_bf16_bf16_avx512"),
    // The more exact rows of the scaled formats, chosen by name.
    bf16_row<Format::nf4>("linear_nf4_bf16_avx512"),
    bf16_row<Format::int4>("linear_int4_bf16_avx512"),
    bf16_row<Format::fp4>("linear_fp4_bf16_avx512"),
    bf16_row<Format::fp4_bnb>("linear_fp4_bnb_bf16_avx512"),
    bf16_row<Format::uint4>("linear_uint4_bf16_avx512"),
    f32_row<Format::nf4>("linear_nf4_f32_avx512", SIZE_MAX),
    f32_row<Format::int4>("linear_int4_f32_avx512", SIZE_MAX),
    f32_row<Format::fp4>("linear_fp4_f32_avx512", SIZE_MAX),
    f32_row<Format::fp4_bnb>("linear_fp4_bnb_f32_avx512", SIZE_MAX),
    f32_row<Format::uint4>("linear_uint4_f32_avx512", SIZE_MAX),
    f32_row<Format::int8>("linear_int8_f32_avx512", SIZE_MAX),
};

}  // namespace

std::span<const LinearKernel> linear_rows_avx512() { return kRows; }

}  // namespace fourfold
