#include "file_stream.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <mutex>
#include <system_error>

#include "memory.h"

namespace fourfold {

namespace {

using Seconds = std::chrono::duration<double>;
constexpr uint64_t kFolioBytes = uint64_t{4} << 20;  // more than a page of the cache, which is dropped whole or not

// Bytes that a thread wants at once.
struct Request {
    uint64_t offset;
    size_t bytes;
    uint8_t* to;
    bool done = false;
};

}  // namespace

struct FileStream::State {
    State(const std::string& path, double patience)
        : walked(path, POSIX_FADV_SEQUENTIAL), looked_up(path, POSIX_FADV_RANDOM), path(path), patience(patience) {}

    const ReadFile walked, looked_up;  // two, so that a look-up does not upset what is read ahead
    const std::string path;
    const Seconds patience;
    std::vector<Piece> pieces;
    size_t n_slots = 0, slot_bytes = 0, n_users = 0;
    NodeMemory ring;
    std::vector<std::atomic<size_t>> users_left;  // of each slot's piece
    std::atomic<uint64_t> n_read{0};              // pieces
    std::atomic<uint64_t> n_bytes{0}, n_looked_up{0};

    std::mutex mutex;                              // guards the rest
    std::condition_variable for_users, for_files;  // what users wait for; what the threads that read files wait for
    uint64_t n_released = 0;                       // pieces that every user has let go
    std::deque<std::shared_ptr<Request>> requests;
    bool closing = false;
    size_t n_running = 0;  // threads that read
    std::string error;

    uint8_t* slot(uint64_t i) const { return ring.as() + i % n_slots * slot_bytes; }

    // A reading thread's life; `work` goes on while it returns true.
    template <class F>
    void run(F work) {
        try {
            while (work()) continue;
        } catch (const std::exception& e) {
            give_up(e.what());
        }
        {
            const std::lock_guard lock(mutex);
            --n_running;
        }
        for_users.notify_all();
    }

    // False where the stream ends.
    template <class Ready>
    bool wait_for_work(std::unique_lock<std::mutex>& lock, Ready ready) {
        for_files.wait(lock, [&] { return closing || ready(); });
        return !closing;
    }

    bool read_piece(uint64_t i) {
        std::unique_lock lock(mutex);
        if (!wait_for_work(lock, [&] { return i < n_released + n_slots; })) return false;
        lock.unlock();
        const Piece& piece = pieces[i % pieces.size()];
        users_left[i % n_slots].store(n_users, std::memory_order_relaxed);
        walked.read(piece.offset, piece.bytes, slot(i), [&](size_t n) { n_bytes += n; });
        walked.drop(piece.offset - std::min(piece.offset, kFolioBytes), piece.offset + piece.bytes);
        lock.lock();
        n_read.store(i + 1, std::memory_order_release);
        lock.unlock();
        for_users.notify_all();
        return true;
    }

    bool answer_request() {
        std::unique_lock lock(mutex);
        if (!wait_for_work(lock, [&] { return !requests.empty(); })) return false;
        const std::shared_ptr<Request> request = std::move(requests.front());
        requests.pop_front();
        lock.unlock();
        looked_up.read(request->offset, request->bytes, request->to, [&](size_t n) { n_looked_up += n; });
        lock.lock();
        request->done = true;
        lock.unlock();
        for_users.notify_all();
        return true;
    }

    // Waits for what a reading thread brings. Throws DiskError where it fails or brings nothing for too long.
    template <class Ready>
    void wait(std::unique_lock<std::mutex>& lock, Ready ready) {
        // Only time that this thread was awake for counts: a process that was stopped for a minute has not stalled.
        const Seconds nap(0.1);
        Seconds waited{};
        for (uint64_t before = 0; !ready() && error.empty();) {
            if (for_users.wait_for(lock, nap) == std::cv_status::no_timeout) continue;
            const uint64_t now = n_bytes + n_looked_up;
            waited = now == before ? waited + nap : Seconds{};
            before = now;
            if (waited < patience) continue;
            char text[64];
            std::snprintf(text, sizeof text, " gave nothing for %.3g s; check the disk", patience.count());
            lock.unlock();
            give_up("the disk of " + path + text);
            lock.lock();
        }
        if (!ready()) throw DiskError(error);
    }

    void give_up(const std::string& why) {
        {
            const std::lock_guard lock(mutex);
            if (error.empty()) error = why;
            closing = true;
        }
        for_users.notify_all();
        for_files.notify_all();
    }
};

FileStream::FileStream(const std::string& path, double patience_seconds)
    : state_(std::make_shared<State>(path, patience_seconds)) {
    start_thread([](State& s) { return s.answer_request(); });
}

template <class F>
void FileStream::start_thread(F work) {
    const auto count = [this](size_t n) {
        const std::lock_guard lock(state_->mutex);
        state_->n_running += n;
    };
    count(1);
    try {
        threads_.emplace_back([state = state_, work]() mutable { state->run([&] { return work(*state); }); });
    } catch (const std::system_error& error) {
        count(size_t{0} - 1);
        throw DiskError("the system gives no thread to read " + state_->path + " with (" + error.code().message() +
                        "); raise this process's limit of threads");
    }
}

void FileStream::start(std::vector<Piece> pieces, size_t n_users) {
    State& s = *state_;
    s.pieces = std::move(pieces);
    s.n_users = n_users;
    for (const Piece& piece : s.pieces) s.slot_bytes = std::max(s.slot_bytes, (piece.bytes + 63) / 64 * 64);
    s.n_slots = std::clamp<size_t>(kRingBytes / s.slot_bytes, 2, s.pieces.size() + 1);
    s.ring = NodeMemory(s.n_slots * s.slot_bytes, kAnyNode);
    s.users_left = std::vector<std::atomic<size_t>>(s.n_slots);
    start_thread([i = uint64_t{0}](State& state) mutable { return state.read_piece(i++); });
}

FileStream::~FileStream() {
    if (!process_.is_this()) {  // forked: nobody reads here, or lets go of the mutex
        new std::vector<std::thread>(std::move(threads_));
        return;
    }
    std::unique_lock lock(state_->mutex);
    state_->closing = true;
    state_->for_files.notify_all();
    // One may hang in the kernel: then it is left alone, and keeps what it holds.
    const bool ended = state_->for_users.wait_for(lock, state_->patience, [&] { return state_->n_running == 0; });
    lock.unlock();
    for (std::thread& thread : threads_) ended ? thread.join() : thread.detach();
}

const uint8_t* FileStream::wait(uint64_t i) {
    State& s = *state_;
    const auto is_read = [&] { return s.n_read.load(std::memory_order_acquire) > i; };
    if (!is_read()) {
        std::unique_lock lock(s.mutex);
        s.wait(lock, is_read);
    }
    return s.slot(i);
}

void FileStream::release(uint64_t i) {
    State& s = *state_;
    if (s.users_left[i % s.n_slots].fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    {
        const std::lock_guard lock(s.mutex);
        s.n_released = i + 1;
    }
    s.for_files.notify_all();
}

void FileStream::read(uint64_t offset, size_t bytes, uint8_t* to) {
    State& s = *state_;
    const auto request = std::make_shared<Request>(Request{offset, bytes, to});
    std::unique_lock lock(s.mutex);
    s.requests.push_back(request);
    s.for_files.notify_all();
    s.wait(lock, [&] { return request->done; });
}

uint64_t FileStream::bytes_read() const { return state_->n_bytes; }

double measure_disk(const std::string& path, uint64_t offset, uint64_t bytes, double seconds) {
    const ReadFile file(path, POSIX_FADV_SEQUENTIAL);
    std::vector<uint8_t> piece(std::min<uint64_t>(bytes, kPieceBytes));
    file.drop(offset, offset + bytes);
    const auto begin = std::chrono::steady_clock::now();
    Seconds taken{};
    uint64_t done = 0;
    while (done < bytes && taken.count() < seconds) {
        const auto n = std::min<uint64_t>(bytes - done, piece.size());
        file.read(offset + done, n, piece.data(), [](size_t) {});
        done += n;
        file.drop(offset + done - std::min(offset + done, n + kFolioBytes), offset + done);
        taken = std::chrono::steady_clock::now() - begin;
    }
    return static_cast<double>(done) / taken.count();
}

}  // namespace fourfold
