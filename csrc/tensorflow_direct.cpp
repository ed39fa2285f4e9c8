#include "tensorflow_direct.h"

#include <dlfcn.h>

#include <array>
#include <exception>
#include <stdexcept>
#include <string_view>
#include <utility>

#include "crew.h"
#include "machine.h"
#include "tensorflow_op.h"

namespace nb = nanobind;

namespace fourfold {
namespace {

constexpr std::string_view kHost = "/job:localhost/replica:0/task:0/device:CPU:0";
constexpr size_t kMaxAxes = 16;  // ours, of y

TensorFlowEager eager{};

// Of TensorFlow's Python. They are C++, so their names say what they take, and others would not be found.
struct Bridge {
    PyTypeObject** tensor_type;
    TFE_TensorHandle* (*handle_of)(const PyObject* tensor);  // the tensor's own
    PyObject* (*tensor_of)(TFE_TensorHandle* taken, bool is_packed);
    PyObject* (*is_tape_set_empty)();  // of this thread: tapes that record, and forward accumulators
    void (*variable_accessed)(PyObject* variable);
} bridge{};

void check(const TF_Status* status) {
    const TensorFlow& tf = tensorflow_api();
    if (tf.TF_GetCode(status) != TF_OK) throw std::runtime_error(tf.TF_Message(status));
}
bool is_ok(const TF_Status* status) { return tensorflow_api().TF_GetCode(status) == TF_OK; }

TFE_Context* context_in(nb::handle capsule) {
    auto* const context =
        static_cast<TFE_Context*>(PyCapsule_GetPointer(capsule.ptr(), PyCapsule_GetName(capsule.ptr())));
    if (!context) throw nb::python_error();
    return context;
}

Isa own_isa() {
    static const Isa isa = choose_isa(read_machine());
    return isa;
}

bool has_mask(nb::handle tensor) {
    const nb::object own = nb::steal(PyObject_GenericGetDict(tensor.ptr(), nullptr));
    if (!own) throw nb::python_error();
    static PyObject* const name = PyUnicode_InternFromString("_keras_mask");
    PyObject* const mask = PyDict_GetItemWithError(own.ptr(), name);
    return mask && mask != Py_None;
}

// Our own crew, whose caller has something else to do first: once, in the first call.
class BesideCrew final : public Crew {
  public:
    explicit BesideCrew(Job first) : first_(first) {}
    void run(size_t n, Job job) override {
        auto both = [&](size_t i) {
            if (i == 0 && !is_done_) do_first();
            job(i);
        };
        own_crew().run(n, job_of(both));
    }
    void finish() {
        if (!is_done_) do_first();
    }

  private:
    void do_first() {
        is_done_ = true;
        first_(0);
    }
    Job first_;
    bool is_done_ = false;
};

}  // namespace

bool find_tensorflow_eager(const std::string& library) {
    void* const loaded = dlopen(library.c_str(), RTLD_NOW | RTLD_NOLOAD);
    if (!loaded) return false;
    TensorFlowEager functions{};
    Bridge python{};
    bool is_complete = true;
    const auto find = [&]<class Pointer>(const char* name, Pointer& pointer) {
        pointer = reinterpret_cast<Pointer>(dlsym(loaded, name));
        is_complete = is_complete && pointer != nullptr;
    };
#define FOURFOLD_FIND(name, result, parameters) find(#name, functions.name);
    FOURFOLD_TENSORFLOW_EAGER_FUNCTIONS(FOURFOLD_FIND)
#undef FOURFOLD_FIND
    find("EagerTensorType", python.tensor_type);
    find("_Z18EagerTensor_HandlePK7_object", python.handle_of);
    find("_Z21EagerTensorFromHandleP16TFE_TensorHandleb", python.tensor_of);
    find("_Z21TFE_Py_TapeSetIsEmptyv", python.is_tape_set_empty);
    find("_Z38TFE_Py_VariableWatcherVariableAccessedP7_object", python.variable_accessed);
    if (!is_complete || !tensorflow_api().TF_NewStatus) return false;
    eager = functions;
    bridge = python;
    return true;
}

HeldVariable::HeldVariable(TFE_Context* context, nb::object handle, TF_DataType type)
    : handle_(std::move(handle)), type_(type) {
    if (Py_TYPE(handle_.ptr()) != *bridge.tensor_type) throw std::invalid_argument("a variable's handle is no tensor");
    status_ = tensorflow_api().TF_NewStatus();
    const char* const device = eager.TFE_TensorHandleDeviceName(bridge.handle_of(handle_.ptr()), status_);
    const bool is_here = device && device == kHost;
    op_ = is_here ? eager.TFE_NewOp(context, "ReadVariableOp", status_) : nullptr;
    if (op_ && is_ok(status_)) return;
    tensorflow_api().TF_DeleteStatus(status_);
    if (op_) eager.TFE_DeleteOp(op_);
    throw std::invalid_argument("the variable does not lie in this process' memory");
}

HeldVariable::~HeldVariable() {
    if (held_) eager.TFE_DeleteTensorHandle(held_);
    if (latest_) eager.TFE_DeleteTensorHandle(latest_);
    eager.TFE_DeleteOp(op_);
    tensorflow_api().TF_DeleteStatus(status_);
}

void HeldVariable::read() {
    int n_results = 1;
    if (latest_) eager.TFE_DeleteTensorHandle(std::exchange(latest_, nullptr));
    eager.TFE_OpReset(op_, "ReadVariableOp", nullptr, status_);
    if (is_ok(status_)) eager.TFE_OpAddInput(op_, bridge.handle_of(handle_.ptr()), status_);
    if (!is_ok(status_)) return;
    eager.TFE_OpSetAttrType(op_, "dtype", type_);
    eager.TFE_Execute(op_, &latest_, &n_results, status_);
}

bool HeldVariable::take() {
    TFE_TensorHandle* const found = std::exchange(latest_, nullptr);
    if (!found) return false;
    const void* const data = is_ok(status_) ? eager.TFE_TensorHandleDevicePointer(found, status_) : nullptr;
    const int64_t numbers = data ? eager.TFE_TensorHandleNumElements(found, status_) : 0;
    if (!data || !is_ok(status_)) {
        eager.TFE_DeleteTensorHandle(found);
        return false;
    }
    is_as_before_ = held_ && data == data_ && static_cast<size_t>(numbers) == numbers_;
    data_ = data;
    numbers_ = static_cast<size_t>(numbers);
    TFE_TensorHandle* const let_go = is_as_before_ ? found : std::exchange(held_, found);
    if (let_go) eager.TFE_DeleteTensorHandle(let_go);
    return true;
}

DirectProduct::DirectProduct(nb::object context, nb::object weight, nb::object bias, TF_DataType bias_type,
                             nb::object watched, TF_DataType type, DirectShapes shapes, size_t n_threads)
    : context_(std::move(context)),
      api_context_(context_in(context_)),
      weight_(api_context_, std::move(weight), TF_UINT8),
      watched_(std::move(watched)),
      type_(type),
      number_type_(number_type_of(type)),
      shapes_(std::move(shapes)),
      n_threads_(n_threads ? n_threads : static_cast<size_t>(read_machine().n_threads())),
      status_(tensorflow_api().TF_NewStatus()) {
    for (const int64_t length : shapes_.output_axes) n_ *= static_cast<size_t>(length);
    for (const int64_t length : shapes_.input_axes) k_ *= static_cast<size_t>(length);
    if (!bias.is_none()) {
        number_type_of(bias_type);
        bias_.emplace(api_context_, std::move(bias), bias_type);
    }
}

DirectProduct::~DirectProduct() { tensorflow_api().TF_DeleteStatus(status_); }

bool DirectProduct::is_async() const {
    TFE_Executor* const executor = eager.TFE_ContextGetExecutorForThread(api_context_);
    const bool found = eager.TFE_ExecutorIsAsync(executor);
    eager.TFE_DeleteExecutor(executor);
    return found;
}

// One call, from the look at x to y.
class DirectProduct::Call {
  public:
    explicit Call(DirectProduct& product) : p_(product) { p_.is_busy_ = true; }
    ~Call() {
        if (y_) tensorflow_api().TF_DeleteTensor(y_);
        p_.is_busy_ = false;
    }

    bool looks_right(TFE_TensorHandle* x) {
        const auto& in = p_.shapes_.input_axes;
        const auto& out = p_.shapes_.output_axes;
        if (eager.TFE_TensorHandleDataType(x) != p_.type_) return false;
        const int found = eager.TFE_TensorHandleNumDims(x, p_.status_);
        const auto axes = static_cast<size_t>(found);
        if (found < 0 || axes < in.size() + 1 || (p_.shapes_.x_axes && axes != p_.shapes_.x_axes)) return false;
        const size_t kept = axes - in.size();
        if (kept + out.size() > kMaxAxes) return false;
        for (size_t i = 0; i < axes; ++i) {
            const int64_t length = eager.TFE_TensorHandleDim(x, static_cast<int>(i), p_.status_);
            if (i >= kept && length != in[i - kept]) return false;
            if (i < kept) m_ *= static_cast<size_t>(dims_[i] = length);
        }
        for (size_t i = 0; i < out.size(); ++i) dims_[kept + i] = out[i];
        n_dims_ = static_cast<int>(kept + out.size());
        const char* const device = eager.TFE_TensorHandleDeviceName(x, p_.status_);
        if (m_ == 0 || !device || device != kHost) return false;
        x_ = eager.TFE_TensorHandleDevicePointer(x, p_.status_);
        return x_ && is_ok(p_.status_);
    }

    // False where a variable cannot be read or is not what it should be, or where there is no memory.
    bool compute() {
        const size_t bytes = m_ * p_.n_ * (p_.number_type_ == NumberType::f32 ? 4 : 2);
        y_ = eager.TF_AllocateTensor(p_.type_, dims_.data(), n_dims_, bytes);
        if (!y_) return false;
        auto read = [this](size_t) {
            p_.weight_.read();
            if (p_.bias_) p_.bias_->read();
        };
        BesideCrew crew(job_of(read));
        const bool is_begun = p_.is_settled_;
        if (is_begun) multiply(crew);
        crew.finish();
        p_.is_settled_ = false;
        if (!p_.weight_.take() || (p_.bias_ && !p_.bias_->take())) return false;
        const bool is_as_before = p_.weight_.is_as_before() && (!p_.bias_ || p_.bias_->is_as_before());
        if (!is_as_before || !p_.matrix_.panels) look_at_variables();
        if (!is_begun || !is_as_before) multiply(own_crew());
        p_.is_settled_ = is_as_before;
        return true;
    }

    nb::object result() {
        TFE_TensorHandle* const handle = eager.TFE_NewTensorHandle(y_, p_.status_);
        if (!handle) return nb::none();
        nb::object y = nb::steal(bridge.tensor_of(handle, false));
        if (!y) throw nb::python_error();
        return y;
    }

  private:
    void look_at_variables() {
        p_.matrix_ = {};
        if (p_.bias_ && p_.bias_->numbers() != p_.n_) throw std::invalid_argument("bias must be (outputs,)");
        p_.matrix_ = matrix_in(static_cast<const uint8_t*>(p_.weight_.data()), p_.weight_.numbers(), p_.n_, p_.k_);
    }

    void multiply(Crew& crew) {
        note_tensorflow_weight(p_.matrix_.panels);
        matmul({p_.matrix_, x_, p_.number_type_, m_, p_.k_, p_.bias_ ? p_.bias_->data() : nullptr,
                p_.bias_ ? number_type_of(p_.bias_->type()) : NumberType::f32, tensorflow_api().TF_TensorData(y_),
                p_.number_type_},
               own_isa(), crew, p_.n_threads_);
    }

    DirectProduct& p_;
    size_t m_ = 1;
    std::array<int64_t, kMaxAxes> dims_;
    int n_dims_ = 0;
    const void* x_ = nullptr;
    TF_Tensor* y_ = nullptr;
};

nb::object DirectProduct::run(nb::handle x) {
    if (is_busy_ || Py_TYPE(x.ptr()) != *bridge.tensor_type) return nb::none();
    if (nb::steal(bridge.is_tape_set_empty()).ptr() != Py_True || has_mask(x) || is_async()) return nb::none();
    Call call(*this);
    if (!call.looks_right(bridge.handle_of(x.ptr()))) return nb::none();
    if (!watched_.is_none()) bridge.variable_accessed(watched_.ptr());
    try {
        const nb::gil_scoped_release others_may_run;
        if (!call.compute()) return nb::none();
    } catch (const std::exception&) {  // the op says what it is
        return nb::none();
    }
    return call.result();
}

}  // namespace fourfold
