// Bindings of team, weight and program. Arrays and integers only; the shapes are checked here, the rest in Python.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "names.h"
#include "program.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace fourfold {
namespace {

template <class T, int DIMS>
using Array = nb::ndarray<T, nb::ndim<DIMS>, nb::c_contig, nb::device::cpu>;
using Ranges = std::vector<std::pair<size_t, size_t>>;

std::vector<Range> ranges(const Ranges& pairs) {
    std::vector<Range> out;
    for (const auto& [begin, end] : pairs) out.push_back({begin, end});
    return out;
}

std::shared_ptr<Weight> make_weight(const std::string& format, size_t n, size_t k,
                                    const std::vector<std::pair<Ranges, Ranges>>& plans, const Team& team,
                                    std::optional<uint64_t> file_offset) {
    std::vector<SlicePlan> cut;
    for (const auto& [outputs, inputs] : plans) cut.push_back({ranges(outputs), ranges(inputs)});
    return std::make_shared<Weight>(format_named(format), n, k, std::move(cut), team, file_offset);
}

// Runs f without the interpreter's lock. Where a thread stalls, it may still touch the arrays that it was given: they
// are then kept for good.
template <class F, class... Held>
void keep_on_stall(F f, const Held&... held) {
    try {
        nb::gil_scoped_release free_threads;
        f();
    } catch (const StallError&) {
        new std::tuple<Held...>(held...);
        throw;
    }
}

void load_weight(std::shared_ptr<Weight> w, Team& team, std::optional<Array<const uint8_t, 2>> panels,
                 std::optional<Array<const float, 1>> scales) {
    if (w->is_in_memory() != panels.has_value())
        throw std::invalid_argument("panels are loaded where they are to be in memory, and only there");
    if (panels && (panels->shape(0) != panels_of(w->n) || panels->shape(1) != panel_bytes(w->format, tiles_of(w->k))))
        throw std::invalid_argument("the panels do not have the weight's shape");
    if (has_scales(w->format) != scales.has_value() || (scales && scales->shape(0) != panels_of(w->n)))
        throw std::invalid_argument("one scale for each panel of a scaled format is needed, none for another");
    const float* s = scales ? scales->data() : nullptr;
    const uint8_t* data = panels ? panels->data() : nullptr;
    keep_on_stall([&] { team.run([&w = *w, data, s](Worker& worker) { w.load(worker, data, s); }); }, w, panels,
                  scales);
}

// Panels and scales of the whole matrix, from where they begin in the file; nothing where it holds none for memory.
void read_weight(std::shared_ptr<Weight> w, Team& team, std::shared_ptr<const ReadFile> file,
                 std::optional<uint64_t> panels, std::optional<uint64_t> scales) {
    if (w->is_in_memory() != panels.has_value())
        throw std::invalid_argument("panels are read where they are to be in memory, and only there");
    if (has_scales(w->format) != scales.has_value())
        throw std::invalid_argument("one scale for each panel of a scaled format is needed, none for another");
    if (panels) file->ask(*panels, panels_of(w->n) * panel_bytes(w->format, tiles_of(w->k)));
    const auto read = [&w = *w, &file = *file, from = panels.value_or(0),
                       scales_from = scales.value_or(0)](Worker& worker) { w.load(worker, file, from, scales_from); };
    keep_on_stall([&] { team.run(read); }, w, file);
}

void read_runs(const ReadFile& file, uint64_t offset, uint64_t stride, Array<uint8_t, 2> to) {
    nb::gil_scoped_release free_threads;
    if (to.shape(0) == 1) file.ask(offset, to.shape(1));
    file.read_runs(offset, stride, to.shape(0), to.shape(1), to.data());
}

Vectors place(const Program& p, const std::vector<Array<const float, 1>>& arrays) {
    std::vector<std::span<const float>> parts;
    for (const auto& a : arrays) parts.emplace_back(a.data(), a.shape(0));
    return p.place(parts);
}

using PartTuple = std::tuple<int, int, std::vector<Array<const float, 1>>>;

void step(Program& p, Array<const int32_t, 1> tokens, Array<const int32_t, 2> sequences, Array<const int32_t, 2> pages,
          Array<const int32_t, 1> output_rows, Array<float, 2> logits, const std::string& tokens_class,
          const std::string& outputs_class) {
    if (sequences.shape(1) != 4 || pages.shape(0) != sequences.shape(0) || logits.shape(0) != output_rows.shape(0))
        throw std::invalid_argument("step: the arrays' shapes do not agree");
    auto rows = std::make_shared<std::vector<SequenceRows>>();
    for (size_t i = 0; i < sequences.shape(0); ++i) {
        const int32_t* s = sequences.data() + 4 * i;
        rows->push_back({s[0], s[1], s[2], s[3], pages.data() + i * pages.shape(1)});
    }
    Step step{};
    step.tokens = {tokens.data(), tokens.shape(0)};
    step.sequences = *rows;
    step.output_rows = {output_rows.data(), output_rows.shape(0)};
    step.logits = logits.data();
    step.logits_stride = logits.shape(1);
    step.tokens_class = row_class_named(tokens_class);
    step.outputs_class = row_class_named(outputs_class);
    keep_on_stall([&] { p.step(step); }, rows, tokens, pages, logits, output_rows);
}

}  // namespace
}  // namespace fourfold

using namespace fourfold;

void bind_program(nb::module_& m) {
    nb::exception<StallError>(m, "StallError", PyExc_RuntimeError);

    nb::class_<Team>(m, "Team")
        .def(
            "__init__",
            [](Team* self, const std::vector<std::pair<int, std::vector<int>>>& ranks, double timeout, bool may_spill) {
                std::vector<RankPlan> plan;
                for (const auto& [node, cpus] : ranks) plan.push_back({Home(node, may_spill), cpus});
                new (self) Team(std::move(plan), timeout);
            },
            "ranks"_a, "timeout_seconds"_a = 60.0, "may_spill"_a = false,
            "ranks: (node, CPUs) of each; node -1 for any. may_spill: memory may come from other nodes too.")
        .def_prop_ro("n_ranks", &Team::n_ranks)
        .def("stall_next", &Team::stall_next, "rank"_a, "thread"_a, "seconds"_a, "For tests.");

    nb::class_<ReadFile>(m, "ReadFile")
        .def(
            "__init__",
            [](ReadFile* self, const std::string& path) { new (self) ReadFile(path, POSIX_FADV_SEQUENTIAL); }, "path"_a,
            "A file of weights. Raises StallError where it cannot be opened.")
        .def_prop_ro("bytes_read", &ReadFile::bytes_read, "So far, by all threads.")
        .def_prop_ro(
            "stamp",
            [](const ReadFile& file) {
                const struct stat& s = file.opened();
                return std::tuple(uint64_t{s.st_dev}, uint64_t{s.st_ino}, static_cast<int64_t>(s.st_size),
                                  static_cast<int64_t>(s.st_mtim.tv_sec) * 1'000'000'000 + s.st_mtim.tv_nsec);
            },
            "Device, number, bytes and time of change (ns), as it was opened: another file has another.")
        .def("read_runs", &read_runs, "offset"_a, "stride"_a, "to"_a,
             "The rows of `to`, whose begins lie `stride` bytes apart in the file. Raises StallError where it changed.")
        .def("stop", &ReadFile::stop, "Reads end in a StallError, as soon as the disk lets go of them.");
    nb::class_<Weight>(m, "Weight")
        .def_prop_ro("n", [](const Weight& w) { return w.n; })
        .def_prop_ro("k", [](const Weight& w) { return w.k; })
        .def("load", &load_weight, "team"_a, "panels"_a.none(), "scales"_a.none())
        .def("read", &read_weight, "team"_a, "file"_a, "panels"_a.none(), "scales"_a.none(),
             "From a ReadFile: where the whole matrix's panels and scales begin in it.");
    m.def("make_weight", &make_weight, "format"_a, "n"_a, "k"_a, "plans"_a, "team"_a,
          "file_offset"_a.none() = nb::none(),
          "plans: for each rank its (output ranges, input ranges). file_offset: where its panels stay in a file.");
    m.def(
        "slice_bytes",
        [](const std::string& format, const Ranges& outputs, const Ranges& inputs) {
            return slice_bytes(format_named(format), {ranges(outputs), ranges(inputs)});
        },
        "format"_a, "outputs"_a, "inputs"_a);

    nb::class_<Program>(m, "Program")
        .def("add_buffer", &Program::add_buffer, "width"_a, "of_outputs"_a)
        .def("add_weight", &Program::add_weight, "weight"_a)
        .def("read_from", &Program::read_from, "path"_a, "patience_seconds"_a)
        .def(
            "add_rotary",
            [](Program& p, Array<const float, 2> cosines, Array<const float, 2> sines) {
                return p.add_rotary({{cosines.data(), cosines.data() + cosines.size()},
                                     {sines.data(), sines.data() + sines.size()},
                                     2 * cosines.shape(1)});
            },
            "cosines"_a, "sines"_a, "Tables (context, rotated dimensions / 2); their number, for add_cache.")
        .def("add_embed", &Program::add_embed, "weight"_a, "scale"_a, "dst"_a)
        .def(
            "add_norm",
            [](Program& p, int src, const std::vector<Array<const float, 1>>& w, float eps, int dst) {
                p.add_norm(src, place(p, w), eps, dst);
            },
            "src"_a, "w"_a, "eps"_a, "dst"_a)
        .def(
            "add_normed",
            [](Program& p, int base, int src, const std::vector<Array<const float, 1>>& w, float eps, int dst) {
                p.add_normed(base, src, place(p, w), eps, dst);
            },
            "base"_a, "src"_a, "w"_a, "eps"_a, "dst"_a)
        .def(
            "add_linear",
            [](Program& p, int src, const std::vector<PartTuple>& parts, const std::vector<Array<const float, 1>>& norm,
               float eps, int up, const std::string& gate, int base, int sum,
               const std::vector<Array<const float, 1>>& sum_bias, bool is_for_next) {
                std::vector<Program::LinearPart> linear;
                for (const auto& [weight, dst, bias] : parts) linear.push_back({weight, dst, place(p, bias)});
                p.add_linear({src, place(p, norm), eps, up, gate_named(gate)}, std::move(linear),
                             {base, sum, place(p, sum_bias)}, is_for_next);
            },
            "src"_a, "parts"_a, nb::kw_only(), "norm"_a = nb::list(), "eps"_a = 0.0f, "up"_a = Program::kNone,
            "gate"_a = "silu", "base"_a = Program::kNone, "sum"_a = Program::kNone, "sum_bias"_a = nb::list(),
            "is_for_next"_a = false,
            "parts: (weight, destination, bias of each rank or nothing). norm: of each rank, weights that the input\n"
            "is normed with. sum: where base + outputs + sum_bias goes. is_for_next: the outputs are gate and up of\n"
            "the next op's input, and of nothing else.")
        .def(
            "add_reduce",
            [](Program& p, int partial, int base, const std::vector<Array<const float, 1>>& bias, int dst) {
                p.add_reduce(partial, base, place(p, bias), dst);
            },
            "partial"_a, "base"_a, "bias"_a, "dst"_a)
        .def(
            "add_cache",
            [](Program& p, int layer, int q, int k, int v, int rotary, const std::vector<Array<const float, 1>>& q_norm,
               const std::vector<Array<const float, 1>>& k_norm,
               float eps) { p.add_cache(layer, q, k, v, rotary, {place(p, q_norm), place(p, k_norm), eps}); },
            "layer"_a, "q"_a, "k"_a, "v"_a, nb::kw_only(), "rotary"_a, "q_norm"_a = nb::list(), "k_norm"_a = nb::list(),
            "eps"_a = 0.0f, "q_norm, k_norm: of each rank, weights (head_dim) that every head is normed with.")
        .def(
            "add_attend",
            [](Program& p, int layer, int q, std::vector<std::vector<int>> kv_of_head, int dst, float scale,
               std::optional<size_t> window) {
                p.add_attend(layer, q, std::move(kv_of_head), scale, window.value_or(Program::kSeesAll), dst);
            },
            "layer"_a, "q"_a, "kv_of_head"_a, "dst"_a, nb::kw_only(), "scale"_a, "window"_a.none() = nb::none(),
            "window: positions that a query sees, its own the last; None: all before it.")
        .def(
            "add_gated",
            [](Program& p, int src, int up, int dst, const std::string& gate) {
                p.add_gated(src, up, gate_named(gate), dst);
            },
            "src"_a, "up"_a, "dst"_a, "gate"_a = "silu")
        .def("add_with_previous", &Program::add_with_previous, "src"_a, "dst"_a)
        .def("add_select", &Program::add_select, "src"_a, "dst"_a)
        .def("finish", &Program::finish)
        .def("step", &step, "tokens"_a, "sequences"_a, "pages"_a, "output_rows"_a, "logits"_a.noconvert(),
             nb::kw_only(), "tokens_class"_a = "best", "outputs_class"_a = "best",
             "sequences: (slot, first position, first row, rows) of each; pages: their page tables, padded.\n"
             "Classes: of the kernels that multiply the tokens' and the output rows: best, few or many.")
        .def("record", &Program::record, "wanted"_a)
        .def(
            "marks",
            [](const Program& p, size_t rank, size_t thread) {
                const std::vector<Mark>& marks = p.marks(rank, thread);
                return nb::bytes(marks.data(), marks.size() * sizeof(Mark));
            },
            "rank"_a, "thread"_a, "Of the last recorded step: (int64 ns, int32 op, int32 phase) each.")
        .def_prop_ro("kv_bytes", &Program::kv_bytes)
        .def_prop_ro("disk_bytes_read", &Program::disk_bytes_read)
        .def(
            "memory_map",
            [](const Program& p) {
                std::vector<std::tuple<std::string, size_t, uintptr_t, size_t>> regions;
                for (const Region& r : p.memory_map()) regions.emplace_back(r.kind, r.rank, r.address, r.bytes);
                return regions;
            },
            "(kind, rank, address, bytes) of everything that the ranks hold.")
        .def_prop_ro("op_names", &Program::op_names)
        .def(
            "kernels",
            [](const Program& p, size_t m, const std::string& row_class) {
                return p.kernels(m, row_class_named(row_class));
            },
            "m"_a, "row_class"_a = "best")
        .def_ro_static("KEPT_ROWS", &Program::kKeptRows)
        .def_ro_static("LOGITS", &Program::kLogits)
        .def_ro_static("NONE", &Program::kNone);
    m.def(
        "make_program",
        [](std::shared_ptr<Team> team, size_t max_tokens, size_t n_slots, size_t context, size_t n_pages,
           size_t head_dim, const std::string& kv, const std::string& isa, const std::string& kernel,
           const std::string& attend) {
            return std::make_shared<Program>(
                std::move(team), ProgramOptions{max_tokens, n_slots, context, n_pages, head_dim, kv_named(kv),
                                                isa_named(isa), kernel, attend});
        },
        "team"_a, nb::kw_only(), "max_tokens"_a, "n_slots"_a, "context"_a, "n_pages"_a, "head_dim"_a, "kv"_a, "isa"_a,
        "kernel"_a = "", "attend"_a = "");
    m.def("measure_disk", &measure_disk, "path"_a, "offset"_a, "bytes"_a, "seconds"_a,
          nb::call_guard<nb::gil_scoped_release>());
    m.attr("PAGE") = kPage;
    m.def(
        "kv_page_bytes", [](const std::string& kv, size_t head_dim) { return KvPage::bytes(kv_named(kv), head_dim); },
        "kv"_a, "head_dim"_a, "Bytes of PAGE positions of one KV head.");
    m.def(
        "packed_bytes",
        [](const std::string& format, size_t m, size_t k) {
            return most_packed_bytes(format_named(format), m, tiles_of(k));
        },
        "format"_a, "m"_a, "k"_a, "Bytes of m rows of k inputs as the kernels of a format want them, at most.");
    m.def("scratch_bytes", &Program::scratch_bytes, "widest_inputs"_a, "context"_a, "head_dim"_a,
          "Bytes of scratch a thread.");
    m.def("attend_chunk", &Program::attend_chunk, "context"_a, "Positions that one thread attends to at a time.");
    m.attr("SPLIT_ITEMS") = Program::kSplitItems;
    m.def("attend_shared_bytes", &Program::attend_shared_bytes, "threads"_a, "context"_a, "head_dim"_a,
          "Bytes of a rank's partial attention.");
    m.attr("PHASES") = std::vector<std::string>(std::begin(kPhaseNames), std::end(kPhaseNames));
    m.attr("RING_BYTES") = kRingBytes;
    m.attr("MAX_RANKS") = kMaxRanks;
    m.def(
        "nodes_of_pages",
        [](const std::vector<uintptr_t>& addresses) -> std::optional<std::vector<int>> {
            try {
                return nodes_of_pages(addresses);
            } catch (const std::system_error&) {
                return std::nullopt;
            }
        },
        "addresses"_a,
        "The node of the page at each, negative where none is there yet; None where the system is mute.");
    m.def("memory_is_bound", &NodeMemory::all_bound, "Whether every binding of memory to a node was granted.");
}
