// Every AMX row of the table of attention kernels, executed by the tile unit, beside the same algorithm over tiles in
// memory: the same bits, over heads, lengths and windows that meet every edge, and with every operand at the end of
// what is mapped. What the numbers should be is tests/test_attention_kernels.py's matter, on any machine.
#include <algorithm>

#include "check.h"
#include "kernels/linear_rows.h"

namespace metal {
namespace {

using namespace fourfold;

constexpr size_t kHeadDims[] = {1, 8, 16, 31, 33, 48, 64, 80, 96, 127, 128, 200, 256};

// `n` rows of a prompt, the last of which sees `n_positions`, in chunks.
struct Case {
    size_t n, n_positions, window, chunk;
};
constexpr size_t kAll = SIZE_MAX;
constexpr Case kCases[] = {
    {1, 1, kAll, 256},    {16, 16, kAll, 256},  {7, 70, kAll, 256},  {16, 263, kAll, 256},
    {16, 600, kAll, 256}, {16, 600, kAll, 320}, {5, 600, kAll, 640}, {16, 300, 20, 256},
    {3, 590, 300, 576},   {16, 64, 1, 64},      {2, 33, kAll, 256},  {16, 320, 100, 256},
};
constexpr size_t kMostPositions = 600, kMostPages = 10, kMostFloats = kAttendQueries * attend_partial_floats(256);

// Where things lie.
constexpr Arena kPages = arena(0), kQueries = arena(1), kPartial = arena(2), kScratch = arena(3);
constexpr size_t kMargin = 4096;  // bytes before an operand that are watched

// What all chunks of a case have in common, over pages in reversed order that hold not-a-numbers where no position is.
class Text {
  public:
    Text(KvFormat format, size_t d, const Case& of, float size) : args_{}, of_(of), d_(d) {
        const KvRuns runs{(of.n_positions + kPage - 1) / kPage, 1, KvPage::bytes(format, d)};
        const size_t n_pages = runs.n_pages;
        uint8_t* const pages = kPages.last(runs.bytes());
        std::memset(pages, 0xFF, runs.bytes());
        Random random(d * 1000 + of.n_positions);
        static float key[256], value[256];
        for (size_t page = 0; page < n_pages; ++page) table_[page] = static_cast<int32_t>(n_pages - 1 - page);
        for (size_t p = 0; p < of.n_positions; ++p) {
            for (size_t i = 0; i < d; ++i) key[i] = random.normal() * size, value[i] = random.normal();
            kRowsAvx512.kv_store(format, pages + runs.offset(static_cast<size_t>(table_[p / kPage]), 0), p % kPage, d,
                                 key, value);
        }
        kRowsAvx512.kv_clear(format, pages, (of.n_positions - 1) % kPage + 1, d);
        auto* const q = reinterpret_cast<float*>(kQueries.last(of.n * d * sizeof(float)));
        for (size_t i = 0; i < of.n * d; ++i) q[i] = random.normal() * size;
        args_.n_queries = of.n;
        for (size_t i = 0; i < of.n; ++i) {
            const size_t sees = of.n_positions - (of.n - 1 - i);
            args_.q[i] = q + i * d;
            args_.first[i] = sees < of.window ? 0 : sees - of.window;
            args_.n_positions[i] = sees;
        }
        args_.pages = pages;
        args_.runs = runs;
        args_.page_table = table_;
        args_.end_ahead = of.n_positions;
        args_.d = d;
        args_.scale = 0.125f;
    }

    size_t first_chunk() const { return args_.first[0] / of_.chunk; }
    size_t end_chunk() const { return (of_.n_positions + of_.chunk - 1) / of_.chunk; }

    // The partials of a chunk by that row, which must write all of them and nothing else.
    const float* run(Checks& checks, const AttendKernel& row, size_t chunk) {
        const size_t floats = attend_partial_floats(d_), bytes = of_.n * floats * sizeof(float),
                     scratch_bytes = attend_scratch_floats(d_) * sizeof(float);
        uint8_t *const at = kPartial.last(bytes), *const scratch = kScratch.last(scratch_bytes);
        watch(at - kMargin, kMargin + bytes);
        watch(scratch - kMargin, kMargin);
        std::memset(scratch, 0xFF, scratch_bytes);  // not-a-numbers: who reads what it has not written shows it
        args_.begin = std::max(args_.first[0] / kPage * kPage, chunk * of_.chunk);
        args_.end = std::min((chunk + 1) * of_.chunk, of_.n_positions);
        args_.partial = reinterpret_cast<float*>(at);
        args_.scratch = reinterpret_cast<float*>(scratch);
        row.run(args_);
        checks.that(tiles_are_released(), row.name, " leaves tiles configured");
        checks.that(is_untouched(at - kMargin, kMargin), row.name, " writes before its partials");
        checks.that(is_untouched(scratch - kMargin, kMargin), row.name, " writes before its scratch");
        const size_t used = KvPage::padded(d_) + 2;
        for (size_t i = 0; i < of_.n; ++i) {
            const float* own = args_.partial + i * floats;
            checks.that(std::none_of(own, own + used, [](float v) { return bits(v) == kPattern; }), row.name,
                        " leaves a part of query ", i, "'s partial unwritten");
            checks.that(is_untouched(reinterpret_cast<const uint8_t*>(own + used), (floats - used) * sizeof(float)),
                        row.name, " writes behind query ", i, "'s partial");
        }
        return args_.partial;
    }

  private:
    AttendArgs args_;
    const Case& of_;
    size_t d_;
    int32_t table_[kMostPages];
};

void check_row(Checks& checks, const AttendKernel& row) {
    const auto twins = attend_rows_amx_emulated();
    const auto twin = std::find_if(twins.begin(), twins.end(), [&](const auto& t) { return t.format == row.format; });
    if (!checks.that(twin != twins.end(), row.name, " has no twin")) return;
    static float kept[kMostFloats];
    size_t n_calls = 0, n_results = 0, n_different = 0;
    for (const size_t d : kHeadDims)
        for (const Case& of : kCases)
            for (const float size : {1.0f, 8.0f}) {  // weights that are even, and almost all on one position
                Text text(row.format, d, of, size);
                const size_t floats = of.n * attend_partial_floats(d);
                for (size_t chunk = text.first_chunk(); chunk < text.end_chunk(); ++chunk) {
                    std::memcpy(kept, text.run(checks, row, chunk), floats * sizeof(float));
                    checks.that(std::none_of(kept, kept + floats, is_nan), row.name, " gives not-a-numbers, D = ", d);
                    const float* const expected = text.run(checks, *twin, chunk);
                    for (size_t at = 0; at < floats; ++at)
                        if (!same_bits(kept[at], expected[at])) {
                            ++n_different;
                            checks.that(false, row.name, ", D = ", d, ", ", of.n, " queries of ", of.n_positions,
                                        " positions, chunk ", chunk, ": [", at, "] is ", Hex{bits(kept[at])}, ", and ",
                                        Hex{bits(expected[at])}, " by ", twin->name);
                        }
                    n_results += floats;
                    ++n_calls;
                }
            }
    say(row.name, ": ", n_calls, " calls, ", n_results - n_different, " of ", n_results, " results have the bits of ",
        twin->name);
}

}  // namespace

void check_attention(Checks& checks) {
    for (const AttendKernel& row : attend_rows_amx()) check_row(checks, row);
}

}  // namespace metal
