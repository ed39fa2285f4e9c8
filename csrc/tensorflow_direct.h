// What FourfoldLinear (tensorflow_op.h) computes, on eager tensors and without TensorFlow's dispatcher: one call from
// Python, which Python makes where nobody but the caller is to see the op.
//
// A variable is read by TensorFlow's own op alone, whoever may have assigned to it; that takes a fifteenth of a product
// of 4096 x 4096 with cold caches. So the product begins with what the last read gave, which is held for that, while
// this thread reads once more. Where the variable's memory has become another, the product is computed again.
#pragma once
#include <nanobind/nanobind.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "matmul.h"
#include "tensorflow_api.h"

namespace fourfold {

// Finds the C API of eager execution, and the functions between its tensors and Python's (tensorflow/python/eager/
// pywrap_tensor.h), in the library that TensorFlow's Python is linked with. False where something is missing: then
// there are no direct products.
bool find_tensorflow_eager(const std::string& library);

// A variable in the memory of this process, and its value when it was last read.
class HeldVariable {
  public:
    // `handle` is its eager tensor of type resource. Throws std::invalid_argument for one that lies elsewhere.
    HeldVariable(TFE_Context* context, nanobind::object handle, TF_DataType type);
    ~HeldVariable();
    HeldVariable(const HeldVariable&) = delete;
    HeldVariable& operator=(const HeldVariable&) = delete;

    void read();  // throws nothing
    // What was read since: whether it could be; then it is held.
    bool take();
    // Whether it is the memory that was held before. As long as that is held, nobody writes to it: TensorFlow's ops
    // change a variable in place only where nobody shares its memory, or give every reader a copy.
    bool is_as_before() const { return is_as_before_; }
    const void* data() const { return data_; }
    size_t numbers() const { return numbers_; }
    TF_DataType type() const { return type_; }

  private:
    nanobind::object handle_;
    TF_DataType type_;
    TF_Status* status_;
    TFE_Op* op_;
    TFE_TensorHandle *held_ = nullptr, *latest_ = nullptr;
    const void* data_ = nullptr;
    size_t numbers_ = 0;
    bool is_as_before_ = false;
};

struct DirectShapes {
    std::vector<int64_t> input_axes, output_axes;  // last axes of x and y
    size_t x_axes;  // of all of x; 0 where there may be any, but at least one before those
};

class DirectProduct {
  public:
    // `context` is the capsule of TensorFlow's eager context, which is kept; `bias` may be None; `watched` is the bias'
    // variable where it can be trained, else None. Throws std::invalid_argument, or std::runtime_error with TensorFlow's
    // words.
    DirectProduct(nanobind::object context, nanobind::object weight, nanobind::object bias, TF_DataType bias_type,
                  nanobind::object watched, TF_DataType type, DirectShapes shapes, size_t n_threads);
    ~DirectProduct();

    // y, a new eager tensor. None where a gradient of either mode is recorded, where execution is asynchronous, where
    // another thread is in this product, and where x is no eager tensor of the type and shape here in CPU memory, has a
    // mask of Keras', or has no rows: the op sees to that, and to all errors.
    nanobind::object run(nanobind::handle x);

  private:
    class Call;
    bool is_async() const;

    nanobind::object context_;  // outlives what was made with it
    TFE_Context* api_context_;
    HeldVariable weight_;
    std::optional<HeldVariable> bias_;
    nanobind::object watched_;
    TF_DataType type_;
    NumberType number_type_;
    DirectShapes shapes_;
    size_t n_ = 1, k_ = 1, n_threads_;
    TF_Status* status_;
    MatrixView matrix_{};      // in the weight that is held; no panels where those bytes are no such matrix
    bool is_settled_ = false;  // the last read gave what was held
    bool is_busy_ = false;     // the interpreter's lock guards it
};

}  // namespace fourfold
