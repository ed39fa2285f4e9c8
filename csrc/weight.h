// A weight matrix cut over ranks: each slice in its rank's own memory, in the tile format; or left in its file, where
// it does not fit.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "format.h"
#include "memory.h"
#include "read_file.h"

namespace fourfold {

struct Range {
    size_t begin, end;
};

// What one rank holds: some outputs and some inputs, each a list of ranges that follow one another in the slice. Output
// ranges begin at multiples of 16 and input ranges at multiples of 64, and end there or at the matrix's edge.
struct SlicePlan {
    std::vector<Range> outputs, inputs;
};

// Bytes that the slice of a plan takes: codes and scales.
size_t slice_bytes(Format format, const SlicePlan& plan);

class Weight {
  public:
    // Reserves each rank's slice on its node. With a file offset, where the whole matrix's panels begin, the panels
    // stay in the file and the slices hold scales alone. Throws std::invalid_argument for ranges off the tile grid or
    // out of bounds.
    Weight(Format format, size_t n, size_t k, std::vector<SlicePlan> plans, const Team& team,
           std::optional<uint64_t> file_offset = {});

    Weight(const Weight&) = delete;
    Weight& operator=(const Weight&) = delete;

    // This thread's share of filling its rank's slice, from a whole matrix in the same format: `panels` as it lies in a
    // file (unread where they stay there), `scales` its panel scales (null for bf16 and f32). A slice is a list of byte
    // ranges: nothing is repacked.
    void load(const Worker& worker, const uint8_t* panels, const float* scales);
    // The same from a file in which the matrix's panels and its scales begin there. Throws DiskError.
    void load(const Worker& worker, const ReadFile& file, uint64_t panels, uint64_t scales);

    struct Slice {
        SlicePlan plan;
        size_t n_panels = 0, k_tiles = 0;  // both 0 where a rank holds nothing
        NodeMemory panels, scales;         // no panels where they stay in the file
    };
    const Format format;
    const size_t n, k;
    const std::optional<uint64_t> file_offset;
    bool is_in_memory() const { return !file_offset; }
    // The scale of a panel of the whole matrix, from the first slice that holds it; 1 for formats without.
    float panel_scale(size_t panel) const;
    // A rank's part of one panel: from a panel of the whole matrix, which it leaves, to one of the slice's own.
    void take_inputs(const Slice& slice, const uint8_t* panel, uint8_t* to) const;
    const Slice& slice(size_t rank) const { return slices_[rank]; }
    // Whether a rank holds less than all inputs of some outputs, which are partial sums then.
    bool inputs_are_cut() const;

  private:
    template <class F>
    void each_run(const Worker& worker, F f);
    std::vector<Slice> slices_;
};

}  // namespace fourfold
