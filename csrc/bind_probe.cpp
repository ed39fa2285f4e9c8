#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>

#include "probe.h"

namespace nb = nanobind;
using namespace fourfold;

namespace {

// The machine is read again for each measurement: it is the one that the threads will run on.
template <typename Measure>
auto without_gil(Measure measure) {
    nb::gil_scoped_release released;
    return measure(read_machine());
}

nb::dict bandwidth(const Spread& bytes_per_s) {
    nb::dict result;
    result["best_gb_s"] = bytes_per_s.best / 1e9;
    result["median_gb_s"] = bytes_per_s.median / 1e9;
    return result;
}

nb::dict read_bandwidth(const std::vector<int>& cpus, int64_t n_bytes, int n_repeats) {
    const auto read =
        without_gil([&](const Machine& machine) { return measure_read_bandwidth(machine, cpus, n_bytes, n_repeats); });
    Spread most = read.bytes_per_s[0];
    nb::dict patterns;
    for (size_t i = 0; i < kReadPatterns; ++i) {
        const Spread& pattern = read.bytes_per_s[i];
        patterns[kReadPatternNames[i].data()] = bandwidth(pattern);
        most = {std::max(most.best, pattern.best), std::max(most.median, pattern.median)};
    }
    nb::dict result = bandwidth(most);
    result["patterns"] = patterns;
    result["isa"] = to_string(read.isa).data();
    result["bytes"] = read.n_bytes;
    return result;
}

nb::dict copy_bandwidth(const std::vector<int>& cpus, int64_t n_bytes, int n_repeats) {
    const auto copy =
        without_gil([&](const Machine& machine) { return measure_copy_bandwidth(machine, cpus, n_bytes, n_repeats); });
    nb::dict result = bandwidth(copy.bytes_per_s);
    result["bytes"] = copy.n_bytes;
    return result;
}

nb::dict peak(const std::vector<int>& cpus, const std::string& kind, int n_repeats) {
    const auto peak = without_gil([&](const Machine& machine) { return measure_peak(machine, cpus, kind, n_repeats); });
    nb::dict result;
    result["best_gflop_s"] = peak.flop_per_s.best / 1e9;
    result["median_gflop_s"] = peak.flop_per_s.median / 1e9;
    result["kind"] = kind;
    return result;
}

nb::dict handover(int from, int to, int64_t n_bytes, int n_rounds) {
    const auto times =
        without_gil([&](const Machine& machine) { return measure_handover(machine, from, to, n_bytes, n_rounds); });
    nb::dict result;
    result["best_us"] = times.best * 1e6;
    result["median_us"] = times.median * 1e6;
    result["bytes"] = times.n_bytes;
    return result;
}

}  // namespace

void bind_probe(nb::module_& m) {
    constexpr int64_t kBytes = 2'000'000'000;
    m.def("measure_read_bandwidth", &read_bandwidth, nb::arg("cpus"), nb::arg("bytes") = kBytes,
          nb::arg("repeats") = 5);
    m.def("measure_copy_bandwidth", &copy_bandwidth, nb::arg("cpus"), nb::arg("bytes") = kBytes,
          nb::arg("repeats") = 5);
    m.def("measure_handover", &handover, nb::arg("from_cpu"), nb::arg("to_cpu"), nb::arg("bytes"),
          nb::arg("rounds") = 2000);
    m.def("measure_peak", &peak, nb::arg("cpus"), nb::arg("kind"), nb::arg("repeats") = 5);
    m.def("peak_kinds", [] { return peak_kinds(read_machine()); });
}
