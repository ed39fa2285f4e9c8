// Every AMX row of the table of linear kernels, executed by the tile unit, beside the same algorithm over tiles in
// memory and, for i16, the vector kernel: the same bits from all, over the shapes of tests/test_kernels.py and with
// every operand at the end of what is mapped. What the numbers should be is tests/test_kernels.py's matter, on any
// machine.
#include <algorithm>

#include "check.h"
#include "kernels/linear_rows.h"
#include "pack.h"

namespace metal {
namespace {

using namespace fourfold;

constexpr size_t kTokens[] = {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64};
constexpr size_t kOutputs[] = {1, 16, 17, 40, 100};
constexpr size_t kInputs[] = {1, 63, 64, 65, 200, 256, 320, 576};
constexpr size_t kEvery = 3;  // of the shapes; it divides no length, so that any two sizes meet

struct Shape {
    size_t m, n, k;
};
constexpr Shape kLargeShapes[] = {{530, 290, 700}, {33, 530, 1100}, {520, 16, 1030}, {64, 16, 1100}};
constexpr size_t kMostTokens = 530, kMostOutputs = 544, kMostInputs = 1152;

// Where things lie.
constexpr Arena kX = arena(0), kPanels = arena(1), kScales = arena(2), kScratch = arena(3), kY = arena(4);
constexpr size_t kMargin = 4096;     // bytes before an operand that are watched
constexpr size_t kBesideY = kTileN;  // floats behind each row of y, the same

struct Matrix {
    Format format;
    size_t n, k_tiles;
    const uint8_t* panels;
    const float* scales;
};

// Outputs of different size share a panel.
Matrix make_matrix(Format format, size_t n, size_t k) {
    static float columns[kMostInputs * kTileN];
    const size_t k_tiles = tiles_of(k), n_panels = panels_of(n), bytes = panel_bytes(format, k_tiles);
    uint8_t* const panels = kPanels.last(n_panels * bytes);
    auto* const scales = reinterpret_cast<float*>(kScales.last(n_panels * sizeof(float)));
    Random random(n * 1000 + k);
    for (size_t p = 0; p < n_panels; ++p) {
        std::memset(columns, 0, sizeof columns);
        for (size_t lane = 0; lane < std::min(kTileN, n - p * kTileN); ++lane) {
            const float size = std::bit_cast<float>((123 + random.word() % 8) << 23);  // 2^-4 .. 2^3
            for (size_t i = 0; i < k; ++i) columns[i * kTileN + lane] = random.normal() * size;
        }
        pack_panel_avx512(format, columns, k_tiles, panels + p * bytes, scales + p);
    }
    return {format, n, k_tiles, panels, has_scales(format) ? scales : nullptr};
}

// x (m, k) packed for kernels of that kind: normal, times `size`, with `bad` at one place if it is not zero.
const uint8_t* make_x(Activation activation, size_t m, size_t k, float size, float bad = 0) {
    static float x[kMostTokens * kMostInputs];
    Random random(m);
    for (size_t i = 0; i < m * k; ++i) x[i] = random.normal() * size;
    if (bad != 0) x[m / 2 * k + k / 3] = bad;
    const size_t k_tiles = tiles_of(k), padded = padded_rows(activation, m);
    uint8_t* const packed = kX.last(packed_bytes(activation, m, k_tiles));
    kRowsAvx512.pack(activation, x, k, m, k, k_tiles, 0, padded, 0, k_tiles, packed);
    return packed;
}

size_t y_stride(const Matrix& matrix) { return panels_of(matrix.n) * kTileN + kBesideY; }

// y (m, 16 panels), its rows y_stride floats apart, by that row, which must write all of it and nothing else.
const float* run(Checks& checks, const LinearKernel& row, const Matrix& matrix, const uint8_t* x, size_t m) {
    const size_t n_panels = panels_of(matrix.n), stride = y_stride(matrix), bytes = m * stride * sizeof(float);
    uint8_t *const at = kY.last(bytes), *const scratch = kScratch.last(kLinearScratchBytes);
    auto* const y = reinterpret_cast<float*>(at);
    watch(at - kMargin, kMargin + bytes);
    watch(scratch - kMargin, kMargin);
    std::memset(scratch, 0xFF, kLinearScratchBytes);  // not-a-numbers: who reads what it has not written shows it
    row.run({matrix.panels, matrix.scales, n_panels, matrix.k_tiles, x, m, y, stride, scratch});
    checks.that(tiles_are_released(), row.name, " leaves tiles configured");
    checks.that(is_untouched(at - kMargin, kMargin), row.name, " writes before y");
    checks.that(is_untouched(scratch - kMargin, kMargin), row.name, " writes before its scratch");
    for (size_t r = 0; r < m; ++r) {
        const float* const row_end = y + (r + 1) * stride - kBesideY;
        checks.that(is_untouched(reinterpret_cast<const uint8_t*>(row_end), kBesideY * sizeof(float)), row.name,
                    " writes behind row ", r, " of y, M = ", m);
        checks.that(std::none_of(row_end - n_panels * kTileN, row_end, [](float v) { return bits(v) == kPattern; }),
                    row.name, " leaves a part of row ", r, " of y unwritten, M = ", m);
    }
    return y;
}

// One row of the table, and those that must give its bits.
class Subject {
  public:
    Subject(Checks& checks, const LinearKernel& row) : checks_(checks), row_(row) {
        add_twin(linear_rows_amx_emulated());
        if (row.activation == Activation::i16) add_twin(linear_rows_avx512());  // bf16 is added in another order there
    }

    // Inputs times `size`, one of them `bad` if that is not 0.
    void check(const Matrix& matrix, size_t k, size_t m, float size = 1, float bad = 0) {
        static float kept[kMostTokens * (kMostOutputs + kBesideY)];
        const uint8_t* const x = make_x(row_.activation, m, k, size, bad);
        const size_t stride = y_stride(matrix);
        std::memcpy(kept, run(checks_, row_, matrix, x, m), m * stride * sizeof(float));
        if (size == 1 && bad == 0)
            checks_.that(std::none_of(kept, kept + m * stride, is_nan), row_.name, " gives not-a-numbers, M = ", m);
        for (size_t i = 0; i < n_twins_; ++i) {
            const float* const expected = run(checks_, *twins_[i].row, matrix, x, m);
            for (size_t at = 0; at < m * stride; ++at)
                if (!same_bits(kept[at], expected[at])) {
                    ++twins_[i].n_different;
                    checks_.that(false, row_.name, " at (", m, ", ", matrix.n, ", ", k, "), inputs of ",
                                 Hex{bits(size)}, ": y[", at / stride, "][", at % stride, "] is ", Hex{bits(kept[at])},
                                 ", and ", Hex{bits(expected[at])}, " by ", twins_[i].row->name);
                }
        }
        n_results_ += m * (stride - kBesideY);
        ++n_calls_;
    }

    void tell() const {
        for (size_t i = 0; i < n_twins_; ++i)
            say(row_.name, ": ", n_calls_, " calls, ", n_results_ - twins_[i].n_different, " of ", n_results_,
                " results have the bits of ", twins_[i].row->name);
    }

  private:
    struct Twin {
        const LinearKernel* row;
        size_t n_different;
    };

    void add_twin(std::span<const LinearKernel> rows) {
        const auto twin = std::find_if(rows.begin(), rows.end(), [&](const LinearKernel& other) {
            return other.format == row_.format && other.activation == row_.activation;
        });
        if (checks_.that(twin != rows.end(), row_.name, " has no twin")) twins_[n_twins_++] = {&*twin, 0};
    }

    Checks& checks_;
    const LinearKernel& row_;
    Twin twins_[2] = {};
    size_t n_twins_ = 0, n_calls_ = 0, n_results_ = 0;
};

void check_row(Checks& checks, const LinearKernel& row) {
    Subject subject(checks, row);
    for (size_t j = 0; j < std::size(kOutputs); ++j)
        for (size_t l = 0; l < std::size(kInputs); ++l) {
            const Matrix matrix = make_matrix(row.format, kOutputs[j], kInputs[l]);
            for (size_t i = 0; i < std::size(kTokens); ++i)
                if (((i * std::size(kOutputs) + j) * std::size(kInputs) + l) % kEvery == 0)
                    subject.check(matrix, kInputs[l], kTokens[i]);
        }
    for (const Shape& shape : kLargeShapes) subject.check(make_matrix(row.format, shape.n, shape.k), shape.k, shape.m);
    const Matrix matrix = make_matrix(row.format, 40, 320);
    // Inputs that are subnormal as bfloat16, with subnormal products, large, and zero.
    for (const float size : {0x1p-130f, 0x1p-124f, 0x1p-66f, 0x1p20f, 0x1p66f, 0x1p120f, 0.0f})
        subject.check(matrix, 320, 17, size);
    for (const float bad : {__builtin_nanf(""), __builtin_inff(), -__builtin_inff()})
        subject.check(matrix, 320, 17, 1, bad);
    subject.tell();
}

}  // namespace

void check_linear(Checks& checks) {
    for (const LinearKernel& row : linear_rows_amx()) check_row(checks, row);
}

}  // namespace metal
