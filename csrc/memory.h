// Memory of one NUMA node, in huge pages where the system gives them.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string_view>
#include <utility>
#include <vector>

namespace fourfold {

constexpr int kAnyNode = -1;

// Where pages are to lie. A node is the kernel's number, or kAnyNode: where they are first touched.
struct Home {
    int node;
    bool may_spill;  // to other nodes where this one is full; else what is full of cached files gives those up first
    Home(int node, bool may_spill = false) : node(node), may_spill(may_spill) {}
};

// Zeroed pages bound to a node before they are first touched. Owns them; moves, does not copy.
class NodeMemory {
  public:
    NodeMemory() = default;
    // Throws std::bad_alloc where the kernel refuses. Where binding is not permitted (containers without the privilege)
    // the pages fall where they are first touched: by the node's own threads.
    NodeMemory(size_t bytes, Home home);
    NodeMemory(NodeMemory&& other) noexcept { *this = std::move(other); }
    NodeMemory& operator=(NodeMemory&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(bytes_, other.bytes_);
        std::swap(within_, other.within_);
        return *this;
    }
    ~NodeMemory();

    template <class T = uint8_t>
    T* as() const {
        return reinterpret_cast<T*>(data_);
    }
    size_t bytes() const { return bytes_; }

    // Whether every binding that was asked for so far was granted.
    static bool all_bound();

  private:
    friend class NodeArena;
    uint8_t* data_ = nullptr;
    size_t bytes_ = 0;                          // as mapped
    std::shared_ptr<const NodeMemory> within_;  // whose pages these are, if not its own
};

// Memory of a node for much that is read together, one thing after another: so that many of a few MB, or of a few KB,
// are in huge pages to the last byte and waste none. Not for several threads at once.
class NodeArena {
  public:
    explicit NodeArena(Home home) : home_(home) {}
    // As NodeMemory(bytes, home), but that it shares huge pages with what was taken before and after.
    NodeMemory take(size_t bytes);

  private:
    static constexpr size_t kBlock = size_t{256} << 20;  // address space; pages come as they are written
    Home home_;
    std::shared_ptr<const NodeMemory> block_;
    size_t used_ = 0;
};

// Memory that a rank holds, and what for: whole pages.
struct Region {
    std::string_view kind;
    size_t rank;
    uintptr_t address;
    size_t bytes;
};
using MemoryMap = std::vector<Region>;

// Adds what lies in `memory`; nothing where it is empty.
void list_memory(MemoryMap& map, std::string_view kind, size_t rank, const NodeMemory& memory);
// The same for each rank's of `memories`.
void list_memory(MemoryMap& map, std::string_view kind, const std::vector<NodeMemory>& memories);

// The node that holds the page at each address; negative where none is there yet (untouched, or read but never
// written). Throws std::system_error where the system does not tell (containers without the privilege).
std::vector<int> nodes_of_pages(const std::vector<uintptr_t>& addresses);

}  // namespace fourfold
