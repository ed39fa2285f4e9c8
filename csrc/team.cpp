#include "team.h"

#include <immintrin.h>
#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <exception>
#include <map>
#include <mutex>

#include "affinity.h"
#include "arithmetic.h"

namespace fourfold {

namespace {
using Clock = std::chrono::steady_clock;
constexpr std::chrono::milliseconds kAwake{2};  // between jobs: longer than a token takes to be sampled
constexpr std::chrono::milliseconds kTurn{10};  // of three others on a thread's CPU, each for the scheduler's 3 ms

struct alignas(64) Flag {
    std::atomic<uint64_t> value{0};
};
}  // namespace

// Everything that threads share; each holds a reference, so that one that never returns outlives the team unharmed.
struct Worker::State {
    std::vector<std::vector<Flag>> arrived;  // (rank, thread)
    std::vector<Flag> released, rank_arrived;

    alignas(64) std::atomic<uint32_t> generation{0};  // of jobs; threads spin on it, then sleep
    alignas(64) std::atomic<uint32_t> finished{0};    // the last generation that ended; the caller spins, then sleeps
    alignas(64) std::atomic<size_t> n_done{0};
    alignas(64) std::atomic<size_t> n_asleep{0};  // threads that only notify_all wakes
    std::atomic<bool> broken{false}, closing{false}, has_stalls{false};
    size_t n_workers = 0;
    int spins = 0;
    std::chrono::duration<double> timeout{};
    Team::Job job;     // written by the caller alone, while no thread runs one
    std::mutex turn;   // held by the caller of run
    std::mutex mutex;  // guards the rest
    std::exception_ptr error;
    std::map<std::pair<size_t, size_t>, double> stalls;

    // This worker's part of the job.
    void work(Worker& worker) {
        try {
            if (has_stalls) nap(worker.rank, worker.thread);
            worker.timeline = nullptr;
            if (!broken) job(worker);
        } catch (...) {
            fail(std::current_exception());
        }
    }

    // For tests: sleeps as stall_next asked.
    void nap(size_t rank, size_t thread) {
        std::unique_lock lock(mutex);
        const auto it = stalls.find({rank, thread});
        if (it == stalls.end()) return;
        const std::chrono::duration<double> seconds(it->second);
        stalls.erase(it);
        lock.unlock();
        std::this_thread::sleep_for(seconds);
    }

    // Returns once value is not old any more: spins for kAwake first, asleep afterwards.
    void sleep_while(const std::atomic<uint32_t>& value, uint32_t old) {
        const auto end = Clock::now() + kAwake;
        while (spins > 0 && Clock::now() < end)
            for (int i = 0; i < 64; ++i) {
                if (value.load(std::memory_order_acquire) != old) return;
                _mm_pause();
            }
        ++n_asleep;
        while (value == old) value.wait(old);
        --n_asleep;
    }
    void wake(std::atomic<uint32_t>& value) {
        if (n_asleep > 0) value.notify_all();
    }

    void fail(std::exception_ptr e) {
        {
            std::lock_guard lock(mutex);
            if (!error) error = e;
        }
        broken = true;
        finished = generation.load();
        wake(finished);
    }

    // Waits until flag >= target. `who` names the thread awaited if the wait is one that should report it.
    template <class Who>
    void wait(Worker& worker, const Flag& flag, uint64_t target, double patience, Who who) {
        for (int i = 0; i < spins; ++i) {
            if (flag.value.load(std::memory_order_acquire) >= target) return;
            if (!worker.ask_ahead()) _mm_pause();
        }
        // Only time that this thread was awake for counts: a process that was stopped for a minute has not stalled. The
        // clock is read at every turn, kTurn counting at most, since with others on its CPU a turn takes that long.
        std::chrono::duration<double> waited{};
        auto last = Clock::now();
        while (flag.value.load(std::memory_order_acquire) < target) {
            if (broken) throw StallError("another thread failed");
            sched_yield();
            const auto now = Clock::now();
            waited += std::min<std::chrono::duration<double>>(now - last, kTurn);
            last = now;
            if (waited > timeout * patience) {
                const StallError e(who());
                fail(std::make_exception_ptr(e));
                throw e;
            }
        }
    }
};

namespace {
std::string late(size_t rank, size_t thread, double seconds) {
    char text[160];
    std::snprintf(text, sizeof text, "rank %zu, thread %zu did not arrive within %.3g s; the step was given up", rank,
                  thread, seconds);
    return text;
}
}  // namespace

bool Worker::ask_ahead() {
    constexpr size_t kLines = 2, kLine = 64;
    if (ahead_.size() < kLines * kLine) return false;
    for (size_t i = 0; i < kLines; ++i)
        _mm_prefetch(reinterpret_cast<const char*>(ahead_.data() + i * kLine), _MM_HINT_T1);
    ahead_ = ahead_.subspan(kLines * kLine);
    return true;
}

// The first thread of a rank gathers the others; it alone reports who is late, the rest wait longer for it.
void Worker::arrive() {
    ++epoch_;
    if (thread != 0) {
        state_.arrived[rank][thread].value.store(epoch_, std::memory_order_release);
        state_.wait(*this, state_.released[rank], epoch_, 3, [&] { return late(rank, 0, 3 * state_.timeout.count()); });
        return;
    }
    for (size_t t = 1; t < n_threads; ++t)
        state_.wait(*this, state_.arrived[rank][t], epoch_, 1, [&] { return late(rank, t, state_.timeout.count()); });
}

void Worker::release() {
    if (thread == 0) state_.released[rank].value.store(epoch_, std::memory_order_release);
}

void Worker::barrier() {
    if (timeline) timeline->enter_barrier();
    arrive();
    release();
    if (timeline) timeline->leave_barrier();
}

// The ranks' first threads tell each other: one hand-over from core to core, whichever came last.
void Worker::barrier_all() {
    if (timeline) timeline->enter_barrier();
    arrive();
    ++epoch_all_;
    if (thread == 0) {
        state_.rank_arrived[rank].value.store(epoch_all_, std::memory_order_release);
        for (size_t r = 0; r < n_ranks; ++r)
            state_.wait(*this, state_.rank_arrived[r], epoch_all_, 1.5,
                        [&] { return late(r, 0, 1.5 * state_.timeout.count()); });
    }
    release();
    if (timeline) timeline->leave_barrier();
}

Team::Team(std::vector<RankPlan> plan, double timeout_seconds) : plan_(std::move(plan)) {
    if (plan_.empty() || plan_.size() > kMaxRanks)
        throw std::invalid_argument("a team has 1 to " + std::to_string(kMaxRanks) + " ranks");
    state_ = std::make_shared<Worker::State>();
    Worker::State& s = *state_;
    std::vector<int> used;
    for (const RankPlan& rank : plan_) {
        if (rank.cpus.empty()) throw std::invalid_argument("every rank needs at least one CPU");
        s.arrived.emplace_back(rank.cpus.size());
        s.n_workers += rank.cpus.size();
        used.insert(used.end(), rank.cpus.begin(), rank.cpus.end());
        arenas_.push_back(std::make_unique<NodeArena>(rank.node));
    }
    s.released = std::vector<Flag>(plan_.size());
    s.rank_arrived = std::vector<Flag>(plan_.size());
    s.timeout = std::chrono::duration<double>(timeout_seconds);
    std::sort(used.begin(), used.end());
    const bool shared_cpus = std::adjacent_find(used.begin(), used.end()) != used.end();
    s.spins = shared_cpus ? 0 : 20000;  // 0.2 to 0.8 ms: longer than most waits in a step

    caller_.reset(new Worker(s, 0, 0, plan_.size(), plan_[0].cpus.size()));
    try {
        for (size_t r = 0; r < plan_.size(); ++r)
            for (size_t t = r == 0; t < plan_[r].cpus.size(); ++t)
                threads_.emplace_back(serve, state_, r, t, plan_.size(), plan_[r].cpus.size(), plan_[r].cpus[t]);
    } catch (...) {
        close();
        throw;
    }
}

namespace {

// The calling thread as a worker: on its CPU and with our arithmetic, until this goes.
class Enlisted {
  public:
    explicit Enlisted(int cpu) : before_(CpuSet::of_this_thread()) {
        const CpuSet set = CpuSet::only(cpu);
        if (before_ == set) before_.reset();
        if (before_) set.bind(pthread_self());  // best effort, as for threads
    }
    ~Enlisted() {
        if (before_) before_->bind(pthread_self());
    }

  private:
    std::optional<CpuSet> before_;  // where it is another, and known
    OwnArithmetic arithmetic_;
};

}  // namespace

// A thread's life: wait for a job, run it, say so.
void Team::serve(std::shared_ptr<Worker::State> state, size_t rank, size_t thread, size_t n_ranks, size_t n_threads,
                 int cpu) {
    CpuSet::only(cpu).bind(pthread_self());  // best effort: a cpuset may have shrunk
    const OwnArithmetic while_it_lives;
    Worker worker(*state, rank, thread, n_ranks, n_threads);
    for (uint32_t seen = 0; !state->broken; ++seen) {
        state->sleep_while(state->generation, seen);
        if (state->closing) return;
        state->work(worker);
        if (state->n_done.fetch_add(1) + 1 == state->n_workers) {
            state->finished = state->generation.load();
            state->wake(state->finished);
        }
    }
}

void Team::close() {
    if (!process_.is_this()) {  // whose threads are not there to be waited for
        new std::vector<std::thread>(std::move(threads_));
        return;
    }
    state_->closing = true;
    ++state_->generation;
    state_->generation.notify_all();
    // A thread of a broken team may never return; it holds its own reference to the state.
    for (std::thread& t : threads_) state_->broken ? t.detach() : t.join();
}

Team::~Team() { close(); }

void Team::check_process() const {
    if (!process_.is_this())
        throw StallError(
            "this process was forked from the one that has the model's threads; load the model in it again");
}

void Team::run(Job job) {
    check_process();
    Worker::State& s = *state_;
    const std::lock_guard turn(s.turn);
    if (s.broken) throw StallError("the team is broken by an earlier failure; load the model again");
    s.job = std::move(job);
    s.n_done = 0;
    const uint32_t generation = s.generation.fetch_add(1) + 1;
    s.wake(s.generation);
    {
        const Enlisted here(plan_[0].cpus[0]);
        s.work(*caller_);
        if (s.n_done.fetch_add(1) + 1 == s.n_workers) s.finished = generation;
        for (uint32_t done; (done = s.finished.load()) != generation;) s.sleep_while(s.finished, done);
    }
    if (s.broken) {  // a thread may still run the job: it, and what it holds, are left alone for good
        new std::shared_ptr<Worker::State>(state_);
        const std::lock_guard lock(s.mutex);
        std::rethrow_exception(s.error);
    }
    s.job = nullptr;
}

void Team::stall_next(size_t rank, size_t thread, double seconds) {
    std::lock_guard lock(state_->mutex);
    state_->stalls[{rank, thread}] = seconds;
    state_->has_stalls = true;
}

}  // namespace fourfold
