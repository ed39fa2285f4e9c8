// The library that `tf.load_op_library` opens. TensorFlow writes Python functions for those ops that are registered
// while it opens a library, so opening this one registers those of _core, which lies beside it and is loaded already.
#include <dlfcn.h>

#include <string>

namespace {

const bool is_registered = [] {
    Dl_info here;
    if (dladdr(&is_registered, &here) == 0) return false;
    const std::string path = here.dli_fname;
    const std::string core = path.substr(0, path.rfind('/') + 1) + FOURFOLD_CORE;
    void* const loaded = dlopen(core.c_str(), RTLD_NOW | RTLD_NOLOAD);
    void* const address = loaded ? dlsym(loaded, "fourfold_register_tensorflow_ops") : nullptr;
    if (address != nullptr) reinterpret_cast<void (*)()>(address)();
    return address != nullptr;
}();

}  // namespace
