// FMA and the dot product of bytes: latency 4 to 6 cycles on two ports, so at least 12 accumulators; 16 of 32
// registers. Where 512 bits have one port, as on some Xeons, the figure is still the limit.
#include <immintrin.h>

#include "kernels/probe.h"

namespace fourfold {
namespace {

struct Lanes {
    using Vector = __m512i;
    static Vector zero() { return _mm512_setzero_si512(); }
    static Vector load(const uint8_t* p) { return _mm512_load_si512(p); }
    static Vector add(Vector a, Vector b) { return _mm512_add_epi64(a, b); }
};
#include "kernels/probe_read.inl"

constexpr int kAccumulators = 16;
constexpr int kWidth = 16;
constexpr double kFlopsPerCall = 2.0 * kWidth * kAccumulators * kPeakIterations;  // of FMA; of bytes 4 times that

double peak_f32() {
    __m512 sums[kAccumulators];
    for (auto& sum : sums) sum = _mm512_setzero_ps();
    __m512 a = _mm512_set1_ps(1), b = a;
    __asm__("" : "+v"(a), "+v"(b));  // from here on their values are unknown to the compiler
    for (int64_t i = 0; i < kPeakIterations; ++i)
        for (auto& sum : sums) sum = _mm512_fmadd_ps(a, b, sum);
    double total = 0;  // exact: a sum of 16 equal powers of two is one
    for (auto& sum : sums) total += _mm512_reduce_add_ps(sum);
    return total;
}

double peak_int8() {
    __m512i sums[kAccumulators];
    for (auto& sum : sums) sum = _mm512_setzero_si512();
    __m512i a = _mm512_set1_epi8(1), b = a;
    __asm__("" : "+v"(a), "+v"(b));
    for (int64_t i = 0; i < kPeakIterations; ++i)
        for (auto& sum : sums) sum = _mm512_dpbusd_epi32(sum, a, b);
    int64_t total = 0;
    for (auto& sum : sums) total += _mm512_reduce_add_epi32(sum);
    return static_cast<double>(total);
}

}  // namespace

constinit const ReadProbe kReadAvx512 = read_probe(Isa::avx512_vnni);
constinit const PeakProbe kPeakAvx512F32 = {"avx512_f32", Isa::avx512_vnni, kFlopsPerCall, peak_f32};
constinit const PeakProbe kPeakAvx512Int8 = {"avx512_int8", Isa::avx512_vnni, 4 * kFlopsPerCall, peak_int8};

}  // namespace fourfold
