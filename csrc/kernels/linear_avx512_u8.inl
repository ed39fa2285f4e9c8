// linear, AVX-512 VNNI, 8-bit activations: the 4-bit formats, many tokens, where there is no AMX.
// Included once for each level of AVX-512, after bytes_avx512.h.
//
//   w becomes signed bytes s = round(F * codebook) (F: units()), x lies as low + step * code (U8Tile); within a tile
//     sum_k x w  =  scale_w / F * sum over the blocks of x of (step * dot(code, s) + low * sum(s))
//   whose integers are exact. uint4: s is the code, and scale_w * zero * sum(x) is taken from that.
//
//   blocks     a panel's codes become bytes and their sums for 512 inputs at a time (10 KB of scratch, L1), and multiply
//              every row of x before the next: decoding is paid once for all M
//   registers  8 rows x 16 outputs: totals, a tile's sums, a block's integers
//   bound      by the ports that multiply: per row and tile 16 vpdpbusd, 4 fma of steps and lows, 1 of the scale: 21,
//              where bfloat16 takes 32
//   accuracy   x: a 510th of the way from the least to the largest of 32; w: the codebook as in linear_avx512_i16.inl

namespace of_u8 {

constexpr size_t kBlockTiles = 8;  // 512 inputs
constexpr size_t kRows = U8Tile::kRows;
constexpr size_t kRowsOfFew = 48;              // up to which all inputs of x stay in the cache
constexpr size_t kSteps = U8Tile::kBlock / 4;  // vectors of weights that a block of x meets

// A tile of a panel, ready to be multiplied.
struct ByteTile {
    __m512i weights[16];           // 4 inputs of 16 outputs each
    __m512 sums[U8Tile::kBlocks];  // of the weights that a block of x meets
    __m512 scale, minus_zero;      // scale * -zero
};
// Sums of x over the rows' 64 inputs: for zero points.
using RowSums = float[kRows];

template <Format F>
void to_bytes(const uint8_t* scales, const uint8_t* codes, float unit, ByteTile& to) {
    // Those of byte_table are signed but for a bias of 128.
    const __m512i bias = _mm512_set1_epi8(has_zeros(F) ? 0 : static_cast<char>(0x80)), ones = _mm512_set1_epi8(1);
    const __m512i table = _mm512_xor_si512(byte_table<F>(), bias);
    for (size_t g = 0; g < 8; ++g)
        group_to_bytes<F>(codes + g * kGroupBytes<F>, table, to.weights[2 * g], to.weights[2 * g + 1]);
    for (size_t b = 0; b < U8Tile::kBlocks; ++b) {
        __m512i sum = _mm512_setzero_si512();
        for (size_t i = b * kSteps; i < (b + 1) * kSteps; ++i) sum = _mm512_dpbusd_epi32(sum, ones, to.weights[i]);
        to.sums[b] = _mm512_cvtepi32_ps(sum);
    }
    to.scale = tile_scales(scales, _mm512_set1_ps(unit));
    to.minus_zero = _mm512_mul_ps(to.scale, _mm512_cvtepi32_ps(_mm512_sub_epi32(__m512i{}, tile_zeros<F>(scales))));
}

void sum_rows(const U8Tile& x, RowSums& sums) {
    for (size_t r = 0; r < kRows; ++r) {
        sums[r] = 0;
        for (size_t b = 0; b < U8Tile::kBlocks; ++b) {
            static_assert(U8Tile::kBlock == 32);
            const auto* codes = reinterpret_cast<const __m256i*>(x.codes[r]) + b;
            const __m256i eighths = _mm256_sad_epu8(_mm256_loadu_si256(codes), _mm256_setzero_si256());
            const auto sum = static_cast<float>(_mm512_reduce_add_epi64(_mm512_zextsi256_si512(eighths)));
            sums[r] += x.steps[r][b] * sum + x.lows[r][b] * U8Tile::kBlock;
        }
    }
}

// y[r][n] (+)= over `tiles` tiles of a band of x and of a panel. Only `rows` rows are stored.
template <Format F>
void multiply(const U8Tile* x, const RowSums* x_sums, const ByteTile* w, size_t tiles, float* y, size_t y_stride,
              size_t rows, bool first) {
    __m512 total[kRows];
    for (size_t r = 0; r < kRows; ++r)
        total[r] = first || r >= rows ? _mm512_setzero_ps() : _mm512_loadu_ps(y + r * y_stride);
    for (size_t t = 0; t < tiles; ++t, ++x, ++w) {
        __m512 of_tile[kRows];
#pragma GCC unroll 4
        for (size_t b = 0; b < U8Tile::kBlocks; ++b) {
            __m512i dots[kRows];
            for (__m512i& dot : dots) dot = _mm512_setzero_si512();
#pragma GCC unroll 8
            for (size_t i = b * kSteps; i < (b + 1) * kSteps; ++i)
                for (size_t r = 0; r < kRows; ++r) {
                    int32_t codes;
                    std::memcpy(&codes, x->codes[r] + 4 * i, 4);
                    dots[r] = _mm512_dpbusd_epi32(dots[r], _mm512_set1_epi32(codes), w->weights[i]);
                }
            for (size_t r = 0; r < kRows; ++r) {
                const __m512 low = _mm512_set1_ps(x->lows[r][b]), step = _mm512_set1_ps(x->steps[r][b]);
                const __m512 of_lows =
                    b == 0 ? _mm512_mul_ps(w->sums[b], low) : _mm512_fmadd_ps(w->sums[b], low, of_tile[r]);
                of_tile[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[r]), step, of_lows);
            }
        }
        for (size_t r = 0; r < kRows; ++r) {
            total[r] = _mm512_fmadd_ps(of_tile[r], w->scale, total[r]);
            if constexpr (has_zeros(F))
                total[r] = _mm512_fmadd_ps(_mm512_set1_ps(x_sums[t][r]), w->minus_zero, total[r]);
        }
    }
    for (size_t r = 0; r < kRows; ++r)
        if (r < rows) _mm512_storeu_ps(y + r * y_stride, total[r]);
}

// Rows [m0, m1), at most kMostRows: those whose sums there is scratch for.
constexpr size_t kMostRows = 8192;
template <Format F>
void multiply_rows(const LinearArgs& a, size_t m0, size_t m1) {
    constexpr size_t kTileBytes = kBlockTiles * sizeof(ByteTile);
    static_assert(kTileBytes + kMostRows * kBlockTiles * sizeof(float) <= kLinearScratchBytes);
    auto* const w = reinterpret_cast<ByteTile*>(a.scratch);
    auto* const x_sums = reinterpret_cast<RowSums*>(a.scratch + kTileBytes);
    const bool is_few = m1 - m0 <= kRowsOfFew;
    const size_t band = kU8Bands.bytes(a.k_tiles);
    const auto x = [&](size_t m, size_t t) { return reinterpret_cast<const U8Tile*>(a.x + m / kRows * band) + t; };
    const auto sums = [&](size_t m) { return x_sums + (m - m0) / kRows * kBlockTiles; };
    const auto block = [&](size_t p, size_t t0, size_t t1) {
        const uint8_t* const panel = a.panels + p * panel_bytes(F, a.k_tiles);
        if (is_few)
            for (size_t line = 0; line < kBlockTiles * tile_bytes(F); line += 64)
                _mm_prefetch(reinterpret_cast<const char*>(panel + t1 * tile_bytes(F) + line), _MM_HINT_T1);
        for (size_t t = t0; t < t1; ++t)
            to_bytes<F>(panel + scale_offset(F, t), panel + code_offset(F, t, a.k_tiles), a.panel_scales[p] / units(F),
                        w[t - t0]);
        for (size_t m = m0; m < m1; m += kRows)
            multiply<F>(x(m, t0), sums(m), w, t1 - t0, a.y + m * a.y_stride + p * kTileN, a.y_stride,
                        std::min(kRows, m1 - m), t0 == 0);
    };
    // Of many rows 512 inputs stay in the cache while all panels pass. Of few all do, panels are read one after another,
    // and what comes next is asked for meanwhile.
    const size_t at_once = is_few ? 1 : a.n_panels;
    for (size_t p0 = 0; p0 < a.n_panels; p0 += at_once)
        for (size_t t0 = 0; t0 < a.k_tiles; t0 += kBlockTiles) {
            const size_t t1 = std::min(t0 + kBlockTiles, a.k_tiles);
            if constexpr (has_zeros(F))
                for (size_t m = m0; m < m1; m += kRows)
                    for (size_t t = t0; t < t1; ++t) sum_rows(*x(m, t), sums(m)[t - t0]);
            for (size_t p = p0; p < std::min(p0 + at_once, a.n_panels); ++p) block(p, t0, t1);
        }
}

template <Format F>
void linear(const LinearArgs& a) {
    static_assert(is_4bit(F));
    for (size_t m = 0; m < a.m; m += kMostRows) multiply_rows<F>(a, m, std::min(m + kMostRows, a.m));
}

}  // namespace of_u8

template <Format F>
constexpr LinearKernel u8_row(std::string_view name, Isa isa) {
    // Half a step is at most a 255th of the block's largest.
    return {name, isa, F, Activation::u8, 1, SIZE_MAX, of_u8::linear<F>, 0, byte_error(F), 0, 1.0f / 255};
}
