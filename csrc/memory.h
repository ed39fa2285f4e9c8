// Memory of one NUMA node, in huge pages where the system gives them.
#pragma once
#include <cstddef>
#include <cstdint>
#include <utility>

namespace fourfold {

constexpr int kAnyNode = -1;

// Zeroed pages bound to a node before they are first touched. Owns them; moves, does not copy.
class NodeMemory {
  public:
    NodeMemory() = default;
    // Throws std::bad_alloc where the kernel refuses. node is the kernel's number, or kAnyNode. Where binding is not
    // permitted (containers without the privilege) the pages fall where they are first touched: by the node's own
    // threads.
    NodeMemory(size_t bytes, int node);
    NodeMemory(NodeMemory&& other) noexcept { *this = std::move(other); }
    NodeMemory& operator=(NodeMemory&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(bytes_, other.bytes_);
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
    uint8_t* data_ = nullptr;
    size_t bytes_ = 0;  // as mapped
};

}  // namespace fourfold
