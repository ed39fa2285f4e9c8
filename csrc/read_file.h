// A file of weights, ours or a checkpoint's, read and never mapped: a file that shrinks under a mapping, or a disk that
// fails under one, ends the process; under a read it is an error.
#pragma once
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <string>

#include "team.h"

namespace fourfold {

// The file could not be read, changed, or gave nothing for too long. Threads end as they do in any stall.
struct DiskError : StallError {
    using StallError::StallError;
};

// An open file that tells when it is no longer what it was. Threads may read at once: offsets belong to the callers.
class ReadFile {
  public:
    ReadFile(const std::string& path, int advice) : path_(path), fd_(open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
        if (fd_ < 0 || fstat(fd_, &opened_) != 0) {
            const int error = errno;
            if (fd_ >= 0) close(fd_);
            fail(error);
        }
        posix_fadvise(fd_, 0, 0, advice);
    }
    ~ReadFile() { close(fd_); }
    ReadFile(const ReadFile&) = delete;
    ReadFile& operator=(const ReadFile&) = delete;

    // All of [offset, offset + bytes); `arrived(n)` is called as they come.
    template <class F>
    void read(uint64_t offset, size_t bytes, uint8_t* to, F arrived) const {
        read_on(offset, bytes, to, arrived);
        check_unchanged();
    }

    void read(uint64_t offset, size_t bytes, uint8_t* to) const {
        read(offset, bytes, to, [](size_t) {});
    }

    // Runs of `bytes` each whose begins lie `stride` apart, one behind another at `to`.
    void read_runs(uint64_t offset, uint64_t stride, size_t n_runs, size_t bytes, uint8_t* to) const {
        for (size_t i = 0; i < n_runs; ++i) read_on(offset + i * stride, bytes, to + i * bytes, [](size_t) {});
        check_unchanged();
    }

    // What has been read so far, by all threads.
    uint64_t bytes_read() const { return n_read_; }

    // From now on reads end in a DiskError: those under way as soon as the disk lets go of them.
    void stop() { is_stopped_ = true; }

    const struct stat& opened() const { return opened_; }

    // The disk is asked for [begin, begin + bytes) before it is read.
    void ask(uint64_t begin, size_t bytes) const {
        posix_fadvise(fd_, static_cast<off_t>(begin), static_cast<off_t>(bytes), POSIX_FADV_WILLNEED);
    }

    // The page cache forgets [begin, end), as far as it is not needed by others.
    void drop(uint64_t begin, uint64_t end) const {
        posix_fadvise(fd_, static_cast<off_t>(begin), static_cast<off_t>(end - begin), POSIX_FADV_DONTNEED);
    }

  private:
    template <class F>
    void read_on(uint64_t offset, size_t bytes, uint8_t* to, F arrived) const {
        while (bytes) {
            if (is_stopped_) throw DiskError("reading " + path_ + " was given up");
            const ssize_t got = pread(fd_, to, std::min(bytes, kReadBytes), static_cast<off_t>(offset));
            if (got < 0 && errno == EINTR) continue;
            if (got < 0) fail(errno);
            if (got == 0) changed();
            offset += static_cast<uint64_t>(got);
            to += got;
            bytes -= static_cast<size_t>(got);
            n_read_ += static_cast<uint64_t>(got);
            arrived(static_cast<size_t>(got));
        }
    }
    void check_unchanged() const {
        struct stat now;
        if (fstat(fd_, &now) != 0) fail(errno);
        if (now.st_size != opened_.st_size || now.st_mtim.tv_sec != opened_.st_mtim.tv_sec ||
            now.st_mtim.tv_nsec != opened_.st_mtim.tv_nsec)
            changed();
    }
    static constexpr size_t kReadBytes = size_t{1} << 20;  // at a time: it stays in L2 between copy and drop

    [[noreturn]] void fail(int error) const {
        throw DiskError(path_ + " could not be read (" + std::strerror(error) + "); check the disk");
    }
    [[noreturn]] void changed() const {
        throw DiskError(path_ + " was changed while weights were being read from it; begin again");
    }
    std::string path_;
    int fd_;
    struct stat opened_{};
    mutable std::atomic<uint64_t> n_read_{0};
    std::atomic<bool> is_stopped_{false};
};

}  // namespace fourfold
