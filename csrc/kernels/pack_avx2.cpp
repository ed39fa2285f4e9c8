// pack, AVX2: 8 outputs at a time; a table of 16 is two registers.
#include <immintrin.h>

#include "pack.h"

namespace fourfold {
namespace {

struct Lanes {
    static constexpr size_t W = 8;
    static constexpr bool kHasTable32 = false;
    typedef float F __attribute__((vector_size(32)));
    typedef int32_t I __attribute__((vector_size(32)));
    struct Table {
        F low, high;
        explicit Table(const float (&t)[16]) : low(load(t)), high(load(t + 8)) {}
        explicit Table(const int32_t (&t)[16]) : low(floats(load(t))), high(floats(load(t + 8))) {}
    };
    static F load(const float* p) { return (F)_mm256_loadu_ps(p); }
    static I load(const int32_t* p) { return (I)_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    static void store(float* p, F x) { _mm256_storeu_ps(p, (__m256)x); }
    static void store(int32_t* p, I x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)x); }
    static F splat(float x) { return (F)_mm256_set1_ps(x); }
    static I bits(F x) { return (I)x; }
    static F floats(I x) { return (F)x; }
    static F to_float(I x) { return __builtin_convertvector(x, F); }
    static F lookup8(const Table& t, I i) { return __builtin_shuffle(t.low, i); }
    static F lookup(const Table& t, I i) {
        const F low = __builtin_shuffle(t.low, i), high = __builtin_shuffle(t.high, i);  // by the 3 low bits
        return (F)_mm256_blendv_ps((__m256)low, (__m256)high, (__m256)(i << 28));        // bit 3, where blendv looks
    }
    static I turn(I i, int bit, F w, F t) { return i | ((w > t) & bit); }
};

#include "pack.inl"

}  // namespace

PackSums pack_panel_avx2(Format format, const float* columns, size_t k_tiles, uint8_t* panel, float* panel_scale) {
    return pack_panel(format, columns, k_tiles, panel, panel_scale);
}

}  // namespace fourfold
