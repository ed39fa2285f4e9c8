// Softmax attention on AMX BF16, for the rows of prompts; included once over the tile unit and once over its emulation.
// attention.inl says what it computes.
//
//   tiles     0-3 sums (queries x 16 positions or dimensions), 4 queries or weights (queries x 32), 5-7 keys or values
//   order     4 pages together: all their scores; each query's highest; then, 32 positions at a time, their weights
//             and these times the values of up to 64 dimensions; after that the other dimensions. Sums stay in tiles,
//             and what was summed before shrinks once in 256 positions. Which pages are together is the same for all
//   pages     bf16: tiles are loaded where they lie; int8: one page's keys and 4 pages' values become bf16 in scratch
//   bound     tdpbf16ps, 16 cycles a product, D / 8 + Dp / 8 of them a page; exp takes nearly as long, partly beside
//   accuracy  queries (times the scale) and softmax weights (times int8's scales) rounded to bfloat16, sums in
//             float32, subnormals as zero
//
// What a query does not see weighs exactly 0 and, where it is finite, adds nothing: sums are the same bits whoever
// shares the tiles.

constexpr size_t kTileRowBytes = 64;
constexpr size_t kTogether = 4 * kPage;  // positions
constexpr size_t kHalf = kPage / 2;      // positions that one product sums over
constexpr size_t kKeyRowBytes = kPage * 4, kScoreRowBytes = kTogether * sizeof(float);
static_assert(kAttendQueries == 16 && KvPage::kBlock == 4 * 16);  // a tile of sums has 16 rows and 16 columns

// What a thread's scratch holds, in bytes from its begin.
struct TiledScratch {
    explicit constexpr TiledScratch(size_t d)
        : key_rows((d + 1) / 2 < 16 ? 16 : (d + 1) / 2),
          n_products((key_rows + 15) / 16),
          scores(kAttendQueries * n_products * kTileRowBytes),
          keys(scores + kAttendQueries * kScoreRowBytes),
          values(keys + key_rows * kKeyRowBytes),
          end(values + kTogether * KvPage::padded(d) * 2) {}
    size_t key_rows, n_products;       // pairs of dimensions, at least a tile of them; products that a score sums
    size_t scores, keys, values, end;  // the queries come first
};
static_assert([] {
    for (size_t d = 1; d <= 1024; ++d)
        if (TiledScratch(d).end > attend_scratch_floats(d) * sizeof(float)) return false;
    return true;
}());

// 2^x for x <= 0, within 2 units in the last place: 2^floor(x) times a polynomial in the rest, which is within 2^-23.5
// of 2^rest and exactly 1 at 0. Exactly 0 for -infinity.
inline __m512 power_of_two(__m512 x) {
    const __m512 rest = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 y = _mm512_set1_ps(0x1.e97532p-10f);
    for (const float c : {0x1.277846p-7f, 0x1.c91ce8p-5f, 0x1.ebdb56p-3f, 0x1.62e4bap-1f, 1.0f})
        y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(c));
    return _mm512_scalef_ps(y, x);  // which takes the floor itself
}

// 32 floats as bfloat16, to nearest even.
inline void store_rounded(void* to, __m512 first, __m512 second) {
    _mm512_storeu_si512(to, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first)));
}

// Lanes [begin, end) of 16, either of which may lie outside.
inline __mmask16 lanes(ptrdiff_t begin, ptrdiff_t end) {
    const auto before = [](ptrdiff_t n) { return n <= 0 ? 0u : n >= 16 ? 0xFFFFu : (1u << n) - 1; };
    return static_cast<__mmask16>(before(end) & ~before(begin));
}

// f<C>() for each sums tile C in [begin, end), which are of 0 .. 3; its B tile is kTileB<C>.
template <int C>
constexpr int kTileB = 5 + C % 3;
template <class F>
inline void each_sums(size_t begin, size_t end, F f) {
    [&]<int... C>(std::integer_sequence<int, C...>) {
        ((begin <= C && C < end ? f.template operator()<C>() : void()), ...);
    }(std::make_integer_sequence<int, 4>{});
}

// What is read next, asked for into L2 a part at a time, between other work.
class NextRead {
  public:
    // `bytes` at `at`, in so many calls of ask().
    void is(const uint8_t* at, size_t bytes, size_t n_calls) {
        at_ = at, end_ = at + bytes, part_ = ((bytes + kStep - 1) / kStep + n_calls - 1) / n_calls * kStep;
    }
    void ask() {
        const uint8_t* at = at_;
        for (const uint8_t* stop = std::min(at + part_, end_); at < stop; at += kStep)
            for (size_t line = 0; line < kStep; line += 64) __builtin_prefetch(at + line, 0, 2);
        at_ = at;
    }

  private:
    static constexpr size_t kStep = 256;  // line by line it would be as many instructions as all the rest
    const uint8_t *at_ = nullptr, *end_ = nullptr;
    size_t part_ = 0;  // bytes
};

// One chunk for one item. Positions are counted from the first page of the 4 that are taken together.
template <KvFormat F>
class TiledAttention {
  public:
    explicit TiledAttention(const AttendArgs& a)
        : a_(a), at_(a.d), dp_(KvPage::padded(a.d)), scratch_(reinterpret_cast<uint8_t*>(a.scratch)) {
        _mm512_store_ps(highest_, _mm512_set1_ps(-INFINITY));
        for (size_t i = 0; i < a.n_queries; ++i) pack_query(i);
        // Of a head with less than 32 dimensions the rest of a tile, which no page fills.
        std::memset(scratch_ + at_.keys + n_pairs() * kKeyRowBytes, 0, (at_.key_rows - n_pairs()) * kKeyRowBytes);
    }

    // Positions [begin, end) of the text, which lie between two multiples of kTogether; begin is that of a page.
    void add(size_t begin, size_t end) {
        n_pages_ = (end - begin + kPage - 1) / kPage;
        for (size_t i = 0; i < n_pages_; ++i) pages_[i] = a_.page_at(begin + i * kPage);
        next_page_ = end < a_.end_ahead ? a_.page_at(end) : nullptr;
        for (size_t i = 0; i < a_.n_queries; ++i) {
            seen_begin_[i] = std::clamp(a_.first[i], begin, end) - begin;
            seen_end_[i] = std::clamp(a_.n_positions[i], begin, end) - begin;
        }
        for (size_t page = 0; page < n_pages_; ++page) score_page(page);
        find_highest();
        for (size_t first = 0; first < dp_; first += KvPage::kBlock) add_values(first);
        is_first_ = false;
    }

    void finish() {
        for (size_t i = 0; i < a_.n_queries; ++i) {
            float* own = a_.partial + i * attend_partial_floats(a_.d) + dp_;
            own[0] = highest_[i] * 0.693147181f;  // ln 2
            own[1] = _mm512_reduce_add_ps(totals_[i]);
        }
    }

  private:
    size_t n_pairs() const { return (a_.d + 1) / 2; }
    // The first pair of dimensions of a product. The last product of a head begins early where a whole tile from there
    // on would pass the head's end: it repeats what the one before took in, times zeros.
    size_t first_pair(size_t product) const { return std::min(product * 16, at_.key_rows - 16); }
    // 32 positions each, from the first that anybody sees to the last.
    size_t first_half() const { return seen_begin_[0] / kHalf; }
    size_t last_half() const { return (seen_end_[a_.n_queries - 1] + kHalf - 1) / kHalf; }
    float* scores_of(size_t query) { return reinterpret_cast<float*>(scratch_ + at_.scores) + query * kTogether; }
    // 32 positions' values as the page has them, of the block that begins at dimension `first`.
    const uint8_t* stored_values(size_t half, size_t first) const {
        return pages_[half / 2] + KvPage::block_offset(F, a_.d, first) +
               half % 2 * kHalfBytes * KvPage::block_width(a_.d, first);
    }
    static constexpr size_t kHalfBytes = kHalf * KvPage::element_bytes(F);  // of one dimension
    // The half of a page's values that is asked for before its first or second 32 positions are taken.
    const uint8_t* half_of_values(size_t half) const {
        return pages_[half / 2] + KvPage::values_offset(F, a_.d) + half % 2 * kHalfBytes * dp_;
    }

    // Query i times the scale, and log2(e) so that powers of two are taken.
    void pack_query(size_t i) {
        const __m512 factor = _mm512_set1_ps(a_.scale * 1.44269504f);
        for (size_t product = 0; product < at_.n_products; ++product) {
            const auto dims_at = [&](size_t dim) {  // 16 of them, those that other products have taken as zeros
                const auto from = static_cast<ptrdiff_t>(product * 32 - dim), to = static_cast<ptrdiff_t>(a_.d - dim);
                return _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes(from, to), a_.q[i] + dim), factor);
            };
            const size_t dim = 2 * first_pair(product);
            store_rounded(scratch_ + (i * at_.n_products + product) * kTileRowBytes, dims_at(dim), dims_at(dim + 16));
        }
    }

    // Keys as tiles have them: in place, or brought into that form.
    const uint8_t* tiled_keys(size_t page) {
        uint8_t* to = scratch_ + at_.keys;
        if constexpr (F == KvFormat::int8) {
            for (size_t pair = 0; pair < n_pairs(); ++pair)
                for (size_t p = 0; p < kPage; p += 16) {
                    const uint8_t* codes = pages_[page] + 2 * pair * kPage + p;
                    _mm512_storeu_si512(to + pair * kKeyRowBytes + p * 4, bf16_lanes(codes, codes + kPage));
                }
            return to;
        }
        if (n_pairs() >= 16) return pages_[page];
        std::memcpy(to, pages_[page], n_pairs() * kKeyRowBytes);
        return to;
    }
    void widen_values(size_t half) {
        for (size_t first = 0; first < dp_; first += KvPage::kBlock) {
            const size_t width = KvPage::block_width(a_.d, first);
            const uint8_t* from = stored_values(half, first);
            uint8_t* to = scratch_ + widened(half, first);
            for (size_t row = 0; row < kHalf; row += 2, from += 2 * width)
                for (size_t d = 0; d < width; d += 16, to += 64)
                    _mm512_storeu_si512(to, bf16_lanes(from + d, from + width + d));
        }
    }
    size_t widened(size_t half, size_t first) const { return at_.values + kHalf * 2 * (half * dp_ + first); }
    const uint8_t* tiled_values(size_t half, size_t first) const {
        return F == KvFormat::int8 ? scratch_ + widened(half, first) : stored_values(half, first);
    }
    template <int T>
    static void load_page_tile(const uint8_t* at, size_t stride) {
        if constexpr (F == KvFormat::int8)
            tile_load<T>(at, stride);
        else
            tile_load_once<T>(at, stride);
    }

    // The scores of a page, in powers of two, but for tiles that nobody sees.
    void score_page(size_t page) {
        const size_t position = page * kPage, n_products = at_.n_products;
        const auto tile_of = [&](size_t seen) {
            return seen <= position ? 0 : std::min<size_t>(4, (seen - position) / 16);
        };
        const size_t first = tile_of(seen_begin_[0]), last = tile_of(seen_end_[a_.n_queries - 1] + 15);
        const uint8_t* keys = tiled_keys(page);
        if (page + 1 < n_pages_)
            next_.is(pages_[page + 1], KvPage::values_offset(F, a_.d), 4 * n_products);
        else if (first_half() < last_half())
            next_.is(half_of_values(first_half()), kHalfBytes * dp_, 4 * n_products);
        each_sums(first, last, []<int C>() { tile_zero<C>(); });
        for (size_t product = 0; product < n_products; ++product) {
            tile_load<4>(scratch_ + product * kTileRowBytes, n_products * kTileRowBytes);
            const uint8_t* rows = keys + first_pair(product) * kKeyRowBytes;
            each_sums(first, last, [&]<int C>() {
                load_page_tile<kTileB<C>>(rows + C * kTileRowBytes, kKeyRowBytes);
                tile_dot<C, 4, kTileB<C>>();
                next_.ask();
            });
        }
        each_sums(first, last, [&]<int C>() { tile_store<C>(scores_of(0) + position + 16 * C, kScoreRowBytes); });
        if constexpr (F == KvFormat::int8)
            for (size_t i = 0; i < a_.n_queries; ++i)
                for (size_t p = 0; p < kPage; p += 16) {
                    float* s = scores_of(i) + position + p;
                    _mm512_storeu_ps(s, _mm512_mul_ps(_mm512_loadu_ps(s), _mm512_loadu_ps(scales_of(page) + p)));
                }
    }
    const float* scales_of(size_t page) const {  // of 64 keys, then of 64 values
        return reinterpret_cast<const float*>(pages_[page] + KvPage::scales_offset(F, a_.d));
    }

    // Each query's highest score so far, those that it does not see made -infinity; what was summed before shrinks.
    void find_highest() {
        const __m512 before = _mm512_load_ps(highest_);
        for (size_t i = 0; i < a_.n_queries; ++i) {
            float* s = scores_of(i);
            hide(s, 0, seen_begin_[i]);
            hide(s, seen_end_[i], n_pages_ * kPage);
            __m512 most = _mm512_set1_ps(highest_[i]);
            for (size_t p = 0; p < n_pages_ * kPage; p += 16) most = _mm512_max_ps(most, _mm512_loadu_ps(s + p));
            highest_[i] = _mm512_reduce_max_ps(most);
        }
        const __m512 now = _mm512_load_ps(highest_), unseen = _mm512_set1_ps(-INFINITY);
        _mm512_store_ps(subtracted_, _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(now, unseen, _CMP_NEQ_UQ), now));
        if (is_first_) return;
        const __mmask16 rises = _mm512_cmp_ps_mask(before, now, _CMP_NEQ_OQ);
        alignas(64) float shrinks[kAttendQueries];
        _mm512_store_ps(shrinks, power_of_two(_mm512_sub_ps(before, now)));
        for (size_t i = 0; i < a_.n_queries; ++i) {
            if (!(rises >> i & 1)) continue;
            const __m512 shrink = _mm512_set1_ps(shrinks[i]);
            totals_[i] = _mm512_mul_ps(totals_[i], shrink);
            float* own = a_.partial + i * attend_partial_floats(a_.d);
            for (size_t d = 0; d < dp_; d += 16)
                _mm512_storeu_ps(own + d, _mm512_mul_ps(_mm512_loadu_ps(own + d), shrink));
        }
    }
    static void hide(float* scores, size_t begin, size_t end) {
        for (size_t p = begin / 16 * 16; p < end; p += 16)
            _mm512_mask_storeu_ps(scores + p, lanes(static_cast<ptrdiff_t>(begin - p), static_cast<ptrdiff_t>(end - p)),
                                  _mm512_set1_ps(-INFINITY));
    }

    // The scores of 32 positions become weights, which take the place of scores that are weights already.
    void weigh(size_t half) {
        if constexpr (F == KvFormat::int8) widen_values(half);
        if (half + 1 < last_half())
            next_.is(half_of_values(half + 1), kHalfBytes * dp_, a_.n_queries);
        else
            next_.is(next_page_, next_page_ ? KvPage::values_offset(F, a_.d) : 0, a_.n_queries);
        for (size_t i = 0; i < a_.n_queries; ++i) {
            const __m512 highest = _mm512_set1_ps(subtracted_[i]);
            const float* s = scores_of(i) + half * kHalf;
            __m512 first = power_of_two(_mm512_sub_ps(_mm512_loadu_ps(s), highest));
            __m512 second = power_of_two(_mm512_sub_ps(_mm512_loadu_ps(s + 16), highest));
            totals_[i] = _mm512_add_ps(totals_[i], _mm512_add_ps(first, second));
            if constexpr (F == KvFormat::int8) {  // what weighs nothing may have no scale yet
                const float* scales = scales_of(half / 2) + kPage + half % 2 * kHalf;
                const auto scaled = [](__m512 w, const float* by) {
                    const __mmask16 counts = _mm512_cmp_ps_mask(w, _mm512_setzero_ps(), _CMP_NEQ_UQ);
                    return _mm512_maskz_mul_ps(counts, w, _mm512_loadu_ps(by));
                };
                first = scaled(first, scales), second = scaled(second, scales + 16);
            }
            store_rounded(weights_at(half) + i * kScoreRowBytes, first, second);
            next_.ask();
        }
    }
    uint8_t* weights_at(size_t half) { return scratch_ + at_.scores + half * kTileRowBytes; }

    // Weights, which the first block makes, times values of the block of dimensions that begins at `first`.
    void add_values(size_t first) {
        const size_t stride = attend_partial_floats(a_.d) * sizeof(float), width = KvPage::block_width(a_.d, first);
        float* sums = a_.partial + first;
        each_sums(0, width / 16, [&]<int C>() { is_first_ ? tile_zero<C>() : tile_load<C>(sums + 16 * C, stride); });
        for (size_t half = first_half(); half < last_half(); ++half) {
            if (first == 0) weigh(half);
            tile_load<4>(weights_at(half), kScoreRowBytes);
            const uint8_t* rows = tiled_values(half, first);
            each_sums(0, width / 16, [&]<int C>() {
                load_page_tile<kTileB<C>>(rows + C * kTileRowBytes, width * 4);
                tile_dot<C, 4, kTileB<C>>();
            });
        }
        each_sums(0, width / 16, [&]<int C>() { tile_store<C>(sums + 16 * C, stride); });
    }

    const AttendArgs& a_;
    const TiledScratch at_;
    const size_t dp_;
    uint8_t* const scratch_;
    bool is_first_ = true;
    alignas(64) float highest_[kAttendQueries], subtracted_[kAttendQueries];  // 0 where nothing has been seen
    __m512 totals_[kAttendQueries] = {};                                      // of weights, by lane
    // Of the pages that are taken together.
    const uint8_t *pages_[kTogether / kPage] = {}, *next_page_ = nullptr;
    size_t n_pages_ = 0;
    size_t seen_begin_[kAttendQueries] = {}, seen_end_[kAttendQueries] = {};
    NextRead next_;
};

template <KvFormat F>
void attend_tiles(const AttendArgs& a) {
    configure_tiles({a.n_queries, a.n_queries, a.n_queries, a.n_queries, a.n_queries, 16, 16, 16});
    TiledAttention<F> attention(a);
    for (size_t begin = a.begin, end; begin < a.end; begin = end) {
        end = std::min(begin / kTogether * kTogether + kTogether, a.end);
        attention.add(begin, end);
    }
    attention.finish();
    release_tiles();
}
