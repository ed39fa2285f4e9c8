// Softmax attention over KV pages, against the dialect.
//
//   scores[i][p] = scale * q[i] . key[p],   out[i] = sum over p of softmax(scores[i])[p] * value[p],   p <
//   n_positions[i]
//
//   order      page by page, with a running maximum and sum per query (online softmax, arXiv 1805.02867)
//   lanes      positions for the scores (keys lie transposed), dimensions for the values
//   registers  4 queries x 2 vectors of sums: each load of a key or value serves 4 queries
//   bound      one token: memory, as every key and value is read once; prompts: fma

constexpr size_t kQuad = 4;

template <KvFormat F>
inline Vec load_kv(const uint8_t* p, size_t i) {
    if constexpr (F == KvFormat::f32) return load(reinterpret_cast<const float*>(p) + i);
    if constexpr (F == KvFormat::bf16) return load_bf16(reinterpret_cast<const uint16_t*>(p) + i);
    return load_int8(reinterpret_cast<const int8_t*>(p) + i);
}

// Dot products of N rows `a` (of `depth` floats, a_step apart) with columns [c0, c0 + 2 kLanes) of a (depth, width)
// matrix.
template <KvFormat F, size_t N>
inline void times_page(const float* const* a, size_t depth, const uint8_t* matrix, size_t width, size_t c0,
                       Vec (&sums)[N][2]) {
    for (size_t k = 0; k < depth; ++k) {
        const Vec v0 = load_kv<F>(matrix, k * width + c0), v1 = load_kv<F>(matrix, k * width + c0 + kLanes);
        for (size_t i = 0; i < N; ++i) {
            const Vec x = set1(a[i][k]);
            sums[i][0] = fma(x, v0, sums[i][0]);
            sums[i][1] = fma(x, v1, sums[i][1]);
        }
    }
}

// One page for N queries: scores, softmax update, values.
template <KvFormat F, size_t N>
inline void attend_page(const AttendArgs& a, size_t first, const uint8_t* page, size_t position, float* sums,
                        float* scores, float* highest, float* weight) {
    const size_t dp = KvPage::padded(a.d);
    const auto* key_scales = reinterpret_cast<const float*>(page + KvPage::scales_offset(F, a.d));
    const float* const* q = a.q + first;
    size_t seen = 0;  // positions of this page that the last, furthest-seeing query sees
    for (size_t i = 0; i < N; ++i) {
        const size_t limit = a.n_positions[first + i];
        const size_t n = limit <= position ? 0 : limit - position < kPage ? limit - position : kPage;
        seen = n > seen ? n : seen;
    }
    for (size_t c = 0; c < kPage; c += 2 * kLanes) {
        Vec dots[N][2];
        for (auto& pair : dots) pair[0] = pair[1] = zero();
        if (c < seen) times_page<F, N>(q, a.d, page, kPage, c, dots);
        for (size_t half = 0; half < 2; ++half) {
            const size_t at = c + half * kLanes;
            const Vec factor = F == KvFormat::int8 ? mul(set1(a.scale), load(key_scales + at)) : set1(a.scale);
            for (size_t i = 0; i < N; ++i) store(scores + i * kPage + at, mul(dots[i][half], factor));
        }
    }
    for (size_t i = 0; i < N; ++i) {
        float* s = scores + i * kPage;
        const size_t limit = a.n_positions[first + i];
        const size_t n = limit <= position ? 0 : limit - position < kPage ? limit - position : kPage;
        for (size_t p = n; p < kPage; ++p) s[p] = -INFINITY;
        if (n == 0) {
            std::memset(s, 0, kPage * sizeof(float));
            continue;
        }
        Vec most = set1(highest[i]);
        for (size_t p = 0; p < kPage; p += kLanes) most = max(most, load(s + p));
        const float top = largest(most), shrink = std::exp(highest[i] - top);
        Vec total = zero();
        for (size_t p = 0; p < kPage; p += kLanes) {
            const Vec e = exp(sub(load(s + p), set1(top)));
            store(s + p, e);
            if (p + kLanes <= n) total = add(total, e);
        }
        float rest = 0;
        for (size_t p = n / kLanes * kLanes; p < n; ++p) rest += s[p];
        for (size_t p = n; p < kPage; ++p) s[p] = 0;
        weight[i] = weight[i] * shrink + sum(total) + rest;
        highest[i] = top;
        if (F == KvFormat::int8)
            for (size_t p = 0; p < kPage; p += kLanes) store(s + p, mul(load(s + p), load(key_scales + kPage + p)));
        for (size_t d = 0; d < dp; d += kLanes) store(sums + i * dp + d, mul(load(sums + i * dp + d), set1(shrink)));
    }
    const float* weights[N];
    for (size_t i = 0; i < N; ++i) weights[i] = scores + i * kPage;
    const uint8_t* values = page + KvPage::values_offset(F, a.d);
    constexpr size_t kStep = 2 * kLanes;
    size_t d = 0;
    for (; d + kStep <= dp; d += kStep) {
        Vec out[N][2];
        for (size_t i = 0; i < N; ++i)
            out[i][0] = load(sums + i * dp + d), out[i][1] = load(sums + i * dp + d + kLanes);
        times_page<F, N>(weights, seen, values, dp, d, out);
        for (size_t i = 0; i < N; ++i)
            store(sums + i * dp + d, out[i][0]), store(sums + i * dp + d + kLanes, out[i][1]);
    }
    for (; d < dp; d += kLanes)  // one vector is left where 16 lanes meet an odd multiple of 16
        for (size_t i = 0; i < N; ++i) {
            Vec out = load(sums + i * dp + d);
            for (size_t p = 0; p < seen; ++p) out = fma(set1(weights[i][p]), load_kv<F>(values, p * dp + d), out);
            store(sums + i * dp + d, out);
        }
}

template <KvFormat F, size_t N>
void attend_group(const AttendArgs& a, size_t first) {
    const size_t dp = KvPage::padded(a.d);
    float* sums = a.scratch;
    float* scores = a.scratch + N * dp;
    float highest[N], weight[N];
    size_t last = 0;
    for (size_t i = 0; i < N; ++i) {
        highest[i] = -INFINITY;
        weight[i] = 0;
        last = a.n_positions[first + i] > last ? a.n_positions[first + i] : last;
    }
    std::memset(sums, 0, N * dp * sizeof(float));
    for (size_t position = 0; position < last; position += kPage)
        attend_page<F, N>(a, first, a.pages + static_cast<size_t>(a.page_table[position / kPage]) * a.page_stride,
                          position, sums, scores, highest, weight);
    for (size_t i = 0; i < N; ++i)
        for (size_t d = 0; d < a.d; ++d) a.out[first + i][d] = sums[i * dp + d] / weight[i];
}

template <KvFormat F>
void attend_format(const AttendArgs& a) {
    size_t i = 0;
    for (; i + kQuad <= a.n_queries; i += kQuad) attend_group<F, kQuad>(a, i);
    for (; i < a.n_queries; ++i) attend_group<F, 1>(a, i);
}

void attend(const AttendArgs& a) {
    if (a.format == KvFormat::bf16) return attend_format<KvFormat::bf16>(a);
    if (a.format == KvFormat::int8) return attend_format<KvFormat::int8>(a);
    return attend_format<KvFormat::f32>(a);
}

// Largest magnitude over 127, and its inverse.
inline float int8_scale(const float* x, size_t d, float* inverse) {
    float most = 0;
    for (size_t i = 0; i < d; ++i) most = std::fabs(x[i]) > most ? std::fabs(x[i]) : most;
    *inverse = most > 0 ? 127.0f / most : 0.0f;
    return most / 127.0f;
}

void kv_store(KvFormat format, uint8_t* page, size_t slot, size_t d, const float* k, const float* v) {
    const size_t dp = KvPage::padded(d);
    uint8_t* values = page + KvPage::values_offset(format, d);
    if (format == KvFormat::int8) {
        auto* scales = reinterpret_cast<float*>(page + KvPage::scales_offset(format, d));
        float k_inverse, v_inverse;
        scales[slot] = int8_scale(k, d, &k_inverse);
        scales[kPage + slot] = int8_scale(v, d, &v_inverse);
        for (size_t i = 0; i < d; ++i)
            page[i * kPage + slot] = static_cast<uint8_t>(static_cast<int8_t>(std::nearbyint(k[i] * k_inverse)));
        for (size_t i = 0; i < dp; ++i)
            values[slot * dp + i] =
                i < d ? static_cast<uint8_t>(static_cast<int8_t>(std::nearbyint(v[i] * v_inverse))) : 0;
    } else if (format == KvFormat::bf16) {
        auto* keys = reinterpret_cast<uint16_t*>(page);
        auto* rows = reinterpret_cast<uint16_t*>(values);
        for (size_t i = 0; i < d; ++i) keys[i * kPage + slot] = to_bf16(k[i]);
        for (size_t i = 0; i < dp; ++i) rows[slot * dp + i] = i < d ? to_bf16(v[i]) : 0;
    } else {
        auto* keys = reinterpret_cast<float*>(page);
        auto* rows = reinterpret_cast<float*>(values);
        for (size_t i = 0; i < d; ++i) keys[i * kPage + slot] = k[i];
        for (size_t i = 0; i < dp; ++i) rows[slot * dp + i] = i < d ? v[i] : 0;
    }
}
