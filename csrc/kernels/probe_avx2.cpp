// FMA: latency 4 to 5 cycles on two ports, so at least 10 accumulators; 12 and two operands fit 16 registers.
#include <immintrin.h>

#include "kernels/probe.h"

namespace fourfold {
namespace {

struct Lanes {
    using Vector = __m256i;
    static Vector zero() { return _mm256_setzero_si256(); }
    static Vector load(const uint8_t* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }
    static Vector add(Vector a, Vector b) { return _mm256_add_epi64(a, b); }
};
#include "kernels/probe_read.inl"

constexpr int kAccumulators = 12;
constexpr int kWidth = 8;

double peak_f32() {
    __m256 sums[kAccumulators];
    for (auto& sum : sums) sum = _mm256_setzero_ps();
    __m256 a = _mm256_set1_ps(1), b = a;
    __asm__("" : "+x"(a), "+x"(b));  // from here on their values are unknown to the compiler
    for (int64_t i = 0; i < kPeakIterations; ++i)
        for (auto& sum : sums) sum = _mm256_fmadd_ps(a, b, sum);
    float elements[kAccumulators * kWidth];
    __builtin_memcpy(elements, sums, sizeof(sums));
    double total = 0;
    for (float element : elements) total += element;
    return total;
}

}  // namespace

constinit const ReadProbe kReadAvx2 = read_probe(Isa::avx2);
constinit const PeakProbe kPeakAvx2F32 = {"avx2_f32", Isa::avx2, 2.0 * kWidth * kAccumulators * kPeakIterations,
                                          peak_f32};

}  // namespace fourfold
