// The tile format: how a weight matrix lies in memory and on disk. docs/format.md is the specification; this is its
// code.
//
//   matrix (N, K)  = panels of 16 outputs, one after another
//   panel          = groups of up to 4 tiles (256 inputs)
//   group          = [scales: 16 bytes a tile][codes of tile 0][codes of tile 1]...     (bf16, f32: no scales;
//                    uint4: 32 bytes a tile, 16 scales and 16 zero points)
//   tile           = 16 outputs x 64 inputs = 8 vectors of 64 bytes (4-bit formats); a 32-bit lane is an output
//
//   lane of a 4-bit vector j:  bits 0-3  4-7  8-11 12-15 16-19 20-23 24-27 28-31
//   input 8j + ...                  0    4    1    5     2     6     3     7
#pragma once
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace fourfold {

enum class Format : uint8_t { nf4, int4, fp4, fp4_bnb, uint4, int8, bf16, f32 };
constexpr int kFormats = 8;
constexpr std::array<std::string_view, kFormats> kFormatNames = {"nf4",   "int4", "fp4",  "fp4_bnb",
                                                                 "uint4", "int8", "bf16", "f32"};

constexpr size_t kTileN = 16;      // outputs: the 32-bit lanes of a 512-bit vector, the columns of an AMX tile
constexpr size_t kTileK = 64;      // inputs: the quantization block
constexpr size_t kGroupTiles = 4;  // tiles that share one 64-byte line of scales

constexpr bool has_scales(Format f) { return f <= Format::int8; }
constexpr bool is_4bit(Format f) { return f <= Format::uint4; }
// Whose blocks have a zero point, a signed byte, that is taken from every code.
constexpr bool has_zeros(Format f) { return f == Format::uint4; }

// Bytes of codes a tile.
constexpr size_t code_bytes(Format f) {
    constexpr size_t bytes[] = {512, 512, 512, 512, 512, 1024, 2048, 4096};
    return bytes[static_cast<size_t>(f)];
}
// Bytes of scales a tile, and of zero points where there are any.
constexpr size_t scale_bytes(Format f) { return has_zeros(f) ? 2 * kTileN : has_scales(f) ? kTileN : 0; }
constexpr size_t tile_bytes(Format f) { return code_bytes(f) + scale_bytes(f); }
constexpr size_t panel_bytes(Format f, size_t k_tiles) { return k_tiles * tile_bytes(f); }
constexpr size_t panels_of(size_t n) { return (n + kTileN - 1) / kTileN; }
constexpr size_t tiles_of(size_t k) { return (k + kTileK - 1) / kTileK; }

// Where the scales of tile t lie within a panel of k_tiles tiles: byte n for output n; its zero point is kTileN on.
constexpr size_t scale_offset(Format f, size_t t) {
    return t / kGroupTiles * kGroupTiles * tile_bytes(f) + t % kGroupTiles * scale_bytes(f);
}
// Where the codes of tile t lie within a panel of k_tiles tiles.
constexpr size_t code_offset(Format f, size_t t, size_t k_tiles) {
    const size_t first = t / kGroupTiles * kGroupTiles;
    const size_t in_group = k_tiles - first < kGroupTiles ? k_tiles - first : kGroupTiles;
    return first * tile_bytes(f) + in_group * scale_bytes(f) + (t - first) * code_bytes(f);
}

// Within a tile: the byte that holds the code of (n, k) in a 4-bit format, and whether it is the high nibble.
constexpr size_t nibble_byte(size_t n, size_t k) { return k / 8 * 64 + n * 4 + k % 4; }
constexpr bool nibble_is_high(size_t k) { return k % 8 >= 4; }
// Within an int8 tile: the byte of (n, k).
constexpr size_t int8_byte(size_t n, size_t k) { return k / 4 * 64 + n * 4 + k % 4; }
// Within a group of 8 inputs, the order in which 16-bit formats and activations hold them: pairs (0,2) (4,6) (1,3)
// (5,7).
constexpr std::array<uint8_t, 8> kPairOrder = {0, 2, 4, 6, 1, 3, 5, 7};
constexpr std::array<uint8_t, 8> kPairPlace = {0, 4, 1, 5, 2, 6, 3, 7};  // its inverse
// Within a bf16 tile: the 16-bit word of (n, k).
constexpr size_t bf16_word(size_t n, size_t k) {
    const size_t place = kPairPlace[k % 8];
    return (k / 8 * 4 + place / 2) * 32 + n * 2 + place % 2;
}

// The 16 values of the 4-bit formats. NF4: QLoRA, arXiv 2305.14314, appendix E. FP4: E2M1 over 6. INT4: (code - 8) / 8.
// FP4 of bitsandbytes: twelfths, in its order of codes. UINT4: the code, from which the zero point is yet to be taken.
using Codebook = std::array<float, 16>;
constexpr std::array<Codebook, 5> kCodebooks = {
    Codebook{-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
             -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
             0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f,
             1.0f},
    Codebook{-1.0f, -0.875f, -0.75f, -0.625f, -0.5f, -0.375f, -0.25f, -0.125f, 0.0f, 0.125f, 0.25f, 0.375f, 0.5f,
             0.625f, 0.75f, 0.875f},
    Codebook{0.0f, 0.5f / 6, 1.0f / 6, 1.5f / 6, 2.0f / 6, 3.0f / 6, 4.0f / 6, 1.0f, -0.0f, -0.5f / 6, -1.0f / 6,
             -1.5f / 6, -2.0f / 6, -3.0f / 6, -4.0f / 6, -1.0f},
    Codebook{0.0f, 0.0625f / 12, 8.0f / 12, 1.0f, 4.0f / 12, 6.0f / 12, 2.0f / 12, 3.0f / 12, -0.0f, -0.0625f / 12,
             -8.0f / 12, -1.0f, -4.0f / 12, -6.0f / 12, -2.0f / 12, -3.0f / 12},
    Codebook{0.0f, 1.0f, 2.0f, 3.0f, 4.0f, 5.0f, 6.0f, 7.0f, 8.0f, 9.0f, 10.0f, 11.0f, 12.0f, 13.0f, 14.0f, 15.0f},
};
constexpr const Codebook& codebook(Format f) { return kCodebooks[static_cast<size_t>(f)]; }
// What is taken from the codebook's values of the output whose scale byte is at `scale`.
inline float zero_point(Format f, const uint8_t* scale) {
    return has_zeros(f) ? static_cast<float>(static_cast<int8_t>(scale[kTileN])) : 0.0f;
}

// Numbers of the world outside: a checkpoint's weights, another framework's activations.
enum class NumberType : uint8_t { f32, f16, bf16 };

// IEEE half precision to float32 and, to nearest even, back. A NaN stays one.
static inline float from_half(uint16_t h) {
    const uint32_t sign = (h & 0x8000u) << 16, rest = h & 0x7FFFu;
    if (rest >= 0x7C00) return std::bit_cast<float>(sign | 0x7F800000 | (rest & 0x3FF) << 13);
    // As if it were a float32 of the same fields, its exponent is 112 too small; this mends the subnormals too.
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(std::bit_cast<float>(rest << 13) * 0x1p112f));
}
static inline uint16_t to_half(float x) {
    const auto bits = std::bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7FFFFFFF;
    const auto half = [&]() -> uint32_t {
        if (rest > 0x7F800000) return 0x7E00 | (rest >> 13 & 0x3FF);
        if (rest >= 0x477FF000) return 0x7C00;  // beyond 65504
        // Adding 1/2 leaves a subnormal's multiple of 2^-24 in the low bits.
        if (rest < 0x38800000) return std::bit_cast<uint32_t>(std::bit_cast<float>(rest) + 0.5f) - 0x3F000000;
        return (rest + 0xFFF + (rest >> 13 & 1) - 0x38000000) >> 13;
    };
    return static_cast<uint16_t>(sign | half());
}

// FP8 E4M3 (fn): the 7 magnitude bits are those of a float32 whose exponent is 120 too small. Exact, subnormals
// included.
inline float e4m3(uint8_t byte) {
    const float magnitude = std::bit_cast<float>(static_cast<uint32_t>(byte & 0x7F) << 20) * 0x1p120f;
    return byte & 0x80 ? -magnitude : magnitude;
}

}  // namespace fourfold
