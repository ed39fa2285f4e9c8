#include "weight.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace fourfold {

namespace {

size_t units(const std::vector<Range>& ranges, size_t unit) {
    size_t total = 0;
    for (const Range& r : ranges) total += (r.end - r.begin + unit - 1) / unit;
    return total;
}

void check(const std::vector<Range>& ranges, size_t unit, size_t limit) {
    for (const Range& r : ranges)
        if (r.begin % unit || (r.end % unit && r.end != limit) || r.begin >= r.end || r.end > limit)
            throw std::invalid_argument("a slice must be cut at multiples of " + std::to_string(unit) + " within " +
                                        std::to_string(limit) + ", not at " + std::to_string(r.begin) + " to " +
                                        std::to_string(r.end));
}

}  // namespace

size_t slice_bytes(Format format, const SlicePlan& plan) {
    const size_t panels = units(plan.outputs, kTileN), tiles = units(plan.inputs, kTileK);
    return panels * (panel_bytes(format, tiles) + (has_scales(format) ? sizeof(float) : 0));
}

Weight::Weight(Format format, size_t n, size_t k, std::vector<SlicePlan> plans, const Team& team,
               std::optional<uint64_t> file_offset)
    : format(format), n(n), k(k), file_offset(file_offset) {
    if (plans.size() != team.n_ranks()) throw std::invalid_argument("one slice for each rank is needed");
    for (size_t r = 0; r < plans.size(); ++r) {
        check(plans[r].outputs, kTileN, n);
        check(plans[r].inputs, kTileK, k);
        Slice& s = slices_.emplace_back();
        s.n_panels = units(plans[r].outputs, kTileN);
        s.k_tiles = units(plans[r].inputs, kTileK);
        s.plan = std::move(plans[r]);
        if (s.n_panels == 0 || s.k_tiles == 0) s.n_panels = s.k_tiles = 0;
        if (is_in_memory()) s.panels = team.arena(r).take(s.n_panels * panel_bytes(format, s.k_tiles));
        if (has_scales(format)) s.scales = team.arena(r).take(s.n_panels * sizeof(float));
    }
}

bool Weight::inputs_are_cut() const {
    for (const Slice& s : slices_)
        if (!s.plan.outputs.empty() && units(s.plan.inputs, kTileK) < tiles_of(k)) return true;
    return false;
}

// f(slice, p, local, count) for each run of the thread's panels that are neighbours in the whole matrix, from p on, as
// they are in the slice, from `local` on.
template <class F>
void Weight::each_run(const Worker& worker, F f) {
    Slice& s = slices_[worker.rank];
    const auto [begin, end] = worker.share(s.n_panels);
    size_t local = 0;
    for (const Range& rows : s.plan.outputs) {
        const size_t first = rows.begin / kTileN, n = panels_of(rows.end) - first;
        const size_t from = std::clamp(begin, local, local + n), to = std::clamp(end, local, local + n);
        if (from < to) f(s, first + from - local, from, to - from);
        local += n;
    }
}

void Weight::load(const Worker& worker, const uint8_t* panels, const float* scales) {
    const size_t from_bytes = panel_bytes(format, tiles_of(k));
    each_run(worker, [&](Slice& s, size_t p, size_t local, size_t count) {
        const size_t to_bytes = panel_bytes(format, s.k_tiles);
        if (scales) std::copy_n(scales + p, count, s.scales.as<float>() + local);
        for (size_t i = 0; i < count && is_in_memory(); ++i)
            take_inputs(s, panels + (p + i) * from_bytes, s.panels.as() + (local + i) * to_bytes);
    });
}

void Weight::load(const Worker& worker, const ReadFile& file, uint64_t panels, uint64_t scales) {
    const size_t from_bytes = panel_bytes(format, tiles_of(k));
    each_run(worker, [&](Slice& s, size_t p, size_t local, size_t count) {
        const size_t to_bytes = panel_bytes(format, s.k_tiles);
        if (has_scales(format))
            file.read(scales + p * sizeof(float), count * sizeof(float), s.scales.as() + local * sizeof(float));
        if (!is_in_memory()) return;
        uint8_t* to = s.panels.as() + local * to_bytes;
        if (s.k_tiles == tiles_of(k)) {
            file.read(panels + p * from_bytes, count * from_bytes, to);
            return;
        }
        std::vector<uint8_t> whole(from_bytes);
        for (size_t i = 0; i < count; ++i, to += to_bytes) {
            file.read(panels + (p + i) * from_bytes, from_bytes, whole.data());
            take_inputs(s, whole.data(), to);
        }
    });
}

float Weight::panel_scale(size_t panel) const {
    for (const Slice& s : slices_) {
        size_t before = 0;
        for (const Range& rows : s.plan.outputs) {
            const size_t first = rows.begin / kTileN, last = panels_of(rows.end);
            if (panel >= first && panel < last && s.n_panels && has_scales(format))
                return s.scales.as<float>()[before + panel - first];
            before += last - first;
        }
    }
    return 1;
}

void Weight::take_inputs(const Slice& s, const uint8_t* from, uint8_t* to) const {
    const size_t all_tiles = tiles_of(k);
    if (s.k_tiles == all_tiles) {
        std::memcpy(to, from, panel_bytes(format, all_tiles));
        return;
    }
    size_t t = 0;
    for (const Range& inputs : s.plan.inputs)
        for (size_t source = inputs.begin / kTileK; source * kTileK < inputs.end; ++source, ++t) {
            std::memcpy(to + scale_offset(format, t), from + scale_offset(format, source), scale_bytes(format));
            std::memcpy(to + code_offset(format, t, s.k_tiles), from + code_offset(format, source, all_tiles),
                        code_bytes(format));
        }
}

}  // namespace fourfold
