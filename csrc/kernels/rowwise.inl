// Norm, rotary embedding, gated activation, sums and the packing of activations, against the dialect. Each is one pass
// over rows that lie in a cache; all are bound by loads. Tails shorter than a vector are done one by one.

float rms_factor(const float* x, float eps, size_t n) {
    Vec squares = zero();
    size_t i = 0;
    for (; i + kLanes <= n; i += kLanes) squares = fma(load(x + i), load(x + i), squares);
    float total = sum(squares);
    for (; i < n; ++i) total += x[i] * x[i];
    return 1.0f / std::sqrt(total / static_cast<float>(n) + eps);
}

void scale_row(const float* x, const float* w, float factor, size_t n, float* y) {
    size_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(y + i, mul(mul(load(x + i), set1(factor)), load(w + i)));
    for (; i < n; ++i) y[i] = x[i] * factor * w[i];
}

void rope(float* x, const float* c, const float* s, size_t d) {
    const size_t half = d / 2;
    size_t i = 0;
    for (; i + kLanes <= half; i += kLanes) {
        const Vec a = load(x + i), b = load(x + half + i), cosine = load(c + i), sine = load(s + i);
        store(x + i, sub(mul(a, cosine), mul(b, sine)));
        store(x + half + i, add(mul(b, cosine), mul(a, sine)));
    }
    for (; i < half; ++i) {
        const float a = x[i], b = x[half + i];
        x[i] = a * c[i] - b * s[i];
        x[half + i] = b * c[i] + a * s[i];
    }
}

// -s of the sigmoid that a gate is: gate(a) = a / (1 + exp(-s)), where s = a for silu and, as (1 + tanh(z)) / 2 is the
// sigmoid of 2 z, s = sqrt(8 / pi) (a + 0.044715 a^3) for gelu; of |a|, whose s has the sign of a.
constexpr float kGeluLinear = 1.5957691216f, kGeluCubic = 0.071354816f;
template <Gate G>
inline Vec minus_steepness(Vec size) {
    if constexpr (G == Gate::silu) return sub(zero(), size);
    return mul(sub(zero(), size), fma(mul(size, size), set1(kGeluCubic), set1(kGeluLinear)));
}
template <Gate G>
inline float minus_steepness_of(float size) {
    if constexpr (G == Gate::silu) return -size;
    return -size * (size * size * kGeluCubic + kGeluLinear);
}

// Through exp of a negative number only: exp(-|s|) and the sigmoid's symmetry.
template <Gate G>
inline void gate_mul(const float* a, const float* b, size_t n, float* y) {
    size_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        const Vec v = load(a + i), e = exp(minus_steepness<G>(max(v, sub(zero(), v))));
        const Vec positive = max(v, zero()), negative = sub(v, positive);
        const Vec numerator = fma(negative, e, positive);
        store(y + i, mul(div(numerator, add(set1(1.0f), e)), load(b + i)));
    }
    for (; i < n; ++i) {
        const float e = std::exp(minus_steepness_of<G>(std::fabs(a[i])));
        y[i] = (a[i] > 0 ? a[i] : a[i] * e) / (1.0f + e) * b[i];
    }
}

void silu_mul(const float* a, const float* b, size_t n, float* y) { gate_mul<Gate::silu>(a, b, n, y); }
void gelu_tanh_mul(const float* a, const float* b, size_t n, float* y) { gate_mul<Gate::gelu_tanh>(a, b, n, y); }

void add_parts(const float* base, const float* const* parts, size_t n_parts, const float* bias, size_t n, float* y) {
    size_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        Vec total = load(base + i);
        for (size_t r = 0; r < n_parts; ++r) total = add(total, load(parts[r] + i));
        if (bias) total = add(total, load(bias + i));
        store(y + i, total);
    }
    for (; i < n; ++i) {
        float total = base[i];
        for (size_t r = 0; r < n_parts; ++r) total += parts[r][i];
        y[i] = bias ? total + bias[i] : total;
    }
}

// Tile t of a row of k values, where it lies if it is whole, else in `padded`: zero beyond k.
inline const float* take_tile(const float* tile, size_t t, size_t k, float (&padded)[kTileK]) {
    const size_t begin = t * kTileK, count = begin >= k ? 0 : k - begin;
    if (count >= kTileK) return tile;
    std::memcpy(padded, tile, count * sizeof(float));
    std::memset(padded + count, 0, (kTileK - count) * sizeof(float));
    return padded;
}

// NaN where 64 values hold NaN or infinity, else 0.
inline float poison_of(const float* x) {
    Vec poison = zero();
    for (size_t i = 0; i < kTileK; i += kLanes) poison = add(poison, mul(load(x + i), zero()));
    return sum(poison);
}

template <bool WORDS>
inline void pack_i16(const float* x, uint8_t* codes, float* scale, int32_t* offset) {
    Vec biggest = zero();
    for (size_t i = 0; i < kTileK; i += kLanes) {
        const Vec v = load(x + i);
        biggest = max(biggest, max(v, sub(zero(), v)));
    }
    if (const float poison = poison_of(x); poison != 0) {
        std::memset(codes, 0, I16Row::tile_bytes);
        *scale = poison;
        *offset = 0;
        return;
    }
    const float most = largest(biggest), step = most / 32512.0f, inverse = most > 1e-30f ? 32512.0f / most : 0.0f;
    int32_t total = 0;
    for (size_t i = 0; i < kTileK; ++i) {
        // Adding 1.5 * 2^23 leaves the integer nearest to x in the low bits.
        const int32_t q = std::bit_cast<int32_t>(x[i] * inverse + 0x1.8p23f) - 0x4B400000;
        if constexpr (WORDS) {
            constexpr size_t kPlace[4] = {0, 2, 1, 3};
            const auto word = static_cast<int16_t>(q);
            std::memcpy(codes + 2 * (i / 4 * 4 + kPlace[i % 4]), &word, 2);
        } else {
            const int32_t hi = (q + 128) >> 8;
            codes[i] = static_cast<uint8_t>(hi);
            codes[kTileK + i] = static_cast<uint8_t>(q - hi * 256);
        }
        total += q;
    }
    *scale = step;
    *offset = -128 * total;
}

// One row of a U8Tile.
inline void pack_u8(const float* x, uint8_t* codes, float* steps, float* lows) {
    static_assert(U8Tile::kBlock == 32);
    float most[U8Tile::kBlocks], factors[U8Tile::kBlocks];
    extremes(x, lows, most);
    const float poison = poison_of(x);
    for (size_t b = 0; b < U8Tile::kBlocks; ++b) {
        const float range = most[b] - lows[b];
        steps[b] = poison != 0 ? poison : range > 1e-30f ? range * (1 / 255.0f) : 0.0f;
        factors[b] = range > 1e-30f ? 255.0f / range : 0.0f;
    }
    for (size_t i = 0; i < kTileK; i += kLanes) {
        const size_t b = i / U8Tile::kBlock;
        store_bytes(codes + i, mul(sub(load(x + i), set1(lows[b])), set1(factors[b])));
    }
}

void pack(Activation a, const float* x, size_t x_stride, size_t m, size_t k, size_t k_tiles, size_t m0, size_t m1,
          size_t t0, size_t t1, uint8_t* out) {
    for (size_t row = m0; row < m1; ++row)
        for (size_t t = t0; t < t1; ++t) {
            alignas(64) float padded[kTileK];
            const float* tile =
                row < m ? take_tile(x + (row - m0) * x_stride + (t - t0) * kTileK, t, k, padded) : nullptr;
            if (a == Activation::bf16) {
                uint8_t* to = out + row / 16 * kBf16Bands.bytes(k_tiles) + t * 2048 + row % 16 * 64;
                for (size_t half = 0; half < 2; ++half, to += 1024)
                    if (tile)
                        store_pair_order(reinterpret_cast<uint16_t*>(to), tile + half * 32);
                    else
                        std::memset(to, 0, 64);
            } else if (a == Activation::u8) {
                alignas(64) static constexpr float kZeros[kTileK] = {};
                auto* band = reinterpret_cast<U8Tile*>(out + row / U8Tile::kRows * kU8Bands.bytes(k_tiles));
                const size_t r = row % U8Tile::kRows;
                pack_u8(tile ? tile : kZeros, band[t].codes[r], band[t].steps[r], band[t].lows[r]);
            } else if (a == Activation::f32) {
                std::memcpy(out + (row * k_tiles + t) * sizeof padded, tile, sizeof padded);
            } else {
                uint8_t* packed = out + row * I16Row::bytes(k_tiles);
                const auto pack_row = a == Activation::i16 ? pack_i16<false> : pack_i16<true>;
                pack_row(tile, packed + t * I16Row::tile_bytes, const_cast<float*>(I16Row::scales(packed, k_tiles)) + t,
                         const_cast<int32_t*>(I16Row::offsets(packed, k_tiles)) + t);
            }
        }
}

void unpack_row(Format f, const uint8_t* panels, const float* panel_scales, size_t n, size_t k_tiles, float* out) {
    const uint8_t* panel = panels + n / kTileN * panel_bytes(f, k_tiles);
    const size_t lane = n % kTileN;
    for (size_t t = 0; t < k_tiles; ++t) {
        const uint8_t* codes = panel + code_offset(f, t, k_tiles);
        const uint8_t* at = panel + scale_offset(f, t) + lane;
        const float scale = has_scales(f) ? panel_scales[n / kTileN] * e4m3(*at) : 1.0f, zero = zero_point(f, at);
        for (size_t k = 0; k < kTileK; ++k, ++out) {
            if (is_4bit(f)) {
                const uint8_t byte = codes[nibble_byte(lane, k)];
                *out = scale * (codebook(f)[nibble_is_high(k) ? byte >> 4 : byte & 15] - zero);
            } else if (f == Format::int8) {
                *out = scale * (static_cast<float>(static_cast<int8_t>(codes[int8_byte(lane, k)])) / 127.0f);
            } else if (f == Format::bf16) {
                uint16_t bits;
                std::memcpy(&bits, codes + 2 * bf16_word(lane, k), 2);
                *out = std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
            } else {
                std::memcpy(out, codes + 4 * (k * kTileN + lane), 4);
            }
        }
    }
}
