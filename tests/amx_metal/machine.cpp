// The C++ half of the machine: faults, words, the end, and what compilers and kernels expect of a C library. Compiled
// for the baseline: it runs before the vector registers are switched on.
#include "machine.h"

#include <cpuid.h>

#include "check.h"

namespace metal {
namespace {

// Ports of Bochs: a character for its standard output, and the end if this word is written letter by letter.
constexpr uint16_t kConsole = 0xE9, kPower = 0x8900;
constexpr std::string_view kPowerOff = "Shutdown";

void out(uint16_t port, char c) { __asm__ volatile("outb %0, %1" : : "a"(c), "Nd"(port)); }

struct Frame {
    uint64_t vector, error, rip, cs, flags, rsp, ss;
};

struct Gate {
    uint16_t low, selector;
    uint8_t stack, type;
    uint16_t middle;
    uint32_t high, reserved;
};
static_assert(sizeof(Gate) == 16);
constexpr uint16_t kCode64 = 0x18;
constexpr uint8_t kInterruptGate = 0x8E;
constexpr size_t kFaults = 32;
Gate gates[kFaults];

extern "C" const uint64_t fault_entries[kFaults];

void catch_faults() {
    for (size_t i = 0; i < kFaults; ++i) {
        const uint64_t entry = fault_entries[i];
        gates[i] = {static_cast<uint16_t>(entry),       kCode64, 0, kInterruptGate, static_cast<uint16_t>(entry >> 16),
                    static_cast<uint32_t>(entry >> 32), 0};
    }
    const struct [[gnu::packed]] {
        uint16_t limit;
        const Gate* gates;
    } table = {sizeof gates - 1, gates};
    __asm__ volatile("lidt %0" : : "m"(table));
}

// XCR0: x87, SSE, AVX, the three parts of AVX-512, tile configuration and tile data.
constexpr uint32_t kState = 0x600E7;

bool switch_tiles_on() {
    uint32_t a, b, c, d;
    constexpr uint32_t kTileUnit = 1u << 22 | 1u << 24 | 1u << 25;  // AMX-BF16, AMX-TILE, AMX-INT8
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTileUnit) != kTileUnit) return false;
    __asm__ volatile("xsetbv" : : "a"(kState), "d"(0), "c"(0));
    return true;
}

}  // namespace

void print(std::string_view text) {
    for (const char c : text) out(kConsole, c);
}
void print(Hex number) {
    print("0x");
    int shift = 60;
    while (shift > 0 && number.value >> shift == 0) shift -= 4;
    for (; shift >= 0; shift -= 4) out(kConsole, "0123456789abcdef"[number.value >> shift & 15]);
}
void print_number(uint64_t number) {
    if (number >= 10) print_number(number / 10);
    out(kConsole, static_cast<char>('0' + number % 10));
}

void finish(size_t n_checks, size_t n_failures) {
    if (n_failures > 0)
        say("FAILED ", n_failures);
    else
        say("PASSED ", n_checks);
    for (const char c : kPowerOff) out(kPower, c);
    for (;;) __asm__ volatile("hlt");
}

extern "C" [[noreturn]] void fault(const Frame* frame) {
    uint64_t address;
    __asm__ volatile("movq %%cr2, %0" : "=r"(address));
    say("the processor raised exception ", frame->vector, " at ", Hex{frame->rip}, ", error code ", Hex{frame->error},
        ", last page fault at ", Hex{address});
    finish(0, 1);
}

extern "C" [[noreturn]] void start() {
    catch_faults();
    if (!switch_tiles_on()) {
        say("this processor has no AMX");
        finish(0, 1);
    }
    Checks checks;
    check_everything(checks);
    finish(checks.n_checks, checks.n_failures);
}

}  // namespace metal

// What compilers call unasked, and what kernels take from the C library.
extern "C" {
void* memcpy(void* to, const void* from, size_t n) {
    void* const result = to;
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(n) : : "memory");
    return result;
}
void* memset(void* to, int value, size_t n) {
    void* const result = to;
    __asm__ volatile("rep stosb" : "+D"(to), "+c"(n) : "a"(value) : "memory");
    return result;
}
float fmaxf(float a, float b) { return a > b || metal::is_nan(b) ? a : b; }
float expf(float) {  // of tails that no check has
    metal::say("expf was called, which is not here");
    metal::finish(0, 1);
}
}
