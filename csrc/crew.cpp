#include "crew.h"

#include <emmintrin.h>
#include <pthread.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>

#include "arithmetic.h"

namespace fourfold {
namespace {

using Clock = std::chrono::steady_clock;
// A thread that waits for the next call looks out for it, at first alone on its core, then giving way to whoever else
// wants to run there, and then sleeps: to wake it takes 50 microseconds, and more on a virtual machine.
constexpr auto kSpin = std::chrono::microseconds(50), kYield = std::chrono::microseconds(2000);

class OwnCrew final : public Crew {
  public:
    void run(size_t n, Job job) override {
        if (n == 0) return;
        const std::lock_guard<std::mutex> turn(turn_);
        while (n_threads_ + 1 < n && start_thread()) continue;
        while (parts_.size() + 1 < n) parts_.emplace_back(kTaken);
        job_ = job;
        const uint64_t call = next_call(n);
        for (size_t i = 1; i < n; ++i) parts_[i - 1].store(call, std::memory_order_relaxed);
        pending_.store(n - 1, std::memory_order_relaxed);
        call_.store(call, std::memory_order_release);
        if (n > 1) call_.notify_all();
        job(0);
        for (size_t i = 1; i < n; ++i) {
            if (!take(parts_[i - 1], call)) continue;
            job(i);
            pending_.fetch_sub(1, std::memory_order_relaxed);
        }
        for (size_t spins = 0; pending_.load(std::memory_order_acquire) != 0; ++spins)
            spins < 10000 ? _mm_pause() : std::this_thread::yield();
    }

    void stall(size_t i, double seconds) {
        stall_seconds_ = seconds;
        stalled_ = i;
    }

  private:
    void nap() {
        stalled_ = 0;
        std::this_thread::sleep_for(std::chrono::duration<double>(stall_seconds_));
    }

    // A call in one word, which a thread reads at once: its number, and how many parts it has. Part i is thread i's, or
    // the caller's where that thread has not come by when the caller is done with its own: whoever takes it first.
    // Those who took one are waited for, so that nothing of a call changes before they are done; nobody else is.
    static constexpr int kBits = 16;
    using Part = std::atomic<uint64_t>;    // the call that it is of, until it is taken
    static constexpr uint64_t kTaken = 0;  // no call's
    uint64_t next_call(size_t n) const { return ((call_.load() >> kBits) + 1) << kBits | n; }
    static bool take(Part& part, uint64_t call) {
        return part.load(std::memory_order_relaxed) == call &&
               part.compare_exchange_strong(call, kTaken, std::memory_order_acquire);
    }

    // False where the system gives no more.
    bool start_thread() {
        if (parts_.size() == n_threads_) parts_.emplace_back(kTaken);
        try {
            std::thread([this, i = n_threads_ + 1, &part = parts_[n_threads_], seen = call_.load()] {
                serve(i, part, seen);
            }).detach();  // never joined: see crew()
        } catch (const std::system_error&) {
            return false;
        }
        ++n_threads_;
        return true;
    }

    void serve(size_t i, Part& part, uint64_t seen) {
        const OwnArithmetic while_it_lives;
        for (;;) {
            seen = await(seen);
            if (stalled_.load(std::memory_order_relaxed) == i) nap();
            if (i >= (seen & ((1 << kBits) - 1)) || !take(part, seen)) continue;
            job_(i);
            pending_.fetch_sub(1, std::memory_order_release);
        }
    }

    // Returns the next call once there is one.
    uint64_t await(uint64_t seen) const {
        const auto begin = Clock::now();
        for (;;) {
            for (int spins = 0; spins < 64; ++spins) {
                const uint64_t call = call_.load(std::memory_order_acquire);
                if (call != seen) return call;
                _mm_pause();
            }
            const auto waited = Clock::now() - begin;
            if (waited > kYield)
                call_.wait(seen, std::memory_order_acquire);
            else if (waited > kSpin)
                std::this_thread::yield();
        }
    }

    std::mutex turn_;
    std::deque<Part> parts_;  // the first are those of threads, the others all the caller's
    size_t n_threads_ = 0;    // beside the caller
    Job job_{};
    std::atomic<size_t> stalled_ = 0;  // the thread that is to sleep; the caller, 0, never is
    std::atomic<double> stall_seconds_ = 0;
    alignas(64) std::atomic<uint64_t> call_ = 0;
    alignas(64) std::atomic<size_t> pending_ = 0;
};

std::atomic<OwnCrew*> shared = nullptr;

OwnCrew& crew() {
    // Never destroyed: its threads may outlive main. A forked child has none of them, and forgets it.
    static std::once_flag once;
    std::call_once(once, [] {
        shared = new OwnCrew;
        pthread_atfork(nullptr, nullptr, [] { shared = new OwnCrew; });
    });
    return *shared;
}

}  // namespace

Crew& own_crew() { return crew(); }
void stall_own_crew(size_t i, double seconds) { crew().stall(i, seconds); }

void OpenMpCrew::run(size_t n, Job job) {
    if (n <= 1) {
        if (n == 1) job(0);
        return;
    }
    struct Call {
        const OpenMp& runtime;
        size_t n;
        Job job;
    } call{runtime_, n, job};
    const auto region = [](void* data) {
        const Call& c = *static_cast<const Call*>(data);
        const OwnArithmetic while_computing;
        const auto step = static_cast<size_t>(c.runtime.num_threads());
        for (auto i = static_cast<size_t>(c.runtime.thread_num()); i < c.n; i += step) c.job(i);
    };
    runtime_.parallel(region, &call, static_cast<unsigned>(n), 0);
}

}  // namespace fourfold
