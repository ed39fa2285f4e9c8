#include "program.h"

#include <algorithm>
#include <set>
#include <stdexcept>

#include "ops.h"
#include "ops_streamed.h"

namespace fourfold {

namespace {
// The row of a table that is forced by name, or null where none is. Throws std::invalid_argument where there is no such
// row, or its ISA is above `isa`.
template <class Row>
const Row* forced(const Row* (*find)(std::string_view), const std::string& name, Isa isa) {
    if (name.empty()) return nullptr;
    const Row* row = find(name);
    if (!row) throw std::invalid_argument("there is no kernel named " + name);
    if (row->isa > isa) throw std::invalid_argument("kernel " + name + " needs " + std::string(to_string(row->isa)));
    return row;
}

constexpr size_t kBlockRows = 16;  // rows of a sequence that attention takes together
constexpr size_t kMarksAnOp = 8;   // more than any op makes: a phase and a barrier, a few times over
}  // namespace

Program::Program(std::shared_ptr<Team> team, ProgramOptions options)
    : team_(std::move(team)),
      options_(std::move(options)),
      rows_(row_kernels(options_.isa)),
      forced_(forced(find_linear, options_.kernel, options_.isa)),
      forced_attend_(forced(find_attend, options_.attend, options_.isa)),
      attend_chunk_(attend_chunk(options_.context)) {
    if (forced_attend_ && forced_attend_->format != options_.kv)
        throw std::invalid_argument("kernel " + options_.attend + " reads pages of another format");
    row_sequence_.resize(options_.max_tokens);
    row_position_.resize(options_.max_tokens);
    blocks_.reserve(options_.max_tokens);
}

Program::~Program() = default;

const LinearKernel& Program::kernel(Format format, size_t m, RowClass row_class) const {
    if (forced_ && forced_->format == format) return *forced_;
    return choose_linear(options_.isa, format, m, row_class);
}

const AttendKernel& Program::attend_kernel(size_t m, RowClass row_class) const {
    return forced_attend_ ? *forced_attend_ : choose_attend(options_.isa, options_.kv, m, row_class);
}

int Program::add_buffer(std::vector<size_t> width, bool of_outputs) {
    Buffer b{std::move(width), {}, {}, of_outputs};
    for (size_t r = 0; r < team_->n_ranks(); ++r) {
        b.stride.push_back((b.width[r] + 15) / 16 * 16);
        b.memory.emplace_back(options_.max_tokens * b.stride[r] * sizeof(float), team_->plan()[r].node);
    }
    buffers_.push_back(std::move(b));
    return static_cast<int>(buffers_.size()) - 1;
}

int Program::add_weight(std::shared_ptr<Weight> weight) {
    for (size_t r = 0; r < team_->n_ranks(); ++r)
        packed_bytes_ =
            std::max(packed_bytes_, most_packed_bytes(weight->format, options_.max_tokens, weight->slice(r).k_tiles));
    weights_.push_back(std::move(weight));
    return static_cast<int>(weights_.size()) - 1;
}

int Program::add_rotary(RotaryTable table) {
    rotaries_.push_back(std::move(table));
    return static_cast<int>(rotaries_.size()) - 1;
}

Vectors Program::place(const std::vector<std::span<const float>>& parts) const {
    Vectors placed;
    for (size_t r = 0; r < parts.size(); ++r) {
        const NodeMemory& memory = placed.memory.emplace_back(parts[r].size_bytes(), team_->plan().at(r).node);
        placed.width.push_back(parts[r].size());
        std::copy(parts[r].begin(), parts[r].end(), memory.as<float>());
    }
    return placed;
}

void Program::read_from(const std::string& path, double patience_seconds) {
    stream_ = std::make_unique<FileStream>(path, patience_seconds);
}

void Program::add_embed(int weight, float scale, int dst) {
    if (weights_[static_cast<size_t>(weight)]->is_in_memory())
        ops_.push_back(std::make_unique<EmbedOp>(weight, scale, dst));
    else
        ops_.push_back(std::make_unique<StreamedEmbedOp>(weight, scale, dst));
}

void Program::add_norm(int src, Vectors w, float eps, int dst) {
    ops_.push_back(std::make_unique<NormOp>(src, std::move(w), eps, dst));
}

void Program::add_normed(int base, int src, Vectors w, float eps, int dst) {
    ops_.push_back(std::make_unique<NormedOp>(base, src, std::move(w), eps, dst));
}

void Program::add_linear(LinearInput input, std::vector<LinearPart> parts, LinearSum sum, bool is_for_next) {
    bool partial = false, in_memory = true;
    packs_ahead_ |= is_for_next;
    for (const LinearPart& part : parts) {
        const Weight& w = *weights_[static_cast<size_t>(part.weight)];
        if (w.format != weights_[static_cast<size_t>(parts[0].weight)]->format)
            throw std::invalid_argument("the weights of one linear must have one format");
        partial |= w.inputs_are_cut();
        in_memory &= w.is_in_memory();
    }
    if (sum.dst != kNone && (partial || parts.size() != 1))
        throw std::invalid_argument(
            "a linear adds to another activation only where one rank has all inputs of one part");
    if (!in_memory) return add_streamed_linear(std::move(input), std::move(parts), std::move(sum), partial);
    ops_.push_back(
        std::make_unique<LinearOp>(std::move(input), std::move(parts), std::move(sum), partial, is_for_next));
}

void Program::add_streamed_linear(LinearInput input, std::vector<LinearPart> parts, LinearSum sum, bool partial) {
    const size_t first = pieces_.size();
    std::vector<StreamedLinearOp::Piece> pieces;
    for (size_t i = 0; i < parts.size(); ++i) {
        const Weight& w = *weights_[static_cast<size_t>(parts[i].weight)];
        if (w.is_in_memory()) continue;
        const size_t bytes = panel_bytes(w.format, tiles_of(w.k)), at_once = std::max<size_t>(1, kPieceBytes / bytes);
        for (size_t panel = 0; panel < panels_of(w.n); panel += at_once) {
            const size_t n = std::min(at_once, panels_of(w.n) - panel);
            pieces.push_back({i, panel, n});
            pieces_.push_back({*w.file_offset + panel * bytes, n * bytes});
        }
    }
    ops_.push_back(std::make_unique<StreamedLinearOp>(std::move(input), std::move(parts), std::move(sum), partial,
                                                      std::move(pieces), first));
}

void Program::add_reduce(int partial, int base, Vectors bias, int dst) {
    ops_.push_back(std::make_unique<ReduceOp>(partial, base, std::move(bias), dst));
}

void Program::add_cache(int layer, int q, int k, int v, int rotary, HeadNorms norms) {
    if (static_cast<size_t>(layer) != caches_.size()) throw std::invalid_argument("layers are added in order");
    Cache& cache = caches_.emplace_back();
    for (size_t r = 0; r < team_->n_ranks(); ++r)
        cache.runs.push_back({options_.n_pages, buffers_[static_cast<size_t>(k)].width[r] / options_.head_dim,
                              KvPage::bytes(options_.kv, options_.head_dim)});
    ops_.push_back(std::make_unique<CacheOp>(layer, q, k, v, rotary, std::move(norms)));
}

void Program::add_attend(int layer, int q, std::vector<std::vector<int>> kv_of_head, float scale, size_t window,
                         int dst) {
    if (window == 0) throw std::invalid_argument("a query sees its own position at least");
    ops_.push_back(std::make_unique<AttendOp>(layer, q, std::move(kv_of_head), scale, window, dst));
}

void Program::add_gated(int src, int up, Gate gate, int dst) {
    ops_.push_back(std::make_unique<GatedOp>(src, up, gate, dst));
}

void Program::add_with_previous(int src, int dst) {
    std::vector<NodeMemory> of_slots, of_pages;
    for (size_t r = 0; r < team_->n_ranks(); ++r) {
        const size_t row_bytes = buffers_[static_cast<size_t>(src)].width[r] * sizeof(float);
        of_slots.emplace_back(options_.n_slots * kKeptRows * row_bytes, team_->plan()[r].node);
        of_pages.emplace_back(options_.n_pages * row_bytes, team_->plan()[r].node);
    }
    ops_.push_back(std::make_unique<WithPreviousOp>(src, dst, std::move(of_slots), std::move(of_pages)));
}

void Program::add_select(int src, int dst) { ops_.push_back(std::make_unique<SelectOp>(src, dst)); }

void Program::finish() {
    if (forced_ &&
        std::none_of(weights_.begin(), weights_.end(), [&](const auto& w) { return w->format == forced_->format; }))
        throw std::invalid_argument("kernel " + options_.kernel + " reads a format that no weight has");
    size_t widest = 0, widest_panel = 0;
    for (const auto& w : weights_) {
        widest = std::max(widest, w->k);
        if (!w->is_in_memory()) widest_panel = std::max(widest_panel, panel_bytes(w->format, tiles_of(w->k)));
    }
    if (widest_panel && !stream_) throw std::invalid_argument("weights outside memory need a file to be read from");
    const size_t scratch = scratch_bytes(widest, options_.context, options_.head_dim);
    for (size_t r = 0; r < team_->n_ranks(); ++r) {
        const RankPlan& plan = team_->plan()[r];
        packed_.emplace_back(packed_bytes_, plan.node);
        packed_next_.emplace_back(packs_ahead_ ? packed_bytes_ : 0, plan.node);
        if (!caches_.empty())
            partials_.emplace_back(attend_shared_bytes(plan.cpus.size(), options_.context, options_.head_dim),
                                   plan.node);
        auto &threads = scratch_.emplace_back(), &gathered = gathered_.emplace_back();
        NodeArena arena(plan.node);
        for (size_t t = 0; t < plan.cpus.size(); ++t) {
            threads.push_back(arena.take(scratch));
            gathered.emplace_back(widest_panel, plan.node);
        }
        timelines_.emplace_back(plan.cpus.size());
        for (Cache& cache : caches_) cache.pages.emplace_back(cache.runs[r].bytes(), plan.node);
    }
    link_linears();
    size_t n_threads = 0;
    for (const RankPlan& plan : team_->plan()) n_threads += plan.cpus.size();
    if (!pieces_.empty()) stream_->start(pieces_, n_threads);
}

void Program::link_linears() {
    LinearOp *first = nullptr, *last = nullptr;
    for (size_t i = 0; i < ops_.size(); ++i) {
        auto* linear = dynamic_cast<LinearOp*>(ops_[i].get());
        if (!linear) continue;
        last ? last->next = linear : first = linear;
        last = linear;
        if (!linear->is_for_next) continue;
        auto* after = i + 1 < ops_.size() ? dynamic_cast<LinearOp*>(ops_[i + 1].get()) : nullptr;
        if (!after || !after->gates(*linear))
            throw std::invalid_argument("a linear for the next op comes before one that gates its two outputs");
        if (linear->is_packed || !linear->may_pack_for(*this, *after, team_->plan())) continue;
        linear->packs_for = after;
        after->is_packed = true;
    }
    if (last) last->next = first;
}

void Program::step(const Step& given) {
    team_->check_process();
    const std::lock_guard turn(turn_);
    Step step = given;
    blocks_.clear();
    for (size_t i = 0; i < step.sequences.size(); ++i) {
        const SequenceRows& s = step.sequences[i];
        for (int32_t row = 0; row < s.n_rows; ++row) {
            row_sequence_[static_cast<size_t>(s.row_begin + row)] = static_cast<int32_t>(i);
            row_position_[static_cast<size_t>(s.row_begin + row)] = s.start + row;
        }
        for (size_t row = 0; row < static_cast<size_t>(s.n_rows); row += kBlockRows)
            blocks_.push_back(
                {i, static_cast<size_t>(s.row_begin) + row, std::min(kBlockRows, static_cast<size_t>(s.n_rows) - row)});
    }
    step.row_sequence = {row_sequence_.data(), step.n_tokens()};
    step.row_position = {row_position_.data(), step.n_tokens()};
    step.blocks = blocks_;
    step.first_piece = n_steps_++ * pieces_.size();
    team_->run([self = shared_from_this(), step](Worker& worker) { self->walk(worker, step); });
}

void Program::walk(Worker& worker, const Step& step) {
    Timeline* timeline = recording_ ? &timelines_[worker.rank][worker.thread] : nullptr;
    worker.timeline = timeline;
    if (timeline) timeline->clear();
    for (size_t i = 0; i < ops_.size(); ++i) {
        if (timeline) timeline->enter(static_cast<int32_t>(i));
        ops_[i]->run(*this, worker, step);
        ops_[i]->ends_globally() ? worker.barrier_all() : worker.barrier();
    }
    if (timeline) timeline->end();
}

void Program::record(bool wanted) {
    team_->check_process();
    const std::lock_guard turn(turn_);
    recording_ = wanted;
    for (auto& rank : timelines_)
        for (Timeline& timeline : rank) {
            timeline = {};
            if (wanted) timeline.reserve(ops_.size() * kMarksAnOp);
        }
}

const std::vector<Mark>& Program::marks(size_t rank, size_t thread) const {
    return timelines_.at(rank).at(thread).marks();
}

size_t Program::kv_bytes() const {
    size_t total = 0;
    for (const Cache& cache : caches_)
        for (const KvRuns& runs : cache.runs) total += runs.bytes();
    return total;
}

uint64_t Program::disk_bytes_read() const { return stream_ ? stream_->bytes_read() : 0; }

MemoryMap Program::memory_map() const {
    MemoryMap map;
    for (size_t r = 0; r < team_->n_ranks(); ++r) {
        for (const auto& weight : weights_) {
            list_memory(map, "weights", r, weight->slice(r).panels);
            list_memory(map, "weights", r, weight->slice(r).scales);
        }
        if (r < scratch_.size())
            for (size_t t = 0; t < scratch_[r].size(); ++t) {
                list_memory(map, "scratch", r, scratch_[r][t]);
                list_memory(map, "scratch", r, gathered_[r][t]);
            }
    }
    for (const Buffer& buffer : buffers_) list_memory(map, "activations", buffer.memory);
    list_memory(map, "activations", packed_);
    list_memory(map, "activations", packed_next_);
    list_memory(map, "scratch", partials_);
    for (const Cache& cache : caches_) list_memory(map, "kv", cache.pages);
    for (const auto& op : ops_) op->list_own(map);
    return map;
}

std::map<std::string, std::string> Program::kernels(size_t m, RowClass row_class) const {
    if (m == 0) throw std::invalid_argument("no kernel serves no rows");
    std::map<std::string, std::string> names;
    for (const auto& w : weights_)
        names[std::string(kFormatNames[static_cast<size_t>(w->format)])] =
            std::string(kernel(w->format, m, row_class).name);
    if (!caches_.empty()) names["attention"] = std::string(attend_kernel(m, row_class).name);
    return names;
}

std::vector<std::string> Program::op_names() const {
    std::vector<std::string> names;
    for (const auto& op : ops_) names.push_back(op->name());
    return names;
}

}  // namespace fourfold
