// Another framework's tensors, read and made without its Python, and with nothing of it compiled in: through the table
// of C functions that its tensor type carries (`__dlpack_c_exchange_api__`, DLPack 1.3).
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <optional>

#include "format.h"

namespace fourfold {

// dlpack.h, DLPackExchangeAPI, of major version 1. Functions give 0, or set Python's error.
struct DlpackTable {
    using Tensor = nanobind::dlpack::dltensor;
    struct Managed;  // DLManagedTensorVersioned
    using SetError = void (*)(void* context, const char* kind, const char* message);

    uint32_t major, minor;
    const void* older;
    int (*allocate)(Tensor* like, Managed** made, void* context, SetError set_error);
    int (*own)(void* object, Managed** made);
    int (*wrap)(Managed* taken, void** object);
    int (*look)(void* object, Tensor* seen);  // what `seen` points to is the object's
    int (*stream)(int device_type, int32_t device, void** stream);
};

// A tensor of at most 64 axes that is contiguous and in CPU memory. What it points to is the framework's.
class SeenTensor {
  public:
    explicit SeenTensor(const DlpackTable::Tensor& tensor) : tensor_(tensor) {}

    size_t axes() const { return static_cast<size_t>(tensor_.ndim); }
    size_t length(size_t axis) const { return static_cast<size_t>(tensor_.shape[axis]); }
    bool is_bytes(std::initializer_list<size_t> shape) const;
    std::optional<NumberType> number_type() const;
    template <class T>
    T* data() const {
        return reinterpret_cast<T*>(static_cast<uint8_t*>(tensor_.data) + tensor_.byte_offset);
    }
    const DlpackTable::Tensor& raw() const { return tensor_; }

  private:
    DlpackTable::Tensor tensor_;
};

// A framework's tensors. A subclass may compute in a way of its own, so none is looked at but a tensor itself and, for
// weights, a `parameter` itself.
class Exchange {
  public:
    // Nothing where the type has no table, or one of another major version.
    static std::optional<Exchange> of(nanobind::handle tensor, nanobind::handle parameter);

    // Nothing for an object of another type, on another device, of more than 64 axes, not contiguous, or whose elements
    // are nowhere in memory.
    std::optional<SeenTensor> plain(nanobind::handle object) const;
    std::optional<SeenTensor> weight(nanobind::handle object) const;

    // A new tensor like `like` (1 to 64 axes), but for the length of its last axis; `data` becomes its memory. Throws
    // nanobind::python_error.
    nanobind::object make(const SeenTensor& like, size_t last, void*& data) const;

  private:
    Exchange(const DlpackTable* table, nanobind::handle tensor, nanobind::handle parameter)
        : table_(table), tensor_(tensor), parameter_(parameter) {}
    std::optional<SeenTensor> look(nanobind::handle object) const;

    const DlpackTable* table_;
    nanobind::handle tensor_, parameter_;  // never given back: this may outlive the interpreter
};

}  // namespace fourfold
