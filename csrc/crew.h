// Threads for one call at a time, where there is no team: they belong to nobody's memory and to no CPU.
//
// Inside another framework its own threads do our work: those of the OpenMP runtime that it computes with, entered as
// its compiled loops enter it. Everywhere else a few of ours do, which sleep between calls.
#pragma once
#include <cstddef>

namespace fourfold {

// A job is called once for each i < n, from whatever threads there are, some i perhaps only when others are done. It
// must not throw.
struct Job {
    void (*call)(void* self, size_t i);
    void* self;
    void operator()(size_t i) const { call(self, i); }
};
template <class F>
Job job_of(F& f) {
    return {[](void* self, size_t i) { (*static_cast<F*>(self))(i); }, &f};
}

class Crew {
  public:
    virtual ~Crew() = default;
    // Calls job(i) for every i < n, the caller job(0) and perhaps others, and returns when all are done. Callers take
    // turns. Threads compute with our arithmetic (arithmetic.h); the caller computes with its own.
    virtual void run(size_t n, Job job) = 0;
};

// Our own threads: as many as were ever asked for at once, one for each i, which look out for the next call for 2 ms
// and then sleep. Nobody waits for one that comes late, or that the system does not give: its i is called by the
// caller. A forked child starts its own.
Crew& own_crew();
// For tests: thread i of those, from 1 on, sleeps before it comes to the next call.
void stall_own_crew(size_t i, double seconds);

// The entry points of a loaded OpenMP runtime, by the names under which GCC's and LLVM's export them.
struct OpenMp {
    void (*parallel)(void (*)(void*), void*, unsigned n_threads, unsigned flags);  // GOMP_parallel
    int (*thread_num)();                                                           // omp_get_thread_num
    int (*num_threads)();                                                          // omp_get_num_threads
};

// Threads of another framework's OpenMP runtime: as many as it gives, which may be fewer than n.
class OpenMpCrew final : public Crew {
  public:
    explicit OpenMpCrew(OpenMp runtime) : runtime_(runtime) {}
    void run(size_t n, Job job) override;

  private:
    OpenMp runtime_;
};

}  // namespace fourfold
