#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "tensorflow_direct.h"
#include "tensorflow_op.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace fourfold;

void bind_tensorflow(nb::module_& m) {
    m.def("find_tensorflow", &find_tensorflow, "library"_a,
          "Finds TensorFlow's C API in a library that is loaded. Raises RuntimeError, naming what it lacks.");
    m.def("last_tensorflow_weight", &last_tensorflow_weight,
          "The address of the weight that FourfoldLinear last computed with.");
    m.def("find_tensorflow_eager", &find_tensorflow_eager, "library"_a,
          "Finds what DirectProduct needs in the library of TensorFlow's Python; False where something is missing.");
    nb::class_<DirectProduct>(m, "DirectProduct",
                              "FourfoldLinear of one weight on eager tensors, past TensorFlow's dispatcher.")
        .def(
            "__init__",
            [](DirectProduct* self, nb::object context, nb::object weight, nb::object bias, int bias_type,
               nb::object watched, int type, std::vector<int64_t> input_axes, std::vector<int64_t> output_axes,
               size_t x_axes, size_t threads) {
                new (self) DirectProduct(std::move(context), std::move(weight), std::move(bias),
                                         static_cast<TF_DataType>(bias_type), std::move(watched),
                                         static_cast<TF_DataType>(type),
                                         {std::move(input_axes), std::move(output_axes), x_axes}, threads);
            },
            "context"_a, "weight"_a, "bias"_a.none(), "bias_type"_a, "watched"_a.none(), "type"_a, "input_axes"_a,
            "output_axes"_a, "x_axes"_a, "threads"_a,
            "`context`: the capsule of TensorFlow's; `weight`, `bias`: handles of variables; `watched`: the bias'\n"
            "variable where it can be trained; types as TensorFlow numbers them; `x_axes` 0 for any; `threads` 0 for "
            "all.")
        .def("__call__", &DirectProduct::run, "x"_a,
             "y, a new eager tensor. None where the op is to compute it: a gradient is recorded, execution is\n"
             "asynchronous, x is not as it should be.");
}
