// Names of the enumerations, as Python passes them.
#pragma once
#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <string_view>

#include "format.h"
#include "isa.h"
#include "kernels/kernels.h"

namespace fourfold {

// The enumerator at the name's place. Throws std::invalid_argument for an unknown name.
template <class E, size_t N>
E named(const std::array<std::string_view, N>& names, std::string_view name, const char* what) {
    const auto it = std::find(names.begin(), names.end(), name);
    if (it == names.end()) throw std::invalid_argument("unknown " + std::string(what) + ": " + std::string(name));
    return static_cast<E>(it - names.begin());
}
inline Format format_named(std::string_view name) { return named<Format>(kFormatNames, name, "format"); }
inline Isa isa_named(std::string_view name) { return named<Isa>(kIsaNames, name, "instruction set"); }
inline KvFormat kv_named(std::string_view name) { return named<KvFormat>(std::to_array(kKvNames), name, "KV format"); }
inline Gate gate_named(std::string_view name) { return named<Gate>(std::to_array(kGateNames), name, "gate"); }
inline RowClass row_class_named(std::string_view name) {
    return named<RowClass>(std::to_array(kRowClassNames), name, "class of rows");
}

}  // namespace fourfold
