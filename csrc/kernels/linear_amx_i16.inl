// linear, AMX INT8, 16-bit fixed-point activations: the scaled formats, a few tokens; included once over the tile unit
// and once over its emulation. The integers of linear_avx512_i16.inl, scaled and added in its order: the same bits.
//
//   tiles      0-1 and 2-3 sums of hi and of lo (up to 16 tokens x 16 outputs, int32), in turn; 4-5 x hi and lo
//              (tokens x 64 inputs) as I16Row has them; 6-7 w as unsigned bytes (64 inputs x 16 outputs), in turn
//   order      tile t is multiplied, t + 1 decoded, the sums of t - 1 scaled: what one of them stores is loaded a whole
//              tile later. int32 sums cannot pass from tile to tile, as each has scales of its own
//   factors    what scales a tile's sums lies together for all its tokens, copied once for all panels; a thread's
//              scratch has room for 5,000 times 16 tokens and 64 inputs
//   counts     per weight tile (1,024 weights) and 16 tokens: 24 vector operations and 16 stores to decode, 2 products
//              of 16 cycles, 32 rows of sums stored, 16 x 6 vector operations to scale: 60 cycles of two vector ports,
//              48 of the store port, 32 of the tile unit. Decoding from memory at 15 GB/s a core leaves about 110.
//              uint4: a product of 32-bit integers more a row, which is two operations: 76 cycles
//   accuracy   as linear_avx512_i16.inl

// Of up to 16 tokens in one tile of inputs; see I16Row.
struct Factors {
    float scale[16];
    int32_t offset[16];
};
constexpr size_t kWeightsAt = 0, kI16SumsAt = 2 * 1024, kFactorsAt = kI16SumsAt + 4 * 1024;
constexpr size_t kFactors = (kLinearScratchBytes - kFactorsAt) / sizeof(Factors);

// Tokens [m, m + rows), rows <= ROWS <= 16, times panel p. Every call inlined, so that the totals are registers.
template <Format F, size_t ROWS>
class Band {
  public:
    [[gnu::always_inline]] Band(const LinearArgs& a, size_t p, size_t m)
        : k_tiles_(a.k_tiles),
          panel_(a.panels + p * panel_bytes(F, k_tiles_)),
          x_(a.x + m * I16Row::bytes(k_tiles_)),
          scratch_(a.scratch),
          unit_(_mm512_set1_ps(a.panel_scales[p] / units(F))),
          ahead_(a, p) {}

    // Over tiles [t0, t1), whose factors are given; y holds the sums of those before.
    [[gnu::always_inline]] void run(size_t t0, size_t t1, const Factors* factors, float* y, size_t stride,
                                    size_t rows) {
        // Of rows that are not there, nobody reads the totals.
        each([&](auto r) __attribute__((always_inline)) {
            total_[r] = t0 > 0 && r < rows ? _mm512_loadu_ps(y + r * stride) : _mm512_setzero_ps();
        });
        if (t0 < t1) decode<0>(t0);
        for (size_t t = t0; t <= t1; t += 2) {
            if (t < t1) multiply<0>(t);
            if (t + 1 < t1) decode<1>(t + 1);
            if (t > t0) add_scaled<1>(t - 1, factors[t - 1 - t0]);
            if (t + 1 < t1) multiply<1>(t + 1);
            if (t + 2 < t1) decode<0>(t + 2);
            if (t < t1) add_scaled<0>(t, factors[t - t0]);
        }
        each([&](auto r) __attribute__((always_inline)) {
            if (r < rows) _mm512_storeu_ps(y + r * stride, total_[r]);
        });
    }

  private:
    // f(r) for each row, a constant.
    template <class G>
    [[gnu::always_inline]] static void each(G f) {
        [&]<size_t... R>(std::index_sequence<R...>) __attribute__((always_inline)) {
            (f(std::integral_constant<size_t, R>{}), ...);
        }(std::make_index_sequence<ROWS>{});
    }
    const uint8_t* scales(size_t t) const { return panel_ + scale_offset(F, t); }

    template <size_t TURN>
    [[gnu::always_inline]] void decode(size_t t) {
        auto* w = reinterpret_cast<__m512i*>(scratch_ + kWeightsAt + TURN * 1024);
        const uint8_t* codes = panel_ + code_offset(F, t, k_tiles_);
        const __m512i table = byte_table<F>();
        ahead_.enter(t);
        for (size_t line = 0; t % kGroupTiles == 0 && line < kScaleLines<F>; ++line) ask_near(scales(t) + line * 64);
#pragma GCC unroll 8
        for (size_t g = 0; g < 8; ++g) {
            __m512i first, second;
            for (size_t line = g * kGroupBytes<F>; line < (g + 1) * kGroupBytes<F>; line += 64) {
                ahead_.ask_line(0, line);
                ask_near(codes + line);
            }
            group_to_bytes<F>(codes + g * kGroupBytes<F>, table, first, second);
            _mm512_store_si512(w + 2 * g, first);
            _mm512_store_si512(w + 2 * g + 1, second);
        }
    }
    template <size_t TURN>
    [[gnu::always_inline]] void multiply(size_t t) const {
        const size_t row_bytes = I16Row::bytes(k_tiles_);
        uint8_t* sums = scratch_ + kI16SumsAt + TURN * 2048;
        tile_zero<2 * TURN>();
        tile_zero<2 * TURN + 1>();
        tile_load<6 + TURN>(scratch_ + kWeightsAt + TURN * 1024, 64);
        tile_load<4>(x_ + t * I16Row::tile_bytes, row_bytes);
        tile_dot_bytes<2 * TURN, 4, 6 + TURN>();
        tile_load<5>(x_ + t * I16Row::tile_bytes + kTileK, row_bytes);
        tile_dot_bytes<2 * TURN + 1, 5, 6 + TURN>();
        tile_store<2 * TURN>(sums, 64);
        tile_store<2 * TURN + 1>(sums + 1024, 64);
    }
    template <size_t TURN>
    [[gnu::always_inline]] void add_scaled(size_t t, const Factors& factors) {
        const auto* hi = reinterpret_cast<const __m512i*>(scratch_ + kI16SumsAt + TURN * 2048);
        const __m512i* lo = hi + 16;
        const __m512 scale = tile_scales(scales(t), unit_);
        const __m512i zeros = tile_zeros<F>(scales(t));
        each([&](auto r) __attribute__((always_inline)) {
            const __m512i low = _mm512_add_epi32(lo[r], sums_begin<F>(factors.offset[r], zeros));
            const __m512i sum = _mm512_add_epi32(low, _mm512_slli_epi32(hi[r], 8));
            const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(factors.scale[r]));
            total_[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), both, total_[r]);
        });
    }

    const size_t k_tiles_;
    const uint8_t *const panel_, *const x_;
    uint8_t* const scratch_;
    const __m512 unit_;
    Ahead<F, 1> ahead_;
    __m512 total_[ROWS];
};

template <Format F, size_t ROWS>
void multiply_band(const LinearArgs& a, size_t p, size_t m, size_t rows, size_t t0, size_t t1, const Factors* factors) {
    Band<F, ROWS>(a, p, m).run(t0, t1, factors, a.y + m * a.y_stride + p * kTileN, a.y_stride, rows);
}

// Tokens [m, m + rows) in tiles [t0, t1).
inline void copy_factors(const LinearArgs& a, size_t m, size_t rows, size_t t0, size_t t1, Factors* to) {
    const size_t row_bytes = I16Row::bytes(a.k_tiles);
    for (size_t t = t0; t < t1; ++t, ++to)
        for (size_t r = 0; r < 16; ++r) {
            const uint8_t* row = a.x + (m + r) * row_bytes;
            to->scale[r] = r < rows ? I16Row::scales(row, a.k_tiles)[t] : 0.0f;
            to->offset[r] = r < rows ? I16Row::offsets(row, a.k_tiles)[t] : 0;
        }
}

// Tokens [m0, m1) over tiles [t0, t1), whose factors fit in scratch together.
template <Format F>
void multiply_tokens(const LinearArgs& a, size_t m0, size_t m1, size_t t0, size_t t1, size_t& configured) {
    auto* const factors = reinterpret_cast<Factors*>(a.scratch + kFactorsAt);
    const auto rows_at = [&](size_t m) { return std::min<size_t>(16, m1 - m); };
    const auto factors_at = [&](size_t m) { return factors + (m - m0) / 16 * (t1 - t0); };
    for (size_t m = m0; m < m1; m += 16) copy_factors(a, m, rows_at(m), t0, t1, factors_at(m));
    for (size_t p = 0; p < a.n_panels; ++p)  // a panel stays in the cache while all rows pass
        for (size_t m = m0; m < m1; m += 16) {
            const size_t rows = rows_at(m);
            if (rows != configured) configure_tiles({rows, rows, rows, rows, rows, rows, 16, 16});
            configured = rows;
            const auto band = rows <= 4 ? multiply_band<F, 4> : rows <= 8 ? multiply_band<F, 8> : multiply_band<F, 16>;
            band(a, p, m, rows, t0, t1, factors_at(m));
        }
}

template <Format F>
void linear_i16(const LinearArgs& a) {
    std::memset(a.scratch, 0, kFactorsAt);  // rows of sums that no tile writes are still scaled
    const size_t tiles = std::clamp<size_t>(a.k_tiles, 1, kFactors), tokens = kFactors / tiles * 16;
    size_t configured = 0;
    for (size_t m = 0; m < a.m; m += tokens)
        for (size_t t = 0; t == 0 || t < a.k_tiles; t += tiles)
            multiply_tokens<F>(a, m, std::min(m + tokens, a.m), t, std::min(t + tiles, a.k_tiles), configured);
    release_tiles();
}
