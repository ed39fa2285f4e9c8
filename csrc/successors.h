// Which matrix is read after which: learned from the calls themselves, since every walk through a model is the same.
//
// What is learned is only ever asked into caches. It may be wrong, or of memory that is freed by now: asking for an
// address faults nowhere, and answers are the same.
#pragma once
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>

#include "shares.h"

namespace fourfold {

// What the threads of a call read: thread i of n_threads its share of the panels.
struct Reading {
    const uint8_t* panels = nullptr;
    size_t n_panels = 0, panel_bytes = 0, n_threads = 0;

    std::span<const uint8_t> of_thread(size_t i) const {
        if (i >= n_threads) return {};
        const auto [begin, end] = share(n_panels, i, n_threads);
        return {panels + begin * panel_bytes, (end - begin) * panel_bytes};
    }
};

// For any number of threads at once, without a lock: a mixture of two calls is one more wrong guess.
class Successors {
  public:
    // `now` is read next: remembers that it came after what was read before. Returns what came after `now` both times
    // that it was read last; nothing where that is not known, or not the same. A wrong guess costs what it reads.
    Reading after(const Reading& now) {
        Entry& entry = entries_[place(now.panels)];
        if (Entry* const before = last_.exchange(&entry, std::memory_order_relaxed)) {
            set(before->is_sure, get(before->then.panels) == now.panels);
            before->then.store(now);
        }
        if (get(entry.panels) == now.panels) return get(entry.is_sure) ? entry.then.load() : Reading{};
        set(entry.panels, now.panels);
        set(entry.is_sure, false);
        entry.then.store({});
        return {};
    }

  private:
    static constexpr size_t kEntries = 4096;  // of a line each: matrices of a model, some of which share a place
    static size_t place(const uint8_t* panels) {
        return (reinterpret_cast<uintptr_t>(panels) >> 6) * 0x9E3779B97F4A7C15u >> 52;
    }

    template <class T>
    static T get(const std::atomic<T>& value) {
        return value.load(std::memory_order_relaxed);
    }
    // Writes only what is new: lines that nobody writes are shared by all cores.
    template <class T>
    static void set(std::atomic<T>& value, T now) {
        if (get(value) != now) value.store(now, std::memory_order_relaxed);
    }

    struct Stored {
        std::atomic<const uint8_t*> panels = nullptr;
        std::atomic<size_t> n_panels = 0, panel_bytes = 0, n_threads = 0;

        Reading load() const { return {get(panels), get(n_panels), get(panel_bytes), get(n_threads)}; }
        void store(const Reading& reading) {
            set(panels, reading.panels);
            set(n_panels, reading.n_panels);
            set(panel_bytes, reading.panel_bytes);
            set(n_threads, reading.n_threads);
        }
    };
    struct alignas(64) Entry {
        std::atomic<const uint8_t*> panels = nullptr;
        Stored then;
        std::atomic<bool> is_sure = false;
    };

    std::array<Entry, kEntries> entries_;
    std::atomic<Entry*> last_ = nullptr;
};

}  // namespace fourfold
