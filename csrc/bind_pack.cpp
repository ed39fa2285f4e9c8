#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "machine.h"
#include "names.h"
#include "pack.h"
#include "place.h"

namespace nb = nanobind;
using namespace fourfold;

namespace {

using Rows = nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu, nb::ro>;
template <class T, size_t kDims, class... Access>
using Array = nb::ndarray<T, nb::ndim<kDims>, nb::c_contig, nb::device::cpu, Access...>;

SourceType source_type(const Rows& rows) {
    if (rows.dtype() == nb::dtype<float>()) return SourceType::f32;
    if (rows.dtype() == nb::dtype<uint16_t>()) return SourceType::bf16;
    if (rows.dtype() == nb::dlpack::dtype{static_cast<uint8_t>(nb::dlpack::dtype_code::Float), 16, 1})
        return SourceType::f16;
    throw std::invalid_argument("rows must be float32, float16, or bfloat16 as uint16");
}

// The level of that name, or the machine's own. Throws std::invalid_argument where the machine cannot run it.
Isa find_isa(const std::optional<std::string>& name) {
    static const Machine machine = read_machine();
    if (!name) return choose_isa(machine);
    const std::vector<Isa> usable = available_isas(machine);
    const std::optional<Isa> isa = parse_isa(*name);
    if (!isa || std::find(usable.begin(), usable.end(), *isa) == usable.end())
        throw std::invalid_argument("this machine does not run the instruction set " + *name);
    return *isa;
}

void check(Format format, size_t n, size_t k, size_t n_panels, size_t bytes, const float* scales, size_t n_scales) {
    if (n_panels != panels_of(n) || bytes != panel_bytes(format, tiles_of(k)))
        throw std::invalid_argument("panels must have shape (" + std::to_string(panels_of(n)) + ", " +
                                    std::to_string(panel_bytes(format, tiles_of(k))) + ")");
    if (has_scales(format) && (!scales || n_scales != n_panels))
        throw std::invalid_argument("scales must have shape (" + std::to_string(n_panels) + ",)");
}

}  // namespace

void bind_pack(nb::module_& m) {
    m.def(
        "pack",
        [](const Rows& rows, std::string_view format_name, const Array<uint8_t, 2>& panels,
           const std::optional<Array<float, 1>>& scales, size_t threads, const std::optional<std::string>& isa_name) {
            const Format format = format_named(format_name);
            const PackArgs args{rows.data(),
                                source_type(rows),
                                rows.shape(0),
                                rows.shape(1),
                                format,
                                panels.data(),
                                scales ? scales->data() : nullptr};
            check(format, args.n, args.k, panels.shape(0), panels.shape(1), args.panel_scales,
                  scales ? scales->shape(0) : 0);
            const Isa isa = find_isa(isa_name);
            PackResult result;
            {
                nb::gil_scoped_release release;
                result = pack(args, isa, threads);
            }
            if (result.non_finite_row)
                throw std::invalid_argument("row " + std::to_string(*result.non_finite_row) + " holds NaN or infinity");
            return nb::make_tuple(result.sums.error, result.sums.reference);
        },
        nb::arg("rows"), nb::arg("format"), nb::arg("panels_out"), nb::arg("scales_out").none(), nb::arg("threads") = 1,
        nb::arg("isa").none() = nb::none(),
        "Packs (N, K) float32, float16, or bfloat16 as uint16, into uint8 (P, panel bytes) and float32 (P,).\n"
        "Returns the sums of (weight - stored value)^2 and of weight^2. Raises ValueError on NaN or infinity.");
    m.def(
        "place",
        [](const Array<uint8_t, 2, nb::ro>& codes, const Array<float, 2, nb::ro>& block_scales,
           std::string_view format_name, const Array<uint8_t, 2>& panels, const Array<float, 1>& scales,
           const std::optional<Array<int8_t, 2, nb::ro>>& zeros) {
            const Format format = format_named(format_name);
            const PlaceArgs args{codes.data(),   block_scales.data(), zeros ? zeros->data() : nullptr,
                                 codes.shape(0), codes.shape(1),      format,
                                 panels.data(),  scales.data()};
            if (!has_scales(format) || args.k % kTileK != 0)
                throw std::invalid_argument("codes are placed in formats with scales, in whole blocks of 64 inputs");
            const auto is_by_block = [&](const auto& array) {
                return array.shape(0) == args.n && array.shape(1) == args.k / kTileK;
            };
            if (!is_by_block(block_scales) || (zeros && !is_by_block(*zeros)))
                throw std::invalid_argument("block scales and zero points must have shape (" + std::to_string(args.n) +
                                            ", " + std::to_string(args.k / kTileK) + ")");
            if (has_zeros(format) != zeros.has_value())
                throw std::invalid_argument(std::string(format_name) +
                                            (zeros ? " has no zero points" : " needs zero points"));
            check(format, args.n, args.k, panels.shape(0), panels.shape(1), scales.data(), scales.shape(0));
            PackSums sums;
            {
                nb::gil_scoped_release release;
                sums = place(args);
            }
            return nb::make_tuple(sums.error, sums.reference);
        },
        nb::arg("codes"), nb::arg("block_scales"), nb::arg("format"), nb::arg("panels_out"), nb::arg("scales_out"),
        nb::arg("zeros").none() = nb::none(),
        "Places codes uint8 (N, K) and their blocks' scales float32 (N, K / 64), of uint4 their zero points int8\n"
        "(N, K / 64) too, into uint8 (P, panel bytes) and float32 (P,).\n"
        "Returns the sums of (value - stored value)^2 and of value^2. Raises ValueError for a code that the format\n"
        "does not have and for a scale that is not finite.");
    m.def(
        "unpack",
        [](const Array<uint8_t, 2, nb::ro>& panels, const std::optional<Array<float, 1, nb::ro>>& scales,
           std::string_view format_name, const Array<float, 2>& out) {
            const Format format = format_named(format_name);
            const float* panel_scales = scales ? scales->data() : nullptr;
            check(format, out.shape(0), out.shape(1), panels.shape(0), panels.shape(1), panel_scales,
                  scales ? scales->shape(0) : 0);
            nb::gil_scoped_release release;
            unpack(format, panels.data(), panel_scales, out.shape(0), out.shape(1), out.data());
        },
        nb::arg("panels"), nb::arg("scales").none(), nb::arg("format"), nb::arg("out"),
        "The inverse of pack: writes float32 (N, K).");
}
