// linear, AMX INT8, 16-bit fixed-point activations: the scaled formats, a few tokens; included once over the tile unit
// and once over its emulation. The integers of linear_avx512_i16.cpp, scaled and added in its order: the same bits.
//
//   tiles      0-1 and 2-3 sums of hi and of lo (up to 16 tokens x 16 outputs, int32), in turn; 4-5 x hi and lo
//              (tokens x 64 inputs) as I16Row has them; 6-7 w as unsigned bytes (64 inputs x 16 outputs), in turn
//   order      a weight tile is decoded and multiplied while the sums of the one before are scaled: int32 sums cannot
//              pass from tile to tile, as each has scales of its own
//   counts     per weight tile (1,024 weights) and 16 tokens: 24 vector operations and 16 stores to decode, 2 products
//              of 16 cycles, 32 rows of sums stored, 16 x 6 vector operations to scale: 60 cycles of two vector ports,
//              64 of the store port, 32 of the tile unit. Decoding from memory at 15 GB/s a core leaves about 110.
//              uint4: a product of 32-bit integers more a row, which is two operations: 76 cycles
//   accuracy   as linear_avx512_i16.cpp

constexpr size_t kI16Scratch = 6 * 1024;

// Tokens [m, m + rows), rows <= ROWS <= 16, times panel p.
template <Format F, size_t ROWS>
void multiply_band(const LinearArgs& a, size_t p, size_t m, size_t rows) {
    const __m512i table = byte_table<F>();
    const size_t row_bytes = I16Row::bytes(a.k_tiles);
    const uint8_t* const x = a.x + m * row_bytes;
    const uint8_t* const panel = a.panels + p * panel_bytes(F, a.k_tiles);
    Ahead<F, 1> ahead(a, p);
    const __m512 unit = _mm512_set1_ps(a.panel_scales[p] / units(F));
    const float* x_scales[ROWS];
    const int32_t* offsets[ROWS];
    __m512 total[ROWS];
    for (size_t r = 0; r < ROWS; ++r) {  // rows that are not there repeat the last; nobody reads their totals
        const uint8_t* row = x + std::min(r, rows - 1) * row_bytes;
        x_scales[r] = I16Row::scales(row, a.k_tiles);
        offsets[r] = I16Row::offsets(row, a.k_tiles);
        total[r] = _mm512_setzero_ps();
    }

    const auto multiply = [&]<size_t TURN>(std::integral_constant<size_t, TURN>, size_t t) {
        auto* w = reinterpret_cast<__m512i*>(a.scratch + TURN * 1024);
        const uint8_t* codes = panel + code_offset(F, t, a.k_tiles);
        ahead.enter(t);
        for (size_t line = 0; t % kGroupTiles == 0 && line < kScaleLines<F>; ++line)
            ask_near(panel + scale_offset(F, t) + line * 64);
#pragma GCC unroll 8
        for (size_t g = 0; g < 8; ++g) {
            __m512i first, second;
            for (size_t line = g * kGroupBytes<F>; line < (g + 1) * kGroupBytes<F>; line += 64) {
                ahead.ask_line(0, line);
                ask_near(codes + line);
            }
            group_to_bytes<F>(codes + g * kGroupBytes<F>, table, first, second);
            _mm512_store_si512(w + 2 * g, first);
            _mm512_store_si512(w + 2 * g + 1, second);
        }
        tile_zero<2 * TURN>();
        tile_zero<2 * TURN + 1>();
        tile_load<6 + TURN>(w, 64);
        tile_load<4>(x + t * I16Row::tile_bytes, row_bytes);
        tile_dot_bytes<2 * TURN, 4, 6 + TURN>();
        tile_load<5>(x + t * I16Row::tile_bytes + kTileK, row_bytes);
        tile_dot_bytes<2 * TURN + 1, 5, 6 + TURN>();
        uint8_t* sums = a.scratch + 2048 + TURN * 2048;
        tile_store<2 * TURN>(sums, 64);
        tile_store<2 * TURN + 1>(sums + 1024, 64);
    };
    const auto add_scaled = [&](size_t turn, size_t t) {
        const auto* hi = reinterpret_cast<const __m512i*>(a.scratch + 2048 + turn * 2048);
        const __m512i* lo = hi + 16;
        const __m512 scale = tile_scales(panel + scale_offset(F, t), unit);
        const __m512i zeros = tile_zeros<F>(panel + scale_offset(F, t));
#pragma GCC unroll 16
        for (size_t r = 0; r < ROWS; ++r) {
            const __m512i low = _mm512_add_epi32(lo[r], sums_begin<F>(offsets[r][t], zeros));
            const __m512i sum = _mm512_add_epi32(low, _mm512_slli_epi32(hi[r], 8));
            total[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(scale, _mm512_set1_ps(x_scales[r][t])),
                                       total[r]);
        }
    };
    constexpr std::integral_constant<size_t, 0> kFirst{};
    constexpr std::integral_constant<size_t, 1> kSecond{};
    for (size_t t = 0; t < a.k_tiles; t += 2) {
        multiply(kFirst, t);
        if (t > 0) add_scaled(1, t - 1);
        if (t + 1 < a.k_tiles) multiply(kSecond, t + 1);
        add_scaled(0, t);
    }
    if (a.k_tiles % 2 == 0 && a.k_tiles > 0) add_scaled(1, a.k_tiles - 1);
    for (size_t r = 0; r < rows; ++r) _mm512_storeu_ps(a.y + (m + r) * a.y_stride + p * kTileN, total[r]);
}

template <Format F>
void linear_i16(const LinearArgs& a) {
    static_assert(kI16Scratch <= kLinearScratchBytes);
    std::memset(a.scratch, 0, kI16Scratch);  // rows of sums that no tile writes are still scaled
    size_t configured = 0;
    for (size_t p = 0; p < a.n_panels; ++p)  // a panel stays in the cache while all rows pass
        for (size_t m = 0; m < a.m; m += 16) {
            const size_t rows = std::min<size_t>(16, a.m - m);
            if (rows != configured) configure_tiles({rows, rows, rows, rows, rows, rows, 16, 16});
            configured = rows;
            const auto band = rows <= 4 ? multiply_band<F, 4> : rows <= 8 ? multiply_band<F, 8> : multiply_band<F, 16>;
            band(a, p, m, rows);
        }
    release_tiles();
}
