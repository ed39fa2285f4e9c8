// A weight matrix cut over ranks: each slice in its rank's own memory, in the tile format.
#pragma once
#include <string>
#include <vector>

#include "format.h"
#include "memory.h"
#include "team.h"

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
    // Reserves each rank's slice on its node. Throws std::invalid_argument for ranges off the tile grid or out of
    // bounds.
    Weight(Format format, size_t n, size_t k, std::vector<SlicePlan> plans, const Team& team);

    Weight(const Weight&) = delete;
    Weight& operator=(const Weight&) = delete;

    // This thread's share of filling its rank's slice, from a whole matrix in the same format: `panels` as it lies in a
    // file, `scales` its panel scales (null for bf16 and f32). A slice is a list of byte ranges: nothing is repacked.
    void load(const Worker& worker, const uint8_t* panels, const float* scales);

    struct Slice {
        SlicePlan plan;
        size_t n_panels = 0, k_tiles = 0;  // both 0 where a rank holds nothing
        NodeMemory panels, scales;
    };
    const Format format;
    const size_t n, k;
    const Slice& slice(size_t rank) const { return slices_[rank]; }
    // Whether a rank holds less than all inputs of some outputs, which are partial sums then.
    bool inputs_are_cut() const;

  private:
    std::vector<Slice> slices_;
};

}  // namespace fourfold
