// How floats are rounded while we compute: to nearest even, subnormals kept, exceptions masked, as a process begins.
//
// A thread begins with the mode of the one that starts it, and a mode may be anything: PyTorch's set_flush_denormal,
// TensorFlow's threads and libraries linked with -ffast-math have subnormals taken for zero. That would change more
// than what is nearly zero: the small scales of a block (e4m3) and halves are made of subnormal floats. So whoever
// computes has one of these: a thread of ours for its life, a thread of others for a call.
#pragma once
#include <emmintrin.h>

namespace fourfold {

class OwnArithmetic {
  public:
    OwnArithmetic() : theirs_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
    ~OwnArithmetic() { _mm_setcsr(theirs_); }
    OwnArithmetic(const OwnArithmetic&) = delete;
    OwnArithmetic& operator=(const OwnArithmetic&) = delete;

  private:
    const unsigned theirs_;
};

}  // namespace fourfold
