// The CPUs that a thread may run on, on machines of any size.
#pragma once
#include <pthread.h>
#include <sched.h>

#include <array>
#include <optional>

namespace fourfold {

// As cpu_set_t, which ends at 1,024 and which kernels with more CPUs than that do not fill at all; this has as many as
// Linux can be built for.
class CpuSet {
  public:
    // Nothing where there can be no such CPU.
    static CpuSet only(int cpu) {
        CpuSet set;
        CPU_SET_S(cpu, sizeof set.words_, set.as_theirs());
        return set;
    }
    // Of the calling thread; none where the system does not tell.
    static std::optional<CpuSet> of_this_thread() {
        CpuSet set;
        if (pthread_getaffinity_np(pthread_self(), sizeof set.words_, set.as_theirs()) != 0) return std::nullopt;
        return set;
    }
    // Whether the system lets the thread run there, and nowhere else.
    bool bind(pthread_t thread) const {
        return pthread_setaffinity_np(thread, sizeof words_, reinterpret_cast<const cpu_set_t*>(words_.data())) == 0;
    }
    bool operator==(const CpuSet&) const = default;

  private:
    cpu_set_t* as_theirs() { return reinterpret_cast<cpu_set_t*>(words_.data()); }
    std::array<__cpu_mask, 8192 / __NCPUBITS> words_{};
};

}  // namespace fourfold
