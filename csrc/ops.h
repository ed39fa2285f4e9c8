// The ops of a program (program.h says what each computes): how work is divided over the threads of a rank.
#pragma once
#include <string>
#include <utility>
#include <vector>

#include "program.h"

namespace fourfold {

// What ops may touch of a program.
struct Ops {
    static Buffer& buffer(Program& p, int i) { return p.buffers_[static_cast<size_t>(i)]; }
    static Weight& weight(Program& p, int i) { return *p.weights_[static_cast<size_t>(i)]; }
    static const RowKernels& rows(const Program& p) { return p.rows_; }
    static const ProgramOptions& options(const Program& p) { return p.options_; }
    static const LinearKernel& kernel(const Program& p, Format f, size_t m, RowClass c) { return p.kernel(f, m, c); }
    static const AttendKernel& attend_kernel(const Program& p, size_t m, RowClass c) { return p.attend_kernel(m, c); }
    static uint8_t* packed(Program& p, size_t rank) { return p.packed_[rank].as(); }
    static uint8_t* packed_next(Program& p, size_t rank) { return p.packed_next_[rank].as(); }
    static FileStream& stream(Program& p) { return *p.stream_; }
    static uint8_t* gathered(Program& p, const Worker& w) { return p.gathered_[w.rank][w.thread].as(); }
    // Sums of the first or second of two parts: kSumBytes that a thread has for itself.
    static float* sums(Program& p, const Worker& w, size_t part) {
        return reinterpret_cast<float*>(p.scratch_[w.rank][w.thread].as() + part * Program::kSumBytes);
    }
    static uint8_t* scratch(Program& p, const Worker& w) {
        return p.scratch_[w.rank][w.thread].as() + 2 * Program::kSumBytes;
    }
    static size_t attend_chunk(const Program& p) { return p.attend_chunk_; }
    static float* partials(Program& p, size_t rank) { return p.partials_[rank].as<float>(); }
    static Program::Cache& cache(Program& p, int layer) { return p.caches_[static_cast<size_t>(layer)]; }
    static const RotaryTable& rotary(const Program& p, int i) { return p.rotaries_[static_cast<size_t>(i)]; }
    static size_t n_rows(const Buffer& b, const Step& s) { return b.of_outputs ? s.output_rows.size() : s.n_tokens(); }
    static RowClass row_class(const Buffer& b, const Step& s) {
        return b.of_outputs ? s.outputs_class : s.tokens_class;
    }
};

struct EmbedOp final : Op {
    int weight, dst;
    float scale;
    EmbedOp(int weight, float scale, int dst) : weight(weight), dst(dst), scale(scale) {}
    void run(Program&, Worker&, const Step&) const override;
    std::string name() const override { return "embed"; }
};

struct NormOp final : Op {
    int src, dst;
    Vectors w;
    float eps;
    NormOp(int src, Vectors w, float eps, int dst) : src(src), dst(dst), w(std::move(w)), eps(eps) {}
    void run(Program&, Worker&, const Step&) const override;
    std::string name() const override { return "norm"; }
    void list_own(MemoryMap& map) const override { list_memory(map, "vectors", w.memory); }
};

struct NormedOp final : Op {
    int base, src, dst;
    Vectors w;
    float eps;
    NormedOp(int base, int src, Vectors w, float eps, int dst)
        : base(base), src(src), dst(dst), w(std::move(w)), eps(eps) {}
    void run(Program&, Worker&, const Step&) const override;
    std::string name() const override { return "normed"; }
    void list_own(MemoryMap& map) const override { list_memory(map, "vectors", w.memory); }
};

struct LinearOp : Op {
    Program::LinearInput input;
    std::vector<Program::LinearPart> parts;
    Program::LinearSum sum;
    bool is_partial;                 // its inputs are cut over ranks: a reduction follows
    bool is_for_next;                // only the op after it reads its outputs, as gate and up of its input
    const LinearOp* next = nullptr;  // whose weights are read after these; after the last, the first of the next step
    // Of two linears in a row, the one that packs gate(first) * second for the other while they lie in the cache.
    const LinearOp* packs_for = nullptr;
    bool is_packed = false;  // its input is, by the op before
    LinearOp(Program::LinearInput input, std::vector<Program::LinearPart> parts, Program::LinearSum sum,
             bool is_partial, bool is_for_next)
        : input(std::move(input)),
          parts(std::move(parts)),
          sum(std::move(sum)),
          is_partial(is_partial),
          is_for_next(is_for_next) {}
    void run(Program&, Worker&, const Step&) const override;
    virtual bool is_in_memory() const { return true; }
    // The first panels that this thread reads; none where they are in no memory.
    virtual std::span<const uint8_t> first_read(Program&, const Worker&) const;
    // Whether its input is gate(first) * second of that linear's two outputs.
    bool gates(const LinearOp& first) const {
        return first.parts.size() == 2 && input.src == first.parts[0].dst && input.up == first.parts[1].dst;
    }
    // Whether the op after it may have its input packed by this one: both weights are in memory, and no thread gets
    // more than a sixteenth more to do where outputs are divided in whole tiles of inputs.
    bool may_pack_for(Program&, const LinearOp& other, const std::vector<RankPlan>&) const;
    std::string name() const override { return "linear"; }
    bool ends_globally() const override { return is_partial; }
    void list_own(MemoryMap& map) const override {
        list_memory(map, "vectors", input.norm.memory);
        for (const auto& part : parts) list_memory(map, "vectors", part.bias.memory);
        list_memory(map, "vectors", sum.bias.memory);
    }

  protected:
    struct Packed {
        const LinearKernel& kernel;
        const uint8_t* x;  // a rank's activations as the kernel wants them
        size_t m;          // rows
    };
    // Packs m rows, at least one; all threads of the rank do it together.
    Packed pack(Program&, Worker&, const Step&, size_t m) const;
    // Panels [b, e) of the rank's slice of a part, the first of which lies at `panels`, then their bias and sum. `then`
    // is what this thread reads after them, null where that is not known.
    void multiply(Program&, const Worker&, const Step&, const Packed&, const Program::LinearPart&,
                  const uint8_t* panels, size_t b, size_t e, const uint8_t* then) const;
    // A rank that holds none of a part's inputs still adds its zeros.
    void add_zeros(Program&, const Worker&, const Program::LinearPart&, size_t m) const;

  private:
    struct Outputs {
        float* first;  // of the panels' outputs, in the first of the rows
        size_t stride;
    };
    const LinearKernel& kernel(Program&, const Step&, size_t m) const;
    size_t input_tiles(Program&, size_t rank) const;
    // Calls f(part, its panels [begin, end) that are this thread's, where they lie) for every part, also where it has
    // none.
    template <class F>
    void each_share(Program&, const Worker&, F f) const;
    // This thread's panels of gate, and of up: whole tiles of the next linear's inputs.
    static std::pair<size_t, size_t> gated_share(const Worker&, size_t n_panels);
    // This thread's share of the input, in the form that the kernel reads: one row by tiles, many rows by rows.
    void pack_share(Program&, const Worker&, Activation, size_t m, size_t k_tiles) const;
    // This thread's panels of every part; `after` is what it reads after them.
    void multiply_shares(Program&, const Worker&, const Step&, const Packed&, const uint8_t* after) const;
    // The same of gate and up, and the gated products packed for the next linear, a piece at a time.
    void multiply_gated(Program&, const Worker&, const Step&, const Packed&, const uint8_t* after) const;
    // Rows [m0, m0 + rows) times panels [b, e), plus the part's bias.
    void run_kernel(Program&, const Worker&, const Packed&, const Program::LinearPart&, const uint8_t* panels, size_t b,
                    size_t e, size_t m0, size_t rows, Outputs y, const uint8_t* then) const;
};

struct ReduceOp final : Op {
    int partial, base, dst;
    Vectors bias;
    ReduceOp(int partial, int base, Vectors bias, int dst)
        : partial(partial), base(base), dst(dst), bias(std::move(bias)) {}
    void run(Program&, Worker&, const Step&) const override;
    std::string name() const override { return "reduce"; }
    void list_own(MemoryMap& map) const override { list_memory(map, "vectors", bias.memory); }
};

struct CacheOp final : Op {
    int layer, q, k, v, rotary;
    Program::HeadNorms norms;
    CacheOp(int layer, int q, int k, int v, int rotary, Program::HeadNorms norms)
        : layer(layer), q(q), k(k), v(v), rotary(rotary), norms(std::move(norms)) {}
    void run(Program&, Worker&, const Step&) const override;
    std::string name() const override { return "cache"; }
    void list_own(MemoryMap& map) const override {
        list_memory(map, "vectors", norms.q.memory);
        list_memory(map, "vectors", norms.k.memory);
    }
};

struct AttendOp final : Op {
    int layer, q, dst;
    // Per rank: runs of query heads (first, count) that share a KV head, count <= kAttendQueries.
    struct Group {
        size_t head, count, kv_head;
    };
    std::vector<std::vector<Group>> groups;
    float scale;    // of the scores
    size_t window;  // positions that a query sees, its own the last of them
    AttendOp(int layer, int q, std::vector<std::vector<int>> kv_of_head, float scale, size_t window, int dst);
    void run(Program&, Worker&, const Step&) const override;
    std::string name() const override { return "attend"; }
};

struct GatedOp final : Op {
    int src, up, dst;
    Gate gate;
    GatedOp(int src, int up, Gate gate, int dst) : src(src), up(up), dst(dst), gate(gate) {}
    void run(Program&, Worker&, const Step&) const override;
    std::string name() const override { return "gated"; }
};

struct WithPreviousOp final : Op {
    int src, dst;
    std::vector<NodeMemory> of_slots;  // per rank: (n_slots, kKeptRows, width), position p's row at p % kKeptRows
    std::vector<NodeMemory> of_pages;  // per rank: (n_pages, width), the row of the page's last position
    WithPreviousOp(int src, int dst, std::vector<NodeMemory> of_slots, std::vector<NodeMemory> of_pages)
        : src(src), dst(dst), of_slots(std::move(of_slots)), of_pages(std::move(of_pages)) {}
    void run(Program&, Worker&, const Step&) const override;
    std::string name() const override { return "with_previous"; }
    void list_own(MemoryMap& map) const override {
        list_memory(map, "state", of_slots);
        list_memory(map, "state", of_pages);
    }
};

struct SelectOp final : Op {
    int src, dst;
    SelectOp(int src, int dst) : src(src), dst(dst) {}
    void run(Program&, Worker&, const Step&) const override;
    std::string name() const override { return "select"; }
};

}  // namespace fourfold
