// The ops whose weights stay in their file: the same arithmetic, on panels as the disk brings them.
#pragma once
#include <utility>
#include <vector>

#include "file_stream.h"
#include "ops.h"

namespace fourfold {

// A linear of which one weight or more is in the file. Threads take the file's pieces together, in order, and divide
// each one's panels; the parts in memory come first, while the disk reads on.
struct StreamedLinearOp final : LinearOp {
    // A piece that the stream reads: whole panels of a part's matrix, as all ranks hold it together.
    struct Piece {
        size_t part, first_panel, n_panels;
    };
    std::vector<Piece> pieces;
    size_t first_piece;  // among a step's
    StreamedLinearOp(Program::LinearInput input, std::vector<Program::LinearPart> parts, Program::LinearSum sum,
                     bool is_partial, std::vector<Piece> pieces, size_t first_piece)
        : LinearOp(std::move(input), std::move(parts), std::move(sum), is_partial, false),
          pieces(std::move(pieces)),
          first_piece(first_piece) {}
    void run(Program&, Worker&, const Step&) const override;
    bool is_in_memory() const override { return false; }
    std::span<const uint8_t> first_read(Program&, const Worker&) const override { return {}; }

  private:
    void multiply_piece(Program&, const Worker&, const Step&, const Packed&, const Piece&, const uint8_t* bytes) const;
};

// An embedding in the file: of each token, the panel that holds its row.
struct StreamedEmbedOp final : Op {
    int weight, dst;
    float scale;
    StreamedEmbedOp(int weight, float scale, int dst) : weight(weight), dst(dst), scale(scale) {}
    void run(Program&, Worker&, const Step&) const override;
    std::string name() const override { return "embed"; }
};

}  // namespace fourfold
