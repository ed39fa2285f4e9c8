// The packer, written once: a lane is an output, a step of a loop an input. The including file defines `Lanes`, its
// dialect:
//   W                    lanes: a divisor of the tile's 16 outputs
//   F, I                 W float32, W int32; operators act lane by lane, and `m ? a : b` where m compares two F
//   load, store, splat   between memory and lanes
//   bits, floats         of F as I, of I as F;  to_float: I converted to F
//   Table, lookup(t, i)  16 floats; t[i], i < 16;   lookup8: for i < 8
//   turn(i, bit, w, t)   i | (w > t ? bit : 0)
//   Table32              where kHasTable32: 32 floats; lookup32(t, i): t[i mod 32]
//
// What bounds it: arithmetic. A weight of a 4-bit format is tried 8 times (4 scales, each mirrored and not) and coded
// once, by 4 comparisons on the way down a tree of thresholds. A threshold is midpoint * scale, rounded, as the
// specification has it; rounding keeps their order, so the way ends where counting all 15 of them would.
//
// A try needs only the value, and with tables of 32 finds it by one comparison: weight / scale, roughly, says the
// bucket, and a bucket has one midpoint at most. The same value, bit for bit: midpoints keep away from the buckets'
// edges by more than the quotient is wrong, and on either side of an edge both buckets give the value that lies there.
using F = Lanes::F;
using I = Lanes::I;
constexpr size_t W = Lanes::W;

constexpr float kE4m3Max = 448.0f;
constexpr float kRound = 12582912.0f;       // 1.5 * 2^23: adding it rounds |x| < 2^22 to an integer, half to even,
constexpr int32_t kRoundBits = 0x4B400000;  // which then stands in the low bits
constexpr int kCandidates = 4;              // scale bytes tried: c-2 .. c+1
constexpr int32_t kMirrored = 128;          // the sign bit of a scale byte

// The nearest E4M3 byte of x >= 0, half to even; 127 where x rounds beyond 448.
int e4m3_byte(float x) {
    if (x < 0x1p-6f) return __builtin_bit_cast(int32_t, x * 0x1p9f + kRound) - kRoundBits;  // subnormals: steps of 2^-9
    const uint32_t bits = __builtin_bit_cast(uint32_t, x);
    const uint32_t byte = ((bits + 0x7FFFF + (bits >> 20 & 1)) >> 20) - (127 - 7) * 8;  // 3 bits of mantissa stay
    return byte > 127 ? 127 : static_cast<int>(byte);
}

// A 4-bit codebook and its 15 midpoints as a binary tree. A path to a leaf is 4 bits, the first turn the lowest, 1
// where the weight is above the midpoint there. Of the midpoints at depth d, midpoints[d][path] is the one that d turns
// lead to.
struct Tree {
    float midpoints[4][16] = {};
    float values[16] = {};   // by path
    int32_t codes[16] = {};  // by path, as stored
    int32_t zero = 0;        // the code of the value 0, as stored
};
constexpr Tree make_tree(Format format) {
    float ascending[16] = {};
    int32_t codes[16] = {};
    const float* values = kCodebooks[static_cast<size_t>(format)].data();
    int n_values = 0;  // sign and magnitude have 15: their zeros count once, and the 16th place is out of reach
    for (float last = -2.0f; n_values < 16; ++n_values) {
        int next = -1;
        for (int code = 0; code < 16; ++code)
            if (values[code] > last && (next < 0 || values[code] < values[next])) next = code;
        if (next < 0) break;
        codes[n_values] = next;
        ascending[n_values] = last = values[next];
    }
    for (int i = n_values; i < 16; ++i) codes[i] = codes[i - 1], ascending[i] = ascending[i - 1];
    Tree tree;
    for (int path = 0; path < 16; ++path) {
        int first = 0;  // of the places that are left
        for (int depth = 0; depth < 4; ++depth) {
            const int half = 8 >> depth, below = first + half - 1;
            const bool is_reachable = below + 1 < n_values;
            if (path < 1 << depth)
                tree.midpoints[depth][path] =
                    is_reachable ? (ascending[below] + ascending[below + 1]) * 0.5f : __builtin_inff();
            if (path >> depth & 1) first += half;
        }
        tree.values[path] = ascending[first];
        tree.codes[path] = codes[first];
        if (ascending[first] == 0) tree.zero = codes[first];
    }
    return tree;
}
// Bucket i is [(i - 16.5) / kBucketsPerUnit, (i - 15.5) / kBucketsPerUnit) of weight / scale; the outermost go on.
constexpr float kBucketsPerUnit = 15.8f;  // keeps the midpoints of nf4, int4 and fp4 farthest from the edges
constexpr float kFarthest = 15.4f;        // from bucket 16: what is farther has the value of the last bucket
constexpr float kLeastScale = 1e-30f;     // above it kBucketsPerUnit / scale is finite
struct Buckets {
    float midpoint[32] = {}, below[32] = {}, above[32] = {};  // the one in the bucket, and the values beside it
    bool is_sound = true;
};
constexpr Buckets make_buckets(const Tree& tree) {
    float ascending[16] = {}, midpoints[15] = {};
    for (int path = 0; path < 16; ++path) {
        const int place = (path & 1) << 3 | (path & 2) << 1 | (path & 4) >> 1 | path >> 3;
        ascending[place] = tree.values[path];
    }
    for (int i = 0; i < 15; ++i) midpoints[i] = (ascending[i] + ascending[i + 1]) * 0.5f;
    Buckets buckets;
    for (int i = 0, passed = 0; i < 32; ++i) {  // passed: midpoints below the bucket
        buckets.below[i] = buckets.above[i] = ascending[passed];
        const float end = (static_cast<float>(i) - 15.5f) / kBucketsPerUnit, margin = 0.05f / kBucketsPerUnit;
        if (passed == 15 || midpoints[passed] > end) continue;
        const float begin = end - 1 / kBucketsPerUnit;
        buckets.is_sound &= midpoints[passed] > begin + margin && midpoints[passed] < end - margin;
        buckets.midpoint[i] = midpoints[passed];
        buckets.above[i] = ascending[++passed];
        buckets.is_sound &= passed == 15 || midpoints[passed] > end;
    }
    return buckets;
}

constexpr Tree kTrees[] = {make_tree(Format::nf4), make_tree(Format::int4), make_tree(Format::fp4),
                           make_tree(Format::fp4_bnb)};

// How the weights of a block become codes and codes values. `Block` is what its scale fixes.
template <Format format>
struct Coder {  // the 4-bit formats
    static constexpr bool kMirrors = format == Format::nf4 || format == Format::int4;
    static constexpr Tree kTree = kTrees[static_cast<size_t>(format)];
    static constexpr int32_t kZero = kTree.zero;
    Lanes::Table second{kTree.midpoints[1]}, third{kTree.midpoints[2]}, fourth{kTree.midpoints[3]};
    Lanes::Table values{kTree.values}, codes{kTree.codes};

    struct Block {
        F scale, root;
    };
    Block block(F scale) const { return {scale, Lanes::splat(kTree.midpoints[0][0]) * scale}; }
    I code(const Block& b, F w) const {
        I path = Lanes::turn(I{}, 1, w, b.root);
        path = Lanes::turn(path, 2, w, Lanes::lookup8(second, path) * b.scale);
        path = Lanes::turn(path, 4, w, Lanes::lookup8(third, path) * b.scale);
        return Lanes::turn(path, 8, w, Lanes::lookup8(fourth, path) * b.scale);
    }
    F value(const Block& b, I path) const { return b.scale * Lanes::lookup(values, path); }
    I stored(I path) const { return Lanes::bits(Lanes::lookup(codes, path)); }
    F nearest(const Block& b, F w) const { return value(b, code(b, w)); }
};
// What Coder::nearest gives, for scales from kLeastScale on.
template <Format format, class L>
struct Bucketer {
    static constexpr Buckets kBuckets = make_buckets(kTrees[static_cast<size_t>(format)]);
    static_assert(kBuckets.is_sound);
    L::Table32 midpoint{kBuckets.midpoint}, below{kBuckets.below}, above{kBuckets.above};

    struct Block {
        F scale, inverse;
    };
    Block block(F scale) const { return {scale, Lanes::splat(kBucketsPerUnit) / scale}; }
    F nearest(const Block& b, F w) const {
        const F most = Lanes::splat(kFarthest), x = w * b.inverse, low = x < -most ? -most : x;
        const I bucket = Lanes::bits((most < low ? most : low) + (kRound + 16));
        const auto is_above = w > L::lookup32(midpoint, bucket) * b.scale;
        return b.scale * (is_above ? L::lookup32(above, bucket) : L::lookup32(below, bucket));
    }
};
template <>
struct Coder<Format::int8> {
    static constexpr bool kMirrors = false;
    static constexpr int32_t kZero = 0;

    struct Block {
        F scale, inverse;
    };
    Block block(F scale) const { return {scale, Lanes::splat(127.0f) / scale}; }
    I code(const Block& b, F w) const {
        const F most = Lanes::splat(127.0f), x = w * b.inverse;
        const F low = x < -most ? -most : x, clipped = most < low ? most : low;
        const F safe = w == F{} ? w : clipped;  // 0 * inverse is not a number where the inverse is infinite
        return Lanes::bits(safe + kRound) - kRoundBits;
    }
    F value(const Block& b, I code) const { return b.scale * (Lanes::to_float(code) / 127.0f); }
    I stored(I code) const { return code & 0xFF; }
    F nearest(const Block& b, F w) const { return value(b, code(b, w)); }
};

// One block per lane: the sums of (weight - value)^2 and weight^2, over its inputs in order.
struct BlockSums {
    F error{}, reference{};
};

// The scale bytes tried for blocks whose scale would be `ideal`, and the scales under the panel's, g.
struct TriedScales {
    float scales[kCandidates][W];
    int32_t bytes[kCandidates][W];
    bool is_tiny = false;  // one of the scales is below kLeastScale
    TriedScales(F ideal, float g) {
        float ratios[W];
        Lanes::store(ratios, ideal / Lanes::splat(g));
        for (size_t n = 0; n < W; ++n)
            for (int i = 0; i < kCandidates; ++i) {
                const int byte = e4m3_byte(ratios[n]) - 2 + i;
                bytes[i][n] = byte < 1 ? 1 : byte > 126 ? 126 : byte;
                scales[i][n] = g * e4m3(static_cast<uint8_t>(bytes[i][n]));
                is_tiny |= !(scales[i][n] >= kLeastScale);
            }
    }
};

// Stores a tile's codes of W outputs, code_at(k), k ascending: a 32-bit lane holds those of 8 inputs, byte k % 4, the
// high nibbles from the fifth on; or of 4 in int8.
template <size_t PER_LANE, class CodeAt>
void store_codes(uint8_t* codes, CodeAt&& code_at) {
    for (size_t k0 = 0; k0 < kTileK; k0 += PER_LANE) {
        I lanes{};
        for (size_t k = 0; k < PER_LANE; ++k)
            lanes = lanes | code_at(k0 + k) << static_cast<int>(k % 4 * 8 + k / 4 * 4);
        Lanes::store(reinterpret_cast<int32_t*>(codes + k0 / PER_LANE * 64), lanes);
    }
}

// W outputs of one tile; `columns`, `scales` and `codes` begin at the first of them. g is the panel's scale.
template <Format format>
BlockSums pack_block(const Coder<format>& coder, const float* columns, float g, uint8_t* scales, uint8_t* codes) {
    F largest{}, squares{};
    for (size_t k = 0; k < kTileK; ++k) {
        const F w = Lanes::load(columns + k * kTileN), a = w < F{} ? -w : w;
        largest = largest < a ? a : largest;
        squares += w * w;
    }

    const TriedScales tried(largest, g);
    F error = Lanes::splat(__builtin_inff()), scale = Lanes::load(tried.scales[0]), sign = Lanes::splat(1.0f);
    I byte = Lanes::load(tried.bytes[0]);
    const auto try_each = [&](const auto& coder) {
        for (int candidate = 0; candidate < (Coder<format>::kMirrors ? 2 : 1) * kCandidates; ++candidate) {
            const bool is_mirrored = candidate >= kCandidates;
            const F s = Lanes::load(tried.scales[candidate % kCandidates]);
            const F side = Lanes::splat(is_mirrored ? -1.0f : 1.0f);
            const auto block = coder.block(s);
            F e{};
            for (size_t k = 0; k < kTileK; ++k) {
                const F w = Lanes::load(columns + k * kTileN) * side;
                const F miss = w - coder.nearest(block, w);
                e += miss * miss;
            }
            const auto is_better = e < error;
            error = is_better ? e : error;
            scale = is_better ? s : scale;
            sign = is_better ? side : sign;
            byte = is_better ? Lanes::load(tried.bytes[candidate % kCandidates]) + (is_mirrored ? kMirrored : 0) : byte;
        }
    };
    // Two midpoints of fp4_bnb, on either side of 0, share a bucket.
    if constexpr (is_4bit(format) && format != Format::fp4_bnb && Lanes::kHasTable32)
        tried.is_tiny ? try_each(coder) : try_each(Bucketer<format, Lanes>());
    else
        try_each(coder);

    const auto is_zero = largest == F{};
    int32_t bytes[W];
    Lanes::store(bytes, is_zero ? I{} : byte);
    for (size_t n = 0; n < W; ++n) scales[n] = static_cast<uint8_t>(bytes[n]);

    const auto block = coder.block(scale);
    store_codes<is_4bit(format) ? 8 : 4>(codes, [&](size_t k) {
        const I code = coder.stored(coder.code(block, Lanes::load(columns + k * kTileN) * sign));
        return is_zero ? I{} + Coder<format>::kZero : code;
    });
    return {is_zero ? F{} : error, squares};
}

#include "kernels/pack_uint4.inl"

BlockSums pack_block_bf16(const float* columns, uint8_t* codes) {
    BlockSums sums;
    for (size_t k0 = 0; k0 < kTileK; k0 += 8)
        for (size_t place = 0; place < 8; place += 2) {
            I lanes{};
            for (size_t e = 0; e < 2; ++e) {
                const F w = Lanes::load(columns + (k0 + kPairOrder.data()[place + e]) * kTileN);
                const I bits = Lanes::bits(w), word = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;  // to nearest even
                const F miss = w - Lanes::floats(word << 16);
                sums.error += miss * miss;
                sums.reference += w * w;
                lanes = lanes | (word & 0xFFFF) << static_cast<int>(16 * e);
            }
            Lanes::store(reinterpret_cast<int32_t*>(codes + (k0 / 8 * 4 + place / 2) * 64), lanes);
        }
    return sums;
}

BlockSums pack_block_f32(const float* columns, uint8_t* codes) {
    BlockSums sums;
    for (size_t k = 0; k < kTileK; ++k) {
        const F w = Lanes::load(columns + k * kTileN);
        sums.reference += w * w;
        Lanes::store(reinterpret_cast<float*>(codes) + k * kTileN, w);
    }
    return sums;
}

float panel_scale_of(const float* columns, size_t k_tiles) {
    F largest{};
    for (size_t i = 0; i < k_tiles * kTileK * kTileN; i += W) {
        const F w = Lanes::load(columns + i), a = w < F{} ? -w : w;
        largest = largest < a ? a : largest;
    }
    float lanes[W], most = 0;
    Lanes::store(lanes, largest);
    for (float lane : lanes) most = lane > most ? lane : most;
    return most / kE4m3Max;
}

// Tile by tile and output by output, in that order whatever W is: the sums are the same on every instruction set.
template <class PackBlock>
PackSums each_block(size_t k_tiles, PackBlock&& pack_block_at) {
    PackSums sums;
    for (size_t t = 0; t < k_tiles; ++t)
        for (size_t n0 = 0; n0 < kTileN; n0 += W) {
            const BlockSums block = pack_block_at(t, n0);
            float errors[W], references[W];
            Lanes::store(errors, block.error);
            Lanes::store(references, block.reference);
            for (size_t n = 0; n < W; ++n) {
                sums.error += static_cast<double>(errors[n]);
                sums.reference += static_cast<double>(references[n]);
            }
        }
    return sums;
}

template <Format format>
PackSums pack_scaled(const float* columns, size_t k_tiles, uint8_t* panel, float* panel_scale) {
    const float g = *panel_scale = panel_scale_of(columns, k_tiles);
    const Coder<format> coder;
    return each_block(k_tiles, [&](size_t t, size_t n) {
        return pack_block(coder, columns + t * kTileK * kTileN + n, g, panel + scale_offset(format, t) + n,
                          panel + code_offset(format, t, k_tiles) + n * 4);
    });
}

PackSums pack_uint4(const float* columns, size_t k_tiles, uint8_t* panel, float* panel_scale) {
    const float g = *panel_scale = uint4_panel_scale(columns, k_tiles);
    return each_block(k_tiles, [&](size_t t, size_t n) {
        return pack_uint4_block(columns + t * kTileK * kTileN + n, g, panel + scale_offset(Format::uint4, t) + n,
                                panel + code_offset(Format::uint4, t, k_tiles) + n * 4);
    });
}

PackSums pack_panel(Format format, const float* columns, size_t k_tiles, uint8_t* panel, float* panel_scale) {
    switch (format) {
        case Format::nf4:
            return pack_scaled<Format::nf4>(columns, k_tiles, panel, panel_scale);
        case Format::int4:
            return pack_scaled<Format::int4>(columns, k_tiles, panel, panel_scale);
        case Format::fp4:
            return pack_scaled<Format::fp4>(columns, k_tiles, panel, panel_scale);
        case Format::fp4_bnb:
            return pack_scaled<Format::fp4_bnb>(columns, k_tiles, panel, panel_scale);
        case Format::uint4:
            return pack_uint4(columns, k_tiles, panel, panel_scale);
        case Format::int8:
            return pack_scaled<Format::int8>(columns, k_tiles, panel, panel_scale);
        case Format::bf16:
            return each_block(k_tiles, [&](size_t t, size_t n) {
                return pack_block_bf16(columns + t * kTileK * kTileN + n, panel + t * code_bytes(format) + n * 4);
            });
        case Format::f32:
            return each_block(k_tiles, [&](size_t t, size_t n) {
                return pack_block_f32(columns + t * kTileK * kTileN + n, panel + t * code_bytes(format) + n * 4);
            });
    }
    return {};
}
