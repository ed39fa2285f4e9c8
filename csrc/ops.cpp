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

void LinearOp::run(Program& p, Worker& worker, const Step& step) const {
    const size_t m = Ops::n_rows(Ops::buffer(p, input.src), step);
    if (m == 0) return;
    const Packed packed = pack(p, worker, step, m);
    struct Share {
        const Program::LinearPart* part;
        size_t begin, end;
        const uint8_t* panels;
    } held{};  // back until it is known what is read after it
    const auto multiply_held = [&](const uint8_t* then) {
        if (held.part) multiply(p, worker, step, packed, *held.part, held.panels, held.begin, held.end, then);
    };
    each_share(p, worker, [&](const Program::LinearPart& part, size_t begin, size_t end, const uint8_t* panels) {
        if (is_partial && Ops::weight(p, part.weight).slice(worker.rank).n_panels == 0) add_zeros(p, worker, part, m);
        if (begin == end) return;
        multiply_held(panels);
        held = {&part, begin, end, panels};
    });
    const std::span<const uint8_t> after = next ? next->first_read(p, worker) : std::span<const uint8_t>{};
    multiply_held(after.data());
    worker.reads_next(after);
}

template <class F>
void LinearOp::each_share(Program& p, const Worker& worker, F f) const {
    size_t n_panels = 0;
    for (const auto& part : parts) n_panels += Ops::weight(p, part.weight).slice(worker.rank).n_panels;
    const auto [begin, end] = worker.share(n_panels);
    size_t before = 0;  // panels of the parts before this one
    for (const auto& part : parts) {
        const Weight& w = Ops::weight(p, part.weight);
        const Weight::Slice& s = w.slice(worker.rank);
        const size_t b = std::clamp(begin, before, before + s.n_panels) - before;
        const size_t e = std::clamp(end, before, before + s.n_panels) - before;
        before += s.n_panels;
        f(part, b, e, s.panels.as() + b * panel_bytes(w.format, s.k_tiles));
    }
}

std::span<const uint8_t> LinearOp::first_read(Program& p, const Worker& worker) const {
    std::span<const uint8_t> first;
    each_share(p, worker, [&](const Program::LinearPart& part, size_t begin, size_t end, const uint8_t* panels) {
        const Weight& w = Ops::weight(p, part.weight);
        if (first.empty()) first = {panels, (end - begin) * panel_bytes(w.format, w.slice(worker.rank).k_tiles)};
    });
    return first;
}

LinearOp::Packed LinearOp::pack(Program& p, Worker& worker, const Step& step, size_t m) const {
    const size_t r = worker.rank;
    const RowClass row_class = Ops::row_class(Ops::buffer(p, input.src), step);
    const LinearKernel& kernel = Ops::kernel(p, Ops::weight(p, parts[0].weight).format, m, row_class);
    size_t k_tiles = 0;
    for (const auto& part : parts) k_tiles = std::max(k_tiles, Ops::weight(p, part.weight).slice(r).k_tiles);
    worker.begins_as(Phase::pack);
    pack_share(p, worker, kernel.activation, m, k_tiles);
    worker.barrier();
    return {kernel, Ops::packed(p, r), m};
}

void LinearOp::pack_share(Program& p, const Worker& worker, Activation form, size_t m, size_t k_tiles) const {
    const size_t r = worker.rank;
    const RowKernels& kernels = Ops::rows(p);
    const Buffer& from = Ops::buffer(p, input.src);
    const size_t width = from.width[r], rows = form == Activation::bf16 ? (m + 15) / 16 * 16 : m;
    const auto [t0, t1] = rows == 1 ? worker.share(k_tiles) : std::pair<size_t, size_t>{0, k_tiles};
    const auto [m0, m1] = rows == 1 ? std::pair<size_t, size_t>{0, 1} : worker.share(rows);
    if (t0 == t1) return;
    const auto pack_rows = [&](const float* x, size_t stride, size_t first, size_t last) {
        kernels.pack(form, x, stride, m, width, k_tiles, first, last, t0, t1, Ops::packed(p, r));
    };
    if (input.norm.empty() && input.up == Program::kNone) return pack_rows(from.row(r, 0), from.stride[r], m0, m1);

    auto* made = reinterpret_cast<float*>(Ops::scratch(p, worker));
    const size_t begin = t0 * kTileK, count = std::min(t1 * kTileK, width) - begin;
    for (size_t row = m0; row < m1; ++row) {
        if (row < m) {  // else padding, which pack makes zero
            const float* x = from.row(r, row);
            if (input.up != Program::kNone)
                kernels.gate_mul(input.gate)(x + begin, Ops::buffer(p, input.up).row(r, row) + begin, count,
                                             made + begin);
            else
                kernels.scale_row(x + begin, input.norm[r].data() + begin, kernels.rms_factor(x, input.eps, width),
                                  count, made + begin);
        }
        pack_rows(made, 0, row, row + 1);
    }
}

void LinearOp::multiply(Program& p, const Worker& worker, const Step& step, const Packed& packed,
                        const Program::LinearPart& part, const uint8_t* panels, size_t b, size_t e,
                        const uint8_t* then) const {
    if (b == e) return;
    const size_t r = worker.rank;
    const Weight& w = Ops::weight(p, part.weight);
    const Weight::Slice& s = w.slice(r);
    const bool to_logits = part.dst == Program::kLogits;
    float* y = to_logits ? step.logits + s.plan.outputs[0].begin : Ops::buffer(p, part.dst).row(r, 0);
    const size_t y_stride = to_logits ? step.logits_stride : Ops::buffer(p, part.dst).stride[r];
    packed.kernel.run({panels, has_scales(w.format) ? s.scales.as<float>() + b : nullptr, e - b, s.k_tiles, packed.x,
                       packed.m, y + b * kTileN, y_stride, Ops::scratch(p, worker), then});
    finish(p, worker, part, y, y_stride, packed.m, b * kTileN, e * kTileN);
}

void LinearOp::add_zeros(Program& p, const Worker& worker, const Program::LinearPart& part, size_t m) const {
    const Buffer& to = Ops::buffer(p, part.dst);
    const auto [c0, c1] = worker.share(to.stride[worker.rank], kLine);
    for (size_t row = 0; row < m; ++row) std::memset(to.row(worker.rank, row) + c0, 0, (c1 - c0) * sizeof(float));
}

void LinearOp::finish(Program& p, const Worker& worker, const Program::LinearPart& part, float* y, size_t y_stride,
                      size_t m, size_t begin, size_t end) const {
    const size_t r = worker.rank;
    if (!part.bias.empty()) {
        const size_t stop = std::min(end, part.bias[r].size());
        for (size_t row = 0; row < m; ++row)
            for (size_t n = begin; n < stop; ++n) y[row * y_stride + n] += part.bias[r][n];
    }
    if (sum.dst == Program::kNone) return;
    const Buffer &plus = Ops::buffer(p, sum.base), &to = Ops::buffer(p, sum.dst);
    const float* bias = sum.bias.empty() ? nullptr : sum.bias[r].data() + begin;
    const size_t count = std::min(end, to.width[r]) - begin;
    for (size_t row = 0; row < m; ++row) {
        const float* outputs = y + row * y_stride + begin;
        Ops::rows(p).add_parts(plus.row(r, row) + begin, &outputs, 1, bias, count, to.row(r, row) + begin);
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
