// The ops FourfoldLinear and FourfoldRows of TensorFlow: matmul.h and unpack_rows on its tensors, where they lie.
//
//   y = FourfoldLinear(x, weight, bias)
//     x       (..., K)   float32, float16 or bfloat16
//     weight  (bytes,)   uint8: the panels of a matrix (N, K) (docs/format.md), its panel scales, float32, where the
//                        format has some, and 8 bytes of the format's name in ASCII. One tensor, so that weights are
//                        never without what says how to read them, and because TensorFlow takes as long to read a
//                        variable as to start an op.
//     bias    (N,)       float32, float16 or bfloat16; (0, N) for none
//     y       (..., N)   of x's type
//   rows = FourfoldRows(weight, outputs, inputs, begin, end)
//     outputs, inputs, begin, end   ()   int64: N, K, and which of the N
//     rows    (end - begin, K)           float32
//
// N stands in the shape of an argument, an empty one if need be, because a shape function written in C can read shapes
// but no attribute that is a number; so y's shape is known before anything is computed.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

#include "matmul.h"
#include "tensorflow_api.h"

namespace fourfold {

// Finds TensorFlow's C API in a loaded library; its path is as the loader knows it. Throws std::runtime_error, naming
// what is missing.
void find_tensorflow(const std::string& library);

// What was found. Every pointer is null before that.
const TensorFlow& tensorflow_api();

// The matrix (n, k) that lies in a weight's bytes, as above. Throws std::invalid_argument where they are not those of
// one: the kernels read by address.
MatrixView matrix_in(const uint8_t* bytes, size_t n_bytes, size_t n, size_t k);

// float32, float16 or bfloat16. Throws std::invalid_argument for another type.
NumberType number_type_of(TF_DataType type);

// The address of the weight that FourfoldLinear, or what stands for it (tensorflow_direct.h), last computed with.
uintptr_t last_tensorflow_weight();
void note_tensorflow_weight(const void* weight);

}  // namespace fourfold

// Registers ops and kernels with the TensorFlow that was found; csrc/tensorflow_library.cpp calls it.
extern "C" __attribute__((visibility("default"))) void fourfold_register_tensorflow_ops();
