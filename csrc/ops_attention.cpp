// The two ops of attention: rotate and remember, then attend.
#include <algorithm>
#include <cmath>

#include "ops.h"

namespace fourfold {

void CacheOp::run(Program& p, Worker& worker, const Step& step) const {
    const size_t r = worker.rank, d = Ops::options(p).head_dim;
    const Buffer &queries = Ops::buffer(p, q), &keys = Ops::buffer(p, k), &values = Ops::buffer(p, v);
    Program::Cache& cache = Ops::cache(p, layer);
    const KvFormat kv = Ops::options(p).kv;
    const size_t n_q = queries.width[r] / d, n_kv = cache.n_heads[r], n_heads = n_q + n_kv;
    const auto [begin, end] = worker.share(step.n_tokens() * n_heads);
    for (size_t item = begin; item < end; ++item) {
        const size_t m = item / n_heads, head = item % n_heads;
        const auto position = static_cast<size_t>(step.row_position[m]);
        const float *c = Ops::cosines(p, position), *s = Ops::sines(p, position);
        if (head < n_q) {
            Ops::rows(p).rope(queries.row(r, m) + head * d, c, s, d);
            continue;
        }
        const size_t h = head - n_q;
        const int32_t page = step.sequences[static_cast<size_t>(step.row_sequence[m])].pages[position / kPage];
        uint8_t* to = cache.pages[r].as() + (static_cast<size_t>(page) * n_kv + h) * KvPage::bytes(kv, d);
        Ops::rows(p).rope(keys.row(r, m) + h * d, c, s, d);
        Ops::rows(p).kv_store(kv, to, position % kPage, d, keys.row(r, m) + h * d, values.row(r, m) + h * d);
    }
}

AttendOp::AttendOp(int layer, int q, std::vector<std::vector<int>> kv_of_head, int dst) : layer(layer), q(q), dst(dst) {
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

// Items are (rows of a sequence, query heads that share a KV head). Threads take them in turn, so that the later rows
// of a prompt, which see more, spread evenly; where there are few, every query head is an item of its own.
void AttendOp::run(Program& p, Worker& worker, const Step& step) const {
    const size_t r = worker.rank, d = Ops::options(p).head_dim;
    const Buffer &queries = Ops::buffer(p, q), &to = Ops::buffer(p, dst);
    const Program::Cache& cache = Ops::cache(p, layer);
    const KvFormat kv = Ops::options(p).kv;
    const size_t page_bytes = KvPage::bytes(kv, d), n_kv = cache.n_heads[r];
    const bool by_head = step.blocks.size() * groups[r].size() < 2 * worker.n_threads;

    AttendArgs args{};
    args.page_stride = n_kv * page_bytes;
    args.d = d;
    args.scale = 1.0f / std::sqrt(static_cast<float>(d));
    args.format = kv;
    args.scratch = reinterpret_cast<float*>(Ops::scratch(p, worker));
    const auto attend = [&](const SequenceRows& sequence, size_t row, size_t n_rows, const Group& g) {
        args.pages = cache.pages[r].as() + g.kv_head * page_bytes;
        args.page_table = sequence.pages;
        args.n_queries = 0;
        for (size_t m = row; m < row + n_rows; ++m)
            for (size_t h = g.head; h < g.head + g.count; ++h, ++args.n_queries) {
                args.q[args.n_queries] = queries.row(r, m) + h * d;
                args.out[args.n_queries] = to.row(r, m) + h * d;
                args.n_positions[args.n_queries] = static_cast<size_t>(step.row_position[m]) + 1;
            }
        Ops::rows(p).attend(args);
    };
    size_t item = 0;
    for (const RowBlock& block : step.blocks)
        for (const Group& g : groups[r]) {
            const size_t pieces = by_head ? g.count : 1, heads = g.count / pieces;
            for (size_t i = 0; i < pieces; ++i, ++item) {
                if (item % worker.n_threads != worker.thread) continue;
                const size_t rows_each = std::max<size_t>(1, kAttendQueries / heads);
                for (size_t m = 0; m < block.n_rows; m += rows_each)
                    attend(step.sequences[block.sequence], block.row + m, std::min(rows_each, block.n_rows - m),
                           {g.head + i * heads, heads, g.kv_head});
            }
        }
}

}  // namespace fourfold
