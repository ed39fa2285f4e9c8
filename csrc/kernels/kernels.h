// The kernel contract. A kernel is single-threaded, allocates nothing, throws nothing, and is one row of a table that
// selection, tests and benchmarks all read. Its name is its address: op, weight format, activation, ISA.
//
//   linear:  y[m][n] = sum over k of x[m][k] * w[n][k],   m < M, n < 16 * n_panels, k < 64 * k_tiles
//
// x comes packed (see Activation), zero beyond K; w in tiles (format.h), zero beyond N and K. y is float32, its rows
// y_stride floats apart; a kernel writes every one of its M x 16 * n_panels results, and nothing else.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "format.h"
#include "isa.h"

namespace fourfold {

// How a linear kernel wants its activations.
enum class Activation : uint8_t {
    f32,   // (M, 64 k_tiles) float32
    i16,   // 16-bit fixed point per row and tile, in two signed bytes; see I16Row
    bf16,  // (ceil(M/16), 2 k_tiles, 16, 32) bfloat16: AMX A tiles, inputs in kPairOrder; rows beyond M are zero; the
           // bands of 16 rows lie kBf16Bands.bytes apart
    u8,    // bytes between the least and the largest of 32 inputs, in bands of 8 rows; see U8Tile
    i16_words,  // the fixed point of i16, in words; see I16Row
};
constexpr std::string_view kActivationNames[] = {"f32", "i16", "bf16", "u8", "i16_words"};

// One row of i16 activations: x[k] ~= scale * (256 hi + lo), |256 hi + lo| <= 32512, an error of at most scale / 2.
// A tile with nothing above 1e-30 is zero; one with NaN or infinity has NaN as its scale.
//   k_tiles times: 64 bytes hi, 64 bytes lo; of i16_words 64 words 256 hi + lo
//   then k_tiles times: float32 scale;   then k_tiles times: int32 offset
// Kernels keep weights as unsigned bytes w + 128; offset = -128 * sum(256 hi + lo) takes the 128 out again. Those of
// uint4 are its codes, and zero * offset / 128 takes their block's zero point out. Words lie in the order in which two
// bytes of a 32-bit lane become words: inputs 0, 2, 1, 3 of every four.
struct I16Row {
    static constexpr size_t tile_bytes = 128;
    static size_t bytes(size_t k_tiles) { return (k_tiles * (tile_bytes + 8) + 63) / 64 * 64; }
    static const float* scales(const uint8_t* row, size_t k_tiles) {
        return reinterpret_cast<const float*>(row + k_tiles * tile_bytes);
    }
    static const int32_t* offsets(const uint8_t* row, size_t k_tiles) {
        return reinterpret_cast<const int32_t*>(row + k_tiles * (tile_bytes + 4));
    }
};

// A tile of u8 activations: 64 inputs of 8 rows. Of every 32 inputs of a row, x[k] ~= low + step * code, where low is
// the least of them and step a 255th of the way to the largest: an error of at most step / 2. Where they differ by less
// than 1e-30, step is 0; where one of a row's 64 is NaN or infinite, all its steps are NaN. Sums of numbers beyond 1e31
// may not be finite. Rows beyond M are zero.
struct U8Tile {
    static constexpr size_t kRows = 8, kBlock = 32, kBlocks = kTileK / kBlock;
    uint8_t codes[kRows][kTileK];
    float steps[kRows][kBlocks], lows[kRows][kBlocks];
};

// Activations that come in bands of several rows, a band tile by tile.
struct Bands {
    size_t rows, tile_bytes, unit;
    // From one band to the next: an odd number of units. The same 512 inputs of many bands, which kernels take together,
    // then fill a second-level cache evenly (2,048 sets of lines: 128 KB). If bands lay as far apart as K demands, those
    // of bf16 at K = 8192 would share an eighth of it.
    constexpr size_t bytes(size_t k_tiles) const { return ((k_tiles * tile_bytes + unit - 1) / unit | 1) * unit; }
};
constexpr Bands kBf16Bands = {16, 16 * kTileK * 2, 8192}, kU8Bands = {U8Tile::kRows, sizeof(U8Tile), 2048};
constexpr const Bands* bands_of(Activation a) {
    return a == Activation::bf16 ? &kBf16Bands : a == Activation::u8 ? &kU8Bands : nullptr;
}

// M, or as many rows as its whole bands have.
constexpr size_t padded_rows(Activation a, size_t m) {
    const Bands* bands = bands_of(a);
    return bands ? (m + bands->rows - 1) / bands->rows * bands->rows : m;
}
// Where packed row m begins, a multiple of 16.
size_t packed_offset(Activation a, size_t m, size_t k_tiles);
// Bytes of M packed rows.
size_t packed_bytes(Activation a, size_t m, size_t k_tiles);

struct LinearArgs {
    const uint8_t* panels;      // n_panels panels, one after another
    const float* panel_scales;  // (n_panels), or null for bf16 and f32
    size_t n_panels;
    size_t k_tiles;
    const uint8_t* x;  // packed activations, 64-byte aligned
    size_t m;          // rows, >= 1
    float* y;
    size_t y_stride;                // floats
    uint8_t* scratch;               // kLinearScratchBytes, 64-byte aligned, this thread's own
    const uint8_t* next = nullptr;  // what this thread reads after the panels, to be prefetched; null: not known
};
constexpr size_t kLinearScratchBytes = 640 * 1024;

using LinearFn = void (*)(const LinearArgs&);

struct LinearKernel {
    std::string_view name;
    Isa isa;
    Format format;
    Activation activation;
    size_t m_min, m_max;  // selection prefers this row for m_min <= M <= m_max; any row computes any M
    LinearFn run;
    // Units of rounding for computed tolerances: an output's error is at most
    //   (weight_rel + x_rel) * S + weight_abs * C + x_abs * B    plus float32 accumulation, where
    //   S = sum |x| |w|,  C = sum |x| * scale of w's block,  B = sum |w| * largest |x| of the tile.
    float weight_rel, weight_abs, x_rel, x_abs;
};

// Every linear kernel compiled in, fastest ISA first; rows whose ISA this machine lacks included.
std::span<const LinearKernel> linear_kernels();
// The row for M tokens in a format on this ISA or below it.
const LinearKernel& choose_linear(Isa isa, Format format, size_t m);

// Which rows serve a step: the best for its M tokens; or those for few tokens, or for many, however many there are. A
// token's outputs are then the same bits alone or beside others: within a class, rows differ in how they block M, never
// in what they add to what. tests/test_same_bits.py holds that.
enum class RowClass : uint8_t { best, few, many };
constexpr std::string_view kRowClassNames[] = {"best", "few", "many"};
constexpr size_t kFewRows = 8, kManyRows = 64;  // inside the ranges of every format's rows of the class
const LinearKernel& choose_linear(Isa isa, Format format, size_t m, RowClass row_class);
// Bytes of M rows as the kernels of a format want them, at most.
size_t most_packed_bytes(Format format, size_t m, size_t k_tiles);
// The row of that name, or null.
const LinearKernel* find_linear(std::string_view name);

// ---- everything that is not a matrix: one set of functions per ISA, written once against a vector dialect ----

constexpr size_t kPage = 64;  // positions a KV page

enum class KvFormat : uint8_t { bf16, int8, f32 };
constexpr std::string_view kKvNames[] = {"bf16", "int8", "f32"};

// One page of one KV head: keys transposed so that positions are lanes, values by rows. Dp is D rounded up to 16.
//   bf16   keys (D/2, 64, 2), values (32, Dp, 2): two neighbours in the summed direction share a 32-bit lane, as dot
//          products and AMX tiles of bfloat16 take them
//   int8   keys (D, 64), values (64, Dp), then 64 float32 key scales, 64 value scales
//   f32    keys (D, 64), values (64, Dp)
// Values lie in blocks of 64 dimensions, one behind the other, which are what a kernel sums at a time: so it reads a
// page from its first byte to its last, which is what hardware prefetchers follow.
// Whoever stores the first positions of a page clears those after: it holds nothing but what its sequence wrote.
struct KvPage {
    static constexpr size_t element_bytes(KvFormat f) { return f == KvFormat::f32 ? 4 : f == KvFormat::bf16 ? 2 : 1; }
    static constexpr size_t padded(size_t d) { return (d + 15) / 16 * 16; }
    static constexpr size_t values_offset(KvFormat f, size_t d) { return (d + d % 2) * kPage * element_bytes(f); }
    static constexpr size_t kBlock = 64;                           // dimensions
    static constexpr size_t block_width(size_t d, size_t first) {  // of the block of values that begins at `first`
        return padded(d) - first < kBlock ? padded(d) - first : kBlock;
    }
    static constexpr size_t block_offset(KvFormat f, size_t d, size_t first) {
        return values_offset(f, d) + first * kPage * element_bytes(f);
    }
    static constexpr size_t scales_offset(KvFormat f, size_t d) {
        return values_offset(f, d) + padded(d) * kPage * element_bytes(f);
    }
    static constexpr size_t bytes(KvFormat f, size_t d) {
        const size_t scales = f == KvFormat::int8 ? 2 * kPage * sizeof(float) : 0;
        return (scales_offset(f, d) + scales + 63) / 64 * 64;
    }
};

// Where a rank's pages of a layer lie: in runs, and in a run the pages of one KV head behind each other. A text that took
// its pages in order is then read, head by head, as a stream that jumps once in half a megabyte; and a head's pages
// spread over all sets of a cache. The last run is as long as pages are left.
struct KvRuns {
    static constexpr size_t kRunBytes = 512 * 1024;  // of one head
    size_t n_pages, n_heads, page_bytes;
    size_t bytes() const { return n_pages * n_heads * page_bytes; }
    size_t offset(size_t page, size_t head) const {
        const size_t most = page_bytes < kRunBytes ? kRunBytes / page_bytes : 1, first = page / most * most;
        const size_t run = n_pages - first < most ? n_pages - first : most;
        return (first * n_heads + head * run + page - first) * page_bytes;
    }
};

// Softmax attention of a few queries that share one KV head, over one chunk of positions. Chunks have fixed bounds, and
// are merged in their order: a query's answer is the same bits whoever computes which chunk, alone or among others.
constexpr size_t kAttendQueries = 16;
struct AttendArgs {
    size_t n_queries;                    // 1 .. kAttendQueries
    const float* q[kAttendQueries];      // (D) each, rotated
    size_t first[kAttendQueries];        // query i sees positions first[i] .. n_positions[i] - 1, at least one;
    size_t n_positions[kAttendQueries];  // both ascend
    const uint8_t* pages;                // of this layer, in the kernel's format
    KvRuns runs;                         // where they lie
    size_t kv_head;
    const int32_t* page_table;  // position p lies in page page_table[p / kPage]
    size_t begin, end;  // the chunk's positions, or those from the page on that the first query sees first; begin is
                        // a multiple of kPage, end at most what the last query sees
    size_t end_ahead;   // pages before this position may be prefetched
    size_t d;
    float scale;     // of the scores
    float* partial;  // out: a Partial of each query, one after another
    float* scratch;  // attend_scratch_floats(d), 64-byte aligned

    const uint8_t* page_at(size_t position) const {
        return pages + runs.offset(static_cast<size_t>(page_table[position / kPage]), kv_head);
    }
};
// What a chunk leaves of a query: Dp sums of exp(score - highest) * value, then highest, then the sum of
// exp(score - highest), which is 0 where the query saw none of the chunk.
constexpr size_t attend_partial_floats(size_t d) { return KvPage::padded(d) + 16; }
// Of the kernel that needs most, attention_amx.inl: 16 queries in bfloat16, their scores of 256 positions, one page's
// keys and 4 pages' values in bfloat16.
constexpr size_t attend_scratch_floats(size_t d) {
    const size_t pairs = d < 32 ? 16 : (d + 1) / 2;
    return kAttendQueries * ((pairs + 15) / 16 * 16 + 4 * kPage) + kPage * (pairs + 2 * KvPage::padded(d));
}

// A row of the table of attention kernels. They are chosen as the linear ones are, by M, the rows of the step (of all
// its sequences): a token's answer must not depend on how many rows are in its own item.
struct AttendKernel {
    std::string_view name;
    Isa isa;
    KvFormat format;
    size_t m_min, m_max;  // selection prefers this row for m_min <= M <= m_max; any row computes any M
    void (*run)(const AttendArgs&);
    float rounding;  // relative, of queries and of softmax weights; sums are float32
};

// Every attention kernel compiled in, fastest ISA first; rows whose ISA this machine lacks included.
std::span<const AttendKernel> attend_kernels();
// The row for a step of M rows of a class, over pages of a format, on this ISA or below it.
const AttendKernel& choose_attend(Isa isa, KvFormat format, size_t m, RowClass row_class);
// The row of that name, or null.
const AttendKernel* find_attend(std::string_view name);

// What a feed-forward's gate goes through: silu(a) = a / (1 + exp(-a)), or gelu(a) = a (1 + tanh(z)) / 2 with
// z = sqrt(2 / pi) (a + 0.044715 a^3) (arXiv 1606.08415, the approximation by tanh).
enum class Gate : uint8_t { silu, gelu_tanh };
constexpr std::string_view kGateNames[] = {"silu", "gelu_tanh"};

struct RowKernels {
    Isa isa;
    // 1 / sqrt(mean(x^2) + eps) of n elements.
    float (*rms_factor)(const float* x, float eps, size_t n);
    // y = x * factor * w.
    void (*scale_row)(const float* x, const float* w, float factor, size_t n, float* y);
    // Rotate-half rotary embedding in place: (x[i], x[i + d/2]) by the angle whose cosine and sine are c[i], s[i].
    void (*rope)(float* x, const float* c, const float* s, size_t d);
    // y = gate(a) * b; y may be a.
    void (*silu_mul)(const float* a, const float* b, size_t n, float* y);
    void (*gelu_tanh_mul)(const float* a, const float* b, size_t n, float* y);
    auto gate_mul(Gate gate) const { return gate == Gate::silu ? silu_mul : gelu_tanh_mul; }
    // y = base + parts[0] + parts[1] + ... (+ bias), added from left to right; y may be any of them.
    void (*add_parts)(const float* base, const float* const* parts, size_t n_parts, const float* bias, size_t n,
                      float* y);
    // out (D) of one query from its n partials, `stride` floats apart, in the order of their chunks.
    void (*merge)(const float* partials, size_t n, size_t stride, size_t d, float* out);
    // Writes one position of one KV head: k and v are (D) float32.
    void (*kv_store)(KvFormat format, uint8_t* page, size_t slot, size_t d, const float* k, const float* v);
    // Zeros positions slot .. kPage - 1; touches no byte of those before.
    void (*kv_clear)(KvFormat format, uint8_t* page, size_t slot, size_t d);
    // Packs tiles [t0, t1) of rows [m0, m1) of an (m, k) matrix for linear kernels; x is where tile t0 of row m0 lies,
    // rows x_stride floats apart. m0 and m1 may run to padded_rows, of which those from m on are written as zeros.
    void (*pack)(Activation a, const float* x, size_t x_stride, size_t m, size_t k, size_t k_tiles, size_t m0,
                 size_t m1, size_t t0, size_t t1, uint8_t* out);
    // One row of a weight as float32: row n of the matrix whose first panel is given.
    void (*unpack_row)(Format format, const uint8_t* panels, const float* panel_scales, size_t n, size_t k_tiles,
                       float* out);
    // n numbers of another type to float32, and back to nearest even. A NaN stays one.
    void (*widen)(NumberType type, const void* from, size_t n, float* to);
    void (*narrow)(NumberType type, const float* from, size_t n, void* to);
};

const RowKernels& row_kernels(Isa isa);

}  // namespace fourfold
