// Bindings of single kernels, for tests and benchmarks: the table as it is, and each row by its name.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "kernels/kernels.h"
#include "memory.h"
#include "names.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace fourfold {
namespace {

template <class T, int DIMS>
using Array = nb::ndarray<T, nb::ndim<DIMS>, nb::c_contig, nb::device::cpu>;

const RowKernels& rows_named(const std::string& isa) { return row_kernels(isa_named(isa)); }

nb::list linear_table() {
    nb::list rows;
    for (const LinearKernel& k : linear_kernels()) {
        nb::dict row;
        row["name"] = std::string(k.name);
        row["isa"] = std::string(to_string(k.isa));
        row["format"] = std::string(kFormatNames[static_cast<size_t>(k.format)]);
        row["activation"] = std::string(kActivationNames[static_cast<size_t>(k.activation)]);
        row["m_min"] = k.m_min;
        row["m_max"] = k.m_max;
        row["weight_rel"] = k.weight_rel;
        row["weight_abs"] = k.weight_abs;
        row["x_rel"] = k.x_rel;
        row["x_abs"] = k.x_abs;
        rows.append(row);
    }
    return rows;
}

// y (M, 16 P) = x (M, K) W^T by the row of that name; the packing is that of `isa`.
void linear(const std::string& name, const std::string& isa, Array<const uint8_t, 2> panels,
            std::optional<Array<const float, 1>> scales, Array<const float, 2> x, Array<float, 2> y) {
    const LinearKernel* kernel = find_linear(name);
    if (!kernel) throw std::invalid_argument("there is no kernel named " + name);
    const size_t m = x.shape(0), k = x.shape(1), k_tiles = tiles_of(k);
    if (panels.shape(1) != panel_bytes(kernel->format, k_tiles) || y.shape(0) != m ||
        y.shape(1) != panels.shape(0) * kTileN || has_scales(kernel->format) != scales.has_value() ||
        (scales && scales->shape(0) != panels.shape(0)))
        throw std::invalid_argument("linear: the arrays' shapes do not agree");
    const NodeMemory packed(packed_bytes(kernel->activation, m, k_tiles), kAnyNode),
        scratch(kLinearScratchBytes, kAnyNode);
    const size_t padded = padded_rows(kernel->activation, m);
    rows_named(isa).pack(kernel->activation, x.data(), k, m, k, k_tiles, 0, padded, 0, k_tiles, packed.as());
    kernel->run({panels.data(), scales ? scales->data() : nullptr, panels.shape(0), k_tiles, packed.as(), m, y.data(),
                 y.shape(1), scratch.as()});
}

nb::list attend_table() {
    nb::list rows;
    for (const AttendKernel& k : attend_kernels()) {
        nb::dict row;
        row["name"] = std::string(k.name);
        row["isa"] = std::string(to_string(k.isa));
        row["kv"] = std::string(kKvNames[static_cast<size_t>(k.format)]);
        row["m_min"] = k.m_min;
        row["m_max"] = k.m_max;
        row["rounding"] = k.rounding;
        rows.append(row);
    }
    return rows;
}

std::string isa_of_kernel(const std::string& name) {
    if (const LinearKernel* linear = find_linear(name)) return std::string(to_string(linear->isa));
    if (const AttendKernel* attend = find_attend(name)) return std::string(to_string(attend->isa));
    throw std::invalid_argument("there is no kernel named " + name);
}

// Floats, at first no numbers, between two margins, which still hold what they held at first as long as nothing is
// written there.
class Guarded {
  public:
    explicit Guarded(size_t n) : n_(n), memory_((n + 2 * kMargin) * sizeof(float), kAnyNode) {
        std::fill_n(memory_.as<float>(), n + 2 * kMargin, kMark);
        std::fill_n(get(), n, NAN);
    }
    float* get() const { return memory_.as<float>() + kMargin; }
    bool is_intact() const {
        const auto holds = [](const float* at) { return std::count(at, at + kMargin, kMark) == kMargin; };
        return holds(get() - kMargin) && holds(get() + n_);
    }

  private:
    static constexpr ptrdiff_t kMargin = 4096;
    static constexpr float kMark = -77;
    size_t n_;
    NodeMemory memory_;
};

// out (Q, D) of Q <= 16 queries (Q, D), query i seeing positions first[i] .. n_positions[i] - 1 of keys and values
// (T, D), in chunks, by the row of that name; chunks before all that is seen are skipped. Throws std::runtime_error
// where the row writes outside of its partials and its scratch.
void attend(const std::string& name, Array<const float, 2> q, Array<const float, 2> keys, Array<const float, 2> values,
            Array<const int32_t, 1> first, Array<const int32_t, 1> n_positions, size_t chunk, Array<float, 2> out) {
    const AttendKernel* kernel = find_attend(name);
    if (!kernel) throw std::invalid_argument("there is no kernel named " + name);
    const RowKernels& rows = row_kernels(kernel->isa);
    const size_t n = q.shape(0), d = q.shape(1), t = keys.shape(0);
    const KvFormat format = kernel->format;
    if (n == 0 || n > kAttendQueries || n_positions.shape(0) != n || first.shape(0) != n || values.shape(0) != t ||
        keys.shape(1) != d || t == 0 || chunk == 0 || chunk % kPage != 0)
        throw std::invalid_argument("attend: the arrays' shapes do not agree");
    const KvRuns runs{(t + kPage - 1) / kPage, 3, KvPage::bytes(format, d)};
    const size_t n_pages = runs.n_pages, kv_head = 1, n_chunks = (t + chunk - 1) / chunk;
    const size_t floats = attend_partial_floats(d);
    const NodeMemory pages(runs.bytes(), kAnyNode);
    // What a page's unwritten part held must not matter, nor other heads: not-a-numbers, in reversed page order.
    std::memset(pages.as(), 0xFF, runs.bytes());
    std::vector<int32_t> order;
    for (size_t i = 0; i < n_pages; ++i) order.push_back(static_cast<int32_t>(n_pages - 1 - i));
    for (size_t p = t; p-- > 0;)  // in no particular order
        rows.kv_store(format, pages.as() + runs.offset(static_cast<size_t>(order[p / kPage]), kv_head), p % kPage, d,
                      keys.data() + p * d, values.data() + p * d);
    rows.kv_clear(format, pages.as() + runs.offset(0, kv_head), (t - 1) % kPage + 1, d);  // of the last page
    const std::vector<uint8_t> before(pages.as(), pages.as() + runs.bytes());
    AttendArgs args{};
    args.n_queries = n;
    for (size_t i = 0; i < n; ++i) {
        args.q[i] = q.data() + i * d;
        args.first[i] = static_cast<size_t>(first.data()[i]);
        args.n_positions[i] = static_cast<size_t>(n_positions.data()[i]);
    }
    args.pages = pages.as();
    args.runs = runs;
    args.kv_head = kv_head;
    args.page_table = order.data();
    args.d = d;
    args.scale = 1.0f / std::sqrt(static_cast<float>(d));
    const size_t last = std::min(t, args.n_positions[n - 1]), begin = args.first[0] / kPage * kPage;
    std::vector<float> partials(n_chunks * n * floats);
    size_t used = 0;
    for (size_t c = begin / chunk; c * chunk < last; ++c, ++used) {
        const Guarded partial(n * floats), scratch(attend_scratch_floats(d));
        args.begin = std::max(begin, c * chunk);
        args.end = std::min((c + 1) * chunk, last);
        args.end_ahead = last;
        args.partial = partial.get();
        args.scratch = scratch.get();
        kernel->run(args);
        if (!partial.is_intact() || !scratch.is_intact() || std::memcmp(before.data(), pages.as(), before.size()) != 0)
            throw std::runtime_error(name + " wrote where it must not");
        std::copy_n(partial.get(), n * floats, partials.data() + used * n * floats);
    }
    for (size_t i = 0; i < n; ++i) rows.merge(partials.data() + i * floats, used, n * floats, d, out.data() + i * d);
}

}  // namespace
}  // namespace fourfold

using namespace fourfold;

void bind_kernels(nb::module_& m) {
    m.def("linear_kernels", &linear_table, "Every row of the table of linear kernels.");
    m.def("attend_kernels", &attend_table, "Every row of the table of attention kernels.");
    m.def("isa_of_kernel", &isa_of_kernel, "kernel"_a, "The instruction set of a row of either table.");
    m.def(
        "choose_linear",
        [](const std::string& isa, const std::string& format, size_t m) {
            return std::string(choose_linear(isa_named(isa), format_named(format), m).name);
        },
        "isa"_a, "format"_a, "m"_a, "The row that M tokens in a format take on an ISA.");
    m.def(
        "choose_attend",
        [](const std::string& isa, const std::string& kv, size_t m, const std::string& row_class) {
            return std::string(choose_attend(isa_named(isa), kv_named(kv), m, row_class_named(row_class)).name);
        },
        "isa"_a, "kv"_a, "m"_a, "row_class"_a,
        "The row that a step of M tokens takes over pages of a format on an ISA.");
    m.def("linear", &linear, "kernel"_a, "isa"_a, "panels"_a, "scales"_a.none(), "x"_a, "y"_a.noconvert());
    m.def("attend", &attend, "kernel"_a, "q"_a, "keys"_a, "values"_a, "first"_a, "n_positions"_a, "chunk"_a,
          "out"_a.noconvert());
    m.def(
        "rms_norm",
        [](const std::string& isa, Array<const float, 1> x, Array<const float, 1> w, float eps, Array<float, 1> y) {
            const RowKernels& rows = rows_named(isa);
            rows.scale_row(x.data(), w.data(), rows.rms_factor(x.data(), eps, x.shape(0)), x.shape(0), y.data());
        },
        "isa"_a, "x"_a, "w"_a, "eps"_a, "y"_a.noconvert());
    m.def(
        "rope",
        [](const std::string& isa, Array<float, 1> x, Array<const float, 1> cosines, Array<const float, 1> sines) {
            rows_named(isa).rope(x.data(), cosines.data(), sines.data(), x.shape(0));
        },
        "isa"_a, "x"_a.noconvert(), "cosines"_a, "sines"_a);
    m.def(
        "gate_mul",
        [](const std::string& isa, const std::string& gate, Array<const float, 1> a, Array<const float, 1> b,
           Array<float, 1> y) { rows_named(isa).gate_mul(gate_named(gate))(a.data(), b.data(), a.shape(0), y.data()); },
        "isa"_a, "gate"_a, "a"_a, "b"_a, "y"_a.noconvert());
    m.def(
        "add_parts",
        [](const std::string& isa, Array<const float, 1> base, Array<const float, 2> parts,
           std::optional<Array<const float, 1>> bias, Array<float, 1> y) {
            std::vector<const float*> rows;
            for (size_t i = 0; i < parts.shape(0); ++i) rows.push_back(parts.data() + i * parts.shape(1));
            rows_named(isa).add_parts(base.data(), rows.data(), rows.size(), bias ? bias->data() : nullptr,
                                      base.shape(0), y.data());
        },
        "isa"_a, "base"_a, "parts"_a, "bias"_a.none(), "y"_a.noconvert());
    m.def(
        "widen",
        [](const std::string& isa, int type, Array<const uint16_t, 1> words, Array<float, 1> out) {
            rows_named(isa).widen(static_cast<NumberType>(type), words.data(), words.shape(0), out.data());
        },
        "isa"_a, "type"_a, "words"_a, "out"_a.noconvert());
    m.def(
        "narrow",
        [](const std::string& isa, int type, Array<const float, 1> numbers, Array<uint16_t, 1> out) {
            rows_named(isa).narrow(static_cast<NumberType>(type), numbers.data(), numbers.shape(0), out.data());
        },
        "isa"_a, "type"_a, "numbers"_a, "out"_a.noconvert());
}
