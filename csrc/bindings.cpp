// Table of contents of fourfold._core; each part binds itself in bind_<part>.cpp.
#include <nanobind/nanobind.h>

namespace nb = nanobind;

void bind_kernels(nb::module_& m);
void bind_machine(nb::module_& m);
void bind_matmul(nb::module_& m);
void bind_pack(nb::module_& m);
void bind_probe(nb::module_& m);
void bind_program(nb::module_& m);
void bind_tensorflow(nb::module_& m);

NB_MODULE(_core, m) {
    m.doc() = "The arithmetic of fourfold. Private: the public face is the Python package.";
    nb::set_leak_warnings(false);  // a broken team keeps what its stuck thread may still touch, on purpose
    bind_kernels(m);
    bind_machine(m);
    bind_matmul(m);
    bind_pack(m);
    bind_probe(m);
    bind_program(m);
    bind_tensorflow(m);
}
