#include "matmul.h"

#include <algorithm>
#include <utility>

#include "arithmetic.h"
#include "kernels/kernels.h"
#include "memory.h"
#include "shares.h"

namespace fourfold {
namespace {

constexpr size_t kRowsAtOnce = 1024;         // packed together: with 8,192 inputs 16 MB of bfloat16
constexpr size_t kAloneNumbers = 32 * 1024;  // packed by the caller alone: 10 microseconds
constexpr size_t kSumBytes = 512 * 1024;     // of a chunk's sums
constexpr size_t kBytesAtOnce = 32 * 1024;   // of one of the 4 panels that a kernel walks together, if they are small
constexpr size_t kTilesAThread = 128;        // of one row, worth a thread: 70 KB of codes
constexpr size_t kLine = 64;

constexpr size_t number_bytes(NumberType type) { return type == NumberType::f32 ? 4 : 2; }
const void* advance(const void* p, NumberType type, size_t count) {
    return static_cast<const uint8_t*>(p) + count * number_bytes(type);
}
void* advance(void* p, NumberType type, size_t count) { return static_cast<uint8_t*>(p) + count * number_bytes(type); }

constexpr size_t in_lines(size_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

// Memory that a thread keeps for its next call.
uint8_t* working_memory(size_t bytes) {
    thread_local NodeMemory memory;
    if (memory.bytes() < bytes) {
        memory = NodeMemory();  // gives the old back first
        memory = NodeMemory(bytes, kAnyNode);
    }
    return memory.as();
}

// Panels that a thread takes at a time: of a few rows, whose time is that of reading, as many as take 10 microseconds
// and no fewer than a kernel walks together; of more rows, whose kernels want many at once, a quarter of its share.
size_t panels_at_once(size_t m, size_t n_panels, size_t bytes, size_t n_threads) {
    const size_t own = std::max<size_t>(n_panels / n_threads, 1);
    const size_t wanted = m <= kFewRows ? std::max<size_t>(kBytesAtOnce / bytes, 1) * 4 : (own + 3) / 4;
    return std::min({wanted, own, std::max<size_t>(kSumBytes / (m * kTileN * sizeof(float)), 1)});
}

// One block of rows: what all threads read, and what each has for itself.
class Block {
  public:
    Block(const MatmulArgs& a, const LinearKernel& kernel, const RowKernels& rows, size_t m, size_t n_threads)
        : a_(a),
          kernel_(kernel),
          rows_(rows),
          m_(m),
          n_threads_(n_threads),
          n_panels_(panels_of(a.w.n)),
          k_tiles_(tiles_of(a.w.k)),
          padded_m_(padded_rows(kernel.activation, m)),
          is_direct_(a.y_type == NumberType::f32 && a.w.n % kTileN == 0),
          panel_bytes_(panel_bytes(a.w.format, k_tiles_)),
          chunk_(panels_at_once(m, n_panels_, panel_bytes_, n_threads)),
          row_bytes_(in_lines(std::max(a.w.k, kTileN) * sizeof(float))),
          sum_bytes_(is_direct_ ? 0 : in_lines(m * chunk_ * kTileN * sizeof(float))) {
        const size_t left_bytes = in_lines(n_threads * sizeof(Shares::Left));
        left_ = working_memory(left_bytes + in_lines(packed_bytes(kernel.activation, m, k_tiles_)) +
                               n_threads * (kLinearScratchBytes + row_bytes_ + sum_bytes_));
        packed_ = left_ + left_bytes;
        own_ = packed_ + in_lines(packed_bytes(kernel.activation, m, k_tiles_));
    }

    void run(size_t first_row, Crew& crew) {
        first_row_ = first_row;
        auto pack = [this](size_t i) {
            const auto [begin, end] = share(padded_m_, i, n_threads_);
            pack_rows(begin, end, i);
        };
        Shares shares(left_, n_panels_, n_threads_);
        // A thread takes its next panels before it multiplies by those it has, so that it reads on without a gap.
        auto multiply = [&](size_t i) {
            for (auto [begin, end] = shares.take(i, chunk_); begin < end;) {
                const auto [next, next_end] = shares.take(i, chunk_);
                multiply_panels(begin, end, i, next < next_end ? panel(next) : nullptr);
                begin = next, end = next_end;
            }
        };
        if (m_ * a_.w.k <= kAloneNumbers)
            pack_rows(0, padded_m_, 0);
        else
            crew.run(n_threads_, job_of(pack));
        crew.run(n_threads_, job_of(multiply));
    }

  private:
    uint8_t* scratch(size_t thread) const { return own_ + thread * (kLinearScratchBytes + row_bytes_ + sum_bytes_); }
    float* row(size_t thread) const { return reinterpret_cast<float*>(scratch(thread) + kLinearScratchBytes); }
    float* sums(size_t thread) const {
        return reinterpret_cast<float*>(scratch(thread) + kLinearScratchBytes + row_bytes_);
    }

    void pack_rows(size_t begin, size_t end, size_t thread) const {
        const auto pack = [&](const float* x, size_t stride, size_t first, size_t last) {
            rows_.pack(kernel_.activation, x, stride, m_, a_.w.k, k_tiles_, first, last, 0, k_tiles_, packed_);
        };
        const void* x = advance(a_.x, a_.x_type, first_row_ * a_.x_stride);
        if (a_.x_type == NumberType::f32)
            return pack(static_cast<const float*>(x) + begin * a_.x_stride, a_.x_stride, begin, end);
        for (size_t m = begin; m < end; ++m) {
            if (m < m_) rows_.widen(a_.x_type, advance(x, a_.x_type, m * a_.x_stride), a_.w.k, row(thread));
            pack(row(thread), 0, m, m + 1);
        }
    }

    const uint8_t* panel(size_t p) const { return a_.w.panels + p * panel_bytes_; }

    void multiply_panels(size_t begin, size_t end, size_t thread, const uint8_t* next) const {
        const MatrixView& w = a_.w;
        const size_t first = begin * kTileN, last = std::min(end * kTileN, w.n);
        float* y = is_direct_ ? static_cast<float*>(a_.y) + first_row_ * w.n + first : sums(thread);
        const size_t stride = is_direct_ ? w.n : (end - begin) * kTileN;
        kernel_.run({panel(begin), w.panel_scales ? w.panel_scales + begin : nullptr, end - begin, k_tiles_, packed_,
                     m_, y, stride, scratch(thread), next});
        finish(y, stride, first, last, thread);
    }

    // Adds the bias to outputs [first, last) and writes them as the caller's numbers.
    void finish(float* sums, size_t stride, size_t first, size_t last, size_t thread) const {
        if (is_direct_ && !a_.bias) return;
        for (size_t begin = first; begin < last;) {  // no more of the bias at once than a row holds
            const size_t count = std::min(last - begin, std::max(a_.w.k, kTileN));
            if (a_.bias) rows_.widen(a_.bias_type, advance(a_.bias, a_.bias_type, begin), count, row(thread));
            for (size_t m = 0; m < m_; ++m) {
                float* from = sums + m * stride + (begin - first);
                const float* parts[] = {row(thread)};
                if (a_.bias) rows_.add_parts(from, parts, 1, nullptr, count, from);
                if (!is_direct_)
                    rows_.narrow(a_.y_type, from, count, advance(a_.y, a_.y_type, (first_row_ + m) * a_.w.n + begin));
            }
            begin += count;
        }
    }

    const MatmulArgs& a_;
    const LinearKernel& kernel_;
    const RowKernels& rows_;
    const size_t m_, n_threads_, n_panels_, k_tiles_, padded_m_;
    const bool is_direct_;  // sums are written where they are wanted
    const size_t panel_bytes_;
    const size_t chunk_;  // panels taken at a time
    const size_t row_bytes_, sum_bytes_;
    size_t first_row_ = 0;
    uint8_t *left_, *packed_, *own_;
};

}  // namespace

void matmul(const MatmulArgs& a, Isa isa, Crew& crew, size_t n_threads) {
    if (a.m == 0 || a.w.n == 0) return;
    const OwnArithmetic while_computing;
    const LinearKernel& kernel = choose_linear(isa, a.w.format, a.m);
    const size_t worth = panels_of(a.w.n) * tiles_of(a.w.k) * ((a.m + 3) / 4) / kTilesAThread;
    n_threads = std::clamp<size_t>(std::min(worth, panels_of(a.w.n)), 1, std::max<size_t>(n_threads, 1));
    for (size_t first = 0; first < a.m; first += kRowsAtOnce)
        Block(a, kernel, row_kernels(isa), std::min(kRowsAtOnce, a.m - first), n_threads).run(first, crew);
}

void unpack_rows(const MatrixView& w, size_t begin, size_t end, float* out, Isa isa, Crew& crew, size_t n_threads) {
    const OwnArithmetic while_computing;
    const RowKernels& rows = row_kernels(isa);
    const size_t k_tiles = tiles_of(w.k), padded = k_tiles * kTileK;
    n_threads = std::clamp<size_t>(n_threads, 1, std::max<size_t>(end - begin, 1));
    uint8_t* const memory = working_memory(n_threads * padded * sizeof(float));
    auto unpack = [&](size_t i) {
        const auto [first, last] = share(end - begin, i, n_threads);
        float* row = reinterpret_cast<float*>(memory) + i * padded;
        for (size_t n = first; n < last; ++n) {
            rows.unpack_row(w.format, w.panels, w.panel_scales, begin + n, k_tiles, row);
            std::copy(row, row + w.k, out + n * w.k);
        }
    };
    crew.run(n_threads, job_of(unpack));
}

}  // namespace fourfold
