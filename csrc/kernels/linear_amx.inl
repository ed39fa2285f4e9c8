// linear, AMX BF16, many tokens; included once over the tile unit and once over its emulation.
//
//   tiles      0-3 sums (2 x 2: 32 tokens x 32 outputs), 4-5 x (16 tokens x 32 inputs), 6-7 w (32 inputs x 16 outputs)
//   blocks     512 tokens x 256 outputs of sums (512 KB) take all inputs, 512 at a time: their x (512 KB) and the sums
//              stay in the L2 cache while the block's weights pass, two panels at a time (32 KB of bf16 tiles)
//   decoding   between the products: as a pair of panels is multiplied, the codes of the next become tiles, a group of
//              8 inputs at a time; paid once for 512 tokens
//   reuse      each loaded tile takes part in 2 products; x is loaded past the L1 cache, which is w's
//   bound      by tdpbf16ps, 16 cycles a product of 16 x 16 x 32; 8 tile moves of sums in 64 products
//   accuracy   x and w rounded to bfloat16 (2^-8 each), sums in float32, subnormals as zero
//
// Rows of y beyond M are never touched: the last band's sums go through scratch.

constexpr size_t kTileBytes = 1024;
constexpr size_t kBlockTiles = 8;                             // 512 inputs
constexpr size_t kBlockChunks = 2 * kBlockTiles;              // of 32 inputs
constexpr size_t kBlockPanels = 16, kBlockBands = 32;         // 256 outputs, 512 tokens
constexpr size_t kPairBytes = 2 * kBlockChunks * kTileBytes;  // two panels as bf16 tiles
constexpr size_t kSpillAt = 2 * kPairBytes, kSumsAt = kSpillAt + kTileBytes;
static_assert(kSumsAt + kBlockPanels * kBlockBands * kTileBytes <= kLinearScratchBytes);

// One or two panels over one block of inputs, becoming bf16 tiles a group of 8 inputs at a time.
template <Format F>
class Pair {
  public:
    Pair() = default;
    Pair(const LinearArgs& a, size_t panel, size_t n, size_t t0, size_t t1, uint8_t* to)
        : k_tiles_(a.k_tiles), t0_(t0), t_(t0), t1_(t1), n_(n) {
        for (size_t i = 0; i < n; ++i) {
            panels_[i] = a.panels + (panel + i) * panel_bytes(F, k_tiles_);
            if constexpr (F == Format::bf16) {
                tiles[i] = panels_[i] + code_offset(F, t0, k_tiles_);  // used where they lie
            } else {
                panel_scales_[i] = a.panel_scales[panel + i];
                tiles[i] = to + i * kPairBytes / 2;
                to_[i] = to + i * kPairBytes / 2;
            }
        }
    }
    // The next `groups` of 8 inputs, of each panel.
    void advance(size_t groups) {
        if constexpr (F != Format::bf16)
            for (; groups > 0 && t_ < t1_; --groups) {
                for (size_t i = 0; i < n_; ++i) {
                    if (g_ == 0) units_[i] = tile_units<F>(panels_[i] + scale_offset(F, t_), panel_scales_[i]);
                    group_to_bf16<F>(panels_[i] + code_offset(F, t_, k_tiles_), units_[i], g_,
                                     to_[i] + (t_ - t0_) * 2 * kTileBytes);
                }
                if (++g_ == 8) g_ = 0, ++t_;
            }
    }
    void finish() { advance(SIZE_MAX); }
    size_t groups() const { return 8 * (t1_ - t0_); }

    const uint8_t* tiles[2] = {nullptr, nullptr};

  private:
    const uint8_t* panels_[2] = {nullptr, nullptr};
    uint8_t* to_[2] = {nullptr, nullptr};
    float panel_scales_[2] = {0, 0};
    TileUnits units_[2] = {};
    size_t k_tiles_ = 0, t0_ = 0, t_ = 0, t1_ = 0, g_ = 0, n_ = 0;
};

// Where the sums of one band (16 tokens) and panel come from and go to.
struct Sums {
    const float* from;  // a tile, or null for zeros
    float* to;
    size_t stride;  // bytes between rows of `to`
    size_t rows;    // of `to`; fewer than 16 go through `spill`
    float* spill;
};

template <int TILE>
inline void load_sums(const Sums& sums) {
    sums.from ? tile_load<TILE>(sums.from, 64) : tile_zero<TILE>();
}
template <int TILE>
inline void store_sums(const Sums& sums) {
    if (sums.rows == 16) return tile_store<TILE>(sums.to, sums.stride);
    tile_store<TILE>(sums.spill, 64);
    for (size_t r = 0; r < sums.rows; ++r)
        std::memcpy(reinterpret_cast<uint8_t*>(sums.to) + r * sums.stride, sums.spill + r * 16, 64);
}

// BANDS x PANELS bands of x times the tiles of `w`, while `next` is decoded, `groups` of it with every 32 inputs.
template <Format F, size_t BANDS, size_t PANELS>
void multiply(const uint8_t* const* x, const Pair<F>& w, size_t chunks, const Sums (&sums)[2][2], Pair<F>& next,
              size_t groups) {
    load_sums<0>(sums[0][0]);
    if constexpr (PANELS == 2) load_sums<1>(sums[0][1]);
    if constexpr (BANDS == 2) load_sums<2>(sums[1][0]);
    if constexpr (BANDS == 2 && PANELS == 2) load_sums<3>(sums[1][1]);
    for (size_t c = 0; c < chunks; ++c) {
        tile_load<6>(w.tiles[0] + c * kTileBytes, 64);
        tile_load_once<4>(x[0] + c * kTileBytes, 64);
        tile_dot<0, 4, 6>();
        if constexpr (PANELS == 2) {
            tile_load<7>(w.tiles[1] + c * kTileBytes, 64);
            tile_dot<1, 4, 7>();
        }
        if constexpr (BANDS == 2) {
            tile_load_once<5>(x[1] + c * kTileBytes, 64);
            tile_dot<2, 5, 6>();
            if constexpr (PANELS == 2) tile_dot<3, 5, 7>();
        }
        next.advance(groups);
    }
    store_sums<0>(sums[0][0]);
    if constexpr (PANELS == 2) store_sums<1>(sums[0][1]);
    if constexpr (BANDS == 2) store_sums<2>(sums[1][0]);
    if constexpr (BANDS == 2 && PANELS == 2) store_sums<3>(sums[1][1]);
}

// Tokens [m0, m1), at most 512, times panels [p0, p1), at most 16.
template <Format F>
void multiply_block(const LinearArgs& a, size_t m0, size_t m1, size_t p0, size_t p1) {
    auto* spill = reinterpret_cast<float*>(a.scratch + kSpillAt);
    auto* kept = reinterpret_cast<float*>(a.scratch + kSumsAt);
    const size_t band_bytes = a.k_tiles * 2 * kTileBytes, n_steps = (m1 - m0 + 31) / 32;
    const auto pair_at = [&](size_t p, size_t t0, size_t turn) {
        if (p >= p1) p = p0, t0 += kBlockTiles;  // the next block of inputs
        if (t0 >= a.k_tiles) return Pair<F>();
        return Pair<F>(a, p, std::min<size_t>(2, p1 - p), t0, std::min(t0 + kBlockTiles, a.k_tiles),
                       a.scratch + turn * kPairBytes);
    };
    size_t turn = 0;
    Pair<F> w = pair_at(p0, 0, turn);
    for (size_t t0 = 0; t0 < a.k_tiles; t0 += kBlockTiles) {
        const bool last = t0 + kBlockTiles >= a.k_tiles;
        const size_t chunks = 2 * (std::min(t0 + kBlockTiles, a.k_tiles) - t0);
        for (size_t p = p0; p < p1; p += 2) {
            w.finish();
            turn ^= 1;
            Pair<F> next = pair_at(p + 2, t0, turn);
            const size_t groups = (next.groups() + n_steps * chunks - 1) / (n_steps * chunks);
            for (size_t m = m0; m < m1; m += 32) {
                const uint8_t* x[2] = {a.x + m / 16 * band_bytes + t0 * 2 * kTileBytes, nullptr};
                x[1] = x[0] + band_bytes;
                Sums sums[2][2];
                for (size_t b = 0; b < 2; ++b)
                    for (size_t i = 0; i < 2; ++i) {
                        const size_t row = m + 16 * b;
                        float* tile =
                            kept + ((p - p0 + i) * kBlockBands + (row - m0) / 16) * kTileBytes / sizeof(float);
                        sums[b][i] = last ? Sums{t0 ? tile : nullptr, a.y + row * a.y_stride + (p + i) * kTileN,
                                                 a.y_stride * sizeof(float),
                                                 row < a.m ? std::min<size_t>(16, a.m - row) : 0, spill}
                                          : Sums{t0 ? tile : nullptr, tile, 64, 16, spill};
                    }
                const bool two_bands = m + 16 < m1, two_panels = p + 1 < p1;
                const auto step = two_bands ? (two_panels ? multiply<F, 2, 2> : multiply<F, 2, 1>)
                                            : (two_panels ? multiply<F, 1, 2> : multiply<F, 1, 1>);
                step(x, w, chunks, sums, next, groups);
            }
            w = next;
        }
    }
}

template <Format F>
void linear(const LinearArgs& a) {
    configure_tiles({16, 16, 16, 16, 16, 16, 16, 16});
    for (size_t m = 0; m < a.m; m += kBlockBands * 16)
        for (size_t p = 0; p < a.n_panels; p += kBlockPanels)
            multiply_block<F>(a, m, std::min(m + kBlockBands * 16, a.m), p, std::min(p + kBlockPanels, a.n_panels));
    release_tiles();
}
