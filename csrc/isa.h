// The instruction-set levels. Each includes the ones before it, and each has its own kernel files and compiler flags.
// Light on purpose: kernels include this, and a kernel file must not instantiate library code with its own flags.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace fourfold {

enum class Isa : uint8_t {
    scalar,       // any x86-64; the definition of correct
    avx2,         // AVX2, FMA, F16C
    avx512_vnni,  // AVX-512 F, BW, DQ, VL, VNNI: Cascade Lake, Cooper Lake, Ice Lake
    avx512,       // and VBMI, BF16: Zen 4, Sapphire Rapids
    amx,          // AMX TILE, BF16, INT8, and the operating system's leave to use the tiles
};
constexpr int kIsas = 5;
constexpr std::array<std::string_view, kIsas> kIsaNames = {"scalar", "avx2", "avx512_vnni", "avx512", "amx"};

constexpr std::string_view to_string(Isa isa) { return kIsaNames[static_cast<size_t>(isa)]; }

}  // namespace fourfold
