#include "ops.h"

#include <algorithm>
#include <cstring>

namespace fourfold {

namespace {
constexpr size_t kLine = 16;  // floats a cache line: threads never share one they write
}

void EmbedOp::run(Program& p, Worker& worker, const Step& step) const {
    const Weight& w = Ops::weight(p, weight);
    const Buffer& to = Ops::buffer(p, dst);
    const auto [begin, end] = worker.share(step.n_tokens());
    auto* row = reinterpret_cast<float*>(Ops::scratch(p, worker));
    for (size_t m = begin; m < end; ++m) {
        const auto token = static_cast<size_t>(step.tokens[m]);
        for (size_t r = 0; r < worker.n_ranks; ++r) {
            const Weight::Slice& s = w.slice(r);
            size_t local = 0;
            for (const Range& range : s.plan.outputs) {
                if (token >= range.begin && token < range.end) {
                    Ops::rows(p).unpack_row(w.format, s.panels.as(), s.scales.as<float>(), local + token - range.begin,
                                            s.k_tiles, row);
                    std::transform(row, row + w.k, to.row(worker.rank, m), [this](float x) { return x * scale; });
                }
                local += (range.end - range.begin + kTileN - 1) / kTileN * kTileN;
            }
        }
    }
}

void NormOp::run(Program& p, Worker& worker, const Step& step) const {
    const Buffer &from = Ops::buffer(p, src), &to = Ops::buffer(p, dst);
    const auto [begin, end] = worker.share(Ops::n_rows(from, step));
    const size_t width = from.width[worker.rank];
    for (size_t m = begin; m < end; ++m) {
        const float* row = from.row(worker.rank, m);
        const float factor = Ops::rows(p).rms_factor(row, eps, width);
        Ops::rows(p).scale_row(row, w[worker.rank].data(), factor, width, to.row(worker.rank, m));
    }
}

// Threads divide rows, or where those are few their columns, each finding the factors of whole rows by itself.
void NormedOp::run(Program& p, Worker& worker, const Step& step) const {
    const Buffer &plus = Ops::buffer(p, base), &from = Ops::buffer(p, src), &to = Ops::buffer(p, dst);
    const size_t r = worker.rank, width = from.width[r], n_rows = Ops::n_rows(from, step);
    const bool by_rows = n_rows >= worker.n_threads;
    const auto [m0, m1] = by_rows ? worker.share(n_rows) : std::pair<size_t, size_t>{0, n_rows};
    const auto [c0, c1] = by_rows ? std::pair<size_t, size_t>{0, width} : worker.share(width, kLine);
    auto* normed = reinterpret_cast<float*>(Ops::scratch(p, worker));
    for (size_t m = m0; m < m1 && c0 < c1; ++m) {
        const float* row = from.row(r, m);
        const float factor = Ops::rows(p).rms_factor(row, eps, width);
        Ops::rows(p).scale_row(row + c0, w[r].data() + c0, factor, c1 - c0, normed);
        Ops::rows(p).add_parts(plus.row(r, m) + c0, &normed, 1, nullptr, c1 - c0, to.row(r, m) + c0);
    }
}

void ReduceOp::run(Program& p, Worker& worker, const Step& step) const {
    const Buffer &from = Ops::buffer(p, partial), &to = Ops::buffer(p, dst);
    const size_t r = worker.rank, n_ranks = worker.n_ranks;
    const auto [c0, c1] = worker.share(to.width[r], kLine);
    if (c0 == c1) return;
    const float* parts[kMaxRanks + 1];  // the base, or else the first rank's, and what is added to it
    const size_t first = base == Program::kNone ? 0 : 1;
    for (size_t m = 0; m < Ops::n_rows(from, step); ++m) {
        if (first == 1) parts[0] = Ops::buffer(p, base).row(r, m) + c0;
        for (size_t i = 0; i < n_ranks; ++i) parts[first + i] = from.row(i, m) + c0;
        Ops::rows(p).add_parts(parts[0], parts + 1, first + n_ranks - 1, bias.empty() ? nullptr : bias[r].data() + c0,
                               c1 - c0, to.row(r, m) + c0);
    }
}

void GatedOp::run(Program& p, Worker& worker, const Step& step) const {
    const Buffer &a = Ops::buffer(p, src), &b = Ops::buffer(p, up), &to = Ops::buffer(p, dst);
    const size_t r = worker.rank;
    const auto [c0, c1] = worker.share(to.width[r], kLine);
    for (size_t m = 0; m < Ops::n_rows(a, step) && c0 < c1; ++m)
        Ops::rows(p).gate_mul(gate)(a.row(r, m) + c0, b.row(r, m) + c0, c1 - c0, to.row(r, m) + c0);
}

// Threads divide columns, so each reads what a sequence left before it replaces it.
void WithPreviousOp::run(Program& p, Worker& worker, const Step& step) const {
    const Buffer &from = Ops::buffer(p, src), &to = Ops::buffer(p, dst);
    const size_t r = worker.rank, width = from.width[r];
    const auto [c0, c1] = worker.share(width, kLine);
    const size_t bytes = (c1 - c0) * sizeof(float);
    if (bytes == 0) return;
    for (const SequenceRows& s : step.sequences) {
        const auto start = static_cast<size_t>(s.start), first = static_cast<size_t>(s.row_begin);
        const auto n_rows = static_cast<size_t>(s.n_rows);
        const auto of_slot = [&](size_t position) {
            const size_t row = static_cast<size_t>(s.slot) * Program::kKeptRows + position % Program::kKeptRows;
            return of_slots[r].as<float>() + row * width + c0;
        };
        const auto of_page = [&](size_t position) {
            return of_pages[r].as<float>() + static_cast<size_t>(s.pages[position / kPage]) * width + c0;
        };
        for (size_t i = 0; i < n_rows; ++i) {
            float* out = to.row(r, first + i);
            if (i > 0)
                std::memcpy(out + c0, from.row(r, first + i - 1) + c0, bytes);
            else if (start > 0)
                std::memcpy(out + c0, start % kPage == 0 ? of_page(start - 1) : of_slot(start - 1), bytes);
            else
                std::memset(out + c0, 0, bytes);
            std::memcpy(out + width + c0, from.row(r, first + i) + c0, bytes);
        }
        for (size_t i = n_rows - std::min(n_rows, Program::kKeptRows); i < n_rows; ++i)
            std::memcpy(of_slot(start + i), from.row(r, first + i) + c0, bytes);
        for (size_t i = kPage - 1 - start % kPage; i < n_rows; i += kPage)
            std::memcpy(of_page(start + i), from.row(r, first + i) + c0, bytes);
    }
}

void SelectOp::run(Program& p, Worker& worker, const Step& step) const {
    const Buffer &from = Ops::buffer(p, src), &to = Ops::buffer(p, dst);
    const auto [begin, end] = worker.share(step.output_rows.size());
    for (size_t i = begin; i < end; ++i)
        std::memcpy(to.row(worker.rank, i), from.row(worker.rank, static_cast<size_t>(step.output_rows[i])),
                    from.width[worker.rank] * sizeof(float));
}

}  // namespace fourfold
