// Codes to unsigned bytes with AVX-512, for the kernels whose dot products are of 8-bit integers; included only by
// files compiled for it.
#pragma once
#include "kernels/decode_avx512.h"
#include "kernels/kernels.h"

namespace fourfold {
namespace {

// Bytes a unit of the codebook: where 16 rounded values lie closest to the true ones (NF4: rms 0.0017 against 0.0036 at
// the worst factor between 90 and 127); exact for int4, uint4 and fp4, and for fp4_bnb but for its least, which is
// 0.625 units.
constexpr float units(Format f) {
    switch (f) {
        case Format::nf4:
            return 112.05f;
        case Format::int4:
            return 112.0f;
        case Format::fp4:
            return 108.0f;
        case Format::fp4_bnb:
            return 120.0f;
        case Format::uint4:
            return 1.0f;
        default:
            return 127.0f;
    }
}

// The furthest that a codebook's bytes are from it, of the scale.
constexpr float byte_error(Format f) {
    return f == Format::nf4 ? 0.5f / units(f) : f == Format::fp4_bnb ? 0.375f / units(f) : 0.0f;
}

// The bytes round(units * codebook) + 128 of the 16 codes (uint4's are not signed: they stay as they are), four times
// over, as both permutes below want it.
template <Format F>
inline __m512i byte_table() {
    alignas(64) static constexpr auto kTable = [] {
        std::array<uint8_t, 64> table{};
        for (size_t i = 0; is_4bit(F) && i < 64; ++i)
            table[i] = static_cast<uint8_t>(codebook(F)[i % 16] * units(F) + (has_zeros(F) ? 0.0f : 128.0f) + 0.5f);
        return table;
    }();
    return _mm512_load_si512(kTable.data());
}

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

// What a tile's sums of (256 hi + lo) * u begin with, so that they are those of the weights: see I16Row.
template <Format F>
inline __m512i sums_begin(int32_t offset, __m512i zeros) {
    if constexpr (has_zeros(F)) return _mm512_mullo_epi32(zeros, _mm512_set1_epi32(offset / 128));
    return _mm512_set1_epi32(offset);
}

// Bytes of codes that 8 inputs take.
template <Format F>
constexpr size_t kGroupBytes = code_bytes(F) / 8;

// Weights of 8 inputs as unsigned bytes: inputs 0-3 and 4-7, 4 inputs a 32-bit lane, a lane an output.
template <Format F>
inline void group_to_bytes(const uint8_t* at, __m512i table, __m512i& first, __m512i& second) {
    if constexpr (F == Format::int8) {
        const __m512i to_unsigned = _mm512_set1_epi8(static_cast<char>(0x80));
        first = _mm512_xor_si512(load64(at), to_unsigned);
        second = _mm512_xor_si512(load64(at + 64), to_unsigned);
    } else {
        const __m512i v = load64(at);
#if defined(__AVX512VBMI__)  // vpermb reads 6 bits of an index, so neither nibble needs a mask
        first = _mm512_permutexvar_epi8(v, table);
        second = _mm512_permutexvar_epi8(_mm512_srli_epi16(v, 4), table);
#else
        const __m512i nibble = _mm512_set1_epi8(15);
        first = _mm512_shuffle_epi8(table, _mm512_and_si512(v, nibble));
        second = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(v, 4), nibble));
#endif
    }
}

}  // namespace
}  // namespace fourfold
