// Table of contents of fourfold._core; each part binds itself in bind_<part>.cpp.
#include <nanobind/nanobind.h>

namespace nb = nanobind;

NB_MODULE(_core, m) {
    m.doc() = "The arithmetic of fourfold. Private: the public face is the Python package.";
}
