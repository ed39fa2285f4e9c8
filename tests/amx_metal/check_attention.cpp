// Every AMX row of the table of attention kernels, executed by the tile unit, beside the same algorithm over tiles in
// memory: the same bits, with every operand at the end of what is mapped. What the numbers should be is
// tests/test_attention_kernels.py's matter, on any machine.
#include <algorithm>
#include <cmath>

#include "check.h"
#include "kernels/linear_rows.h"

namespace metal {
namespace {

using namespace fourfold;

constexpr size_t kHeads[] = {1, 16, 24, 31, 64, 80, 100, 128, 256};  // dimensions
constexpr size_t kQueries[] = {1, 3, 16};
constexpr size_t kMostPositions = 700, kMostDimensions = 256;
// The last query sees all positions but those before the window; of one query to the next the ends are `step` apart.
struct View {
    size_t n_positions, begin, window, step;
};
constexpr View kViews[] = {{1, 0, 1, 0},      {63, 0, 63, 1},      {64, 0, 64, 4},      {200, 0, 200, 1},
                           {257, 0, 257, 13}, {320, 256, 320, 3},  {700, 0, 700, 40},   {700, 256, 700, 1},
                           {700, 0, 100, 17}, {700, 512, 100, 17}, {330, 128, 150, 11}, {700, 640, 50, 30}};

constexpr Arena kPages = arena(0), kQuery = arena(1), kScratch = arena(3), kPartial = arena(4);
constexpr size_t kMargin = 4096;  // bytes before an operand that are watched

// Keys and values of n positions, in pages that lie in reversed order; what nobody has written is not a number.
void make_pages(AttendArgs& a, KvFormat format, size_t n) {
    static int32_t table[(kMostPositions + kPage - 1) / kPage];
    static float key[kMostDimensions], value[kMostDimensions];
    const size_t bytes = KvPage::bytes(format, a.d), n_pages = (n + kPage - 1) / kPage;
    uint8_t* const pages = kPages.last(n_pages * bytes);
    std::memset(pages, 0xFF, n_pages * bytes);
    for (size_t i = 0; i < n_pages; ++i) table[i] = static_cast<int32_t>(n_pages - 1 - i);
    Random random(n + a.d);
    for (size_t p = 0; p < n; ++p) {
        for (size_t i = 0; i < a.d; ++i) key[i] = random.normal(), value[i] = random.normal();
        kRowsAvx512.kv_store(format, pages + static_cast<size_t>(table[p / kPage]) * bytes, p % kPage, a.d, key, value);
    }
    kRowsAvx512.kv_clear(format, pages, (n - 1) % kPage + 1, a.d);
    a.pages = pages;
    a.page_stride = bytes;
    a.page_table = table;
}

void make_queries(AttendArgs& a, size_t n, const View& view) {
    auto* const q = reinterpret_cast<float*>(kQuery.last(n * a.d * sizeof(float)));
    Random random(n);
    for (size_t i = 0; i < n * a.d; ++i) q[i] = random.normal();
    a.n_queries = n;
    for (size_t i = 0; i < n; ++i) {
        const size_t back = (n - 1 - i) * view.step;
        a.q[i] = q + i * a.d;
        a.n_positions[i] = view.n_positions > back ? view.n_positions - back : 1;
        a.first[i] = a.n_positions[i] > view.window ? a.n_positions[i] - view.window : 0;
    }
    a.begin = std::max(view.begin, a.first[0] / kPage * kPage);
    a.end = a.end_ahead = view.n_positions;
}

// The partials of one chunk by that row, which must write nothing else.
const float* run(Checks& checks, const AttendKernel& row, AttendArgs a) {
    const size_t bytes = a.n_queries * attend_partial_floats(a.d) * sizeof(float);
    const size_t scratch_bytes = attend_scratch_floats(a.d) * sizeof(float);
    uint8_t *const partial = kPartial.last(bytes), *const scratch = kScratch.last(scratch_bytes);
    watch(partial - kMargin, kMargin + bytes);
    watch(scratch - kMargin, kMargin);
    std::memset(scratch, 0xFF, scratch_bytes);  // not-a-numbers
    a.partial = reinterpret_cast<float*>(partial);
    a.scratch = reinterpret_cast<float*>(scratch);
    row.run(a);
    checks.that(tiles_are_released(), row.name, " leaves tiles configured");
    checks.that(is_untouched(partial - kMargin, kMargin), row.name, " writes before its partials");
    checks.that(is_untouched(scratch - kMargin, kMargin), row.name, " writes before its scratch");
    return a.partial;
}

void check_row(Checks& checks, const AttendKernel& row) {
    static float kept[kAttendQueries * attend_partial_floats(kMostDimensions)];
    const auto rows = attend_rows_amx_emulated();
    const auto twin = std::find_if(rows.begin(), rows.end(), [&](const auto& r) { return r.format == row.format; });
    if (!checks.that(twin != rows.end(), row.name, " has no twin")) return;
    size_t n_calls = 0, n_results = 0, n_different = 0;
    for (const size_t d : kHeads)
        for (const View& view : kViews) {
            AttendArgs a{};
            a.d = d;
            a.scale = 1.0f / std::sqrt(static_cast<float>(d));
            make_pages(a, row.format, view.n_positions);
            for (const size_t n : kQueries) {
                make_queries(a, n, view);
                const size_t n_floats = n * attend_partial_floats(d);
                std::memcpy(kept, run(checks, row, a), n_floats * sizeof(float));
                checks.that(std::none_of(kept, kept + n_floats, is_nan), row.name, " gives not-a-numbers, D = ", d);
                const float* const expected = run(checks, *twin, a);
                for (size_t i = 0; i < n_floats; ++i)
                    if (!same_bits(kept[i], expected[i])) {
                        ++n_different;
                        checks.that(false, row.name, ", D = ", d, ", ", n, " queries, ", view.n_positions,
                                    " positions from ", view.begin, ": partial[", i, "] is ", Hex{bits(kept[i])},
                                    ", and ", Hex{bits(expected[i])}, " by ", twin->name);
                    }
                ++n_calls;
                n_results += n * (KvPage::padded(d) + 2);
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
