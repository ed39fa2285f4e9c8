#include "memory.h"

#include <linux/mempolicy.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <new>
#include <system_error>

namespace fourfold {

namespace {
constexpr size_t kHugePage = size_t{2} << 20, kPage = 4096;
std::atomic<bool> unbound{false};
}  // namespace

NodeMemory::NodeMemory(size_t bytes, Home home) {
    if (bytes == 0) return;
    // What fills a huge page begins on one; its tail is left to ordinary pages.
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
    if (home.node != kAnyNode) {
        constexpr size_t kBits = 8 * sizeof(unsigned long);
        const auto node = static_cast<size_t>(home.node);
        std::vector<unsigned long> mask(node / kBits + 1);
        mask[node / kBits] |= 1ul << (node % kBits);
        // Either policy also keeps the kernel's NUMA balancing from unmapping pages to see who comes back for them.
        const int policy = home.may_spill ? MPOL_PREFERRED : MPOL_BIND;
        if (syscall(SYS_mbind, data_, bytes_, policy, mask.data(), mask.size() * kBits + 1, 0) != 0) unbound = true;
    }
}

bool NodeMemory::all_bound() { return !unbound; }

NodeMemory::~NodeMemory() {
    if (data_ && !within_) munmap(data_, bytes_);
}

NodeMemory NodeArena::take(size_t bytes) {
    NodeMemory part;
    if (bytes == 0) return part;
    const size_t whole = (bytes + kPage - 1) / kPage * kPage;
    if (!block_ || used_ + whole > block_->bytes()) {
        block_ = std::make_shared<const NodeMemory>(std::max(kBlock, (whole + kHugePage - 1) / kHugePage * kHugePage),
                                                    home_);
        used_ = 0;
    }
    part.data_ = block_->as() + used_;
    part.bytes_ = whole;
    part.within_ = block_;
    used_ += whole;
    return part;
}

void list_memory(MemoryMap& map, std::string_view kind, size_t rank, const NodeMemory& memory) {
    if (memory.bytes()) map.push_back({kind, rank, reinterpret_cast<uintptr_t>(memory.as()), memory.bytes()});
}

void list_memory(MemoryMap& map, std::string_view kind, const std::vector<NodeMemory>& memories) {
    for (size_t rank = 0; rank < memories.size(); ++rank) list_memory(map, kind, rank, memories[rank]);
}

std::vector<int> nodes_of_pages(const std::vector<uintptr_t>& addresses) {
    std::vector<int> nodes(addresses.size());
    // Without nodes to move to, move_pages only says where pages are.
    if (!addresses.empty() &&
        syscall(SYS_move_pages, 0, addresses.size(), addresses.data(), nullptr, nodes.data(), 0) != 0)
        throw std::system_error(errno, std::generic_category(), "move_pages");
    return nodes;
}

}  // namespace fourfold
