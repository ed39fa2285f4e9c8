#include "memory.h"

#include <linux/mempolicy.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <new>
#include <vector>

namespace fourfold {

namespace {
constexpr size_t kHugePage = size_t{2} << 20, kPage = 4096;
std::atomic<bool> unbound{false};
}  // namespace

NodeMemory::NodeMemory(size_t bytes, int node) {
    if (bytes == 0) return;
    // What fills a huge page begins on one; its tail is left to ordinary pages, or a model of many matrices of a few MB
    // would take a tenth more memory than it has weights.
    const size_t unit = bytes >= kHugePage ? kHugePage : kPage;
    bytes_ = (bytes + kPage - 1) / kPage * kPage;
    // A huge page must begin at a multiple of its size: map one more, and give back what lies before and behind.
    const size_t mapped = unit == kHugePage ? bytes_ + kHugePage : bytes_;
    void* p = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) {
        bytes_ = 0;
        throw std::bad_alloc();
    }
    const auto start = reinterpret_cast<uintptr_t>(p), aligned = (start + unit - 1) / unit * unit;
    data_ = reinterpret_cast<uint8_t*>(aligned);
    if (aligned > start) munmap(p, aligned - start);
    if (const size_t behind = mapped - bytes_ - (aligned - start)) munmap(data_ + bytes_, behind);
    if (unit == kHugePage) madvise(data_, bytes_, MADV_HUGEPAGE);
    if (node != kAnyNode) {
        constexpr size_t kBits = 8 * sizeof(unsigned long);
        std::vector<unsigned long> mask(static_cast<size_t>(node) / kBits + 1);
        mask[static_cast<size_t>(node) / kBits] |= 1ul << (static_cast<size_t>(node) % kBits);
        if (syscall(SYS_mbind, data_, bytes_, MPOL_BIND, mask.data(), mask.size() * kBits + 1, 0) != 0) unbound = true;
    }
}

bool NodeMemory::all_bound() { return !unbound; }

NodeMemory::~NodeMemory() {
    if (data_) munmap(data_, bytes_);
}

}  // namespace fourfold
