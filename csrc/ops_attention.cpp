// The two ops of attention: rotate and remember, then attend.
#include <algorithm>

#include "ops.h"

namespace fourfold {

void CacheOp::run(Program& p, Worker& worker, const Step& step) const {
    const size_t r = worker.rank, d = Ops::options(p).head_dim;
    const Buffer &queries = Ops::buffer(p, q), &keys = Ops::buffer(p, k), &values = Ops::buffer(p, v);
    Program::Cache& cache = Ops::cache(p, layer);
    const KvFormat kv = Ops::options(p).kv;
    const size_t n_q = queries.width[r] / d, n_kv = cache.runs[r].n_heads, n_heads = n_q + n_kv;
    const RotaryTable& table = Ops::rotary(p, rotary);
    const size_t half = table.dim / 2;
    const auto turn = [&](float* head, const Vectors& norm, size_t position) {
        if (!norm.empty())
            Ops::rows(p).scale_row(head, norm[r].data(), Ops::rows(p).rms_factor(head, norms.eps, d), d, head);
        Ops::rows(p).rope(head, &table.cosines[position * half], &table.sines[position * half], table.dim);
    };
    const auto [begin, end] = worker.share(step.n_tokens() * n_heads);
    for (size_t item = begin; item < end; ++item) {
        const size_t m = item / n_heads, head = item % n_heads;
        const auto position = static_cast<size_t>(step.row_position[m]);
        if (head < n_q) {
            turn(queries.row(r, m) + head * d, norms.q, position);
            continue;
        }
        const size_t h = head - n_q;
        const SequenceRows& sequence = step.sequences[static_cast<size_t>(step.row_sequence[m])];
        const auto page = static_cast<size_t>(sequence.pages[position / kPage]);
        uint8_t* to = cache.pages[r].as() + cache.runs[r].offset(page, h);
        const size_t slot = position % kPage;
        turn(keys.row(r, m) + h * d, norms.k, position);
        Ops::rows(p).kv_store(kv, to, slot, d, keys.row(r, m) + h * d, values.row(r, m) + h * d);
        const bool is_last = m + 1 == static_cast<size_t>(sequence.row_begin + sequence.n_rows);
        const bool began_here = position - slot >= static_cast<size_t>(sequence.start);
        if (is_last && began_here && slot + 1 < kPage) Ops::rows(p).kv_clear(kv, to, slot + 1, d);
    }
}

AttendOp::AttendOp(int layer, int q, std::vector<std::vector<int>> kv_of_head, float scale, size_t window, int dst)
    : layer(layer), q(q), dst(dst), scale(scale), window(window) {
    for (const std::vector<int>& heads : kv_of_head) {
        std::vector<Group>& runs = groups.emplace_back();
        for (size_t h = 0; h < heads.size(); ++h) {
            const auto kv = static_cast<size_t>(heads[h]);
            if (!runs.empty() && runs.back().kv_head == kv && runs.back().count < kAttendQueries)
                ++runs.back().count;
            else
                runs.push_back({h, 1, kv});
        }
    }
}

namespace {

// Rows of one sequence and query heads that share a KV head: at most kAttendQueries queries.
struct Item {
    const SequenceRows* sequence;
    size_t row, n_rows, head, n_heads, kv_head;
};

// Calls f(item) for every item of a step, in the same order on every thread; one query head each where by_head. A
// prompt's blocks of rows follow one another, so that a KV head's pages are still in the cache for the next.
template <class F>
void each_item(const Step& step, const std::vector<AttendOp::Group>& groups, bool by_head, F f) {
    for (const AttendOp::Group& g : groups)
        for (const RowBlock& block : step.blocks) {
            const size_t n_heads = by_head ? 1 : g.count, rows = kAttendQueries / n_heads;
            for (size_t h = 0; h < g.count; h += n_heads)
                for (size_t m = 0; m < block.n_rows; m += rows)
                    f(Item{&step.sequences[block.sequence], block.row + m, std::min(rows, block.n_rows - m), g.head + h,
                           n_heads, g.kv_head});
        }
}

size_t count_items(const Step& step, const std::vector<AttendOp::Group>& groups, bool by_head) {
    size_t n = 0;
    each_item(step, groups, by_head, [&](const Item&) { ++n; });
    return n;
}

}  // namespace

// Threads take items in turn, so that the later rows of a prompt, which see more, spread evenly. Where there are few,
// as in decoding, they take the items' chunks in turn, and merge them after a barrier.
void AttendOp::run(Program& p, Worker& worker, const Step& step) const {
    const size_t r = worker.rank, d = Ops::options(p).head_dim;
    const Buffer &queries = Ops::buffer(p, q), &to = Ops::buffer(p, dst);
    const Program::Cache& cache = Ops::cache(p, layer);
    const AttendKernel& kernel = Ops::attend_kernel(p, step.n_tokens(), step.tokens_class);
    const size_t chunk = Ops::attend_chunk(p);
    const size_t query_floats = attend_partial_floats(d), item_floats = kAttendQueries * query_floats;
    const auto positions_of = [&](const Item& i) {
        return static_cast<size_t>(step.row_position[i.row + i.n_rows - 1]) + 1;  // of its last row
    };
    const auto first_of = [&](size_t position) { return position < window ? 0 : position + 1 - window; };
    const auto begin_of = [&](const Item& i) {  // of the page that its first row sees first
        return first_of(static_cast<size_t>(step.row_position[i.row])) / kPage * kPage;
    };
    const auto chunks_of = [&](const Item& i) {  // [first, last): what lies before them costs nothing
        return std::pair{begin_of(i) / chunk, (positions_of(i) + chunk - 1) / chunk};
    };

    size_t most_chunks = 0;
    for (const SequenceRows& s : step.sequences) {
        const size_t first = first_of(static_cast<size_t>(s.start)) / chunk;
        most_chunks = std::max(most_chunks, (static_cast<size_t>(s.start + s.n_rows) + chunk - 1) / chunk - first);
    }
    const size_t few = Program::kSplitItems * worker.n_threads;
    const bool by_head = count_items(step, groups[r], false) * most_chunks < few;
    const bool is_split = most_chunks > 1 && count_items(step, groups[r], by_head) < few;

    AttendArgs args{};
    args.pages = cache.pages[r].as();
    args.runs = cache.runs[r];
    args.d = d;
    args.scale = scale;
    args.scratch = reinterpret_cast<float*>(Ops::scratch(p, worker));
    const auto attend = [&](const Item& i, size_t c, float* partial) {
        args.kv_head = i.kv_head;
        args.page_table = i.sequence->pages;
        args.begin = std::max(c * chunk, begin_of(i));
        args.end = std::min((c + 1) * chunk, positions_of(i));
        args.end_ahead = is_split ? args.end : positions_of(i);  // the next chunk is this thread's too, or it is not
        args.partial = partial;
        args.n_queries = 0;
        for (size_t m = i.row; m < i.row + i.n_rows; ++m)
            for (size_t h = i.head; h < i.head + i.n_heads; ++h, ++args.n_queries) {
                args.q[args.n_queries] = queries.row(r, m) + h * d;
                const auto position = static_cast<size_t>(step.row_position[m]);
                args.first[args.n_queries] = first_of(position);
                args.n_positions[args.n_queries] = position + 1;
            }
        kernel.run(args);
    };
    const auto merge = [&](const Item& i, size_t query, const float* partials) {
        float* out = to.row(r, i.row + query / i.n_heads) + (i.head + query % i.n_heads) * d;
        const auto [first, last] = chunks_of(i);
        Ops::rows(p).merge(partials + query * query_floats, last - first, item_floats, d, out);
    };

    size_t turn = 0, at = 0;
    const auto is_mine = [&] { return turn++ % worker.n_threads == worker.thread; };
    if (!is_split) {
        float* partials = args.scratch + attend_scratch_floats(d);
        each_item(step, groups[r], by_head, [&](const Item& i) {
            if (!is_mine()) return;
            const auto [first, last] = chunks_of(i);
            for (size_t c = first; c < last; ++c) attend(i, c, partials + (c - first) * item_floats);
            for (size_t query = 0; query < i.n_rows * i.n_heads; ++query) merge(i, query, partials);
        });
        return;
    }
    float* shared = Ops::partials(p, r);
    const size_t stride = most_chunks * item_floats;
    each_item(step, groups[r], by_head, [&](const Item& i) {
        float* partials = shared + at++ * stride;
        const auto [first, last] = chunks_of(i);
        for (size_t c = first; c < last; ++c)
            if (is_mine()) attend(i, c, partials + (c - first) * item_floats);
    });
    worker.barrier();
    turn = at = 0;
    each_item(step, groups[r], by_head, [&](const Item& i) {
        const float* partials = shared + at++ * stride;
        for (size_t query = 0; query < i.n_rows * i.n_heads; ++query)
            if (is_mine()) merge(i, query, partials);
    });
}

}  // namespace fourfold
