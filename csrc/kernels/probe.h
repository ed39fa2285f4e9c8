// Kernels that measure the machine instead of a model: they set the limits that every figure is a fraction of. Each
// does work whose result is known beforehand, and the caller compares: a loop that the compiler removed would give
// itself away.
//
//   read:  the sum of a buffer's 64-bit words, modulo 2^64                                    bounded by memory
//   peak:  acc += a * b with every operand 1, on enough accumulators to hide the latency      bounded by the ports
//
// A row of another ISA than scalar may be called only on a machine that has it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "isa.h"

namespace fourfold {

// How a thread walks its buffer. Several streams keep several DRAM pages and prefetchers busy; a software prefetch
// crosses the 4 KB boundary where the hardware's prefetchers stop.
enum class ReadPattern : uint8_t { linear, linear_prefetch, streams4, streams4_prefetch };
constexpr std::string_view kReadPatternNames[] = {"linear", "linear_prefetch", "streams4", "streams4_prefetch"};
constexpr size_t kReadPatterns = 4;
constexpr size_t kReadGrain = 4096;           // buffers are 64-byte aligned and whole multiples of this
constexpr size_t kPrefetchAheadBytes = 2048;  // what 25 GB/s a core brings in 80 ns of latency

using ReadFn = uint64_t (*)(const uint8_t* data, size_t n_bytes);
struct ReadProbe {
    Isa isa;
    ReadFn run[kReadPatterns];
};
extern const ReadProbe kReadScalar, kReadAvx2, kReadAvx512;

// A call makes kPeakIterations and returns the sum of all accumulators' elements: half of its flops, as each
// multiplication and addition adds 1. No element passes 2^24, up to where float32 counts exactly.
constexpr int64_t kPeakIterations = 1 << 16;  // 0.1 to 3 ms
struct PeakProbe {
    std::string_view name;  // ISA and operand type
    Isa isa;
    double flops_per_call;  // multiplications and additions
    double (*run)();
};
extern const PeakProbe kPeakAvx2F32, kPeakAvx512F32, kPeakAvx512Bf16, kPeakAvx512Int8, kPeakAmxBf16;

}  // namespace fourfold
