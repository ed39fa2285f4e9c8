#include "tensorflow_op.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <new>
#include <stdexcept>
#include <string_view>
#include <vector>

#include "machine.h"
#include "matmul.h"
#include "tensorflow_api.h"

namespace fourfold {
namespace {

TensorFlow tf;
std::atomic<const void*> last_weight = nullptr;
constexpr size_t kNameBytes = 8;  // of a format, at the end of a weight

struct Delete {
    void operator()(TF_Buffer* buffer) const { tf.TF_DeleteBuffer(buffer); }
    void operator()(TF_ShapeHandle* shape) const { tf.TF_DeleteShapeHandle(shape); }
    void operator()(TF_Status* status) const { tf.TF_DeleteStatus(status); }
    void operator()(TF_Tensor* tensor) const { tf.TF_DeleteTensor(tensor); }
};
template <class T>
using Owned = std::unique_ptr<T, Delete>;

// A call of TensorFlow's that went wrong; what() is its message.
void check(const Owned<TF_Status>& status) {
    if (tf.TF_GetCode(status.get()) != TF_OK) throw std::runtime_error(tf.TF_Message(status.get()));
}
Owned<TF_Status> new_status() { return Owned<TF_Status>(tf.TF_NewStatus()); }

// A tensor's own memory, held while this lives.
class Input {
  public:
    Input(TF_OpKernelContext* context, int i, const Owned<TF_Status>& status) {
        TF_Tensor* tensor = nullptr;
        tf.TF_GetInput(context, i, &tensor, status.get());
        check(status);
        tensor_.reset(tensor);
    }
    int rank() const { return tf.TF_NumDims(tensor_.get()); }
    size_t size(int axis) const { return static_cast<size_t>(tf.TF_Dim(tensor_.get(), axis)); }
    TF_DataType type() const { return tf.TF_TensorType(tensor_.get()); }
    const void* data() const { return tf.TF_TensorData(tensor_.get()); }

  private:
    Owned<TF_Tensor> tensor_;
};

// The tensor that an op gives, uninitialized.
class Output {
  public:
    Output(TF_OpKernelContext* context, TF_DataType type, const int64_t* dims, int rank, size_t bytes,
           const Owned<TF_Status>& status)
        : tensor_(tf.TF_AllocateOutput(context, 0, type, dims, rank, bytes, status.get())) {
        check(status);
    }
    void* data() const { return tf.TF_TensorData(tensor_.get()); }

  private:
    Owned<TF_Tensor> tensor_;
};

// What this process computes with.
struct Means {
    Isa isa;
    size_t n_threads;
};

// Field 2 of a ConfigProto, intra_op_parallelism_threads; 0 where it is not set.
size_t intra_op_threads(const uint8_t* p, const uint8_t* end) {
    auto varint = [&] {
        uint64_t value = 0;
        for (int shift = 0; p < end && shift < 64; shift += 7) {
            value |= static_cast<uint64_t>(*p & 0x7F) << shift;
            if (*p++ < 0x80) break;
        }
        return value;
    };
    size_t found = 0;
    while (p < end) {
        const uint64_t key = varint();
        uint64_t skipped = 0;
        switch (key & 7) {
            case 0: {
                const uint64_t value = varint();
                if (key >> 3 == 2) found = static_cast<int32_t>(value) > 0 ? value : 0;
                break;
            }
            case 1:
                skipped = 8;
                break;
            case 2:
                skipped = varint();
                break;
            case 5:
                skipped = 4;
                break;
            default:
                return found;
        }
        p += std::min<uint64_t>(skipped, static_cast<uint64_t>(end - p));
    }
    return found;
}

// TensorFlow's own count of threads, which nobody can change any more once an op runs; every usable core where it is 0.
Means means_of(TF_OpKernelContext* context) {
    static const Means means = [&] {
        const Machine machine = read_machine();
        const Owned<TF_Status> status = new_status();
        const Owned<TF_Buffer> config(tf.TF_NewBuffer());
        tf.TF_GetSerializedConfigProto(context, config.get(), status.get());
        size_t n_threads = 0;
        if (tf.TF_GetCode(status.get()) == TF_OK) {
            const auto* bytes = static_cast<const uint8_t*>(config->data);
            n_threads = intra_op_threads(bytes, bytes + config->length);
        }
        return Means{choose_isa(machine), n_threads ? n_threads : static_cast<size_t>(machine.n_threads())};
    }();
    return means;
}

MatrixView matrix_of(const Input& weight, size_t n, size_t k) {
    if (weight.rank() != 1) throw std::invalid_argument("weight must be (bytes,)");
    return matrix_in(static_cast<const uint8_t*>(weight.data()), weight.size(0), n, k);
}

void linear(TF_OpKernelContext* context, const Owned<TF_Status>& status) {
    const Input x(context, 0, status), weight(context, 1, status), bias(context, 2, status);
    const int rank = x.rank(), bias_rank = bias.rank();
    const bool has_bias = bias_rank == 1;
    if (rank == 0) throw std::invalid_argument("the last axis of x must be the inputs; x has none");
    if (!has_bias && !(bias_rank == 2 && bias.size(0) == 0))
        throw std::invalid_argument("bias must be (outputs,), or (0, outputs) for none");
    const size_t k = x.size(rank - 1), n = bias.size(bias_rank - 1);
    const MatrixView w = matrix_of(weight, n, k);

    const NumberType type = number_type_of(x.type());
    std::vector<int64_t> dims;
    size_t m = 1;
    for (int i = 0; i + 1 < rank; ++i) {
        dims.push_back(static_cast<int64_t>(x.size(i)));
        m *= x.size(i);
    }
    dims.push_back(static_cast<int64_t>(n));
    const Output y(context, x.type(), dims.data(), rank, m * n * (type == NumberType::f32 ? 4 : 2), status);
    note_tensorflow_weight(w.panels);
    const Means means = means_of(context);
    matmul({w, x.data(), type, m, k, has_bias ? bias.data() : nullptr,
            has_bias ? number_type_of(bias.type()) : NumberType::f32, y.data(), type},
           means.isa, own_crew(), means.n_threads);
}

void rows(TF_OpKernelContext* context, const Owned<TF_Status>& status) {
    const Input weight(context, 0, status);
    const auto number = [&](int i) {
        const Input input(context, i, status);
        const int64_t value = input.rank() == 0 ? *static_cast<const int64_t*>(input.data()) : -1;
        if (value < 0) throw std::invalid_argument("outputs, inputs, begin and end must be numbers, none below 0");
        return static_cast<size_t>(value);
    };
    const size_t n = number(1), k = number(2), begin = number(3), end = number(4);
    if (std::max(n, k) >> 32) throw std::invalid_argument("a matrix has less than 2^32 outputs and inputs");
    const MatrixView w = matrix_of(weight, n, k);
    if (begin > end || end > n) throw std::invalid_argument("rows are out of range");
    const int64_t dims[] = {static_cast<int64_t>(end - begin), static_cast<int64_t>(k)};
    const Output out(context, TF_FLOAT, dims, 2, (end - begin) * k * sizeof(float), status);
    if (begin == end) return;
    const Means means = means_of(context);
    unpack_rows(w, begin, end, static_cast<float*>(out.data()), means.isa, own_crew(), means.n_threads);
}

// Nothing may be thrown into TensorFlow.
template <void (*op)(TF_OpKernelContext*, const Owned<TF_Status>&)>
void compute(void*, TF_OpKernelContext* context) {
    const Owned<TF_Status> status = new_status();
    const auto fail = [&](TF_Code code, const char* why) {
        tf.TF_SetStatus(status.get(), code, why);
        tf.TF_OpKernelContext_Failure(context, status.get());
    };
    try {
        op(context, status);
    } catch (const std::invalid_argument& error) {
        fail(TF_INVALID_ARGUMENT, error.what());
    } catch (const std::bad_alloc&) {
        fail(TF_RESOURCE_EXHAUSTED, "there is no memory left to compute in");
    } catch (const std::exception& error) {
        fail(TF_INTERNAL, error.what());
    }
}

// y's shape: all axes of x but the last, and then the last of bias.
void infer_linear(TF_ShapeInferenceContext* context, TF_Status* status) {
    const auto new_shape = [] { return Owned<TF_ShapeHandle>(tf.TF_NewShapeHandle()); };
    const Owned<TF_ShapeHandle> front = new_shape(), back = new_shape(), joined = new_shape();
    const auto is_ok = [&] { return tf.TF_GetCode(status) == TF_OK; };
    const auto take = [&](int input, int64_t begin, int64_t end, TF_ShapeHandle* shape) {
        tf.TF_ShapeInferenceContextGetInput(context, input, shape, status);
        if (!is_ok() || !tf.TF_ShapeInferenceContextRankKnown(context, shape)) return false;
        tf.TF_ShapeInferenceContextWithRankAtLeast(context, shape, 1, shape, status);
        if (is_ok()) tf.TF_ShapeInferenceContextSubshape(context, shape, begin, end, shape, status);
        return is_ok();
    };
    const bool is_known = take(0, 0, -1, front.get()) && take(2, -1, INT64_MAX, back.get());
    if (!is_ok()) return;
    if (!is_known) return tf.TF_ShapeInferenceContextSetUnknownShape(context, status);
    tf.TF_ShapeInferenceContextConcatenateShapes(context, front.get(), back.get(), joined.get(), status);
    if (is_ok()) tf.TF_ShapeInferenceContextSetOutput(context, 0, joined.get(), status);
}
void infer_rows(TF_ShapeInferenceContext* context, TF_Status* status) {
    tf.TF_ShapeInferenceContextSetUnknownShape(context, status);
}

void register_op(const char* name, std::initializer_list<const char*> attributes,
                 std::initializer_list<const char*> inputs, const char* output, TF_InferShapes* infer,
                 TF_Compute* run) {
    const Owned<TF_Status> status = new_status();
    TF_OpDefinitionBuilder* const op = tf.TF_NewOpDefinitionBuilder(name);  // registering takes both builders
    for (const char* attribute : attributes) tf.TF_OpDefinitionBuilderAddAttr(op, attribute);
    for (const char* input : inputs) tf.TF_OpDefinitionBuilderAddInput(op, input);
    tf.TF_OpDefinitionBuilderAddOutput(op, output);
    tf.TF_OpDefinitionBuilderSetShapeInferenceFunction(op, infer);
    tf.TF_RegisterOpDefinition(op, status.get());
    check(status);
    tf.TF_RegisterKernelBuilder(name, tf.TF_NewKernelBuilder(name, "CPU", nullptr, run, nullptr), status.get());
    check(status);
}

template <class Function>
void find(void* library, const char* name, Function*& function) {
    function = reinterpret_cast<Function*>(dlsym(library, name));
    if (function == nullptr) throw std::runtime_error("this TensorFlow has no " + std::string(name));
}

}  // namespace

void find_tensorflow(const std::string& library) {
    void* const loaded = dlopen(library.c_str(), RTLD_NOW | RTLD_NOLOAD);
    if (loaded == nullptr) throw std::runtime_error(library + " is not loaded");
    TensorFlow found;
#define FOURFOLD_FIND(name, result, parameters) find(loaded, #name, found.name);
    FOURFOLD_TENSORFLOW_FUNCTIONS(FOURFOLD_FIND)
#undef FOURFOLD_FIND
    tf = found;
}

const TensorFlow& tensorflow_api() { return tf; }

MatrixView matrix_in(const uint8_t* bytes, size_t n_bytes, size_t n, size_t k) {
    if (n_bytes < kNameBytes) throw std::invalid_argument("weight must be (bytes,)");
    const size_t size = n_bytes - kNameBytes;
    const char* const name = reinterpret_cast<const char*>(bytes + size);
    const auto it =
        std::find(kFormatNames.begin(), kFormatNames.end(), std::string_view(name, strnlen(name, kNameBytes)));
    if (it == kFormatNames.end()) throw std::invalid_argument("weight does not end in the name of a format");
    const auto format = static_cast<Format>(it - kFormatNames.begin());
    const size_t panels = panels_of(n) * panel_bytes(format, tiles_of(k));
    if (n == 0 || k == 0 || size != panels + (has_scales(format) ? panels_of(n) * sizeof(float) : 0))
        throw std::invalid_argument("weight is not that of " + std::to_string(n) + " outputs and " + std::to_string(k) +
                                    " inputs in " + std::string(*it));
    return {format, n, k, bytes, has_scales(format) ? reinterpret_cast<const float*>(bytes + panels) : nullptr};
}

NumberType number_type_of(TF_DataType type) {
    switch (type) {
        case TF_FLOAT:
            return NumberType::f32;
        case TF_HALF:
            return NumberType::f16;
        case TF_BFLOAT16:
            return NumberType::bf16;
        default:
            throw std::invalid_argument("numbers must be float32, float16 or bfloat16");
    }
}

void note_tensorflow_weight(const void* weight) { last_weight.store(weight, std::memory_order_relaxed); }

uintptr_t last_tensorflow_weight() { return reinterpret_cast<uintptr_t>(last_weight.load(std::memory_order_relaxed)); }

}  // namespace fourfold

using namespace fourfold;

void fourfold_register_tensorflow_ops() {
    if (tf.TF_NewStatus == nullptr) return;
    try {
        register_op("FourfoldLinear", {"T: {float, half, bfloat16}", "U: {float, half, bfloat16}"},
                    {"x: T", "weight: uint8", "bias: U"}, "y: T", infer_linear, compute<linear>);
        register_op("FourfoldRows", {},
                    {"weight: uint8", "outputs: int64", "inputs: int64", "begin: int64", "end: int64"}, "rows: float",
                    infer_rows, compute<rows>);
    } catch (const std::exception&) {
        // What was not registered is missing from what `tf.load_op_library` returns.
    }
}
