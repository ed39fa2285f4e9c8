// pack, AVX-512: 16 outputs at a time; a table of 16 is one register.
#include <immintrin.h>

#include "pack.h"

namespace fourfold {
namespace {

struct Lanes {
    static constexpr size_t W = 16;
    static constexpr bool kHasTable32 = true;
    typedef float F __attribute__((vector_size(64)));
    typedef int32_t I __attribute__((vector_size(64)));
    struct Table {
        F entries;
        explicit Table(const float (&t)[16]) : entries(load(t)) {}
        explicit Table(const int32_t (&t)[16]) : entries(floats(load(t))) {}
    };
    struct Table32 {
        F low, high;
        explicit Table32(const float (&t)[32]) : low(load(t)), high(load(t + 16)) {}
    };
    static F load(const float* p) { return (F)_mm512_loadu_ps(p); }
    static I load(const int32_t* p) { return (I)_mm512_loadu_si512(p); }
    static void store(float* p, F x) { _mm512_storeu_ps(p, (__m512)x); }
    static void store(int32_t* p, I x) { _mm512_storeu_si512(p, (__m512i)x); }
    static F splat(float x) { return (F)_mm512_set1_ps(x); }
    static I bits(F x) { return (I)x; }
    static F floats(I x) { return (F)x; }
    static F to_float(I x) { return __builtin_convertvector(x, F); }
    static F lookup(const Table& t, I i) { return __builtin_shuffle(t.entries, i); }
    static F lookup8(const Table& t, I i) { return __builtin_shuffle(t.entries, i); }
    static F lookup32(const Table32& t, I i) {
        return (F)_mm512_permutex2var_ps((__m512)t.low, (__m512i)i, (__m512)t.high);
    }
    static I turn(I i, int bit, F w, F t) {
        const __mmask16 is_above = _mm512_cmp_ps_mask((__m512)w, (__m512)t, _CMP_GT_OQ);
        return (I)_mm512_mask_or_epi32((__m512i)i, is_above, (__m512i)i, _mm512_set1_epi32(bit));
    }
};

#include "pack.inl"

}  // namespace

PackSums pack_panel_avx512(Format format, const float* columns, size_t k_tiles, uint8_t* panel, float* panel_scale) {
    return pack_panel(format, columns, k_tiles, panel, panel_scale);
}

}  // namespace fourfold
