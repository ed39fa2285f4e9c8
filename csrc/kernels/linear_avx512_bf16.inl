// linear, AVX-512 BF16, many tokens where there is no AMX; included after decode_avx512.h.
//
//   blocks     a panel's codes become bf16 tiles for 512 inputs at a time (16 KB of scratch, L1), and multiply every
//              row of x before the next: decoding is paid once for all M
//   registers  16 rows x 16 outputs of sums, one vector of 16 weight pairs; x pairs are broadcast from memory
//   bound      by vdpbf16ps: 16 a weight vector, one load of weights and 16 broadcasts beside them
//   accuracy   x and w rounded to bfloat16 (2^-8 each), sums in float32

namespace of_bf16 {

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

}  // namespace of_bf16

template <Format F>
constexpr LinearKernel bf16_row(std::string_view name, Isa isa) {
    // Half a unit in the last place of 8 significant bits, relative, twice for double rounding.
    constexpr float kHalf = 0x1p-8f, kOfWeights = F == Format::bf16 ? 0 : kHalf;
    return {name, isa, F, Activation::bf16, 1, SIZE_MAX, of_bf16::linear<F>, kOfWeights, 0, kHalf, 0};
}
