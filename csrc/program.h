// A model as a short list of ops over named activations and weights, walked by every thread of every rank in lock-step.
//
// Built once (the add_* calls, in order), then run with step(): one call a step, nothing allocated in it. Activations
// are float32; `x` of every rank is its own copy, so that no thread reads another node's memory but in `reduce` and
// `embed`, and a row of a rotary table in `cache`. Rows are tokens, of any mix of sequences, never padded.
#pragma once
#include <algorithm>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "file_stream.h"
#include "kernels/kernels.h"
#include "memory.h"
#include "team.h"
#include "weight.h"

namespace fourfold {

// The rows of one sequence in a step; they are contiguous.
struct SequenceRows {
    int32_t slot;               // which LFA state is its own
    int32_t start;              // position of its first row
    int32_t row_begin, n_rows;  // among the step's rows
    const int32_t* pages;       // page table: position p lies in KV page pages[p / kPage]
};

// Rows of one sequence that one attention item takes together.
struct RowBlock {
    size_t sequence, row, n_rows;
};

struct Step {
    std::span<const int32_t> tokens;  // (M)
    std::span<const SequenceRows> sequences;
    std::span<const int32_t> output_rows;  // (L), rows whose logits are wanted
    float* logits;                         // (L, logits_stride)
    size_t logits_stride;
    RowClass tokens_class, outputs_class;  // of the kernels for tokens' rows, attention's too, and for output rows
    // Made by Program::step.
    std::span<const int32_t> row_sequence, row_position;  // (M)
    std::span<const RowBlock> blocks;
    uint64_t first_piece;  // of the file, where weights stay there
    size_t n_tokens() const { return tokens.size(); }
};

// An activation: per rank, `rows` rows of that rank's width, each row at a multiple of 64 bytes.
struct Buffer {
    std::vector<size_t> width;   // per rank
    std::vector<size_t> stride;  // per rank, floats
    std::vector<NodeMemory> memory;
    bool of_outputs;  // rows are the step's output rows, not its tokens
    float* row(size_t rank, size_t m) const { return memory[rank].as<float>() + m * stride[rank]; }
};

// Each rank's part of a norm's weights or of a bias, on its node.
struct Vectors {
    std::vector<NodeMemory> memory;
    std::vector<size_t> width;  // floats
    bool empty() const { return memory.empty(); }
    std::span<const float> operator[](size_t rank) const { return {memory[rank].as<const float>(), width[rank]}; }
};

// Angles of a rotary embedding, of the first `dim` of a head's dimensions; the others stay as they are.
struct RotaryTable {
    std::vector<float> cosines, sines;  // (context, dim / 2) each, on no node in particular
    size_t dim;
};

class Op;

struct ProgramOptions {
    size_t max_tokens;  // rows a step
    size_t n_slots;     // sequences at a time
    size_t context;     // positions a sequence
    size_t n_pages;     // KV pages in all
    size_t head_dim;
    KvFormat kv;
    Isa isa;
    // Force a linear kernel by name wherever its format is read, an attention kernel everywhere; empty: the table
    // chooses.
    std::string kernel, attend;
};

class Program : public std::enable_shared_from_this<Program> {
  public:
    Program(std::shared_ptr<Team> team, ProgramOptions options);
    ~Program();
    Program(const Program&) = delete;
    Program& operator=(const Program&) = delete;

    int add_buffer(std::vector<size_t> width, bool of_outputs);
    int add_weight(std::shared_ptr<Weight> weight);
    // Where the panels of weights that are not in memory lie. Throws DiskError where the file cannot be opened.
    void read_from(const std::string& path, double patience_seconds);
    // A table that add_cache may name.
    int add_rotary(RotaryTable table);

    // Each rank's part, copied to its node, as the add_* below take it; nothing from nothing.
    Vectors place(const std::vector<std::span<const float>>& parts) const;

    // dst = scale * row `token` of the weight (which is cut by outputs over the ranks).
    void add_embed(int weight, float scale, int dst);
    void add_norm(int src, Vectors w, float eps, int dst);
    // dst = base + the norm of src.
    void add_normed(int base, int src, Vectors w, float eps, int dst);
    struct LinearPart {
        int weight, dst;
        Vectors bias;  // empty: none
    };
    // What is multiplied: rows of src; with a norm's weights, their norm; with `up`, gate(src) * up. Made while the
    // rows are brought into the kernel's form, so that it takes no pass and no barrier of its own, or by the linear op
    // before, whose outputs they are.
    static constexpr int kNone = -1;
    struct LinearInput {
        int src;
        Vectors norm = {};  // empty: none
        float eps = 0;
        int up = kNone;
        Gate gate = Gate::silu;
    };
    // What is done with the outputs of the only part, where one rank has all inputs: dst = base + outputs + bias.
    struct LinearSum {
        int base = kNone, dst = kNone;
        Vectors bias = {};
    };
    // dst = input W^T + bias for each part, the input read once. dst may be kLogits: the ranks' outputs side by side.
    // With a sum, dst is not written. `is_for_next`: the next op is a linear whose input is gate(first) * second of the
    // outputs, and nobody else reads them: they may never be written.
    static constexpr int kLogits = -2;
    void add_linear(LinearInput input, std::vector<LinearPart> parts, LinearSum sum, bool is_for_next);
    // dst = base + sum over ranks of partial + bias, in rank order: the same bits on every rank. base may be kNone.
    void add_reduce(int partial, int base, Vectors bias, int dst);
    // Weights (head_dim) of the norms that every head of q and of k goes through before it is rotated.
    struct HeadNorms {
        Vectors q = {}, k = {};  // empty: none
        float eps = 0;
    };
    // Norms and rotates q and k by their positions; writes k and v to the layer's cache.
    void add_cache(int layer, int q, int k, int v, int rotary, HeadNorms norms);
    static constexpr size_t kSeesAll = std::numeric_limits<size_t>::max();
    // dst = softmax attention of q over the layer's cache, scores times `scale`. Query head h of a rank reads its KV
    // head kv_of_head[rank][h], and sees `window` positions, the last of which is its own.
    void add_attend(int layer, int q, std::vector<std::vector<int>> kv_of_head, float scale, size_t window, int dst);
    void add_gated(int src, int up, Gate gate, int dst);  // gate(src) * up
    // dst = [src of the token before | src]; the first token of a sequence has zeros before it. The last kKeptRows rows
    // of a sequence are kept with its slot, so that it may go back by fewer; a full page's last row is kept with the
    // page, where whoever goes on from that page finds it.
    void add_with_previous(int src, int dst);
    static constexpr size_t kKeptRows = 16;
    void add_select(int src, int dst);  // the step's output rows
    // Allocates caches and scratch; the program is then complete. Throws std::invalid_argument where the forced kernel
    // reads a format that no weight has.
    void finish();

    // One step; callers take turns. They have checked sizes: rows <= max_tokens, positions < context, ids in range.
    void step(const Step& step);

    // Whether later steps record what each thread does; what was recorded before is forgotten.
    void record(bool wanted);
    // The thread's marks in the last recorded step; none before it. Not during a step.
    const std::vector<Mark>& marks(size_t rank, size_t thread) const;

    size_t kv_bytes() const;           // of all ranks' caches
    uint64_t disk_bytes_read() const;  // weights, since the program was finished
    // Everything the ranks hold: weights (with their scales), vectors, activations (packed too), scratch, kv, state.
    MemoryMap memory_map() const;
    // Kernels that M tokens of a class would run: linear ones by weight format, and that of "attention", if there is
    // any.
    std::map<std::string, std::string> kernels(size_t m, RowClass row_class) const;
    std::vector<std::string> op_names() const;

    // Positions that attention takes as one piece, whatever the threads and the other sequences: a multiple of the 256
    // that tiles take together, and at most kMostChunks pieces of the context.
    static constexpr size_t kLeastChunk = 256, kMostChunks = 32;
    static size_t attend_chunk(size_t context) {
        const size_t least = kLeastChunk * kMostChunks;
        return kLeastChunk * std::max<size_t>(1, (context + least - 1) / least);
    }
    // Fewer items a thread than this, and attention divides their chunks instead.
    static constexpr size_t kSplitItems = 2;
    // Bytes of a rank for the chunks of divided items, of a thread for everything it needs, and for the chunks of an
    // item.
    static size_t attend_shared_bytes(size_t threads, size_t context, size_t head_dim) {
        return threads * kSplitItems * attend_item_bytes(context, head_dim);
    }
    static size_t scratch_bytes(size_t widest_inputs, size_t context, size_t head_dim) {
        return 2 * kSumBytes +
               std::max({kLinearScratchBytes, tiles_of(widest_inputs) * kTileK * sizeof(float),
                         attend_scratch_floats(head_dim) * sizeof(float) + attend_item_bytes(context, head_dim)});
    }
    // Of sums that a thread keeps in its cache until it has added, or gated and packed, them: 512 rows of 256 outputs.
    static constexpr size_t kSumBytes = 512 * 1024;
    static size_t attend_item_bytes(size_t context, size_t head_dim) {
        const size_t chunk = attend_chunk(context), n_chunks = (context + chunk - 1) / chunk;
        return n_chunks * kAttendQueries * attend_partial_floats(head_dim) * sizeof(float);
    }

    struct Cache {  // of one layer, per rank
        std::vector<NodeMemory> pages;
        std::vector<KvRuns> runs;
    };

  private:
    friend struct Ops;
    void add_streamed_linear(LinearInput input, std::vector<LinearPart> parts, LinearSum sum, bool partial);
    const LinearKernel& kernel(Format format, size_t m, RowClass row_class) const;
    const AttendKernel& attend_kernel(size_t m, RowClass row_class) const;
    void link_linears();                          // tells each what is read after it, and who packs for whom
    void walk(Worker& worker, const Step& step);  // one thread's part

    std::shared_ptr<Team> team_;
    const ProgramOptions options_;
    const RowKernels& rows_;
    const LinearKernel* const forced_;
    const AttendKernel* const forced_attend_;
    std::mutex turn_;  // held by the caller of step
    std::vector<Buffer> buffers_;
    std::vector<std::shared_ptr<Weight>> weights_;
    std::vector<RotaryTable> rotaries_;
    std::vector<Cache> caches_;
    std::vector<std::unique_ptr<Op>> ops_;
    std::vector<NodeMemory> packed_, packed_next_;  // per rank: activations as this linear and the next want them
    std::vector<std::vector<NodeMemory>> scratch_;  // per rank and thread
    const size_t attend_chunk_;                     // positions
    std::vector<NodeMemory> partials_;              // per rank: of attention that threads share
    std::vector<std::vector<Timeline>> timelines_;  // per rank and thread
    bool recording_ = false;
    std::vector<int32_t> row_sequence_, row_position_;
    std::vector<RowBlock> blocks_;
    size_t packed_bytes_ = 0;
    bool packs_ahead_ = false;  // some linear is for the next
    // Of weights that stay in their file; empty where all are in memory.
    std::unique_ptr<FileStream> stream_;
    std::vector<FileStream::Piece> pieces_;          // of a step, in the order of the walk
    std::vector<std::vector<NodeMemory>> gathered_;  // per rank and thread: the widest such weight's panel
    uint64_t n_steps_ = 0;
};

// One step of the walk. run() is called by every thread; a barrier of its kind follows it.
class Op {
  public:
    virtual ~Op() = default;
    virtual void run(Program& p, Worker& worker, const Step& step) const = 0;
    virtual std::string name() const = 0;
    virtual bool ends_globally() const { return false; }  // other ranks read what this op wrote
    virtual void list_own(MemoryMap&) const {}            // what the op itself holds
};

}  // namespace fourfold
