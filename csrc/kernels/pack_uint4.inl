// The packer of uint4, included by pack.inl and in its dialect: where others mirror a block, this one chooses a zero
// point. Of each of the 4 scales the two whole zero points are tried between which the middle of the 16 values meets
// the middle of the block, so 8 times as well; nearest values are found by rounding, without thresholds.

constexpr int32_t kMostCode = 15;

// The least and the largest weight of each lane's block, 0 counted among them: it stays 0.
struct Span {
    F low{}, high{};
    // The scale under which 16 values reach from one to the other.
    F step() const { return high / 15.0f - low / 15.0f; }
    F middle() const { return high * 0.5f + low * 0.5f; }
};
Span span_of(const float* columns) {
    Span span;
    for (size_t k = 0; k < kTileK; ++k) {
        const F w = Lanes::load(columns + k * kTileN);
        span.low = w < span.low ? w : span.low;
        span.high = span.high < w ? w : span.high;
    }
    return span;
}

float uint4_panel_scale(const float* columns, size_t k_tiles) {
    float most = 0;
    for (size_t t = 0; t < k_tiles; ++t)
        for (size_t n0 = 0; n0 < kTileN; n0 += W) {
            float steps[W];
            Lanes::store(steps, span_of(columns + t * kTileK * kTileN + n0).step());
            for (float step : steps) most = step > most ? step : most;
        }
    return most / kE4m3Max;
}

// The zero point at or below the one for which code 7.5 stands for `middle`; 0 where that is not a number.
int32_t zero_below(float middle, float scale) {
    const float x = 7.5f - middle / scale;
    return x > 0 ? x < kMostCode ? static_cast<int32_t>(x) : kMostCode : 0;
}

// Weights under one scale and zero point.
struct Uint4Block {
    F scale, inverse, least, most;
    I zero;
    Uint4Block(F scale, I zero)
        : scale(scale),
          inverse(Lanes::splat(1.0f) / scale),
          least(Lanes::to_float(-zero)),
          most(Lanes::to_float(kMostCode - zero)),
          zero(zero) {}
    // code - zero, + kRound.
    F rounded(F w) const {
        const F x = w == F{} ? w : w * inverse;  // 0 * inverse is not a number where the inverse is infinite
        const F low = x < least ? least : x;
        return (most < low ? most : low) + kRound;
    }
    F nearest(F w) const { return scale * (rounded(w) - kRound); }
    I code(F w) const { return Lanes::bits(rounded(w)) - kRoundBits + zero; }
};

// As pack_block; zero points lie kTileN bytes behind their scales.
BlockSums pack_uint4_block(const float* columns, float g, uint8_t* scales, uint8_t* codes) {
    const Span span = span_of(columns);
    const TriedScales tried(span.step(), g);
    float middles[W];
    Lanes::store(middles, span.middle());
    int32_t tried_zeros[2 * kCandidates][W];
    for (size_t n = 0; n < W; ++n)
        for (int i = 0; i < kCandidates; ++i) {
            const int32_t below = zero_below(middles[n], tried.scales[i][n]);
            tried_zeros[i][n] = below;
            tried_zeros[i + kCandidates][n] = below < kMostCode ? below + 1 : below;
        }

    F error = Lanes::splat(__builtin_inff()), scale = Lanes::load(tried.scales[0]), squares{};
    I byte = Lanes::load(tried.bytes[0]), zero = Lanes::load(tried_zeros[0]);
    for (int candidate = 0; candidate < 2 * kCandidates; ++candidate) {
        const F s = Lanes::load(tried.scales[candidate % kCandidates]);
        const I z = Lanes::load(tried_zeros[candidate]);
        const Uint4Block block(s, z);
        F e{};
        for (size_t k = 0; k < kTileK; ++k) {
            const F w = Lanes::load(columns + k * kTileN), miss = w - block.nearest(w);
            e += miss * miss;
        }
        const auto is_better = e < error;
        error = is_better ? e : error;
        scale = is_better ? s : scale;
        byte = is_better ? Lanes::load(tried.bytes[candidate % kCandidates]) : byte;
        zero = is_better ? z : zero;
    }

    const auto is_zero = span.step() == F{};
    int32_t bytes[W], zeros[W];
    Lanes::store(bytes, is_zero ? I{} : byte);
    Lanes::store(zeros, is_zero ? I{} : zero);
    for (size_t n = 0; n < W; ++n) {
        scales[n] = static_cast<uint8_t>(bytes[n]);
        scales[kTileN + n] = static_cast<uint8_t>(zeros[n]);
    }
    const Uint4Block block(scale, zero);
    store_codes<8>(codes, [&](size_t k) {
        const F w = Lanes::load(columns + k * kTileN);
        squares += w * w;
        return is_zero ? I{} : block.code(w);
    });
    return {is_zero ? squares : error, squares};
}
