#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "machine.h"
#include "matmul.h"
#include "names.h"
#include "shares.h"
#include "successors.h"

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
    m.def(
        "learn_successors",
        [](const std::vector<uintptr_t>& walk) {
            const auto successors = std::make_unique<Successors>();
            std::vector<uintptr_t> expected;
            for (const uintptr_t address : walk)
                expected.push_back(
                    reinterpret_cast<uintptr_t>(successors->after({at<const uint8_t>(address), 1, 64, 1}).panels));
            return expected;
        },
        "walk"_a, "For tests: what is expected after each of these addresses, read in this order; 0 for nothing.");
}
