#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "exchange.h"
#include "machine.h"
#include "matmul.h"
#include "names.h"
#include "shares.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace fourfold {
namespace {

// Other frameworks' arrays come as addresses: what they point to, and that it lasts as long as the call, is the
// caller's to vouch for. Python checks shapes before it gets here.
template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

std::optional<OpenMpCrew> lent;

Crew& crew_for(bool openmp) {
    if (!openmp) return own_crew();
    if (!lent) throw std::invalid_argument("no OpenMP runtime was lent");
    return *lent;
}

// What this process computes with.
Isa own_isa() {
    static const Isa isa = choose_isa(read_machine());
    return isa;
}

NumberType type_at(int i) { return static_cast<NumberType>(i); }

std::optional<Exchange> tensors;

// To give the interpreter to others and take it back costs a part of a small product. Below so many multiplications,
// which take tens of microseconds, it is kept, where no other call can have the threads.
constexpr size_t kKeepInterpreter = size_t{4} << 20;

// What a call of these tensors computes, but for the result; nothing where one of them is not as it should be.
std::optional<MatmulArgs> read_tensors(const SeenTensor& x, nb::handle weight, nb::handle scales, nb::handle bias,
                                       const Format format, size_t n, size_t k) {
    const auto x_type = x.number_type();
    const auto panels = tensors->weight(weight);
    if (!x_type || x.axes() == 0 || x.length(x.axes() - 1) != k) return {};
    if (!panels || !panels->is_bytes({panels_of(n), panel_bytes(format, tiles_of(k))})) return {};
    MatmulArgs args{};
    args.w = {format, n, k, panels->data<const uint8_t>(), nullptr};
    args.x = x.data<const void>();
    args.x_type = args.y_type = *x_type;
    args.m = 1;
    args.x_stride = k;
    for (size_t axis = 0; axis + 1 < x.axes(); ++axis) args.m *= x.length(axis);
    if (has_scales(format)) {
        const auto seen = tensors->weight(scales);
        if (!seen || !seen->is_bytes({panels_of(n), sizeof(float)})) return {};
        args.w.panel_scales = seen->data<const float>();
    }
    if (!bias.is_none()) {
        const auto seen = tensors->weight(bias);
        if (!seen || !seen->number_type() || seen->axes() != 1 || seen->length(0) != n) return {};
        args.bias = seen->data<const void>();
        args.bias_type = *seen->number_type();
    }
    return args;
}

nb::object linear_of_tensors(nb::handle x, nb::handle weight, nb::handle scales, nb::handle bias,
                             std::string_view format, size_t n, size_t k, size_t threads, bool openmp) {
    if (!tensors) throw std::invalid_argument("no tensors were lent");
    const auto rows = tensors->plain(x);
    if (!rows) return nb::none();
    auto args = read_tensors(*rows, weight, scales, bias, format_named(format), n, k);
    if (!args) return nb::none();
    nb::object y = tensors->make(*rows, n, args->y);
    Crew& crew = crew_for(openmp);
    const Isa isa = own_isa();
    std::optional<nb::gil_scoped_release> release;
    if (!openmp || n * k * args->m > kKeepInterpreter) release.emplace();
    matmul(*args, isa, crew, threads);
    return y;
}

}  // namespace
}  // namespace fourfold

using namespace fourfold;

void bind_matmul(nb::module_& m) {
    m.def(
        "view",
        [](const nb::ndarray<nb::ro, nb::device::cpu>& array) -> nb::object {
            using Like = nb::ndarray<nb::numpy, nb::ro>;
            nb::dlpack::dtype type = array.dtype();
            if (type.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat) && type.bits == 16)
                type = nb::dtype<uint16_t>();
            std::vector<size_t> shape;
            std::vector<int64_t> strides;
            for (size_t i = 0; i < array.ndim(); ++i) {
                shape.push_back(array.shape(i));
                strides.push_back(array.stride(i));
            }
            // The array that was handed in is kept by the view.
            const Like like(array.data(), shape.size(), shape.data(), nb::find(array), strides.data(), type);
            return nb::cast(like, nb::rv_policy::reference);
        },
        "array"_a,
        "Anything that speaks DLPack, in CPU memory, as a numpy array of the same bytes; bfloat16 as uint16.");
    m.def(
        "lend_openmp",
        [](uintptr_t parallel, uintptr_t thread_num, uintptr_t num_threads) {
            lent.emplace(OpenMp{reinterpret_cast<decltype(OpenMp::parallel)>(parallel),
                                reinterpret_cast<decltype(OpenMp::thread_num)>(thread_num),
                                reinterpret_cast<decltype(OpenMp::num_threads)>(num_threads)});
        },
        "parallel"_a, "thread_num"_a, "num_threads"_a,
        "Addresses of GOMP_parallel, omp_get_thread_num and omp_get_num_threads of the runtime that `openmp=True` "
        "uses.");
    m.def(
        "lend_tensors",
        [](nb::handle tensor, nb::handle parameter) {
            const auto found = Exchange::of(tensor, parameter);
            if (found) tensors = found;
            return found.has_value();
        },
        "tensor"_a, "parameter"_a,
        "The types that `linear_of_tensors` takes. False, and nothing changed, where the first has no table that we "
        "know.");
    m.def("linear_of_tensors", &linear_of_tensors, "x"_a, "weight"_a.none(), "scales"_a.none(), "bias"_a.none(),
          "format"_a, "n"_a, "k"_a, "threads"_a, "openmp"_a,
          "y = x Wᵀ + bias, a new tensor; None where a tensor is not as it should be: type, shape, place, contiguous.");
    m.def(
        "matmul",
        [](std::string_view format, size_t n, size_t k, uintptr_t panels, uintptr_t scales, uintptr_t x, int x_type,
           size_t rows, size_t x_stride, uintptr_t bias, int bias_type, uintptr_t y, int y_type, size_t threads,
           bool openmp) {
            const MatmulArgs args{{format_named(format), n, k, at<const uint8_t>(panels), at<const float>(scales)},
                                  at<const void>(x),
                                  type_at(x_type),
                                  rows,
                                  x_stride,
                                  at<const void>(bias),
                                  type_at(bias_type),
                                  at<void>(y),
                                  type_at(y_type)};
            Crew& crew = crew_for(openmp);
            const Isa isa = own_isa();
            nb::gil_scoped_release release;
            matmul(args, isa, crew, threads);
        },
        "format"_a, "n"_a, "k"_a, "panels"_a, "scales"_a, "x"_a, "x_type"_a, "rows"_a, "x_stride"_a, "bias"_a,
        "bias_type"_a, "y"_a, "y_type"_a, "threads"_a, "openmp"_a,
        "y = x Wᵀ + bias on arrays given by address. Types: 0 float32, 1 float16, 2 bfloat16; address 0 for none.");
    m.def(
        "unpack_rows",
        [](std::string_view format, size_t n, size_t k, uintptr_t panels, uintptr_t scales, size_t begin, size_t end,
           uintptr_t out, size_t threads, bool openmp) {
            const MatrixView w{format_named(format), n, k, at<const uint8_t>(panels), at<const float>(scales)};
            if (begin > end || end > n) throw std::invalid_argument("rows are out of range");
            Crew& crew = crew_for(openmp);
            const Isa isa = own_isa();
            nb::gil_scoped_release release;
            unpack_rows(w, begin, end, at<float>(out), isa, crew, threads);
        },
        "format"_a, "n"_a, "k"_a, "panels"_a, "scales"_a, "begin"_a, "end"_a, "out"_a, "threads"_a, "openmp"_a,
        "Rows [begin, end) as float32 (end - begin, k), on arrays given by address.");
    m.def(
        "call_late",
        [](size_t threads, size_t late, double seconds) {
            std::vector<std::vector<bool>> by_caller(threads);
            const auto caller = std::this_thread::get_id();
            auto job = [&](size_t i) { by_caller[i].push_back(std::this_thread::get_id() == caller); };
            nb::gil_scoped_release release;
            auto pass = [](size_t) {};
            own_crew().run(threads, job_of(pass));  // all threads have been started, and look out
            stall_own_crew(late, seconds);
            own_crew().run(threads, job_of(job));
            return by_caller;
        },
        "threads"_a, "late"_a, "seconds"_a,
        "For tests: of each part of a call to which thread `late` comes late, whether the caller took it, each time.");
    m.def(
        "take_shares",
        [](size_t count, size_t most, size_t threads, size_t slow, double seconds) {
            std::vector<Shares::Left> left(threads);
            std::vector<std::vector<std::pair<size_t, size_t>>> taken(threads);
            Shares shares(left.data(), count, threads);
            auto take_all = [&](size_t i) {
                for (;;) {
                    const auto units = shares.take(i, most);
                    if (units.first == units.second) return;
                    taken[i].push_back(units);
                    if (i == slow) std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
                }
            };
            nb::gil_scoped_release release;
            own_crew().run(threads, job_of(take_all));
            return taken;
        },
        "count"_a, "most"_a, "threads"_a, "slow"_a, "seconds"_a,
        "For tests: the (begin, end) of `count` units that each thread takes in turn; `slow` sleeps after each.");
}
