#include "place.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

#include "arithmetic.h"

namespace fourfold {
namespace {

constexpr int kPanelScales = 32;       // tried for a panel of a 4-bit format: over one octave
constexpr int kMostMultiple = 16;      // of int8 codes
constexpr uint8_t kLargestByte = 126;  // 448
constexpr uint8_t kSign = 0x80;

// The nearest E4M3 byte of x >= 0, half to even, at most kLargestByte.
uint8_t nearest_byte(float x) {
    if (x >= 448.0f) return kLargestByte;
    if (x < 0x1p-6f) return static_cast<uint8_t>(std::nearbyint(x * 0x1p9f));  // subnormals: steps of 2^-9
    const auto bits = std::bit_cast<uint32_t>(x);
    return static_cast<uint8_t>(((bits + 0x7FFFF + (bits >> 20 & 1)) >> 20) - (127 - 7) * 8);  // 3 bits of mantissa
}

// A block of one output, its scale as it is in the checkpoint.
struct Block {
    float scale = 0;
    double squares = 0;  // sum of (codebook[code] - zero point)^2
    int most = 0;        // int8: the largest |code|
    int8_t zero = 0;
};

// What a block becomes under a panel's scale.
struct Placed {
    uint8_t byte;
    int multiple;  // of its int8 codes: they have room, and a multiple may bring the scale closer to an E4M3
    double error;  // (scale - what stands for it)^2
};

Placed place_block(const Block& b, float panel_scale, Format format) {
    const float magnitude = std::fabs(b.scale);
    const int multiples = format == Format::int8 && b.most > 0 ? std::clamp(127 / b.most, 1, kMostMultiple) : 1;
    Placed best{0, 1, std::numeric_limits<double>::infinity()};
    for (int m = 1; m <= multiples; ++m) {
        const auto step = static_cast<float>(m) * panel_scale;
        const uint8_t byte = magnitude == 0 ? 0 : nearest_byte(magnitude / step);
        const double miss =
            static_cast<double>(magnitude) - static_cast<double>(step) * static_cast<double>(e4m3(byte));
        if (miss * miss < best.error) best = {byte, m, miss * miss};
    }
    if (std::signbit(b.scale) && best.byte != 0) best.byte |= kSign;
    return best;
}

float largest_scale(const std::vector<Block>& blocks) {
    float most = 0;
    for (const Block& b : blocks) most = std::max(most, std::fabs(b.scale));
    return most;
}

// Of int8 the least that holds every scale; of the others the best of kPanelScales.
float choose_panel_scale(const std::vector<Block>& blocks, Format format) {
    const float least = largest_scale(blocks) / 448.0f;
    if (format == Format::int8 || least == 0) return least;
    float best = least;
    double best_error = std::numeric_limits<double>::infinity();
    for (int i = 0; i < kPanelScales; ++i) {
        const float g = least * (1.0f + static_cast<float>(i) / kPanelScales);
        double error = 0;
        for (const Block& b : blocks) error += b.squares * place_block(b, g, format).error;
        if (error < best_error) best = g, best_error = error;
    }
    return best;
}

// By code; 0 for codes that are not the format's.
std::array<double, 256> values_of(Format format) {
    std::array<double, 256> values{};
    for (size_t code = 0; code < (is_4bit(format) ? 16 : 256); ++code)
        values[code] = is_4bit(format) ? static_cast<double>(codebook(format)[code])
                                       : static_cast<double>(static_cast<int8_t>(code)) / 127.0;
    return values;
}

Block read_block(const uint8_t* codes, float scale, int8_t zero, Format format, const std::array<double, 256>& values) {
    Block b{scale};
    b.zero = zero;
    uint8_t all = 0;
    for (size_t k = 0; k < kTileK; ++k) {
        const double value = values[codes[k]] - static_cast<double>(zero);
        all |= codes[k];
        b.squares += value * value;
        if (format == Format::int8)
            b.most = std::max(b.most, std::abs(static_cast<int>(static_cast<int8_t>(codes[k]))));
    }
    if ((is_4bit(format) && all > 15) || b.most > 127) throw std::invalid_argument("a code is not one of the format's");
    if (!std::isfinite(scale)) throw std::invalid_argument("a scale is NaN or infinite");
    return b;
}

// Output n of a tile; `tile` is zero where nothing has been placed.
void place_codes(const uint8_t* codes, size_t n, int multiple, Format format, uint8_t* tile) {
    for (size_t k = 0; k < kTileK; ++k)
        if (format == Format::int8)
            tile[int8_byte(n, k)] = static_cast<uint8_t>(multiple * static_cast<int8_t>(codes[k]));
        else
            tile[nibble_byte(n, k)] |= static_cast<uint8_t>(codes[k] << (nibble_is_high(k) ? 4 : 0));
}

// The code of the value 0, under a zero point of 0: what outputs that are not there have.
uint8_t zero_code(Format format) {
    if (format == Format::int8) return 0;
    const Codebook& values = codebook(format);
    return static_cast<uint8_t>(std::find(values.begin(), values.end(), 0.0f) - values.begin());
}

PackSums place_panel(const PlaceArgs& a, size_t p, const std::array<double, 256>& values) {
    const size_t k_tiles = a.k / kTileK, first = p * kTileN, n_rows = std::min(kTileN, a.n - first);
    uint8_t* panel = a.panels + p * panel_bytes(a.format, k_tiles);
    std::memset(panel, 0, panel_bytes(a.format, k_tiles));
    const auto codes_at = [&](size_t n, size_t t) { return a.codes + (first + n) * a.k + t * kTileK; };

    std::vector<Block> blocks;  // tile by tile, output by output
    for (size_t t = 0; t < k_tiles; ++t)
        for (size_t n = 0; n < n_rows; ++n) {
            const size_t at = (first + n) * k_tiles + t;
            blocks.push_back(
                read_block(codes_at(n, t), a.block_scales[at], a.zeros ? a.zeros[at] : int8_t{0}, a.format, values));
        }

    const float g = a.panel_scales[p] = choose_panel_scale(blocks, a.format);
    std::array<uint8_t, kTileK> nothing;
    nothing.fill(zero_code(a.format));
    PackSums sums;
    for (size_t t = 0; t < k_tiles; ++t) {
        uint8_t* tile = panel + code_offset(a.format, t, k_tiles);
        for (size_t n = 0; n < n_rows; ++n) {
            const Block& b = blocks[t * n_rows + n];
            const Placed placed = place_block(b, g, a.format);
            uint8_t* scale = panel + scale_offset(a.format, t) + n;
            *scale = placed.byte;
            if (has_zeros(a.format)) scale[kTileN] = static_cast<uint8_t>(b.zero);
            place_codes(codes_at(n, t), n, placed.multiple, a.format, tile);
            sums.error += b.squares * placed.error;
            sums.reference += b.squares * static_cast<double>(b.scale) * static_cast<double>(b.scale);
        }
        for (size_t n = n_rows; n < kTileN; ++n) place_codes(nothing.data(), n, 1, a.format, tile);
    }
    return sums;
}

}  // namespace

PackSums place(const PlaceArgs& a) {
    const OwnArithmetic while_computing;
    const std::array<double, 256> values = values_of(a.format);
    PackSums sums;
    for (size_t p = 0; p < panels_of(a.n); ++p) {
        const PackSums panel = place_panel(a, p, values);
        sums.error += panel.error, sums.reference += panel.reference;
    }
    return sums;
}

}  // namespace fourfold
