// The probe of the tile unit's peak as it is, in fewer iterations: emulated, its own take minutes.
#include "check.h"
#include "kernels/probe.h"

namespace fourfold {
constexpr int64_t kFewIterations = 100;
}
#define kPeakIterations kFewIterations
#include "kernels/probe_amx.cpp"
#undef kPeakIterations

namespace metal {

void check_peak(Checks& checks) {
    const auto& probe = fourfold::kPeakAmxBf16;
    const auto sum = static_cast<uint64_t>(probe.run()), expected = static_cast<uint64_t>(probe.flops_per_call / 2);
    checks.that(sum == expected, "the probe of the peak returns ", sum, ", not ", expected);
    checks.that(tiles_are_released(), "the probe of the peak leaves tiles configured");
    say("peak: a sum of ", sum, " as expected");
}

}  // namespace metal
