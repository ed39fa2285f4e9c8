// What checks share. A new subject is a file with a function of Checks, named below, called by check_everything, and
// listed with its flags in CMakeLists.txt.
#pragma once
#include <bit>
#include <cstring>

#include "machine.h"

namespace metal {

struct Checks {
    size_t n_checks = 0, n_failures = 0;

    // Says what is wrong, up to a number of times that can still be read.
    template <class... Parts>
    bool that(bool holds, const Parts&... parts) {
        ++n_checks;
        if (!holds && ++n_failures <= 20) say("WRONG: ", parts...);
        return holds;
    }
};

void check_everything(Checks& checks);
void check_tile_unit(Checks& checks);  // check_tile_unit.cpp: the instructions, against the manual's definitions
void check_linear(Checks& checks);     // check_linear.cpp: every AMX row of the table of linear kernels
void check_attention(Checks& checks);  // check_attention.cpp: every AMX row of the table of attention kernels
void check_peak(Checks& checks);       // check_peak.cpp: the probe of the unit's peak

// Whether the tiles are as at reset: what a kernel must leave behind.
bool tiles_are_released();

// The same numbers on every machine: xorshift64* (Vigna, arXiv 1402.6246).
class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15 + 1) {}
    uint32_t word() {
        state_ ^= state_ >> 12;
        state_ ^= state_ << 25;
        state_ ^= state_ >> 27;
        return static_cast<uint32_t>(state_ * 0x2545F4914F6CDD1D >> 32);
    }
    // About normal, of variance 4/3: the sum of 4 uniform numbers. Exact in float32.
    float normal() {
        int32_t sum = -(2 << 22);
        for (int i = 0; i < 4; ++i) sum += static_cast<int32_t>(word() >> 10);
        return static_cast<float>(sum) * 0x1p-21f;
    }

  private:
    uint64_t state_;
};

// Memory that must stay as it is: filled with a pattern beforehand, and looked at afterwards.
constexpr uint32_t kPattern = 0xB7B7B7B7;
inline void watch(uint8_t* begin, size_t n) { std::memset(begin, kPattern & 0xFF, n); }
inline bool is_untouched(const uint8_t* begin, size_t n) {  // whole floats
    const auto* words = reinterpret_cast<const uint32_t*>(begin);
    size_t i = 0;
    while (i < n / sizeof(uint32_t) && words[i] == kPattern) ++i;
    return i == n / sizeof(uint32_t);
}

inline uint32_t bits(float x) { return std::bit_cast<uint32_t>(x); }
inline bool is_nan(float x) { return (bits(x) & 0x7FFFFFFF) > 0x7F800000; }
// Any NaN is as good as any other.
inline bool same_bits(float a, float b) { return bits(a) == bits(b) || (is_nan(a) && is_nan(b)); }

}  // namespace metal
