#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "tensorflow_op.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace fourfold;

void bind_tensorflow(nb::module_& m) {
    m.def("find_tensorflow", &find_tensorflow, "library"_a,
          "Finds TensorFlow's C API in a library that is loaded. Raises RuntimeError, naming what it lacks.");
    m.def("last_tensorflow_weight", &last_tensorflow_weight,
          "The address of the weight that FourfoldLinear last computed with.");
}
