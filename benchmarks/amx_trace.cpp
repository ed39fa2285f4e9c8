// Executes an AMX kernel one instruction at a time on a machine that need not have AMX, and writes down which
// instructions those were: control flow depends on shapes alone, so tile instructions are skipped where they fault.
//
//   amx_trace KERNEL M N K LIMIT FILE      linear kernels; attention kernels take M rows of N positions and K dimensions
//
// FILE holds, for each instruction up to LIMIT, its address and rax .. r15 as before it, 17 numbers of 64 bits.
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "kernels/linear_rows.h"

using namespace fourfold;

namespace {

constexpr int kRegisters[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                              REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
constexpr long long kTrapFlag = 0x100;
struct Record {
    uint64_t address, registers[16];
};
Record* records;
size_t n_records, limit;
const char* file;

[[noreturn]] void finish() {
    const int to = open(file, O_CREAT | O_TRUNC | O_WRONLY, 0644);
    const auto* at = reinterpret_cast<const char*>(records);
    for (size_t left = n_records * sizeof(Record); left > 0;) {
        const ssize_t n = write(to, at, left);
        if (n <= 0) _exit(1);
        at += n, left -= static_cast<size_t>(n);
    }
    _exit(0);
}
void note(const ucontext_t& context) {
    if (n_records == limit) finish();
    Record& record = records[n_records++];
    record.address = static_cast<uint64_t>(context.uc_mcontext.gregs[REG_RIP]);
    for (int i = 0; i < 16; ++i) record.registers[i] = static_cast<uint64_t>(context.uc_mcontext.gregs[kRegisters[i]]);
}
void on_trap(int, siginfo_t*, void* context) { note(*static_cast<ucontext_t*>(context)); }
// Tile instructions are VEX with three bytes, an opcode, ModRM and, with memory, SIB and displacement.
void on_illegal(int, siginfo_t*, void* context) {
    auto& at = *static_cast<ucontext_t*>(context);
    const auto* code = reinterpret_cast<const uint8_t*>(at.uc_mcontext.gregs[REG_RIP]);
    if (code[0] != 0xC4) _exit(2);
    const int mod = code[4] >> 6, has_sib = mod != 3 && (code[4] & 7) == 4;
    const bool is_absolute = mod == 0 && (has_sib ? code[5] & 7 : code[4] & 7) == 5;
    at.uc_mcontext.gregs[REG_RIP] += 5 + has_sib + (mod == 1 ? 1 : mod == 2 || is_absolute ? 4 : 0);
    note(at);
}
void handle(int number, void (*handler)(int, siginfo_t*, void*)) {
    struct sigaction action = {};
    action.sa_sigaction = handler;
    action.sa_flags = SA_SIGINFO;
    sigaction(number, &action, nullptr);
}
template <class F>
[[gnu::noinline]] void trace(F f) {
    handle(SIGTRAP, on_trap);
    handle(SIGILL, on_illegal);
    __asm__ volatile("pushfq\n orq %0, (%%rsp)\n popfq" ::"i"(kTrapFlag) : "memory", "cc");
    f();
    finish();
}
// Zeros on huge pages, so that what is a line apart here is a line apart in a cache.
uint8_t* memory(size_t bytes) {
    constexpr size_t kHuge = size_t{2} << 20;
    const size_t size = (bytes + kHuge - 1) / kHuge * kHuge;
    void* at = mmap(nullptr, size + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) std::exit(1);
    return reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(at) + kHuge - 1) / kHuge * kHuge);
}

void run_linear(const LinearKernel& kernel, size_t m, size_t n, size_t k) {
    const size_t n_panels = panels_of(n), k_tiles = tiles_of(k), row = k_tiles * (kTileK * 4 + 8) + 64;
    auto* scales = reinterpret_cast<float*>(memory(n_panels * sizeof(float)));
    const LinearArgs args = {memory(n_panels * panel_bytes(kernel.format, k_tiles) + 65536), scales, n_panels, k_tiles,
                             memory((m + 16) * row), m, reinterpret_cast<float*>(memory(m * n_panels * kTileN * 4)),
                             n_panels * kTileN, memory(kLinearScratchBytes)};
    trace([&] { kernel.run(args); });
}
void run_attention(const AttendKernel& kernel, size_t rows, size_t n, size_t d) {
    static AttendArgs args = {};
    static int32_t pages[1024];
    args.n_queries = std::min(rows, kAttendQueries);
    for (size_t i = 0; i < args.n_queries; ++i)
        args.q[i] = reinterpret_cast<float*>(memory(d * 4)), args.n_positions[i] = n;
    for (size_t i = 0; i < 1024; ++i) pages[i] = static_cast<int32_t>(i);
    args.runs = {n / kPage + 2, 1, KvPage::bytes(kernel.format, d)}, args.page_table = pages;
    args.pages = memory(args.runs.bytes());
    args.end = n, args.end_ahead = n, args.d = d, args.scale = 1;
    args.partial = reinterpret_cast<float*>(memory(kAttendQueries * attend_partial_floats(d) * 4));
    args.scratch = reinterpret_cast<float*>(memory(attend_scratch_floats(d) * 4));
    trace([&] { kernel.run(args); });
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 7) return 2;
    const std::string name = argv[1];
    const size_t m = std::strtoul(argv[2], nullptr, 10), n = std::strtoul(argv[3], nullptr, 10);
    const size_t k = std::strtoul(argv[4], nullptr, 10);
    limit = std::strtoul(argv[5], nullptr, 10), file = argv[6];
    records = reinterpret_cast<Record*>(memory(limit * sizeof(Record)));
    for (const auto rows : {linear_rows_amx(), linear_rows_avx512()})
        for (const LinearKernel& kernel : rows)
            if (kernel.name == name) run_linear(kernel, m, n, k);
    for (const AttendKernel& kernel : attend_rows_amx())
        if (kernel.name == name) run_attention(kernel, m, n, k);
    std::fprintf(stderr, "no kernel is called %s\n", name.c_str());
    return 2;
}
