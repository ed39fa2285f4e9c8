// What one thread did in a step, and when: marks in the order of time. A mark says what begins at its instant and lasts
// until the next, so that a thread's time is divided without gaps or overlaps, and adds up.
#pragma once
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

namespace fourfold {

enum class Phase : int32_t {
    work,  // the op's own arithmetic
    pack,  // a linear op bringing its activations into the kernel's form
    wait,  // at a barrier, for other threads
    end,   // of the step: the last mark
};
constexpr std::string_view kPhaseNames[] = {"work", "pack", "wait", "end"};

// As it is handed out: 16 bytes, no padding.
struct Mark {
    int64_t ns;  // of std::chrono::steady_clock
    int32_t op;  // index in the program; that of the last op at the end
    Phase phase;
};

// Belongs to one thread. Nothing is allocated while a step has at most as many marks as were reserved.
class alignas(64) Timeline {
  public:
    void reserve(size_t n_marks) { marks_.reserve(n_marks); }
    void clear() {
        marks_.clear();
        at_barrier_end_ = false;
    }
    const std::vector<Mark>& marks() const { return marks_; }

    // The op begins, with its arithmetic; where a barrier has just been left, at that instant.
    void enter(int32_t op) {
        op_ = op;
        if (at_barrier_end_)
            marks_.back().op = op;
        else
            add(Phase::work);
        at_barrier_end_ = false;
    }
    // What began at the last mark is this.
    void begins_as(Phase phase) { marks_.back().phase = phase; }
    void enter_barrier() {
        at_barrier_end_ = false;
        add(Phase::wait);
    }
    // The op goes on with its arithmetic.
    void leave_barrier() {
        add(Phase::work);
        at_barrier_end_ = true;
    }
    void end() {
        if (at_barrier_end_)
            marks_.back().phase = Phase::end;
        else
            add(Phase::end);
    }

  private:
    void add(Phase phase) {
        marks_.push_back({std::chrono::steady_clock::now().time_since_epoch().count(), op_, phase});
    }
    std::vector<Mark> marks_;
    int32_t op_ = 0;
    bool at_barrier_end_ = false;
};

}  // namespace fourfold
