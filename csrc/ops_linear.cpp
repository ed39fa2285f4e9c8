// The linear op: packing its input, multiplying, and what is done with the sums while they lie in the cache.
#include <algorithm>
#include <cstring>

#include "ops.h"

namespace fourfold {

namespace {

constexpr size_t kLine = 16;                     // floats a cache line: threads never share one they write
constexpr size_t kRowsAtOnce = 512;              // as many as the AMX kernel takes in one block
constexpr size_t kTilePanels = kTileK / kTileN;  // of outputs, for a tile of the next linear's inputs

// Calls f(first row, rows, first panel, end) for pieces of m rows times panels [b, e), in units of panels, each with
// kSumBytes of sums at most and none much smaller than another.
template <class F>
void each_piece(size_t m, size_t b, size_t e, size_t unit, F f) {
    for (size_t m0 = 0; m0 < m && b < e; m0 += kRowsAtOnce) {
        const size_t rows = std::min(kRowsAtOnce, m - m0);
        const size_t most = Program::kSumBytes / (rows * kTileN * sizeof(float)) / unit,
                     units = (e - b + unit - 1) / unit;
        const size_t n_pieces = (units + most - 1) / most, at_once = (units + n_pieces - 1) / n_pieces * unit;
        for (size_t p = b; p < e; p += at_once) f(m0, rows, p, std::min(p + at_once, e));
    }
}

}  // namespace

void LinearOp::run(Program& p, Worker& worker, const Step& step) const {
    const size_t m = Ops::n_rows(Ops::buffer(p, input.src), step);
    if (m == 0) return;
    const Packed packed =
        is_packed ? Packed{kernel(p, step, m), Ops::packed_next(p, worker.rank), m} : pack(p, worker, step, m);
    const std::span<const uint8_t> after = next ? next->first_read(p, worker) : std::span<const uint8_t>{};
    if (packs_for)
        multiply_gated(p, worker, step, packed, after.data());
    else
        multiply_shares(p, worker, step, packed, after.data());
    worker.reads_next(after);
}

void LinearOp::multiply_shares(Program& p, const Worker& worker, const Step& step, const Packed& packed,
                               const uint8_t* after) const {
    struct Share {
        const Program::LinearPart* part;
        size_t begin, end;
        const uint8_t* panels;
    } held{};  // back until it is known what is read after it
    const auto multiply_held = [&](const uint8_t* then) {
        if (held.part) multiply(p, worker, step, packed, *held.part, held.panels, held.begin, held.end, then);
    };
    each_share(p, worker, [&](const Program::LinearPart& part, size_t begin, size_t end, const uint8_t* panels) {
        if (is_partial && Ops::weight(p, part.weight).slice(worker.rank).n_panels == 0)
            add_zeros(p, worker, part, packed.m);
        if (begin == end) return;
        multiply_held(panels);
        held = {&part, begin, end, panels};
    });
    multiply_held(after);
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

// Whole tiles of the next linear's inputs, of gate and of up alike.
std::pair<size_t, size_t> LinearOp::gated_share(const Worker& worker, size_t n_panels) {
    return worker.share(n_panels, kTilePanels);
}

std::span<const uint8_t> LinearOp::first_read(Program& p, const Worker& worker) const {
    if (packs_for) {
        const Weight& w = Ops::weight(p, parts[0].weight);
        const Weight::Slice& s = w.slice(worker.rank);
        const auto [b, e] = gated_share(worker, s.n_panels);
        const size_t bytes = panel_bytes(w.format, s.k_tiles);
        return {s.panels.as() + b * bytes, (e - b) * bytes};
    }
    std::span<const uint8_t> first;
    each_share(p, worker, [&](const Program::LinearPart& part, size_t begin, size_t end, const uint8_t* panels) {
        const Weight& w = Ops::weight(p, part.weight);
        if (first.empty()) first = {panels, (end - begin) * panel_bytes(w.format, w.slice(worker.rank).k_tiles)};
    });
    return first;
}

bool LinearOp::may_pack_for(Program& p, const LinearOp& other, const std::vector<RankPlan>& plan) const {
    if (!is_in_memory() || !other.is_in_memory()) return false;
    for (size_t r = 0; r < plan.size(); ++r) {
        const size_t n_panels = Ops::weight(p, parts[0].weight).slice(r).n_panels, n_threads = plan[r].cpus.size();
        const auto most = [&](size_t count, size_t unit) {
            size_t largest = 0;
            for (size_t t = 0; t < n_threads; ++t) {
                const auto [begin, end] = Worker::share(count, unit, t, n_threads);
                largest = std::max(largest, end - begin);
            }
            return largest;
        };
        if (2 * 16 * most(n_panels, kTilePanels) > 17 * most(2 * n_panels, 1)) return false;
    }
    return true;
}

const LinearKernel& LinearOp::kernel(Program& p, const Step& step, size_t m) const {
    return Ops::kernel(p, Ops::weight(p, parts[0].weight).format, m, Ops::row_class(Ops::buffer(p, input.src), step));
}

size_t LinearOp::input_tiles(Program& p, size_t rank) const {
    size_t k_tiles = 0;
    for (const auto& part : parts) k_tiles = std::max(k_tiles, Ops::weight(p, part.weight).slice(rank).k_tiles);
    return k_tiles;
}

LinearOp::Packed LinearOp::pack(Program& p, Worker& worker, const Step& step, size_t m) const {
    const LinearKernel& chosen = kernel(p, step, m);
    worker.begins_as(Phase::pack);
    pack_share(p, worker, chosen.activation, m, input_tiles(p, worker.rank));
    worker.barrier();
    return {chosen, Ops::packed(p, worker.rank), m};
}

void LinearOp::pack_share(Program& p, const Worker& worker, Activation form, size_t m, size_t k_tiles) const {
    const size_t r = worker.rank;
    const RowKernels& kernels = Ops::rows(p);
    const Buffer& from = Ops::buffer(p, input.src);
    const size_t width = from.width[r], rows = padded_rows(form, m);
    const auto [t0, t1] = rows == 1 ? worker.share(k_tiles) : std::pair<size_t, size_t>{0, k_tiles};
    const auto [m0, m1] = rows == 1 ? std::pair<size_t, size_t>{0, 1} : worker.share(rows);
    if (t0 == t1) return;
    const size_t begin = t0 * kTileK, count = std::min(t1 * kTileK, width) - begin;
    const auto pack_rows = [&](const float* x, size_t stride, size_t first, size_t last) {
        kernels.pack(form, x, stride, m, width, k_tiles, first, last, t0, t1, Ops::packed(p, r));
    };
    if (input.norm.empty() && input.up == Program::kNone)
        return pack_rows(from.row(r, m0) + begin, from.stride[r], m0, m1);

    auto* made = reinterpret_cast<float*>(Ops::scratch(p, worker));
    for (size_t row = m0; row < m1; ++row) {
        if (row < m) {  // else padding, which pack makes zero
            const float* x = from.row(r, row);
            if (input.up != Program::kNone)
                kernels.gate_mul(input.gate)(x + begin, Ops::buffer(p, input.up).row(r, row) + begin, count, made);
            else
                kernels.scale_row(x + begin, input.norm[r].data() + begin, kernels.rms_factor(x, input.eps, width),
                                  count, made);
        }
        pack_rows(made, 0, row, row + 1);
    }
}

void LinearOp::multiply(Program& p, const Worker& worker, const Step& step, const Packed& packed,
                        const Program::LinearPart& part, const uint8_t* panels, size_t b, size_t e,
                        const uint8_t* then) const {
    if (b == e) return;
    const size_t r = worker.rank, m = packed.m;
    const Weight& w = Ops::weight(p, part.weight);
    const size_t bytes = panel_bytes(w.format, w.slice(r).k_tiles);
    const bool adds = sum.dst != Program::kNone, to_logits = !adds && part.dst == Program::kLogits;
    const Buffer* const to = to_logits ? nullptr : &Ops::buffer(p, adds ? sum.dst : part.dst);
    float* const y = to ? to->row(r, 0) : step.logits + w.slice(r).plan.outputs[0].begin;
    const size_t stride = to ? to->stride[r] : step.logits_stride;
    if (!adds && m < kManyRows) {
        run_kernel(p, worker, packed, part, panels, b, e, 0, m, {y + b * kTileN, stride}, then);
        return;
    }
    each_piece(m, b, e, 1, [&](size_t m0, size_t rows, size_t begin, size_t end) {
        const uint8_t *const at = panels + (begin - b) * bytes, *const behind = panels + (end - b) * bytes;
        const Outputs sums = {Ops::sums(p, worker, 0), (end - begin) * kTileN};
        run_kernel(p, worker, packed, part, at, begin, end, m0, rows, sums,
                   end < e         ? behind
                   : m0 + rows < m ? panels
                                   : then);
        const size_t n0 = begin * kTileN, count = adds ? std::min(end * kTileN, to->width[r]) - n0 : sums.stride;
        const float* bias = sum.bias.empty() ? nullptr : sum.bias[r].data() + n0;
        for (size_t i = 0; i < rows; ++i) {
            const float* outputs = sums.first + i * sums.stride;
            float* const out = y + (m0 + i) * stride + n0;
            if (adds)
                Ops::rows(p).add_parts(Ops::buffer(p, sum.base).row(r, m0 + i) + n0, &outputs, 1, bias, count, out);
            else
                std::memcpy(out, outputs, count * sizeof(float));
        }
    });
}

void LinearOp::multiply_gated(Program& p, const Worker& worker, const Step& step, const Packed& packed,
                              const uint8_t* after) const {
    const size_t r = worker.rank, m = packed.m, k_tiles = packs_for->input_tiles(p, r);
    const size_t width = Ops::buffer(p, packs_for->input.src).width[r];
    const RowKernels& kernels = Ops::rows(p);
    const Activation form = packs_for->kernel(p, step, m).activation;
    const Weight* const w[] = {&Ops::weight(p, parts[0].weight), &Ops::weight(p, parts[1].weight)};
    const auto panel = [&](size_t i, size_t index) {
        return w[i]->slice(r).panels.as() + index * panel_bytes(w[i]->format, w[i]->slice(r).k_tiles);
    };
    const auto [b, e] = gated_share(worker, w[0]->slice(r).n_panels);
    each_piece(m, b, e, kTilePanels, [&](size_t m0, size_t rows, size_t begin, size_t end) {
        const size_t stride = (end - begin) * kTileN, n0 = begin * kTileN;
        float* const gates = Ops::sums(p, worker, 0);
        const float* const ups = Ops::sums(p, worker, 1);
        const uint8_t* const next_gate = end < e ? panel(0, end) : m0 + rows < m ? panel(0, b) : after;
        for (size_t i = 0; i < 2; ++i)
            run_kernel(p, worker, packed, parts[i], panel(i, begin), begin, end, m0, rows,
                       {Ops::sums(p, worker, i), stride}, i == 0 ? panel(1, begin) : next_gate);
        for (size_t row = 0; row < rows; ++row)
            kernels.gate_mul(packs_for->input.gate)(gates + row * stride, ups + row * stride,
                                                    std::min(end * kTileN, width) - n0, gates + row * stride);
        const size_t stop = m0 + rows < m ? m0 + rows : padded_rows(form, m);
        kernels.pack(form, gates, stride, m, width, k_tiles, m0, stop, begin / kTilePanels, tiles_of(end * kTileN),
                     Ops::packed_next(p, r));
    });
}

void LinearOp::run_kernel(Program& p, const Worker& worker, const Packed& packed, const Program::LinearPart& part,
                          const uint8_t* panels, size_t b, size_t e, size_t m0, size_t rows, Outputs y,
                          const uint8_t* then) const {
    const size_t r = worker.rank;
    const Weight& w = Ops::weight(p, part.weight);
    const Weight::Slice& s = w.slice(r);
    const uint8_t* const x = packed.x + packed_offset(packed.kernel.activation, m0, s.k_tiles);
    packed.kernel.run({panels, has_scales(w.format) ? s.scales.as<float>() + b : nullptr, e - b, s.k_tiles, x, rows,
                       y.first, y.stride, Ops::scratch(p, worker), then});
    if (part.bias.empty()) return;
    const size_t begin = b * kTileN, stop = std::min(e * kTileN, part.bias[r].size());
    for (size_t i = 0; i < rows; ++i)
        for (size_t n = begin; n < stop; ++n) y.first[i * y.stride + n - begin] += part.bias[r][n];
}

void LinearOp::add_zeros(Program& p, const Worker& worker, const Program::LinearPart& part, size_t m) const {
    const Buffer& to = Ops::buffer(p, part.dst);
    const auto [c0, c1] = worker.share(to.stride[worker.rank], kLine);
    for (size_t row = 0; row < m; ++row) std::memset(to.row(worker.rank, row) + c0, 0, (c1 - c0) * sizeof(float));
}

}  // namespace fourfold
