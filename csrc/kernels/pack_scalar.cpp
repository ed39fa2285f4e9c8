// pack, scalar: one output at a time; the definition of correct.
#include "pack.h"

namespace fourfold {
namespace {

struct Lanes {
    static constexpr size_t W = 1;
    static constexpr bool kHasTable32 = false;
    using F = float;
    using I = int32_t;
    struct Table {
        float entries[16];
        explicit Table(const float (&t)[16]) {
            for (int i = 0; i < 16; ++i) entries[i] = t[i];
        }
        explicit Table(const int32_t (&t)[16]) {
            for (int i = 0; i < 16; ++i) entries[i] = floats(t[i]);
        }
    };
    static F load(const float* p) { return *p; }
    static I load(const int32_t* p) { return *p; }
    static void store(float* p, F x) { *p = x; }
    static void store(int32_t* p, I x) { *p = x; }
    static F splat(float x) { return x; }
    static I bits(F x) { return __builtin_bit_cast(I, x); }
    static F floats(I x) { return __builtin_bit_cast(F, x); }
    static F to_float(I x) { return static_cast<F>(x); }
    static F lookup(const Table& t, I i) { return t.entries[i]; }
    static F lookup8(const Table& t, I i) { return t.entries[i]; }
    static I turn(I i, int bit, F w, F t) { return i | (w > t ? bit : 0); }
};

#include "pack.inl"

}  // namespace

PackSums pack_panel_scalar(Format format, const float* columns, size_t k_tiles, uint8_t* panel, float* panel_scale) {
    return pack_panel(format, columns, k_tiles, panel, panel_scale);
}

}  // namespace fourfold
