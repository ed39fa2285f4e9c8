// Which instruction sets may be used: the silicon offers them, the operating system saves their registers, and for the
// AMX tiles it has given this process leave.
#include "isa.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

#include "machine.h"

namespace fourfold {
namespace {

bool bit(uint32_t word, int index) { return word >> index & 1; }

// XCR0: the register states that the operating system saves. Only where CPUID shows OSXSAVE.
uint64_t saved_states() {
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return static_cast<uint64_t>(high) << 32 | low;
}

// Linux gives the 8 KB of tile state to processes that ask, since 5.16; the answer holds for every thread, those to
// come too.
bool ask_for_tiles() {
    constexpr long kArchReqXcompPerm = 0x1023;  // arch/x86/include/uapi/asm/prctl.h
    constexpr long kXfeatureTileData = 18;
    return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0;
}

std::string names(const std::vector<Isa>& isas) {
    std::string list;
    for (Isa isa : isas) list += (list.empty() ? "" : ", ") + std::string(to_string(isa));
    return list;
}

}  // namespace

CpuFeatures read_cpuid() {
    uint32_t a, b, c, d;
    CpuFeatures found;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return found;
    const bool fma = bit(c, 12), osxsave = bit(c, 27), avx = bit(c, 28), f16c = bit(c, 29);
    if (!osxsave || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
    const bool avx2 = bit(b, 5);
    const bool avx512 = bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31);  // F, DQ, BW, VL
    const bool vbmi = bit(c, 1), vnni = bit(c, 11);
    const bool amx = bit(d, 22) && bit(d, 24) && bit(d, 25);                 // BF16, TILE, INT8
    const bool bf16 = __get_cpuid_count(7, 1, &a, &b, &c, &d) && bit(a, 5);  // AVX-512 BF16

    const uint64_t states = saved_states();
    const auto saved = [states](uint64_t mask) { return (states & mask) == mask; };
    found.avx2 = avx && fma && f16c && avx2 && saved(0x6);            // XMM, YMM
    found.avx512_vnni = found.avx2 && avx512 && vnni && saved(0xe6);  // and the masks, ZMM 0-15 upper halves, ZMM 16-31
    found.avx512 = found.avx512_vnni && vbmi && bf16;
    found.amx_is_present = amx;
    found.amx = found.avx512 && amx && saved(0x60000) && ask_for_tiles();  // and TILECFG, TILEDATA
    return found;
}

CpuFeatures parse_cpu_flags(const std::vector<std::string>& flags) {
    const auto all = [&flags](std::initializer_list<std::string_view> wanted) {
        return std::all_of(wanted.begin(), wanted.end(), [&flags](std::string_view flag) {
            return std::find(flags.begin(), flags.end(), flag) != flags.end();
        });
    };
    CpuFeatures found;
    found.avx2 = all({"avx2", "fma", "f16c"});
    found.avx512_vnni = found.avx2 && all({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"});
    found.avx512 = found.avx512_vnni && all({"avx512vbmi", "avx512_bf16"});
    found.amx_is_present = all({"amx_tile", "amx_bf16", "amx_int8"});
    found.amx = found.avx512 && found.amx_is_present;
    return found;
}

std::vector<Isa> available_isas(const Machine& machine) {
    std::vector<Isa> isas = {Isa::scalar};
    if (machine.has_avx2) isas.push_back(Isa::avx2);
    if (machine.has_avx512_vnni) isas.push_back(Isa::avx512_vnni);
    if (machine.has_avx512) isas.push_back(Isa::avx512);
    if (machine.has_amx) isas.push_back(Isa::amx);
    return isas;
}

std::optional<Isa> parse_isa(std::string_view name) {
    const auto found = std::find(kIsaNames.begin(), kIsaNames.end(), name);
    if (found == kIsaNames.end()) return std::nullopt;
    return static_cast<Isa>(found - kIsaNames.begin());
}

Isa choose_isa(const Machine& machine) {
    const std::vector<Isa> isas = available_isas(machine);
    const char* forced = std::getenv("FOURFOLD_ISA");
    if (!forced || !*forced) return isas.back();
    const auto isa = parse_isa(forced);
    if (!isa) {
        throw std::invalid_argument("FOURFOLD_ISA=" + std::string(forced) + " is no instruction set: choose one of " +
                                    names(isas) + ", or unset it");
    }
    if (std::find(isas.begin(), isas.end(), *isa) == isas.end()) {
        const bool refused = *isa == Isa::amx && machine.amx_is_present;
        const char* reason = refused ? "the operating system does not grant it" : "this CPU does not have it";
        throw std::invalid_argument("FOURFOLD_ISA=" + std::string(forced) + " is not possible here, " + reason +
                                    ": choose one of " + names(isas) + ", or unset it");
    }
    return *isa;
}

}  // namespace fourfold
