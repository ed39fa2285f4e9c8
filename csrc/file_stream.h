// Weights that do not fit in memory: pieces of a file that threads walk in order, round after round (a round is a
// step), read ahead of them into a ring of slots.
//
// One thread reads them, strictly in the walk's order: disks, and what lies between them and us, read ahead where
// reading is sequential; another looks up what is wanted out of order. No user ever waits in the kernel for a disk.
// Reading goes through the page cache with plain reads and drops what it has copied, so that the cache holds nothing
// twice and the same pages serve again.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "read_file.h"

namespace fourfold {

constexpr size_t kPieceBytes = size_t{4} << 20;   // a piece is at most this, or one panel
constexpr size_t kRingBytes = size_t{256} << 20;  // ahead of the walk: 0.1 s of a fast disk, while no thread waits

class FileStream {
  public:
    struct Piece {
        uint64_t offset;  // in the file
        size_t bytes;
    };

    // Opens the file; nothing is read yet. Throws DiskError where it cannot be opened, or where the system gives no
    // thread to read it with, as `start` does. Where a thread waits and nothing is read for `patience_seconds`, the
    // stream is given up.
    FileStream(const std::string& path, double patience_seconds);
    ~FileStream();
    FileStream(const FileStream&) = delete;
    FileStream& operator=(const FileStream&) = delete;

    // Begins to read the pieces (at least one), in order, again and again. Each of n_users threads takes every piece.
    void start(std::vector<Piece> pieces, size_t n_users);

    // Bytes of piece i, counted from the first round on: piece i % n_pieces of round i / n_pieces. They stay until
    // every user has released i; a user takes pieces in order. Throws DiskError.
    const uint8_t* wait(uint64_t i);
    void release(uint64_t i);

    // Waits for bytes of the file that no piece holds, a few. Throws DiskError; `to` may then still be written to.
    void read(uint64_t offset, size_t bytes, uint8_t* to);

    uint64_t bytes_read() const;  // of pieces, since the start

  private:
    struct State;
    template <class F>
    void start_thread(F work);  // work(state) until it returns false
    const Process process_;
    std::shared_ptr<State> state_;  // the threads hold it too: one that never returns outlives the stream unharmed
    std::vector<std::thread> threads_;
};

// Bytes a second at which a disk gives [offset, offset + bytes) of a file in order, none of it cached before, none
// after; it stops after so many seconds. Throws DiskError.
double measure_disk(const std::string& path, uint64_t offset, uint64_t bytes, double seconds);

}  // namespace fourfold
