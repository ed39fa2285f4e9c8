// The ops FourfoldLinear and FourfoldRows of TensorFlow: matmul.h and unpack_rows on its tensors, where they lie.
//
//   y = FourfoldLinear(x, weight, weight_scale, weight_format, bias)
//     x              (..., K)             float32, float16 or bfloat16
//     weight         (P, bytes of a panel) uint8: 16 outputs a panel, docs/format.md
//     weight_scale   (P, 4)               uint8: each panel's float32 scale, as bytes; (0, 4) for bf16 and f32
//     weight_format  (4,)                 uint8: the format's name in ASCII, so that weights are read as what they are
//     bias           (N,)                 float32, float16 or bfloat16; (0, N) for none
//     y              (..., N)             of x's type
//   rows = FourfoldRows(weight, weight_scale, weight_format, begin, end)
//     begin, end     ()                   int64: of N, rounded up to whole panels
//     rows           (end - begin, K)     float32; K rounded up to whole tiles, the added inputs are 0
//
// N stands in the shape of an argument, an empty one if need be, because a shape function written in C can read shapes
// but no attribute that is a number; so y's shape is known before anything is computed.
#pragma once
#include <cstdint>
#include <string>

namespace fourfold {

// Finds TensorFlow's C API in a loaded library; its path is as the loader knows it. Throws std::runtime_error, naming
// what is missing.
void find_tensorflow(const std::string& library);

// The address of the weight that FourfoldLinear last computed with.
uintptr_t last_tensorflow_weight();

}  // namespace fourfold

// Registers ops and kernels with the TensorFlow that was found; csrc/tensorflow_library.cpp calls it.
extern "C" __attribute__((visibility("default"))) void fourfold_register_tensorflow_ops();
