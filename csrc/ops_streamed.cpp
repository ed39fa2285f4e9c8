#include "ops_streamed.h"

#include <algorithm>
#include <cstring>

namespace fourfold {

void StreamedLinearOp::run(Program& p, Worker& worker, const Step& step) const {
    FileStream& stream = Ops::stream(p);
    const size_t m = Ops::n_rows(Ops::buffer(p, input.src), step);
    const uint64_t begin = step.first_piece + first_piece, end = begin + pieces.size();
    if (m == 0) {  // no logits are wanted, and the disk has read the head already
        for (uint64_t i = begin; i < end; ++i) {
            stream.wait(i);
            stream.release(i);
        }
        return;
    }
    const Packed packed = pack(p, worker, step, m);
    for (const auto& part : parts) {
        const Weight& w = Ops::weight(p, part.weight);
        const Weight::Slice& s = w.slice(worker.rank);
        if (is_partial && s.n_panels == 0) add_zeros(p, worker, part, m);
        if (!w.is_in_memory()) continue;
        const auto [b, e] = worker.share(s.n_panels);
        multiply(p, worker, step, packed, part, s.panels.as() + b * panel_bytes(w.format, s.k_tiles), b, e, nullptr);
    }
    // Every thread waits for every piece, also where it has no part in it: here it sleeps, at a barrier it would spin.
    for (uint64_t i = begin; i < end; ++i) {
        const uint8_t* bytes = stream.wait(i);
        multiply_piece(p, worker, step, packed, pieces[i - begin], bytes);
        stream.release(i);
    }
}

void StreamedLinearOp::multiply_piece(Program& p, const Worker& worker, const Step& step, const Packed& packed,
                                      const Piece& piece, const uint8_t* bytes) const {
    const Program::LinearPart& part = parts[piece.part];
    const Weight& w = Ops::weight(p, part.weight);
    const Weight::Slice& s = w.slice(worker.rank);
    if (s.n_panels == 0) return;
    const size_t stored_bytes = panel_bytes(w.format, tiles_of(w.k)), own_bytes = panel_bytes(w.format, s.k_tiles);
    const bool whole_rows = s.k_tiles == tiles_of(w.k);
    uint8_t* gathered = Ops::gathered(p, worker);
    size_t before = 0;  // panels of the slice's ranges before this one
    for (const Range& range : s.plan.outputs) {
        const size_t first = range.begin / kTileN, last = panels_of(range.end);
        const size_t b = std::clamp(piece.first_panel, first, last);
        const size_t e = std::clamp(piece.first_panel + piece.n_panels, first, last);
        const auto [mine, stop] = worker.share(e - b);
        const size_t at_once = whole_rows ? stop - mine : stored_bytes / own_bytes;  // what `gathered` has room for
        for (size_t i = mine; i < stop; i += at_once) {
            const size_t n = std::min(at_once, stop - i), own = before + b - first + i;
            const uint8_t* stored = bytes + (b + i - piece.first_panel) * stored_bytes;
            for (size_t j = 0; j < n && !whole_rows; ++j)
                w.take_inputs(s, stored + j * stored_bytes, gathered + j * own_bytes);
            multiply(p, worker, step, packed, part, whole_rows ? stored : gathered, own, own + n, nullptr);
        }
        before += last - first;
    }
}

void StreamedEmbedOp::run(Program& p, Worker& worker, const Step& step) const {
    const Weight& w = Ops::weight(p, weight);
    const Buffer& to = Ops::buffer(p, dst);
    const size_t k_tiles = tiles_of(w.k), bytes = panel_bytes(w.format, k_tiles);
    const auto [begin, end] = worker.share(step.n_tokens());
    auto* row = reinterpret_cast<float*>(Ops::scratch(p, worker));
    uint8_t* panel = Ops::gathered(p, worker);
    for (size_t m = begin; m < end; ++m) {
        const auto token = static_cast<size_t>(step.tokens[m]);
        Ops::stream(p).read(*w.file_offset + token / kTileN * bytes, bytes, panel);
        const float panel_scale = w.panel_scale(token / kTileN);
        Ops::rows(p).unpack_row(w.format, panel, &panel_scale, token % kTileN, k_tiles, row);
        std::transform(row, row + w.k, to.row(worker.rank, m), [this](float x) { return x * scale; });
    }
}

}  // namespace fourfold
