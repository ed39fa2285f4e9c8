// The bare machine that the checks run on: no operating system, one processor, memory with holes.
#pragma once
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace metal {

// ---- words for whoever reads the emulator's output ----

struct Hex {
    uint64_t value;
};
void print(std::string_view text);
template <size_t N>
void print(const char (&text)[N]) {
    print(std::string_view(text, N - 1));
}
void print(Hex number);
void print_number(uint64_t number);
void print(std::unsigned_integral auto number) { print_number(number); }

// A line of its parts, marked as ours: the emulator speaks too.
template <class... Parts>
void say(const Parts&... parts) {
    print("> ");
    (print(parts), ...);
    print("\n");
}

// The last thing that is called, also by a processor's fault, which is told as a failure: FAILED and how often, or
// PASSED and how many checks.
[[noreturn]] void finish(size_t n_checks, size_t n_failures);

// ---- memory ----

// 2 MB that nothing is mapped around: who reads or writes behind them faults.
struct Arena {
    uintptr_t end;
    // The last `bytes`, 64-byte aligned where they begin; behind them fewer than 64 bytes are mapped.
    uint8_t* last(size_t bytes) const { return reinterpret_cast<uint8_t*>(end - (bytes + 63) / 64 * 64); }
};
constexpr size_t kArenas = 8;
constexpr Arena arena(size_t i) { return {0x1600000 + i * 0x400000}; }

}  // namespace metal
