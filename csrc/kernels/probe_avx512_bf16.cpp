// The dot product of bfloat16, in a file of its own because AVX-512 may lack it; see probe_avx512.cpp.
#include <immintrin.h>

#include "kernels/probe.h"

namespace fourfold {
namespace {

constexpr int kAccumulators = 16;
constexpr int kOne = 0x3F80;  // 1 as bfloat16
constexpr double kFlopsPerCall = 2.0 * 2 * 16 * kAccumulators * kPeakIterations;

double peak_bf16() {
    __m512 sums[kAccumulators];
    for (auto& sum : sums) sum = _mm512_setzero_ps();
    __m512i a = _mm512_set1_epi16(kOne), b = a;
    __asm__("" : "+v"(a), "+v"(b));
    for (int64_t i = 0; i < kPeakIterations; ++i)
        for (auto& sum : sums) sum = _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
    double total = 0;  // exact: a sum of 16 equal powers of two is one
    for (auto& sum : sums) total += _mm512_reduce_add_ps(sum);
    return total;
}

}  // namespace

constinit const PeakProbe kPeakAvx512Bf16 = {"avx512_bf16", Isa::avx512, kFlopsPerCall, peak_bf16};

}  // namespace fourfold
