// Products of prepared rows with packed matrices, and their preparation. One implementation, linear.inc, compiled once for
// each instruction set over its 16-lane vectors (simd_*.h); this header is what the rest sees of them.
//
// Every output is one chain of operations in rising k, the same whatever the number of rows, the tile or the thread: a
// row's result does not depend on its batch.
#pragma once

#include "matrix.h"
#include "pool.h"

namespace hasten {

// Where a product goes: y[row * stride + column] = scale * (x W^T + bias), or += where accumulate is set (the residual).
struct Output {
  float* y;
  ptrdiff_t stride;
  float scale;
  bool accumulate;
};

struct LinearKernels {
  int tile_rows;  // the most rows of one tile; half as many at Q16
  bool (*takes)(Kind kind);  // whether this CPU multiplies such weights: some have no F8, I8Sparse and BF16Sparse
  // Quantise / convert rows x[i * stride], i in [first, last), of a batch laid out by `act`. perm may be nullptr.
  void (*prepare)(const float* x, ptrdiff_t stride, int k, const int32_t* perm, Activations& act, int first, int last);
  // y for row blocks [first, last) of `w` and every row of `act`. scratch is this thread's, scratch_bytes() long.
  void (*product)(const Matrix& w, const Activations& act, int first, int last, const Output& out, uint8_t* scratch);
  // One row of w as float (an embedding), times scale.
  void (*row)(const Matrix& w, int row, float scale, float* out);
};

constexpr int kMaxTileRows = 16;  // no instruction set's tiles have more rows

size_t source_row_bytes(Kind kind, int k);                                  // of one row as a checkpoint stores it
size_t matrix_bytes(const Matrix& w);                                       // numbers, scales and zeros
size_t act_bytes(ActKind kind, int rows, int k_pad, int group);             // size of all three arrays together
Activations make_activations(ActKind kind, int rows, int k_pad, int group, uint8_t* memory);
size_t scratch_bytes(const Matrix& w);                                      // of one thread's scratch, for any number of rows
int num_tiles(int rows, int tile_rows);
int tile_of_row(int rows, int tile_rows, int row);
int tile_first_row(int rows, int tile_rows, int tile);                      // tile in [0, num_tiles]; last gives rows

// Allocates (huge pages where the system gives them) and packs, on all threads. Throws std::bad_alloc. bias and perm are
// left null and stay the caller's. fine_inputs: int8 weights meet activations of 16 bits, and 2:4 ones are packed whole.
Matrix pack(const Source* parts, int num_parts, Pool& pool, bool fine_inputs);  // parts stacked by rows; one kind and group
void release(Matrix& w);

// Splits a product over the pool: chunks small enough that a stolen core costs little.
void linear(Pool& pool, const LinearKernels& kernels, const Matrix& w, const Activations& act, const Output& out,
            uint8_t* const* scratch);

}  // namespace hasten
