#include "exchange.h"

#include <algorithm>
#include <array>

namespace nb = nanobind;

namespace fourfold {
namespace {

constexpr const char *kAttribute = "__dlpack_c_exchange_api__", *kCapsule = "dlpack_exchange_api";
constexpr uint32_t kMajor = 1;
constexpr int32_t kMaxAxes = 64;  // ours: what `make` has room for

constexpr nb::dlpack::dtype type_of(nb::dlpack::dtype_code code, uint8_t bits) {
    return {static_cast<uint8_t>(code), bits, 1};
}

bool is_contiguous(const DlpackTable::Tensor& t) {
    if (!t.strides) return true;
    int64_t stride = 1;
    for (int32_t i = t.ndim; i-- > 0; stride *= t.shape[i])
        if (t.shape[i] != 1 && t.strides[i] != stride) return false;
    return true;
}

bool has_elements(const DlpackTable::Tensor& t) {
    return std::all_of(t.shape, t.shape + t.ndim, [](int64_t length) { return length > 0; });
}

void set_error(void*, const char*, const char* message) {
    const nb::gil_scoped_acquire interpreter;
    PyErr_SetString(PyExc_RuntimeError, message);
}

void check(int result) {
    if (result != 0) throw nb::python_error();
}

}  // namespace

bool SeenTensor::is_bytes(std::initializer_list<size_t> shape) const {
    return tensor_.dtype == type_of(nb::dlpack::dtype_code::UInt, 8) &&
           std::equal(shape.begin(), shape.end(), tensor_.shape, tensor_.shape + tensor_.ndim,
                      [](size_t wanted, int64_t found) { return static_cast<int64_t>(wanted) == found; });
}

std::optional<NumberType> SeenTensor::number_type() const {
    if (tensor_.dtype == type_of(nb::dlpack::dtype_code::Bfloat, 16)) return NumberType::bf16;
    if (tensor_.dtype == type_of(nb::dlpack::dtype_code::Float, 32)) return NumberType::f32;
    if (tensor_.dtype == type_of(nb::dlpack::dtype_code::Float, 16)) return NumberType::f16;
    return {};
}

std::optional<Exchange> Exchange::of(nb::handle tensor, nb::handle parameter) {
    const nb::object capsule = nb::getattr(tensor, kAttribute, nb::none());
    if (!PyCapsule_IsValid(capsule.ptr(), kCapsule)) return {};
    const auto* table = static_cast<const DlpackTable*>(PyCapsule_GetPointer(capsule.ptr(), kCapsule));
    if (table->major != kMajor || !table->look) return {};
    return Exchange(table, tensor.inc_ref(), parameter.inc_ref());
}

std::optional<SeenTensor> Exchange::plain(nb::handle object) const {
    if (object.type().ptr() != tensor_.ptr()) return {};
    return look(object);
}

std::optional<SeenTensor> Exchange::weight(nb::handle object) const {
    return object.type().ptr() == parameter_.ptr() ? look(object) : plain(object);
}

std::optional<SeenTensor> Exchange::look(nb::handle object) const {
    DlpackTable::Tensor seen;
    if (table_->look(object.ptr(), &seen) != 0) {  // what DLPack has no words for: meta
        PyErr_Clear();
        return {};
    }
    if (seen.device.device_type != nb::device::cpu::value || seen.ndim > kMaxAxes || !is_contiguous(seen)) return {};
    if (!seen.data && has_elements(seen)) return {};  // zeros that are nowhere
    return SeenTensor(seen);
}

nb::object Exchange::make(const SeenTensor& like, size_t last, void*& data) const {
    std::array<int64_t, kMaxAxes> shape;
    DlpackTable::Tensor wanted = like.raw(), seen;
    std::copy_n(wanted.shape, like.axes(), shape.begin());
    shape[like.axes() - 1] = static_cast<int64_t>(last);
    wanted.shape = shape.data();
    wanted.strides = nullptr;
    DlpackTable::Managed* managed = nullptr;
    void* object = nullptr;
    check(table_->allocate(&wanted, &managed, nullptr, set_error));
    check(table_->wrap(managed, &object));
    nb::object made = nb::steal(static_cast<PyObject*>(object));
    check(table_->look(object, &seen));
    data = SeenTensor(seen).data<void>();
    return made;
}

}  // namespace fourfold
