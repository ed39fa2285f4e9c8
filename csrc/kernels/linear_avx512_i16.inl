// linear, AVX-512 VNNI, 16-bit fixed-point activations: the scaled formats, one token and a few. The decoding kernel.
// Included once for each level of AVX-512, after bytes_avx512.h.
//
//   w becomes unsigned bytes u = round(F * codebook) + 128 (F: units()), x lies as 256 hi + lo (I16Row); within a tile
//     sum_k x w  =  scale_x * scale_w / F * (256 * dot(u, hi) + dot(u, lo) - 128 * sum(256 hi + lo))
//   is exact in 32-bit integers: |dot(u, hi)| <= 64 * 255 * 128 = 2^21, times 256 = 2^29. uint4: u is the code, and
//   in place of 128 its block's zero point is taken out, by one more product a row and tile; |zero * sum| <= 2^28.
//
//   lanes      the 16 outputs of a panel; one vpdpbusd sums 4 inputs of each
//   counts     per 128 weights 1 load, 2 prefetches, 1 shift, 2 byte permutes (2 masks too without VBMI), and per row
//              4 dot products; per tile (1,024 weights) the scale and 6 operations a row, and where the prefetches go.
//   bound      one token: memory. 8 + 8 + 16 + 32 = 64 vector operations a tile: at two a cycle 32 weights a cycle.
//   accuracy   x: 2^-16 of the tile's largest; w: the rounded codebook, at most 0.5 / F of the scale (rms 0.3 % of w)

namespace of_i16 {

// Rows [m, m + ROWS) of x times panels [p, p + PANELS), which are walked together: as many streams for the memory, and
// each broadcast of x serves them all.
template <Format F, size_t ROWS, size_t PANELS>
void multiply(const LinearArgs& a, size_t p, size_t m) {
    const __m512i table = byte_table<F>();
    const size_t row_bytes = I16Row::bytes(a.k_tiles), stride = panel_bytes(F, a.k_tiles);
    const uint8_t* const rows = a.x + m * row_bytes;
    const uint8_t* const panels = a.panels + p * stride;

    __m512 total[PANELS][ROWS];
    for (auto& panel : total)
        for (__m512& sum : panel) sum = _mm512_setzero_ps();
    Ahead<F, PANELS> ahead(a, p);
    for (size_t t = 0; t < a.k_tiles; ++t) {
        const uint8_t* const x = rows + t * I16Row::tile_bytes;
        const uint8_t* const codes = panels + code_offset(F, t, a.k_tiles);
        ahead.enter(t);
        for (size_t i = 0; i < PANELS && t % kGroupTiles == 0; ++i)
            for (size_t line = 0; line < kScaleLines<F>; ++line)
                ask_near(panels + i * stride + scale_offset(F, t) + line * 64);
        __m512i hi[PANELS][ROWS], lo[PANELS][ROWS];
        for (size_t i = 0; i < PANELS; ++i) {
            const __m512i zeros = tile_zeros<F>(panels + i * stride + scale_offset(F, t));
            for (size_t r = 0; r < ROWS; ++r) {
                hi[i][r] = _mm512_setzero_si512();
                lo[i][r] = sums_begin<F>(I16Row::offsets(rows + r * row_bytes, a.k_tiles)[t], zeros);
            }
        }
        // u holds 4 inputs of each panel's 16 outputs; x's same 4 inputs are at byte `at` of its tile.
        const auto dot = [&](const __m512i(&u)[PANELS], size_t at) {
            for (size_t r = 0; r < ROWS; ++r) {
                int32_t high, low;
                std::memcpy(&high, x + r * row_bytes + at, 4);
                std::memcpy(&low, x + r * row_bytes + kTileK + at, 4);
                for (size_t i = 0; i < PANELS; ++i) {
                    hi[i][r] = _mm512_dpbusd_epi32(hi[i][r], u[i], _mm512_set1_epi32(high));
                    lo[i][r] = _mm512_dpbusd_epi32(lo[i][r], u[i], _mm512_set1_epi32(low));
                }
            }
        };
#pragma GCC unroll 8
        for (size_t g = 0; g < 8; ++g) {
            __m512i first[PANELS], second[PANELS];
            for (size_t i = 0; i < PANELS; ++i) {
                const uint8_t* at = codes + i * stride + g * kGroupBytes<F>;
                for (size_t line = 0; line < kGroupBytes<F>; line += 64) {
                    ahead.ask_line(i, g * kGroupBytes<F> + line);
                    ask_near(at + line);
                }
                group_to_bytes<F>(at, table, first[i], second[i]);
            }
            dot(first, g * 8);
            dot(second, g * 8 + 4);
        }
        for (size_t i = 0; i < PANELS; ++i) {
            const __m512 unit = _mm512_set1_ps(a.panel_scales[p + i] / units(F));
            const __m512 scale = tile_scales(panels + i * stride + scale_offset(F, t), unit);
            for (size_t r = 0; r < ROWS; ++r) {
                const __m512i sum = _mm512_add_epi32(lo[i][r], _mm512_slli_epi32(hi[i][r], 8));
                const float x_scale = I16Row::scales(rows + r * row_bytes, a.k_tiles)[t];
                total[i][r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(scale, _mm512_set1_ps(x_scale)),
                                              total[i][r]);
            }
        }
    }
    for (size_t i = 0; i < PANELS; ++i)
        for (size_t r = 0; r < ROWS; ++r) _mm512_storeu_ps(a.y + (m + r) * a.y_stride + (p + i) * kTileN, total[i][r]);
}

template <Format F>
void linear(const LinearArgs& a) {
    // What is asked into L2 ahead of several panels is most of them: at most half of a small L2.
    constexpr size_t kRoom = 512 * 1024;
    const size_t stride = panel_bytes(F, a.k_tiles);
    size_t p = 0;
    if (a.m == 1 && 3 * stride <= kRoom)
        for (; p + 4 <= a.n_panels; p += 4) multiply<F, 1, 4>(a, p, 0);
    if (a.m == 1 && stride <= kRoom)
        for (; p + 2 <= a.n_panels; p += 2) multiply<F, 1, 2>(a, p, 0);
    for (; p < a.n_panels; ++p)  // a panel stays in the cache while all rows pass
        by_rows(a.m, [&](auto rows, size_t m) { multiply<F, rows, 1>(a, p, m); });
}

}  // namespace of_i16

template <Format F>
constexpr LinearKernel i16_row(std::string_view name, Isa isa, size_t m_max) {
    return {name, isa, F, Activation::i16, 1, m_max, of_i16::linear<F>, 0, byte_error(F), 0, 0.5f / 32512};
}
