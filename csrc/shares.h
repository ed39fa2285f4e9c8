// Units of work divided among threads: each takes its own share from the front, as one stream, and then helps whoever
// has most left, from the back. So a thread that came late, or whose core others use too, holds nobody up for longer
// than what it has taken takes. Every unit is taken once; by whom is not determined.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>

namespace fourfold {

// Thread i's part of [0, count): contiguous, as even as can be.
constexpr std::pair<size_t, size_t> share(size_t count, size_t i, size_t n) {
    return {count * i / n, count * (i + 1) / n};
}

class Shares {
  public:
    // What a thread has left: [begin, end) in one word, so that it and those who help it take at once.
    using Left = std::atomic<uint64_t>;

    // Of `count` units, below 2^32. `left` is memory for n_threads, which nobody else uses while this lives.
    Shares(void* left, size_t count, size_t n_threads) : left_(static_cast<Left*>(left)), n_threads_(n_threads) {
        for (size_t i = 0; i < n_threads; ++i) {
            const auto [begin, end] = share(count, i, n_threads);
            new (left_ + i) Left(begin << 32 | end);
        }
    }

    // At most `most` units for thread i, in order; none (begin = end) once all are taken. Any thread may call this for
    // any i.
    std::pair<size_t, size_t> take(size_t i, size_t most) {
        for (uint64_t now = left_[i].load(std::memory_order_relaxed); n_units(now) > 0;) {
            const uint64_t n = std::min<uint64_t>(most, n_units(now));
            if (left_[i].compare_exchange_weak(now, now + (n << 32), std::memory_order_relaxed))
                return {now >> 32, (now >> 32) + n};
        }
        for (;;) {
            size_t whose = 0;
            uint64_t now = 0;
            for (size_t other = 0; other < n_threads_; ++other) {
                const uint64_t found = left_[other].load(std::memory_order_relaxed);
                if (n_units(found) > n_units(now)) whose = other, now = found;
            }
            const uint64_t n = std::min<uint64_t>(most, n_units(now)), end = now & UINT32_MAX;
            if (n == 0 || left_[whose].compare_exchange_weak(now, now - n, std::memory_order_relaxed))
                return {end - n, end};
        }
    }

  private:
    static uint64_t n_units(uint64_t left) { return (left & UINT32_MAX) - (left >> 32); }

    Left* left_;
    size_t n_threads_;
};

}  // namespace fourfold
