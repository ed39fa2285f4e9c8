// linear, AVX2, 16-bit fixed-point activations: the scaled formats, any number of tokens.
//
//   w becomes unsigned words u = round(F * codebook) + 128 (F: units()), x lies as words (I16Row). The integers of
//   linear_avx512_i16.inl, scaled and added in its order: the same bits.
//
//   lanes      8 outputs; one vpmaddwd multiplies 2 inputs of each
//   blocks     up to 4 rows: a tile is decoded as it is multiplied, for 2 rows at a time. More: a panel's 512 inputs
//              become words first (16 KB of scratch, L1) and multiply 4 rows at a time: decoding is paid once for all M
//   counts     per 64 weights 1 load, 2 shuffles, 4 masks, 3 shifts, and per row 4 products, 4 additions and, for 128
//              weights, 4 broadcasts
//   bound      one token: 17 vector operations for 64 weights, at three a cycle 11 weights a cycle. Many: products and
//              additions, 8 weights each, which differ in their ports; float32 has 8 a product, and its ports alone
//   accuracy   as linear_avx512_i16.inl
namespace of_i16 {

constexpr size_t kBlockTiles = 8;      // 512 inputs
constexpr size_t kRowsOfFew = 48;      // up to which all inputs of x stay in the cache
constexpr size_t kSteps = kTileK / 2;  // 2 inputs each

inline __m256i load32(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

// 8 inputs of 8 of the 16 outputs whose codes begin at `codes`: inputs 0 and 2, 1 and 3, 4 and 6, 5 and 7.
template <Format F>
inline void group_to_words(const uint8_t* codes, size_t half, __m256i table, __m256i (&u)[4]) {
    const __m256i v = load32(codes + half * 32);
    __m256i first, second;
    if constexpr (F == Format::int8) {
        const __m256i to_unsigned = _mm256_set1_epi8(static_cast<char>(0x80));
        first = _mm256_xor_si256(v, to_unsigned);
        second = _mm256_xor_si256(load32(codes + 64 + half * 32), to_unsigned);
    } else {
        const __m256i nibble = _mm256_set1_epi8(15);
        first = _mm256_shuffle_epi8(table, _mm256_and_si256(v, nibble));
        second = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble));
    }
    const __m256i even = _mm256_set1_epi16(0xFF);
    u[0] = _mm256_and_si256(first, even);
    u[1] = _mm256_srli_epi16(first, 8);
    u[2] = _mm256_and_si256(second, even);
    u[3] = _mm256_srli_epi16(second, 8);
}

template <Format F>
inline __m256i table32() {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(kCodeBytes<F>.data()));
}

// A tile of a panel, ready to be multiplied: pairs of inputs of 8 outputs each.
struct WordTile {
    __m256i weights[kSteps][2];
    __m256 scale[2];
    __m256i zeros[2];
};

template <Format F>
void to_words(const uint8_t* scales, const uint8_t* codes, float unit, WordTile& to) {
    const __m256i table = table32<F>();
    for (size_t half = 0; half < 2; ++half) {
        for (size_t g = 0; g < 8; ++g) {
            __m256i u[4];
            group_to_words<F>(codes + g * kGroupBytes<F>, half, table, u);
            for (size_t i = 0; i < 4; ++i) to.weights[g * 4 + i][half] = u[i];
        }
        to.scale[half] = Scales::decode(scales + half * 8, unit);
        to.zeros[half] = zeros8<F>(scales + half * 8);
    }
}

// Of a packed row, from tile t on.
struct Row {
    const uint8_t* words;
    const float* scale;
    const int32_t* offset;
    Row(const LinearArgs& a, size_t m, size_t t) {
        const uint8_t* row = a.x + m * I16Row::bytes(a.k_tiles);
        words = row + t * I16Row::tile_bytes;
        scale = I16Row::scales(row, a.k_tiles) + t;
        offset = I16Row::offsets(row, a.k_tiles) + t;
    }
    __m256i pair(size_t i) const {
        int32_t both;
        std::memcpy(&both, words + 4 * i, 4);
        return _mm256_set1_epi32(both);
    }
    void next() { words += I16Row::tile_bytes, ++scale, ++offset; }
};

// What a tile's sums begin with, so that they are those of the weights: see I16Row.
template <Format F>
inline __m256i sums_begin(const Row& x, __m256i zeros) {
    return has_zeros(F) ? _mm256_mullo_epi32(zeros, _mm256_set1_epi32(*x.offset / 128)) : _mm256_set1_epi32(*x.offset);
}
inline __m256i plus_products(__m256i sum, __m256i u, __m256i pair) {
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(u, pair));
    __asm__("" : "+x"(sum));  // gcc 12 would regroup the additions until registers run out
    return sum;
}
inline __m256 add_tile(__m256 total, __m256i sums, __m256 scale, const Row& x) {
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums), _mm256_mul_ps(scale, _mm256_set1_ps(*x.scale)), total);
}

template <size_t ROWS>
inline std::array<Row, ROWS> rows_of(const LinearArgs& a, size_t m, size_t t) {
    const auto of = [&]<size_t... R>(std::index_sequence<R...>) { return std::array<Row, ROWS>{Row(a, m + R, t)...}; };
    return of(std::make_index_sequence<ROWS>{});
}

// Rows [m, m + ROWS) of x times panel p, decoded as it is multiplied.
template <Format F, size_t ROWS>
[[gnu::noinline]] void multiply_codes(const LinearArgs& a, size_t p, size_t m) {
    const __m256i table = table32<F>();
    const uint8_t* const panel = a.panels + p * panel_bytes(F, a.k_tiles);
    const float unit = a.panel_scales[p] / units(F);
    std::array<Row, ROWS> x = rows_of<ROWS>(a, m, 0);
    Ahead<F, 1> ahead(a, p);
    __m256 total[2][ROWS];
    for (auto& half : total)
        for (__m256& sum : half) sum = _mm256_setzero_ps();
    for (size_t t = 0; t < a.k_tiles; ++t) {
        const uint8_t* const codes = panel + code_offset(F, t, a.k_tiles);
        const uint8_t* const scales = panel + scale_offset(F, t);
        ahead.enter(t);
        for (size_t line = 0; line < kScaleLines<F> && t % kGroupTiles == 0; ++line) ask_near(scales + line * 64);
        __m256i sums[2][ROWS];
        for (size_t half = 0; half < 2; ++half)
            for (size_t r = 0; r < ROWS; ++r) sums[half][r] = sums_begin<F>(x[r], zeros8<F>(scales + half * 8));
#pragma GCC unroll 8
        for (size_t g = 0; g < 8; ++g) {
            for (size_t line = g * kGroupBytes<F>; line < (g + 1) * kGroupBytes<F>; line += 64) {
                ahead.ask_line(0, line);
                ask_near(codes + line);
            }
#pragma GCC unroll 2
            for (size_t half = 0; half < 2; ++half) {
                __m256i u[4];
                group_to_words<F>(codes + g * kGroupBytes<F>, half, table, u);
#pragma GCC unroll 4
                for (size_t i = 0; i < 4; ++i)
#pragma GCC unroll 2
                    for (size_t r = 0; r < ROWS; ++r)
                        sums[half][r] = plus_products(sums[half][r], u[i], x[r].pair(g * 4 + i));
            }
        }
        for (size_t half = 0; half < 2; ++half)
            for (size_t r = 0; r < ROWS; ++r)
                total[half][r] = add_tile(total[half][r], sums[half][r], Scales::decode(scales + half * 8, unit), x[r]);
        for (Row& row : x) row.next();
    }
    for (size_t half = 0; half < 2; ++half)
        for (size_t r = 0; r < ROWS; ++r)
            _mm256_storeu_ps(a.y + (m + r) * a.y_stride + p * kTileN + half * 8, total[half][r]);
}

// Rows [m, m + ROWS) of x times tiles [t0, t1) of panel p. All registers are for a tile's sums: totals stay in y.
template <Format F, size_t ROWS>
[[gnu::noinline]] void multiply(const LinearArgs& a, size_t p, size_t m, size_t t0, size_t t1, const WordTile* w) {
    std::array<Row, ROWS> x = rows_of<ROWS>(a, m, t0);
    for (size_t t = t0; t < t1; ++t, ++w) {
        __m256i low[ROWS], high[ROWS];  // of 8 outputs each
#pragma GCC unroll 4
        for (size_t r = 0; r < ROWS; ++r) {
            low[r] = sums_begin<F>(x[r], w->zeros[0]);
            high[r] = sums_begin<F>(x[r], w->zeros[1]);
        }
        for (size_t i = 0; i < kSteps; ++i)
#pragma GCC unroll 4
            for (size_t r = 0; r < ROWS; ++r) {
                const __m256i pair = x[r].pair(i);
                low[r] = plus_products(low[r], w->weights[i][0], pair);
                high[r] = plus_products(high[r], w->weights[i][1], pair);
            }
#pragma GCC unroll 4
        for (size_t r = 0; r < ROWS; ++r) {
            float* const y = a.y + (m + r) * a.y_stride + p * kTileN;
            const __m256 low_total = t == 0 ? _mm256_setzero_ps() : _mm256_loadu_ps(y);
            const __m256 high_total = t == 0 ? _mm256_setzero_ps() : _mm256_loadu_ps(y + 8);
            _mm256_storeu_ps(y, add_tile(low_total, low[r], w->scale[0], x[r]));
            _mm256_storeu_ps(y + 8, add_tile(high_total, high[r], w->scale[1], x[r]));
            x[r].next();
        }
    }
}

template <Format F>
void linear(const LinearArgs& a) {
    if (a.m <= 4) {
        for (size_t p = 0; p < a.n_panels; ++p) {  // a panel stays in the cache while all rows pass
            for (size_t m = 0; m + 2 <= a.m; m += 2) multiply_codes<F, 2>(a, p, m);
            if (a.m % 2) multiply_codes<F, 1>(a, p, a.m - 1);
        }
        return;
    }
    auto* const words = reinterpret_cast<WordTile*>(a.scratch);
    static_assert(kBlockTiles * sizeof(WordTile) <= kLinearScratchBytes);
    const auto block = [&](size_t p, size_t t0, size_t t1) {
        const uint8_t* const panel = a.panels + p * panel_bytes(F, a.k_tiles);
        for (size_t t = t0; t < t1; ++t) {
            const uint8_t* const codes = panel + code_offset(F, t, a.k_tiles);
            for (size_t line = 0; line < code_bytes(F); line += 64) ask_near(codes + line);
            to_words<F>(panel + scale_offset(F, t), codes, a.panel_scales[p] / units(F), words[t - t0]);
        }
        size_t m = 0;
        for (; m + 4 <= a.m; m += 4) multiply<F, 4>(a, p, m, t0, t1, words);
        if (m + 2 <= a.m) multiply<F, 2>(a, p, m, t0, t1, words), m += 2;
        if (m < a.m) multiply<F, 1>(a, p, m, t0, t1, words);
    };
    // Of many rows 512 inputs stay in the cache while all panels pass. Of few all do, and panels are read one after
    // another.
    const size_t at_once = a.m <= kRowsOfFew ? 1 : a.n_panels;
    for (size_t p0 = 0; p0 < a.n_panels; p0 += at_once)
        for (size_t t0 = 0; t0 < a.k_tiles; t0 += kBlockTiles)
            for (size_t p = p0; p < std::min(p0 + at_once, a.n_panels); ++p)
                block(p, t0, std::min(t0 + kBlockTiles, a.k_tiles));
}

}  // namespace of_i16
