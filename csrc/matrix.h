// One weight matrix [n, k] as the kernels read it, and the rows it is multiplied with.
//
// Rows are interleaved by 16 (a "row block": one lane a row), each block's columns in the order in which they are used, so
// that a product reads the weights once, front to back. n is padded to 16 and k to 64 (with zero weights).
//
//   F32   [n/16][k][16]        f32            F16  [n/16][k][16]    f16
//   BF16  [n/16][k/2][16][2]   bf16
//   I8    [n/16][k/4][16][4]   u8 = value + 128
//   F8    [n/16][k/4][4][2][4][2]  e4m3; of each four rows columns 4i and 4i + 1, then 4i + 2 and 4i + 3
//   I8Sparse, BF16Sparse: two of each four columns kept; for 32 columns [n/16][k/32] first [16] masks of 32 bits (low bit:
//         first column), then [4][16][4] signed bytes, or [8][16][2] bf16
//   I4    [n/16][k/8][16][4]   byte j of a row: low nibble column 8i + j, high nibble column 8i + 4 + j; 0..15
//   scales f16 [n/16][groups][16], relative to `multiplier`, a power of two that keeps them normal; zeros u8 likewise.
//
// All instruction sets read this one layout; F8 and the sparse kinds only where LinearKernels::takes() says so.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hasten {

enum class Kind : uint8_t { F32, F16, BF16, BF16Sparse, F8, I8, I8Sparse, I4 };

// Functions here are static: a copy that the linker shared might have been compiled for instructions that this CPU lacks.
static constexpr bool is_integer(Kind kind) { return kind == Kind::I8 || kind == Kind::I8Sparse || kind == Kind::I4; }
static constexpr bool is_sparse(Kind kind) { return kind == Kind::I8Sparse || kind == Kind::BF16Sparse; }

static constexpr int kind_bits(Kind kind) {  // of a column's number; packed sparse kinds have a bit more for its place
  switch (kind) {
    case Kind::F32: return 32;
    case Kind::F16:
    case Kind::BF16: return 16;
    case Kind::F8:
    case Kind::I8:
    case Kind::BF16Sparse: return 8;
    case Kind::I4:
    case Kind::I8Sparse: break;
  }
  return 4;
}

// What a row must be turned into before a product. F32 serves F32 and F16 weights, BF16 serves BF16, BF16Sparse and F8, Q8 the
// integer kinds, Q16 int8 weights that were packed for it.
enum class ActKind : uint8_t { F32, BF16, Q8, Q16 };

constexpr int kBlockRows = 16;  // rows of a row block
constexpr int kPadK = 64;       // k is padded to a multiple of this
constexpr int kPanelBlocks = 4; // row blocks that a product passes over all rows before the next

struct Matrix {
  Kind kind;
  int n, k;              // as the model knows them
  int n_pad, k_pad;
  int group;             // columns a scale covers: 32, 64, 128; k_pad for one scale a row. Integer kinds and F8 only.
  ActKind act;           // how rows are prepared for it
  int act_group;         // columns an activation scale covers: 32, 64 or 128 (128 where group is larger); integer kinds
  uint8_t* data;         // 64-byte aligned, from memory.h
  uint16_t* scales;      // integer kinds and F8
  uint8_t* zeros;        // asymmetric I4, else nullptr (zero point 8)
  float multiplier;
  float* bias;           // [n_pad] or nullptr
  const int32_t* perm;   // [k] or nullptr: column j multiplies input perm[j]
};

static inline size_t block_bytes(const Matrix& w) {  // of the numbers
  return (size_t)kBlockRows * w.k_pad * (kind_bits(w.kind) + is_sparse(w.kind)) / 8;
}

// Source rows as a checkpoint stores them (see Weight in model/formats.py).
struct Source {
  Kind kind;
  int n, k, group;       // group: 0 (one scale a row), 32, 64 or 128
  const void* data;
  const float* scales;   // [n, ceil(k / group)]
  const uint8_t* zeros;  // same shape or nullptr
  const uint8_t* mask;   // [n, ceil(k / 8)] where data holds two of each four columns, low bit first; else nullptr
};

// Rows [rows, k_pad] in tiles of at most Kernels::tile_rows rows, all but the tail as equal as can be (tile_bounds in
// linear.h; half as many at Q16). Within a tile of m rows: F32 [k][m]; BF16 [k/2][m][2]; Q8 [k/4][m][4] signed; Q16
// [k/4][2][m][4] signed, a value being 254 * first + second. Q8 and Q16 have f32 scales [groups][m] and i32 sums
// [groups][m] (sums of the quantised values, for the zero points).
struct Activations {
  ActKind kind;
  int rows, k_pad, group;
  uint8_t* data;
  float* scales;
  int32_t* sums;
};

}  // namespace hasten
