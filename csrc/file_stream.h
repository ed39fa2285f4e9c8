// Weights that do not fit in memory: pieces of a file that threads walk in order, round after round (a round is a
// step), read ahead of them into a ring of slots.
//
// One thread reads, strictly in the walk's order: disks, and what lies between them and us, read ahead where reading is
// sequential. It goes through the page cache with plain reads and drops what it has copied, so that the cache holds
// nothing twice and the same pages serve again. Never through a mapping: a file that shrinks under a mapping ends the
// process, under a read it is an error.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "team.h"

namespace fourfold {

// The file could not be read, changed, or gave nothing for too long. Threads end as they do in any stall.
struct DiskError : StallError {
    using StallError::StallError;
};

constexpr size_t kPieceBytes = size_t{4} << 20;   // a piece is at most this, or one panel
constexpr size_t kRingBytes = size_t{256} << 20;  // ahead of the walk: 0.1 s of a fast disk, while no thread waits

class FileStream {
  public:
    struct Piece {
        uint64_t offset;  // in the file
        size_t bytes;
    };

    // Opens the file for reading; nothing is read yet. Throws DiskError where it cannot be opened. A read that brings
    // nothing for `patience_seconds` while a thread waits for it is given up.
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

    // Bytes of the file at once, for a few that no piece holds. Throws DiskError.
    void read(uint64_t offset, size_t bytes, uint8_t* to) const;

    uint64_t bytes_read() const;  // of pieces, since the start

  private:
    struct State;
    std::shared_ptr<State> state_;  // the reader holds it too: one that never returns outlives the stream unharmed
    std::thread reader_;
};

// Bytes a second at which a disk gives [offset, offset + bytes) of a file in order, none of it cached before, none
// after; it stops after so many seconds. Throws DiskError.
double measure_disk(const std::string& path, uint64_t offset, uint64_t bytes, double seconds);

}  // namespace fourfold
