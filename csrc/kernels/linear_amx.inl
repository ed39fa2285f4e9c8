// linear, AMX BF16, many tokens; included once over the tile unit and once over its emulation.
//
//   tiles      0-3 sums (2 x 2: 32 tokens x 32 outputs), 4-5 x (16 tokens x 32 inputs), 6-7 w (32 inputs x 16 outputs)
//   blocks     512 tokens x 256 outputs of sums (512 KB) take all inputs, 512 at a time: their x (512 KB), the x after it
//              and the sums stay in the L2 cache. Two panels at a time: their 32 KB of bf16 tiles stay in the L1 cache
//              while x passes, 32 tokens a step
//   decoding   between the products: as a pair of panels is multiplied, the codes of the next become tiles, 8 inputs of
//              a tile with every 64 inputs of a step; paid once for 512 tokens
//   ahead      asked into L2 beside the products: the next inputs' x, the codes of the pair after the next, and, where
//              sums are complete, the lines of y that the next step writes; past the last panel the first inputs' x and
//              the first codes of `next`, as of another block of outputs of the same tokens
//   reuse      each loaded tile takes part in 2 products; x is loaded past the L1 cache, which is w's
//   bound      by tdpbf16ps, 16 cycles a product of 16 x 16 x 32; 8 tile moves of sums in 64 products. Loads come next:
//              of the four for 64 cycles of products the two past L1 are one in 33 cycles, the others one in 8
//   accuracy   x and w rounded to bfloat16 (2^-8 each), sums in float32, subnormals as zero
//
// Rows of y beyond M are never touched: the last band's sums go through scratch.

constexpr size_t kTileBytes = 1024;
constexpr size_t kBlockTiles = 8;                         // 512 inputs
constexpr size_t kBlockChunks = 2 * kBlockTiles;          // of 32 inputs
constexpr size_t kBlockPanels = 16, kBlockBands = 32;     // 256 outputs, 512 tokens
constexpr size_t kPartBytes = kBlockChunks * kTileBytes;  // a panel's block of inputs as bf16 tiles
constexpr size_t kPairBytes = 2 * kPartBytes;             // two panels'
constexpr size_t kGroups = 8;                             // of 8 inputs, in a tile of codes
constexpr size_t kGroupChunks = kBlockChunks / kGroups;   // beside which one is decoded
constexpr size_t kSpillAt = 2 * kPairBytes, kSumsAt = kSpillAt + kTileBytes;
static_assert(kSumsAt + kBlockPanels * kBlockBands * kTileBytes <= kLinearScratchBytes);
static_assert(kBlockTiles % kGroupTiles == 0);

// In assembly, because gcc 12 takes a function of nothing but prefetches for one without effect, and drops its calls.
inline void ask_l2(const void* line) { __asm__ volatile("prefetcht1 (%0)" ::"r"(line)); }

// `count` in parts of at most `most`, none much smaller than another, each a multiple of `step`: how long they are.
constexpr size_t even_part(size_t count, size_t most, size_t step) {
    const size_t n = (count + most - 1) / most;
    return n == 0 ? step : ((count + n - 1) / n + step - 1) / step * step;
}

// A tile of codes that becomes two bf16 tiles at `to`, 8 inputs at a time.
template <Format F>
struct Decoding {
    const uint8_t* codes;
    ptrdiff_t ahead;  // from here to the codes that are asked for meanwhile
    uint8_t* to;
    TileUnits units;

    void group(size_t g) const {
        for (size_t line = 0; line < code_bytes(F) / kGroups; line += 64)
            ask_l2(codes + g * (code_bytes(F) / kGroups) + line + ahead);
        if constexpr (F != Format::bf16) group_to_bf16<F>(codes, units, g, to);
    }
};

// A row of tiles and, `step` bytes behind it, a second one.
struct Rows {
    const uint8_t* at = nullptr;
    size_t step = 0;
};
// Lines [begin, end) of each of their tiles.
struct Lines {
    Rows rows;
    size_t begin = 0, end = 0;

    [[gnu::always_inline]] void ask(size_t chunk) const {
        const uint8_t* line = rows.at + chunk * kTileBytes + begin * 64;
        for (size_t n = end - begin; n > 0; --n, line += 64) ask_l2(line), ask_l2(line + rows.step);
    }
};
// What later steps read and write, asked for beside the chunks of this one.
template <Format F>
struct Soon {
    Lines x, w;                // w only where it is read as tiles
    const float* y = nullptr;  // 32 rows of 32 sums
    size_t y_stride = 0;

    [[gnu::always_inline]] void ask(size_t chunk) const {
        x.ask(chunk);
        if constexpr (F == Format::bf16) w.ask(chunk);
        if (!y) return;
        constexpr size_t kRows = 32 / kBlockChunks;
        for (size_t row = chunk * kRows; row < (chunk + 1) * kRows; ++row)
            ask_l2(y + row * y_stride), ask_l2(y + row * y_stride + kTileN);
    }
};

// Where the sums of one band (16 tokens) and panel come from and go to.
struct Sums {
    const float* from;  // a tile, or null for zeros
    float* to;
    size_t stride;  // bytes between rows of `to`
    size_t rows;    // of `to`; fewer than 16 go through `spill`
    float* spill;
};

struct StepSums {
    Sums at[2][2];  // of bands and panels
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

// BANDS x PANELS bands of x times the tiles of w, while other tiles are decoded.
template <Format F, size_t BANDS, size_t PANELS>
void multiply(Rows x, Rows w, size_t chunks, const StepSums& step, std::span<const Decoding<F>> decodings,
              const Soon<F>& soon) {
    const auto& sums = step.at;
    load_sums<0>(sums[0][0]);
    if constexpr (PANELS == 2) load_sums<1>(sums[0][1]);
    if constexpr (BANDS == 2) load_sums<2>(sums[1][0]);
    if constexpr (BANDS == 2 && PANELS == 2) load_sums<3>(sums[1][1]);
    for (size_t c = 0; c < chunks; ++c, x.at += kTileBytes, w.at += kTileBytes) {
        tile_load<6>(w.at, 64);
        tile_load_once<4>(x.at, 64);
        tile_dot<0, 4, 6>();
        if constexpr (PANELS == 2) {
            tile_load<7>(w.at + w.step, 64);
            tile_dot<1, 4, 7>();
        }
        if constexpr (BANDS == 2) {
            tile_load_once<5>(x.at + x.step, 64);
            tile_dot<2, 5, 6>();
            if constexpr (PANELS == 2) tile_dot<3, 5, 7>();
        }
        if (c % kGroupChunks == 0)
            for (const Decoding<F>& tile : decodings) tile.group(c / kGroupChunks);
        soon.ask(c);
    }
    store_sums<0>(sums[0][0]);
    if constexpr (PANELS == 2) store_sums<1>(sums[0][1]);
    if constexpr (BANDS == 2) store_sums<2>(sums[1][0]);
    if constexpr (BANDS == 2 && PANELS == 2) store_sums<3>(sums[1][1]);
    for (size_t g = (chunks + kGroupChunks - 1) / kGroupChunks; g < kGroups; ++g)
        for (const Decoding<F>& tile : decodings) tile.group(g);
}

// Two panels, or a block's last alone, over one block of inputs.
struct Pair {
    size_t begin, end;   // the panels of its block, which take each block of inputs one after another
    size_t panel, tile;  // its first
};

// Tokens [m0, m1), at most 512, times all panels.
template <Format F>
class Walk {
  public:
    Walk(const LinearArgs& a, size_t m0, size_t m1) : a_(a), m0_(m0), m1_(m1) {}

    void run() const {
        Pair now = block_at(0);
        for (size_t j = 0; j < n_decoded(now); ++j) {
            const Decoding<F> tile = decoding(now, j, 0, 0);
            for (size_t g = 0; g < kGroups; ++g) tile.group(g);
        }
        for (size_t turn = 0; !is_end(now); turn ^= 1) {
            const Pair next = following(now);
            multiply_pair(now, next, turn);
            now = next;
        }
    }

  private:
    Pair block_at(size_t panel) const {
        return {panel, std::min(panel + even_part(a_.n_panels, kBlockPanels, 2), a_.n_panels), panel, 0};
    }
    Pair following(Pair p) const {
        if ((p.panel += 2) < p.end) return p;
        p.panel = p.begin;
        if ((p.tile += kBlockTiles) < a_.k_tiles) return p;
        return block_at(p.end);
    }
    bool is_end(const Pair& p) const { return p.panel >= a_.n_panels; }
    size_t n_panels(const Pair& p) const { return std::min<size_t>(2, p.end - p.panel); }
    size_t n_tiles(const Pair& p) const { return std::min(kBlockTiles, a_.k_tiles - p.tile); }
    size_t n_decoded(const Pair& p) const { return F == Format::bf16 || is_end(p) ? 0 : n_panels(p) * n_tiles(p); }
    const uint8_t* panel_at(size_t panel) const { return a_.panels + panel * panel_bytes(F, a_.k_tiles); }
    const uint8_t* begin_of(const Pair& p) const { return panel_at(p.panel) + scale_offset(F, p.tile); }
    // A pair's panels as tiles: where they lie, or become them.
    Rows tiles(const Pair& p, size_t turn) const {
        if (F == Format::bf16)
            return {panel_at(p.panel) + code_offset(F, p.tile, a_.k_tiles), panel_bytes(F, a_.k_tiles)};
        return {a_.scratch + turn * kPairBytes, kPartBytes};
    }
    // Tile j of a pair.
    Decoding<F> decoding(const Pair& p, size_t j, size_t turn, ptrdiff_t ahead) const {
        const size_t panel = p.panel + j / n_tiles(p), t = j % n_tiles(p);
        const uint8_t* const scales = panel_at(panel) + scale_offset(F, p.tile + t);
        ask_l2(scales + ahead);
        return {panel_at(panel) + code_offset(F, p.tile + t, a_.k_tiles), ahead,
                a_.scratch + turn * kPairBytes + j / n_tiles(p) * kPartBytes + t * 2 * kTileBytes,
                tile_units<F>(scales, a_.panel_scales[panel])};
    }

    void multiply_pair(const Pair& now, const Pair& next, size_t turn) const {
        const Pair after = is_end(next) ? next : following(next);
        const uint8_t* const read_after = is_end(next) ? nullptr : is_end(after) ? a_.next : begin_of(after);
        const ptrdiff_t to_after = read_after ? read_after - begin_of(next) : 0;
        const Rows w = tiles(now, turn);
        const bool two_panels = n_panels(now) == 2;
        Decoding<F> decodings[2 * kBlockTiles];
        for (size_t m = m0_; m < m1_; m += 32) {
            const auto [first, last] = part(n_decoded(next), m);
            for (size_t j = first; j < last; ++j) decodings[j - first] = decoding(next, j, turn ^ 1, to_after);
            const Rows x = x_at(m, now.tile);
            const auto step = m + 16 < m1_ ? (two_panels ? multiply<F, 2, 2> : multiply<F, 2, 1>)
                                           : (two_panels ? multiply<F, 1, 2> : multiply<F, 1, 1>);
            step(x, w, 2 * n_tiles(now), sums(now, m), {decodings, last - first}, soon(now, next, m));
        }
    }
    // The part of `count` that belongs to the step at token m.
    std::pair<size_t, size_t> part(size_t count, size_t m) const {
        const size_t n_steps = (m1_ - m0_ + 31) / 32, step = (m - m0_) / 32;
        return {count * step / n_steps, count * (step + 1) / n_steps};
    }
    Rows x_at(size_t m, size_t tile) const {
        const size_t band = kBf16Bands.bytes(a_.k_tiles);
        return {a_.x + m / 16 * band + tile * 2 * kTileBytes, band};
    }
    float* y_at(size_t m, size_t panel) const { return a_.y + m * a_.y_stride + panel * kTileN; }

    StepSums sums(const Pair& p, size_t m) const {
        auto* const spill = reinterpret_cast<float*>(a_.scratch + kSpillAt);
        StepSums of;
        for (size_t b = 0; b < 2; ++b)
            for (size_t i = 0; i < 2; ++i) {
                const size_t row = m + 16 * b, at = (p.panel - p.begin + i) * kBlockBands + (row - m0_) / 16;
                auto* const kept = reinterpret_cast<float*>(a_.scratch + kSumsAt + at * kTileBytes);
                of.at[b][i] = {p.tile ? kept : nullptr, kept, 64, 16, spill};
                if (!is_last(p)) continue;
                of.at[b][i].to = y_at(row, p.panel + i), of.at[b][i].stride = a_.y_stride * sizeof(float);
                of.at[b][i].rows = row < a_.m ? std::min<size_t>(16, a_.m - row) : 0;
            }
        return of;
    }
    bool is_last(const Pair& p) const { return p.tile + kBlockTiles >= a_.k_tiles; }

    Soon<F> soon(const Pair& now, const Pair& next, size_t m) const {
        Soon<F> of;
        const size_t tile = is_last(now) ? 0 : now.tile + kBlockTiles;  // 0: of the next block of panels, or call
        if (tile > 0 || now.end < a_.n_panels || a_.next) {
            const size_t lines = kTileBytes / 64, n_pairs = (now.end - now.begin + 1) / 2;
            const size_t pair = (now.panel - now.begin) / 2;
            of.x = {x_at(m, tile), lines * pair / n_pairs, lines * (pair + 1) / n_pairs};
        }
        if (F == Format::bf16 && !is_end(next)) {
            const auto [begin, end] = part(kTileBytes / 64, m);
            of.w = {tiles(next, 0), begin, end};
        }
        if (is_last(now) && m + 32 < m1_) of.y = y_at(m + 32, now.panel), of.y_stride = a_.y_stride;
        return of;
    }

    const LinearArgs& a_;
    const size_t m0_, m1_;
};

template <Format F>
void linear(const LinearArgs& a) {
    configure_tiles({16, 16, 16, 16, 16, 16, 16, 16});
    const size_t rows = even_part(a.m, kBlockBands * 16, 32);
    for (size_t m = 0; m < a.m; m += rows) Walk<F>(a, m, std::min(m + rows, a.m)).run();
    release_tiles();
}
