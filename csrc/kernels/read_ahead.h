// Asking for panels of weights before they are read, for the kernels of a few tokens.
#pragma once
#include <immintrin.h>

#include "kernels/kernels.h"

namespace fourfold {
namespace {

// Reading ahead, in two steps, because one core has too few L1 misses in flight (24 on Zen 4) to cover the memory's
// latency with those alone: a line is asked into L2 long before its load and into L1 shortly before. However many
// panels are walked together, the memory sees one stream: lines go to L2 in the order in which they lie, and past the
// last panel on into what the thread reads next. Every line is asked for, the scales' too: one that is not costs the
// whole latency.
constexpr size_t kLead = 24 * 1024;  // bytes that L2 is ahead of the loads, at least
constexpr size_t kNear = 1024;       // bytes that L1 is

inline void ask_near(const uint8_t* at) { _mm_prefetch(reinterpret_cast<const char*>(at + kNear), _MM_HINT_T0); }

// Lines of scales a group.
template <Format F>
constexpr size_t kScaleLines = scale_bytes(F) * kGroupTiles / 64;

// The lines asked into L2 while panels [p, p + PANELS) are walked, tile by tile.
template <Format F, size_t PANELS>
class Ahead {
  public:
    Ahead(const LinearArgs& a, size_t p) {
        const size_t stride = panel_bytes(F, a.k_tiles);
        end_ = a.panels + a.n_panels * stride;
        jump_ = a.next ? a.next - end_ : 0;
        // The last panel's first tile is read when the block begins.
        from_ = a.panels + (p + PANELS - 1) * stride + kLead;
    }
    // Tile t of each panel is next.
    void enter(size_t t) {
        at_ = from_ < end_ ? from_ : from_ + jump_;
        from_ += PANELS * code_bytes(F);
        if (t % kGroupTiles != 0) return;
        constexpr size_t kLines = PANELS * kScaleLines<F>;
        for (size_t i = 0; i < kLines; ++i) ask(i * kLine);
        at_ += kLines * kLine;
        from_ += kLines * kLine;
    }
    // For the line at `offset` of panel i's tile.
    void ask_line(size_t i, size_t offset) const { ask(offset * PANELS + i * kLine); }

  private:
    static constexpr size_t kLine = 64;
    void ask(size_t offset) const { _mm_prefetch(reinterpret_cast<const char*>(at_ + offset), _MM_HINT_T1); }
    const uint8_t *from_, *end_, *at_ = nullptr;
    ptrdiff_t jump_;
};

}  // namespace
}  // namespace fourfold
