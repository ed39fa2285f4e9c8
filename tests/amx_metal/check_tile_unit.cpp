// The tile instructions, each against its definition in the Intel SDM (vol. 2), in plain arithmetic: whether this
// machine's tile unit is one. What the kernels make of it is check_linear's.
#include <immintrin.h>

#include <array>

#include "check.h"

namespace metal {
namespace {

constexpr size_t kRows = 16, kRowBytes = 64, kLanes = 16;

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

// Tile 0 is C, 1 is A, 2 is B.
void configure(size_t rows_of_a) {
    TileConfig config;
    const auto rows = static_cast<uint8_t>(rows_of_a);
    config.rows[0] = config.rows[1] = rows;
    config.rows[2] = kRows;
    for (size_t i = 3; i < 8; ++i) config.row_bytes[i] = 0;
    __asm__ volatile("ldtilecfg %0" : : "m"(config));
}

struct alignas(64) Tile {
    std::array<std::array<uint32_t, kLanes>, kRows> rows;
};

// C += A B by `product`, from and to rows that lie three rows apart, so that a wrong stride is seen.
template <class Product>
void multiply(size_t rows, const Tile& a, const Tile& b, Tile& c, Product product) {
    alignas(64) static std::array<uint32_t, kLanes> spread_a[3 * kRows], spread_c[3 * kRows];
    std::memset(spread_a, kPattern & 0xFF, sizeof spread_a);
    for (size_t r = 0; r < rows; ++r) spread_a[3 * r] = a.rows[r], spread_c[3 * r] = c.rows[r];
    configure(rows);
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm0" : : "r"(spread_c), "r"(3 * kRowBytes) : "memory");
    __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm1" : : "r"(spread_a), "r"(3 * kRowBytes) : "memory");
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm2" : : "r"(&b), "r"(kRowBytes) : "memory");
    product();
    std::memset(spread_c, kPattern & 0xFF, sizeof spread_c);
    __asm__ volatile("tilestored %%tmm0, (%0,%1,1)" : : "r"(spread_c), "r"(3 * kRowBytes) : "memory");
    for (size_t r = 0; r < kRows; ++r) c.rows[r] = spread_c[3 * r];
    _tile_release();
}

// TDPBSUD: 4 signed bytes of A times 4 unsigned ones of B a lane.
uint32_t signed_by_unsigned(uint32_t sum, uint32_t a, uint32_t b) {
    for (int i = 0; i < 32; i += 8) {
        const auto x = static_cast<int8_t>(a >> i);
        const auto y = static_cast<uint8_t>(b >> i);
        sum += static_cast<uint32_t>(x * y);
    }
    return sum;
}

// float32 with subnormals taken for zero, as the products of bfloat16 take and make them.
float without_subnormals(float x) {
    return (bits(x) & 0x7F800000) == 0 ? std::bit_cast<float>(bits(x) & 0x80000000) : x;
}
float even(uint32_t pair) { return without_subnormals(std::bit_cast<float>(pair << 16)); }
float odd(uint32_t pair) { return without_subnormals(std::bit_cast<float>(pair & 0xFFFF0000)); }

// TDPBF16PS: the sums of even and of odd products apart, each product and addition rounded once; then their sum, then
// C.
float pairs(float c, const std::array<uint32_t, kLanes>& a, const Tile& b, size_t n) {
    float evens = 0, odds = 0;
    for (size_t k = 0; k < kLanes; ++k) {
        evens = without_subnormals(__builtin_fmaf(even(a[k]), even(b.rows[k][n]), evens));
        odds = without_subnormals(__builtin_fmaf(odd(a[k]), odd(b.rows[k][n]), odds));
    }
    return without_subnormals(without_subnormals(c) + without_subnormals(evens + odds));
}

// Bytes with many extremes among them.
uint32_t bytes(Random& random) {
    const uint32_t word = random.word(), extreme = random.word();
    return extreme & 1 ? word : word & 0x80FF0000 ? 0x7F80FF00 ^ (word & 0x00FF00FF) : 0x80808080;
}

// A bfloat16 pair, its exponents random in [least, least + n).
uint32_t pair_of(Random& random, uint32_t least_exponent, uint32_t n_exponents) {
    uint32_t pair = 0;
    for (int half = 0; half < 2; ++half) {
        const uint32_t exponent = least_exponent + random.word() % n_exponents;
        pair = pair << 16 | (random.word() & 0x807F) | exponent << 7;
    }
    return pair;
}

void check_bytes(Checks& checks, size_t rows) {
    Random random(rows);
    Tile a, b, c, expected;
    for (size_t r = 0; r < kRows; ++r)
        for (size_t n = 0; n < kLanes; ++n) {
            a.rows[r][n] = bytes(random), b.rows[r][n] = bytes(random);
            c.rows[r][n] = expected.rows[r][n] = random.word();
        }
    for (size_t r = 0; r < rows; ++r)
        for (size_t n = 0; n < kLanes; ++n)
            for (size_t k = 0; k < kLanes; ++k)
                expected.rows[r][n] = signed_by_unsigned(expected.rows[r][n], a.rows[r][k], b.rows[k][n]);
    for (size_t r = rows; r < kRows; ++r) expected.rows[r].fill(kPattern);
    multiply(rows, a, b, c, [] { _tile_dpbsud(0, 1, 2); });
    for (size_t r = 0; r < kRows; ++r)
        for (size_t n = 0; n < kLanes; ++n)
            checks.that(c.rows[r][n] == expected.rows[r][n], "TDPBSUD of ", rows, " rows: [", r, "][", n, "] is ",
                        Hex{c.rows[r][n]}, ", not ", Hex{expected.rows[r][n]});
}

void check_pairs(Checks& checks, size_t rows, uint32_t least_exponent, uint32_t n_exponents) {
    Random random(rows + least_exponent);
    Tile a, b, c, expected;
    for (size_t r = 0; r < kRows; ++r)
        for (size_t n = 0; n < kLanes; ++n) {
            a.rows[r][n] = pair_of(random, least_exponent, n_exponents);
            b.rows[r][n] = pair_of(random, least_exponent, n_exponents);
            c.rows[r][n] = pair_of(random, least_exponent == 127 ? 127 : 0, n_exponents);
        }
    for (size_t r = 0; r < rows; ++r)
        for (size_t n = 0; n < kLanes; ++n)
            expected.rows[r][n] = bits(pairs(std::bit_cast<float>(c.rows[r][n]), a.rows[r], b, n));
    for (size_t r = rows; r < kRows; ++r) expected.rows[r].fill(kPattern);
    multiply(rows, a, b, c, [] { _tile_dpbf16ps(0, 1, 2); });
    for (size_t r = 0; r < kRows; ++r)
        for (size_t n = 0; n < kLanes; ++n)
            checks.that(c.rows[r][n] == expected.rows[r][n], "TDPBF16PS of ", rows, " rows, exponents from ",
                        least_exponent, ": [", r, "][", n, "] is ", Hex{c.rows[r][n]}, ", not ",
                        Hex{expected.rows[r][n]});
}

}  // namespace

bool tiles_are_released() {
    constexpr uint32_t kTileConfig = 1 << 17;
    uint32_t in_use, high;
    __asm__ volatile("xgetbv" : "=a"(in_use), "=d"(high) : "c"(1));  // XINUSE
    return (in_use & kTileConfig) == 0;
}

void check_tile_unit(Checks& checks) {
    checks.that(tiles_are_released(), "tiles are configured at reset");
    for (size_t rows : {1, 7, 16}) {
        check_bytes(checks, rows);
        check_pairs(checks, rows, 127, 3);
        check_pairs(checks, rows, 117, 20);
        check_pairs(checks, rows, 52, 8);  // products below 2^-133, which are zero
        check_pairs(checks, rows, 0, 130);
        configure(rows);
        checks.that(!tiles_are_released(), "configured tiles are not in use");
        _tile_release();
        checks.that(tiles_are_released(), "tilerelease leaves tiles configured");
    }
}

}  // namespace metal
