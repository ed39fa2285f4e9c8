// y = x Wᵀ + bias on a caller's arrays: the kernels without a program, for those who have a matrix and some rows.
//
// Walk of a call, for each block of rows: the rows are packed as the kernel wants them, by the caller alone where that
// is less than waking others costs; then the threads take panels a few at a time, their own first, and help who has
// most left (shares.h), with sums that stay in their L2, and round them to the caller's numbers. One token is read at
// the speed of the memory; the rest is two calls of the crew.
#pragma once
#include <cstddef>
#include <cstdint>

#include "crew.h"
#include "format.h"
#include "isa.h"

namespace fourfold {

// A whole matrix (n, k) in the tile format, in anybody's memory, at any address.
struct MatrixView {
    Format format;
    size_t n, k;
    const uint8_t* panels;      // panels_of(n) of panel_bytes(format, tiles_of(k))
    const float* panel_scales;  // (panels_of(n)); null for bf16 and f32
};

struct MatmulArgs {
    MatrixView w;
    const void* x;  // (m, k), rows x_stride numbers apart
    NumberType x_type;
    size_t m, x_stride;
    const void* bias;  // (n), or null
    NumberType bias_type;
    void* y;  // (m, n), dense
    NumberType y_type;
};

// The kernel is the best of this ISA for m rows. The result is the same bits for any crew and any number of threads.
// Working memory is the calling thread's own, kept from call to call: up to 1.2 MB and a row a thread, and one block of
// rows. Throws std::bad_alloc where there is none.
void matmul(const MatmulArgs& args, Isa isa, Crew& crew, size_t n_threads);

// Rows [begin, end) of the matrix as float32 (end - begin, k).
void unpack_rows(const MatrixView& w, size_t begin, size_t end, float* out, Isa isa, Crew& crew, size_t n_threads);

}  // namespace fourfold
