// linear, AVX-512, float32 activations: every format, for few tokens. The more exact kernel of the scaled formats.
// Included once for each level of AVX-512, after decode_avx512.h.
//
//   lanes      the 16 outputs of a panel
//   registers  ROWS sums of the tile, ROWS sums of the panel, the codebook; a weight is decoded once for all rows
//   counts     4-bit, one row: per 128 weights 1 load, 7 shifts, 8 permutes, 8 fma (uint4: 8 subtractions too);
//              the scale once a tile (1,024 weights)
//   accuracy   float32 throughout

namespace of_f32 {

// Adds x[r][k] * w[.][k] over the 64 inputs of a tile to sums[r][chain]; chains break the fma's latency for few rows.
template <Format F, size_t ROWS, size_t CHAINS>
void add_tile(const uint8_t* codes, const float* x, size_t x_stride, __m512 table, __m512 zero,
              __m512 (&sums)[ROWS][CHAINS]) {
    const auto add = [&](__m512 w, size_t k, size_t chain) {
        for (size_t r = 0; r < ROWS; ++r)
            sums[r][chain % CHAINS] = _mm512_fmadd_ps(w, _mm512_set1_ps(x[r * x_stride + k]), sums[r][chain % CHAINS]);
    };
    for (size_t g = 0; g < 8; ++g) {
        if constexpr (is_4bit(F)) {
            const __m512i v = load64(codes + g * 64);
            [&]<size_t... I>(std::index_sequence<I...>) {
                (add(nibble<F, I>(table, v, zero), g * 8 + kNibbleInput[I], I), ...);
            }(std::make_index_sequence<8>{});
        } else if constexpr (F == Format::int8) {
            for (size_t half = 0; half < 2; ++half) {
                const __m512i v = load64(codes + g * 128 + half * 64);
                add(signed_byte<0>(v), g * 8 + half * 4 + 0, 0);
                add(signed_byte<1>(v), g * 8 + half * 4 + 1, 1);
                add(signed_byte<2>(v), g * 8 + half * 4 + 2, 2);
                add(signed_byte<3>(v), g * 8 + half * 4 + 3, 3);
            }
        } else if constexpr (F == Format::bf16) {
            for (size_t t = 0; t < 4; ++t) {
                const __m512i v = load64(codes + (g * 4 + t) * 64);
                add(bf16_even(v), g * 8 + kPairOrder[2 * t], 0);
                add(bf16_odd(v), g * 8 + kPairOrder[2 * t + 1], 1);
            }
        } else {
            for (size_t k = 0; k < 8; ++k)
                add(_mm512_loadu_ps(reinterpret_cast<const float*>(codes) + (g * 8 + k) * kTileN), g * 8 + k, k);
        }
    }
}

// Rows [m, m + ROWS) of x times panel p.
template <Format F, size_t ROWS>
void multiply(const LinearArgs& a, size_t p, size_t m) {
    constexpr size_t kChains = 2;  // for every ROWS, so that a row's bits do not depend on its neighbours
    const size_t x_stride = a.k_tiles * kTileK;
    const float* x = reinterpret_cast<const float*>(a.x) + m * x_stride;
    const __m512 table =
        is_4bit(F) ? _mm512_loadu_ps(codebook(is_4bit(F) ? F : Format::nf4).data()) : _mm512_setzero_ps();
    const uint8_t* panel = a.panels + p * panel_bytes(F, a.k_tiles);
    const __m512 unit =
        _mm512_set1_ps(has_scales(F) ? a.panel_scales[p] * (F == Format::int8 ? 1.0f / 127.0f : 1.0f) : 0);
    __m512 total[ROWS];
    for (size_t r = 0; r < ROWS; ++r) total[r] = _mm512_setzero_ps();
    for (size_t t = 0; t < a.k_tiles; ++t) {
        __m512 sums[ROWS][kChains];
        for (size_t r = 0; r < ROWS; ++r)
            for (size_t c = 0; c < kChains; ++c) sums[r][c] = _mm512_setzero_ps();
        const __m512 zero = _mm512_cvtepi32_ps(tile_zeros<F>(panel + scale_offset(F, t)));
        add_tile<F, ROWS, kChains>(panel + code_offset(F, t, a.k_tiles), x + t * kTileK, x_stride, table, zero, sums);
        const __m512 scale = has_scales(F) ? tile_scales(panel + scale_offset(F, t), unit) : _mm512_set1_ps(1.0f);
        for (size_t r = 0; r < ROWS; ++r) {
            __m512 sum = sums[r][0];
            for (size_t c = 1; c < kChains; ++c) sum = _mm512_add_ps(sum, sums[r][c]);
            total[r] = _mm512_fmadd_ps(sum, scale, total[r]);
        }
    }
    for (size_t r = 0; r < ROWS; ++r) _mm512_storeu_ps(a.y + (m + r) * a.y_stride + p * kTileN, total[r]);
}

template <Format F>
void linear(const LinearArgs& a) {
    for (size_t p = 0; p < a.n_panels; ++p)  // a panel stays in the cache while all rows pass
        by_rows(a.m, [&](auto rows, size_t m) { multiply<F, rows>(a, p, m); });
}

}  // namespace of_f32

template <Format F>
constexpr LinearKernel f32_row(std::string_view name, Isa isa, size_t m_max) {
    return {name, isa, F, Activation::f32, 1, m_max, of_f32::linear<F>, 0, 0, 0, 0};
}
