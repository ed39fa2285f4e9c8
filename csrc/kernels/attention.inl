// Softmax attention over KV pages, against the dialect.
//
//   scores[i][p] = scale * q[i] . key[p],   out[i] = sum over p of softmax(scores[i])[p] * value[p],
//   first[i] <= p < n_positions[i]
//
//   order      page by page, with a running maximum and sum per query (online softmax, arXiv 1805.02867); every query
//              that shares the head takes a page before the next, so that memory is read once
//   lanes      positions for the scores (keys lie transposed), dimensions for the values
//   registers  up to 4 queries x kColumns vectors of sums: each load of a key or value serves 4 queries
//   bound      one token: memory, as every key and value is read once, from its page's begin to its end; prompts: the
//              products, 2 a lane and operation in bf16
//   accuracy   bf16: queries and softmax weights are rounded to bfloat16 as keys and values are, sums in float32;
//              int8: float32 products of what is stored, or as bf16 of a page made so; f32: float32 throughout

constexpr size_t kQuad = 4;
constexpr size_t kColumns = kLanes == 16 ? 4 : 2;  // vectors
static_assert(KvPage::kBlock % (kColumns * kLanes) == 0);

// What a page's elements are multiplied with: float32, or pairs of bfloat16 for pages of those.
template <KvFormat F>
using Factor = std::conditional_t<F == KvFormat::bf16, uint32_t, float>;

// n floats as factors, at `to` where they are not floats there already: whole vectors, zeros behind them.
template <KvFormat F>
inline const Factor<F>* as_factors(const float* x, size_t n, float* to) {
    if constexpr (F == KvFormat::bf16) {
        constexpr size_t kTaken = 2 * kLanes;
        size_t i = 0;
        for (; i + kTaken <= n; i += kTaken) store_bf16(to + i / 2, x + i);
        if (i < n) {
            float rest[kTaken] = {};
            std::memcpy(rest, x + i, (n - i) * sizeof(float));
            store_bf16(to + i / 2, rest);
        }
        return reinterpret_cast<const uint32_t*>(to);
    } else {
        return x;
    }
}

// What is asked for ahead of its loads. Where a line takes few operations a core itself looks some 4 KB ahead, and asking
// for all of it only keeps the few miss buffers from the loads (bf16, docs/log.md, 2026-11-30): it is enough to ask for
// the first lines of each 4 KB, which hardware prefetchers do not enter by themselves, and towards a page's end for the
// first 4 KB of the next. The page after is asked for whole where lines take longer, which is int8, and where it lies
// elsewhere, since what follows in memory is then read in vain.
class Ahead {
  public:
    // `next`: the page to be read after `page`, or null.
    Ahead(KvFormat f, size_t d, const uint8_t* page, const uint8_t* next)
        : end_(page + KvPage::scales_offset(f, d)), next_(next), tail_(KvPage::scales_offset(f, d)) {
        const size_t bytes = KvPage::bytes(f, d);
        if (f != KvFormat::int8 && next == page + bytes && kFollowed < tail_) tail_ = kFollowed;
        if (next) ask_lines(next + KvPage::scales_offset(f, d), bytes - KvPage::scales_offset(f, d));
    }
    // n bytes at `at` are read now.
    void ask(const uint8_t* at, size_t n) const {
        const auto left = static_cast<size_t>(end_ - at);
        if (left > tail_) {
            if (reinterpret_cast<uintptr_t>(at) % kFollowed < n) ask_lines(at + kFollowed, kFirstBytes);
        } else if (next_) {
            ask_lines(next_ + (tail_ - left), n);
        }
    }

  private:
    static constexpr size_t kFollowed = 4096, kFirstBytes = 4 * 64;
    static void ask_lines(const uint8_t* at, size_t n) {
        // Into L2; in assembly, since gcc 12 drops calls of a function that does nothing but prefetch.
        for (size_t i = 0; i < n; i += 64) asm volatile("prefetcht1 %0" : : "m"(at[i]));
    }
    const uint8_t *end_, *next_;
    size_t tail_;
};

// Adds the products of N rows `a` (`depth` factors each) with columns [c0, c0 + C kLanes) of a (depth, width) matrix to
// sums; `ahead`, where there is one, hears what is read.
template <KvFormat F, size_t N, size_t C>
inline void times_page(const Factor<F>* const* a, size_t depth, const uint8_t* matrix, size_t width, size_t c0,
                       const Ahead* ahead, Vec (&sums)[N][C]) {
    constexpr size_t kBytes = F == KvFormat::int8 ? 1 : 4;  // a lane
    for (size_t k = 0; k < depth; ++k) {
        const uint8_t* at = matrix + (k * width + c0) * kBytes;
        if (ahead) ahead->ask(at, C * kLanes * kBytes);
        for (size_t c = 0; c < C; ++c) {
            const uint8_t* v = at + c * kLanes * kBytes;
            if constexpr (F == KvFormat::bf16) {
                for (size_t i = 0; i < N; ++i)
                    sums[i][c] = add_pairs(sums[i][c], reinterpret_cast<const uint32_t*>(v), a[i][k]);
            } else {
                const Vec x = F == KvFormat::f32 ? load(reinterpret_cast<const float*>(v))
                                                 : load_int8(reinterpret_cast<const int8_t*>(v));
                for (size_t i = 0; i < N; ++i) sums[i][c] = fma(set1(a[i][k]), x, sums[i][c]);
            }
        }
    }
}

// The scores of one page become its weights exp(score - highest), zero outside positions [first, n); returns by how
// much what was summed before shrinks. `highest` and `total` go on.
template <KvFormat F>
inline float soften(float* s, size_t first, size_t n, const float* value_scales, float& highest, float& total) {
    const auto hide = [&](float with) {
        for (size_t p = 0; p < first; ++p) s[p] = with;
        for (size_t p = n; p < kPage; ++p) s[p] = with;
    };
    hide(-INFINITY);
    Vec most = load(s);
    for (size_t p = kLanes; p < kPage; p += kLanes) most = max(most, load(s + p));
    const float of_page = largest(most), top = of_page <= highest ? highest : of_page;
    for (size_t p = 0; p < kPage; p += kLanes) store(s + p, exp(sub(load(s + p), set1(top))));
    hide(0);
    Vec sums = load(s);
    for (size_t p = kLanes; p < kPage; p += kLanes) sums = add(sums, load(s + p));
    const float shrink = top == highest ? 1.0f : std::exp(highest - top);
    total = total * shrink + sum(sums);
    highest = top;
    if (F == KvFormat::int8) {
        for (size_t p = 0; p < kPage; p += kLanes) store(s + p, mul(load(s + p), load(value_scales + p)));
        hide(0);  // the scale of what is not seen may be NaN, also of another text that had the page before
    }
    return shrink;
}

// Positions of the page at `position` that lie before all that query i sees, and those that lie not beyond it.
inline size_t unseen_of(const AttendArgs& a, size_t i, size_t position) {
    return a.first[i] <= position ? 0 : a.first[i] - position < kPage ? a.first[i] - position : kPage;
}
inline size_t seen_of(const AttendArgs& a, size_t i, size_t position) {
    const size_t limit = a.n_positions[i] < a.end ? a.n_positions[i] : a.end;
    return limit <= position ? 0 : limit - position < kPage ? limit - position : kPage;
}

// One page for queries [first, first + N), `q` being theirs: scores, softmax update, values. The page's format is F, and
// `page` its elements in format W, which is F or what they were made; `key_scales` are where the page itself has them.
template <KvFormat F, KvFormat W, size_t N>
void attend_page(const AttendArgs& a, size_t first, const Factor<W>* const* q, const uint8_t* page,
                 const float* key_scales, const Ahead* ahead, size_t position) {
    constexpr size_t kPair = W == KvFormat::bf16 ? 2 : 1;  // elements a factor
    const size_t dp = KvPage::padded(a.d), step = attend_partial_floats(a.d);
    float* const scores = a.scratch;
    float* const sums = a.partial + first * step;
    // The last query sees furthest, the first furthest back.
    const size_t seen = seen_of(a, first + N - 1, position), unseen = unseen_of(a, first, position);
    if (unseen >= seen) return;
    for (size_t c = 0; c < kPage; c += kColumns * kLanes) {
        Vec dots[N][kColumns];
        for (auto& row : dots)
            for (Vec& v : row) v = zero();
        if (c < seen && c + kColumns * kLanes > unseen)
            times_page<W, N>(q, (a.d + kPair - 1) / kPair, page, kPage, c, ahead, dots);
        for (size_t j = 0; j < kColumns; ++j) {
            const size_t at = c + j * kLanes;
            const Vec factor = F == KvFormat::int8 ? mul(set1(a.scale), load(key_scales + at)) : set1(a.scale);
            for (size_t i = 0; i < N; ++i) store(scores + i * kPage + at, mul(dots[i][j], factor));
        }
    }
    const Factor<W>* weights[N];
    for (size_t i = 0; i < N; ++i) {
        float* s = scores + i * kPage;
        float* own = sums + i * step;
        const size_t from = unseen_of(a, first + i, position), n = seen_of(a, first + i, position);
        if (from < n) {
            const float shrink = soften<F>(s, from, n, key_scales + kPage, own[dp], own[dp + 1]);
            if (shrink != 1)
                for (size_t d = 0; d < dp; d += kLanes) store(own + d, mul(load(own + d), set1(shrink)));
        } else {
            std::memset(s, 0, kPage * sizeof(float));
        }
        weights[i] = as_factors<W>(s, kPage, a.scratch + kQuad * kPage + i * kPage / 2);
    }
    for (size_t d = 0; d < dp; d += KvPage::kBlock) {
        const size_t width = KvPage::block_width(a.d, d);
        const uint8_t* values = page + KvPage::block_offset(W, a.d, d);
        const auto add_values = [&]<size_t C>(std::integral_constant<size_t, C>, size_t column) {
            float* own = sums + d + column;
            Vec out[N][C];
            for (size_t i = 0; i < N; ++i)
                for (size_t c = 0; c < C; ++c) out[i][c] = load(own + i * step + c * kLanes);
            times_page<W, N>(weights, (seen + kPair - 1) / kPair, values, width, column, ahead, out);
            for (size_t i = 0; i < N; ++i)
                for (size_t c = 0; c < C; ++c) store(own + i * step + c * kLanes, out[i][c]);
        };
        size_t column = 0;
        for (; column + kColumns * kLanes <= width; column += kColumns * kLanes)
            add_values(std::integral_constant<size_t, kColumns>{}, column);
        for (; column < width; column += kLanes) add_values(std::integral_constant<size_t, 1>{}, column);
    }
}

// `widen(page, d, to)` makes an F page's elements those of a W page, once for all queries, where W is another format.
template <KvFormat F, KvFormat W, class Widen>
void attend_as(const AttendArgs& a, Widen widen) {
    const size_t dp = KvPage::padded(a.d), step = attend_partial_floats(a.d);
    float* const factors = a.scratch + kQuad * kPage * 3 / 2;
    const Factor<W>* q[kAttendQueries];
    for (size_t i = 0; i < a.n_queries; ++i) {
        std::memset(a.partial + i * step, 0, step * sizeof(float));
        a.partial[i * step + dp] = -INFINITY;
        q[i] = as_factors<W>(a.q[i], a.d, factors + i * (dp + kLanes) / 2);
    }
    auto* const widened = reinterpret_cast<uint8_t*>(factors + kAttendQueries * (dp + kLanes) / 2);
    for (size_t position = a.begin; position < a.end; position += kPage) {
        const uint8_t *page = a.page_at(position),
                      *next = position + kPage < a.end_ahead ? a.page_at(position + kPage) : nullptr;
        const auto* scales = reinterpret_cast<const float*>(page + KvPage::scales_offset(F, a.d));
        const Ahead ahead(F, a.d, page, next);
        const uint8_t* elements = page;
        if constexpr (F != W) {
            ahead.ask(page, KvPage::scales_offset(F, a.d));
            widen(page, a.d, widened);
            elements = widened;
        }
        for (size_t i = 0; i < a.n_queries; i += kQuad) {
            const size_t n = a.n_queries - i < kQuad ? a.n_queries - i : kQuad;
            const auto take = n == 4   ? attend_page<F, W, 4>
                              : n == 3 ? attend_page<F, W, 3>
                              : n == 2 ? attend_page<F, W, 2>
                                       : attend_page<F, W, 1>;
            take(a, i, q + i, elements, scales, i || F != W ? nullptr : &ahead, position);
        }
    }
}

template <KvFormat F>
void attend(const AttendArgs& a) {
    attend_as<F, F>(a, nullptr);
}

// The table's rows of an ISA: every format, any M.
constexpr AttendKernel attend_row(std::string_view name, Isa isa, KvFormat format) {
    return {name,
            isa,
            format,
            1,
            SIZE_MAX,
            format == KvFormat::bf16   ? attend<KvFormat::bf16>
            : format == KvFormat::int8 ? attend<KvFormat::int8>
                                       : attend<KvFormat::f32>,
            format == KvFormat::bf16 ? 0x1p-8f : 0};
}

void merge(const float* partials, size_t n, size_t stride, size_t d, float* out) {
    const size_t dp = KvPage::padded(d);
    float highest = -INFINITY, total = 0;
    for (size_t c = 0; c < n; ++c) highest = std::fmax(highest, partials[c * stride + dp]);
    for (size_t i = 0; i < d; ++i) out[i] = 0;
    for (size_t c = 0; c < n; ++c) {
        const float* own = partials + c * stride;
        if (own[dp + 1] == 0) continue;  // it saw none of this chunk
        const float factor = own[dp] == highest ? 1.0f : std::exp(own[dp] - highest);
        total += own[dp + 1] * factor;
        for (size_t i = 0; i < d; ++i) out[i] += own[i] * factor;
    }
    for (size_t i = 0; i < d; ++i) out[i] /= total;
}

// Largest magnitude over 127, and its inverse, 0 where all codes are 0. A vector that holds NaN or infinity has NaN for
// its scale, so that whoever sees it sees that: its codes are numbers whatever it holds.
inline float int8_scale(const float* x, size_t d, float* inverse) {
    constexpr uint32_t kInfinity = 0x7F800000;
    uint32_t bits = 0;  // magnitudes are in the order of their bits, infinity and NaN behind all numbers
    for (size_t i = 0; i < d; ++i) {
        const uint32_t of_one = std::bit_cast<uint32_t>(x[i]) & 0x7FFFFFFF;
        bits = of_one > bits ? of_one : bits;
    }
    const float most = std::bit_cast<float>(bits);
    *inverse = bits < kInfinity && most > 1e-36f ? 127.0f / most : 0.0f;  // below, the inverse would be infinite
    return bits < kInfinity ? most / 127.0f : NAN;
}

inline uint8_t int8_code(float x, float inverse) {
    return inverse == 0 ? 0 : static_cast<uint8_t>(static_cast<int8_t>(std::nearbyint(x * inverse)));
}

// f(begin, first, width) for each block of a page's values: where `row` of it lies, a position's values or, in bf16, two
// positions' pairs of them; its first dimension; and its dimensions.
template <class F>
inline void each_block(KvFormat format, uint8_t* page, size_t row, size_t d, F f) {
    const size_t element = KvPage::element_bytes(format) * (format == KvFormat::bf16 ? 2 : 1);
    for (size_t first = 0; first < KvPage::padded(d); first += KvPage::kBlock) {
        const size_t width = KvPage::block_width(d, first);
        f(page + KvPage::block_offset(format, d, first) + row * width * element, first, width);
    }
}

void kv_store(KvFormat format, uint8_t* page, size_t slot, size_t d, const float* k, const float* v) {
    if (format == KvFormat::int8) {
        auto* scales = reinterpret_cast<float*>(page + KvPage::scales_offset(format, d));
        float k_inverse, v_inverse;
        scales[slot] = int8_scale(k, d, &k_inverse);
        scales[kPage + slot] = int8_scale(v, d, &v_inverse);
        for (size_t i = 0; i < d; ++i) page[i * kPage + slot] = int8_code(k[i], k_inverse);
        each_block(format, page, slot, d, [&](uint8_t* to, size_t first, size_t width) {
            for (size_t i = 0; i < width; ++i) to[i] = first + i < d ? int8_code(v[first + i], v_inverse) : 0;
        });
    } else if (format == KvFormat::bf16) {
        auto* keys = reinterpret_cast<uint16_t*>(page);
        for (size_t i = 0; i < d + d % 2; ++i) keys[(i / 2 * kPage + slot) * 2 + i % 2] = i < d ? to_bf16(k[i]) : 0;
        each_block(format, page, slot / 2, d, [&](uint8_t* at, size_t first, size_t width) {
            auto* to = reinterpret_cast<uint16_t*>(at) + slot % 2;
            for (size_t i = 0; i < width; ++i) to[2 * i] = first + i < d ? to_bf16(v[first + i]) : 0;
        });
    } else {
        auto* keys = reinterpret_cast<float*>(page);
        for (size_t i = 0; i < d; ++i) keys[i * kPage + slot] = k[i];
        each_block(format, page, slot, d, [&](uint8_t* at, size_t first, size_t width) {
            auto* to = reinterpret_cast<float*>(at);
            for (size_t i = 0; i < width; ++i) to[i] = first + i < d ? v[first + i] : 0;
        });
    }
}

// Element by element, so that other threads may store the slots before meanwhile.
void kv_clear(KvFormat format, uint8_t* page, size_t slot, size_t d) {
    const size_t element = KvPage::element_bytes(format), pair = format == KvFormat::bf16 ? 2 : 1;  // in a lane
    for (size_t i = 0; i < d; i += pair)
        std::memset(page + (i * kPage + slot * pair) * element, 0, (kPage - slot) * pair * element);
    const bool splits = slot % pair != 0;  // two positions' pairs, of which one is another thread's
    if (splits)
        each_block(format, page, slot / pair, d, [](uint8_t* at, size_t, size_t width) {
            for (size_t i = 0; i < width; ++i) reinterpret_cast<uint16_t*>(at)[2 * i + 1] = 0;
        });
    const size_t row = slot / pair + splits, n_rows = kPage / pair - row;
    each_block(format, page, row, d,
               [&](uint8_t* at, size_t, size_t width) { std::memset(at, 0, n_rows * width * pair * element); });
}
