// Everything that is not a matrix, avx512: the dialect of this file's flags.
#include "kernels/decode_avx512.h"
#include "kernels/dialect.h"
#include "kernels/linear_rows.h"

namespace fourfold {
namespace {
#include "kernels/attention.inl"
#include "kernels/numbers.inl"
#include "kernels/rowwise.inl"

// The codes of an int8 page as the elements of a bf16 page.
void widen_page(const uint8_t* page, size_t d, uint8_t* to) {
    for (size_t dim = 0; dim < d; dim += 2)
        for (size_t p = 0; p < kPage; p += 16, to += 64) {
            const uint8_t* codes = page + dim * kPage + p;
            _mm512_storeu_si512(to, bf16_lanes(codes, codes + kPage));
        }
    for (size_t first = 0; first < KvPage::padded(d); first += KvPage::kBlock) {
        const size_t width = KvPage::block_width(d, first);
        const uint8_t* codes = page + KvPage::block_offset(KvFormat::int8, d, first);
        for (size_t row = 0; row < kPage; row += 2, codes += 2 * width)
            for (size_t column = 0; column < width; column += 16, to += 64)
                _mm512_storeu_si512(to, bf16_lanes(codes + column, codes + width + column));
    }
}

void attend_int8_widened(const AttendArgs& a) { attend_as<KvFormat::int8, KvFormat::bf16>(a, widen_page); }

constexpr size_t kMany = 33;  // rows of a step

constexpr AttendKernel kAttend[] = {
    {"attend_int8_avx512_bf16", Isa::avx512, KvFormat::int8, kMany, SIZE_MAX, attend_int8_widened, 0x1p-8f},
    attend_row("attend_bf16_avx512", Isa::avx512, KvFormat::bf16),
    attend_row("attend_int8_avx512", Isa::avx512, KvFormat::int8),
    attend_row("attend_f32_avx512", Isa::avx512, KvFormat::f32),
};

}  // namespace

std::span<const AttendKernel> attend_rows_avx512() { return kAttend; }

extern const RowKernels kRowsAvx512 = {Isa::avx512, rms_factor, scale_row, rope, silu_mul,   gelu_tanh_mul, add_parts,
                                       merge,       kv_store,   kv_clear,  pack, unpack_row, widen,         narrow};

}  // namespace fourfold
