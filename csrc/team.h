// Pinned threads, one group a rank, that run the same job in lock-step.
//
//   rank     one tensor-parallel slice: threads on the cores of one NUMA node (or virtual: any cores)
//   barrier  all threads of a rank;  barrier_all: all threads of all ranks
//
// The caller of a job is the first thread of the first rank while it runs, on that thread's CPU; the other threads are
// the team's own. Every wait inside a job is bounded: a thread that does not arrive in time is named, the job ends in
// StallError, and the team is broken from then on. Threads spin for a moment before they yield, inside a job, or sleep,
// between jobs: an idle team uses no CPU.
#pragma once
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "memory.h"
#include "shares.h"
#include "timeline.h"

namespace fourfold {

constexpr size_t kMaxRanks = 64;

struct RankPlan {
    Home node;              // where its memory goes
    std::vector<int> cpus;  // one thread each; the same CPU may stand in several ranks
};

struct StallError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// The process that something with threads was made in. One that is forked from it has a copy of the memory and none of
// the threads.
class Process {
  public:
    bool is_this() const { return getpid() == id_; }

  private:
    const pid_t id_ = getpid();
};

class Team;

// One thread's place in the team, as a job sees it.
class Worker {
  public:
    const size_t rank, thread, n_ranks, n_threads;  // n_threads: of this rank
    Timeline* timeline = nullptr;                   // where this job's time is recorded, if the job says so
    void barrier();
    void barrier_all();
    // What this thread reads next: while it waits for others, it asks for as much of that as its L2 cache has room for.
    void reads_next(std::span<const uint8_t> bytes) { ahead_ = bytes.first(std::min(bytes.size(), kMostAhead)); }
    // Says how an op, or what follows a barrier in it, begins: otherwise as work.
    void begins_as(Phase phase) {
        if (timeline) timeline->begins_as(phase);
    }

    // This thread's part of [0, count): contiguous, in units, as even as can be.
    std::pair<size_t, size_t> share(size_t count, size_t unit = 1) const {
        return share(count, unit, thread, n_threads);
    }
    static std::pair<size_t, size_t> share(size_t count, size_t unit, size_t thread, size_t n_threads) {
        const auto [begin, end] = fourfold::share((count + unit - 1) / unit, thread, n_threads);
        return {std::min(begin * unit, count), std::min(end * unit, count)};
    }

  private:
    friend class Team;
    struct State;
    Worker(State& state, size_t rank, size_t thread, size_t n_ranks, size_t n_threads)
        : rank(rank), thread(thread), n_ranks(n_ranks), n_threads(n_threads), state_(state) {}
    void arrive();
    void release();
    // Asks for the next lines of what is read next. False where there are none.
    bool ask_ahead();
    static constexpr size_t kMostAhead = 256 * 1024;
    std::span<const uint8_t> ahead_;
    State& state_;
    uint64_t epoch_ = 0, epoch_all_ = 0;
};

class Team {
  public:
    using Job = std::function<void(Worker&)>;

    // Throws std::invalid_argument for no ranks, more than kMaxRanks, or a rank without CPUs; std::system_error where
    // the system gives no more threads.
    explicit Team(std::vector<RankPlan> plan, double timeout_seconds = 60);
    ~Team();
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    // Every thread of every rank runs the job once; returns when all have. Rethrows the first exception of a job; after
    // any failure the team is broken and every later call throws StallError, as every call does in a process that was
    // forked from this one. Callers take turns. The calling thread works too: until the call returns it is pinned to
    // the first CPU of the plan, and a stall of its own is found by the others but returned only once it goes on.
    void run(Job job);
    // Throws StallError in a process that was forked from this one: whoever has a lock of its own around `run` asks
    // before it takes that, since another thread may have held it at the fork, and then nobody lets go of it.
    void check_process() const;

    const std::vector<RankPlan>& plan() const { return plan_; }
    size_t n_ranks() const { return plan_.size(); }
    // Memory of a rank for its weights.
    NodeArena& arena(size_t rank) const { return *arenas_[rank]; }
    // For tests: that thread sleeps before its next job.
    void stall_next(size_t rank, size_t thread, double seconds);

  private:
    static void serve(std::shared_ptr<Worker::State> state, size_t rank, size_t thread, size_t n_ranks,
                      size_t n_threads, int cpu);
    void close();
    const Process process_;
    std::vector<RankPlan> plan_;
    std::vector<std::unique_ptr<NodeArena>> arenas_;  // one a rank
    std::shared_ptr<Worker::State> state_;
    std::unique_ptr<Worker> caller_;
    std::vector<std::thread> threads_;  // all workers but the caller
};

}  // namespace fourfold
