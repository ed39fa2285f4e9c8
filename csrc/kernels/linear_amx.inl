// linear, AMX BF16, many tokens; included once over the tile unit and once over its emulation (namespace TILES).
//
//   tiles      0-3 sums (2 x 2: 32 tokens x 32 outputs), 4-5 x (16 tokens x 32 inputs), 6-7 w (32 inputs x 16 outputs)
//   blocks     two panels' codes become bf16 tiles for 512 inputs at a time (32 KB of scratch), and multiply every
//   token
//              before the next two: decoding is paid once for all M, the x block (M x 512 bf16) stays in the L2 cache
//   reuse      each loaded tile takes part in 2 products, so 4 loads for 4 products
//   bound      by tdpbf16ps, 16 cycles a product of 16 x 16 x 32; a block adds 8 tile moves of sums to its 64 products
//   accuracy   x and w rounded to bfloat16 (2^-9 each), sums in float32, subnormals as zero
//
// Rows of y beyond M are never touched: the last band's sums go through scratch.

constexpr size_t kBlockTiles = 8;  // 512 inputs
constexpr size_t kTileBytes = 1024;

struct Band {  // 16 tokens
    const uint8_t* x;
    float* y;
    size_t y_stride, rows;  // floats
};

// Moves 16 x 16 sums between a tile and y; a band with fewer rows goes through `spill` (1 KB).
template <int TILE>
inline void load_sums(const Band& band, size_t column, bool first, float* spill) {
    if (first) return tile_zero<TILE>();
    if (band.rows == 16) return tile_load<TILE>(band.y + column, band.y_stride * sizeof(float));
    for (size_t r = 0; r < band.rows; ++r) std::memcpy(spill + r * 16, band.y + r * band.y_stride + column, 64);
    tile_load<TILE>(spill, 64);
}
template <int TILE>
inline void store_sums(const Band& band, size_t column, float* spill) {
    if (band.rows == 16) return tile_store<TILE>(band.y + column, band.y_stride * sizeof(float));
    tile_store<TILE>(spill, 64);
    for (size_t r = 0; r < band.rows; ++r) std::memcpy(band.y + r * band.y_stride + column, spill + r * 16, 64);
}

// BANDS x PANELS bands of sums; w0, w1 are the bf16 tiles of two panels.
template <size_t BANDS, size_t PANELS>
inline void multiply(const Band* bands, const uint8_t* w0, const uint8_t* w1, size_t chunks, size_t column, bool first,
                     float* spill) {
    load_sums<0>(bands[0], column, first, spill);
    if constexpr (PANELS == 2) load_sums<1>(bands[0], column + 16, first, spill);
    if constexpr (BANDS == 2) load_sums<2>(bands[1], column, first, spill);
    if constexpr (BANDS == 2 && PANELS == 2) load_sums<3>(bands[1], column + 16, first, spill);
    for (size_t c = 0; c < chunks; ++c) {
        tile_load<6>(w0 + c * kTileBytes, 64);
        tile_load<4>(bands[0].x + c * kTileBytes, 64);
        tile_dot<0, 4, 6>();
        if constexpr (PANELS == 2) {
            tile_load<7>(w1 + c * kTileBytes, 64);
            tile_dot<1, 4, 7>();
        }
        if constexpr (BANDS == 2) {
            tile_load<5>(bands[1].x + c * kTileBytes, 64);
            tile_dot<2, 5, 6>();
            if constexpr (PANELS == 2) tile_dot<3, 5, 7>();
        }
    }
    store_sums<0>(bands[0], column, spill);
    if constexpr (PANELS == 2) store_sums<1>(bands[0], column + 16, spill);
    if constexpr (BANDS == 2) store_sums<2>(bands[1], column, spill);
    if constexpr (BANDS == 2 && PANELS == 2) store_sums<3>(bands[1], column + 16, spill);
}

template <Format F>
void linear(const LinearArgs& a) {
    const size_t band_bytes = a.k_tiles * 2 * kTileBytes, stride = panel_bytes(F, a.k_tiles);
    uint8_t* const decoded[2] = {a.scratch, a.scratch + kBlockTiles * 2 * kTileBytes};
    auto* spill = reinterpret_cast<float*>(a.scratch + 2 * kBlockTiles * 2 * kTileBytes);
    configure_tiles();
    for (size_t t0 = 0; t0 < a.k_tiles; t0 += kBlockTiles) {
        const size_t t1 = std::min(t0 + kBlockTiles, a.k_tiles), chunks = 2 * (t1 - t0);
        for (size_t p = 0; p < a.n_panels; p += 2) {
            const bool two = p + 1 < a.n_panels;
            const uint8_t* w[2] = {nullptr, nullptr};
            for (size_t i = 0; i < (two ? 2 : 1); ++i)
                w[i] = panel_to_bf16<F>(a.panels + (p + i) * stride, has_scales(F) ? a.panel_scales[p + i] : 1.0f,
                                        a.k_tiles, t0, t1, decoded[i]);
            for (size_t m = 0; m < a.m; m += 32) {
                Band bands[2];
                for (size_t b = 0; b < 2; ++b) {
                    const size_t row = m + 16 * b;
                    if (row < a.m)
                        bands[b] = {a.x + row / 16 * band_bytes + t0 * 2 * kTileBytes, a.y + row * a.y_stride,
                                    a.y_stride, std::min<size_t>(16, a.m - row)};
                }
                const bool both = m + 16 < a.m;
                const auto block =
                    both ? (two ? multiply<2, 2> : multiply<2, 1>) : (two ? multiply<1, 2> : multiply<1, 1>);
                block(bands, w[0], w[1], chunks, p * kTileN, t0 == 0, spill);
            }
        }
    }
    release_tiles();
}
