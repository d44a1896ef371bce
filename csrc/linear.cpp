// The parts of linear.h that need no vectors: layouts, packing, and the division of a product among threads.
#include "linear.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "memory.h"

namespace hasten {
namespace {

constexpr size_t kVectorBytes = 64;   // vectors may read and write this much beyond the last value of an array

int round_up(int value, int unit) { return (value + unit - 1) / unit * unit; }
int divide_up(int value, int unit) { return (value + unit - 1) / unit; }
bool has_scales(Kind kind) { return is_integer(kind) || kind == Kind::F8; }
bool is_integer(ActKind kind) { return kind == ActKind::Q8 || kind == ActKind::Q16; }

ActKind act_kind(Kind weight, bool fine) {
  if (weight == Kind::I8 && fine) return ActKind::Q16;
  return is_integer(weight) ? ActKind::Q8 : weight == Kind::F32 || weight == Kind::F16 ? ActKind::F32 : ActKind::BF16;
}

int num_groups(const Matrix& w) { return has_scales(w.kind) ? divide_up(w.k_pad, w.group) : 0; }

size_t data_bytes(const Matrix& w) { return static_cast<size_t>(w.n_pad / kBlockRows) * block_bytes(w); }
size_t scale_count(const Matrix& w) { return static_cast<size_t>(w.n_pad) * num_groups(w); }

// Round to nearest even. Values whose f16 is subnormal take the slow way.
uint16_t to_f16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
  if (magnitude < 0x38800000) return static_cast<uint16_t>(sign | std::lrint(std::ldexp(std::fabs(value), 24)));
  return static_cast<uint16_t>(sign | (((magnitude + 0xfff + (magnitude >> 13 & 1)) >> 13) - (112 << 10)));
}

// One row of the stacked parts.
struct SourceRow {
  const uint8_t* data;  // nullptr: padding
  const float* scales;
  const uint8_t* zeros;
  const uint8_t* mask;
};

SourceRow source_row(const Source* parts, int num_parts, int row) {
  for (int i = 0; i < num_parts; i++) {
    const Source& part = parts[i];
    if (row < part.n) {
      const size_t r = static_cast<size_t>(row);
      const size_t groups = part.group ? divide_up(part.k, part.group) : 1;
      return {static_cast<const uint8_t*>(part.data) + r * source_row_bytes(part.kind, part.k),
              part.scales ? part.scales + r * groups : nullptr, part.zeros ? part.zeros + r * groups : nullptr,
              part.mask ? part.mask + r * divide_up(part.k, 8) : nullptr};
    }
    row -= part.n;
  }
  return {nullptr, nullptr, nullptr, nullptr};
}

// Eight int4 columns c0..c7, lowest nibble first, to c0 c4 c1 c5 c2 c6 c3 c7: a shuffle of bytes, then of nibbles.
uint32_t interleave_nibbles(uint32_t x) {
  uint32_t t = (x ^ (x >> 8)) & 0x0000ff00;
  x ^= t ^ (t << 8);
  t = (x ^ (x >> 4)) & 0x00f000f0;
  return x ^ t ^ (t << 4);
}

// Word i of 16 rows, side by side and each changed on the way; zeros beyond a row's end.
template <class Word, class Change>
void gather_words(const SourceRow* rows, const uint8_t* SourceRow::*part, size_t row_bytes, int i, uint8_t* to, Change change) {
  const size_t at = static_cast<size_t>(i) * sizeof(Word);
  const size_t there = at >= row_bytes ? 0 : std::min(sizeof(Word), row_bytes - at);
  Word line[kBlockRows];
  for (int r = 0; r < kBlockRows; r++) {
    Word word = 0;
    if (rows[r].*part && there == sizeof(Word))
      std::memcpy(&word, rows[r].*part + at, sizeof(Word));
    else if (rows[r].*part)
      std::memcpy(&word, rows[r].*part + at, there);
    line[r] = change(word);
  }
  std::memcpy(to, line, sizeof(line));
}

// A row block is a transposition of words: rows[16][words] to [words][16].
template <class Word, class Change>
void transpose_block(const SourceRow* rows, size_t row_bytes, int num_words, uint8_t* to, Change change) {
  for (int i = 0; i < num_words; i++)
    gather_words<Word>(rows, &SourceRow::data, row_bytes, i, to + i * sizeof(Word) * kBlockRows, change);
}

// 32 columns at a time: their masks, then their numbers.
void pack_sparse(const Matrix& w, const SourceRow* rows, size_t row_bytes, uint8_t* to) {
  const int words = kind_bits(w.kind);  // of a row's 16 numbers
  const auto same = [](uint32_t word) { return word; };
  for (int unit = 0; unit < w.k_pad / 32; unit++) {
    gather_words<uint32_t>(rows, &SourceRow::mask, divide_up(w.k, 8), unit, to, same);
    for (int i = 0; i < words; i++)
      gather_words<uint32_t>(rows, &SourceRow::data, row_bytes, unit * words + i, to + (i + 1) * 4 * kBlockRows, same);
    to += (words + 1) * 4 * kBlockRows;
  }
}

// The same as Kind::I8.
void pack_whole(const Matrix& w, const SourceRow* rows, uint8_t* to) {
  std::memset(to, 0x80, static_cast<size_t>(kBlockRows) * w.k_pad);
  for (int r = 0; r < kBlockRows && rows[r].data; r++)
    for (int c = 0, kept = 0; c < w.k; c++)
      if (rows[r].mask[c / 8] >> c % 8 & 1) to[c / 4 * 4 * kBlockRows + 4 * r + c % 4] = rows[r].data[kept++] ^ 0x80;
}

// Four columns of a row lie as two pairs, eight bytes apart: of four rows first the one pair, then the other.
void pack_float8(const Matrix& w, const SourceRow* rows, uint8_t* to) {
  std::memset(to, 0, static_cast<size_t>(kBlockRows) * w.k_pad);
  for (int r = 0; r < kBlockRows && rows[r].data; r++)
    for (int c = 0; c < w.k; c++) to[c / 4 * 64 + r / 4 * 16 + c % 4 / 2 * 8 + r % 4 * 2 + c % 2] = rows[r].data[c];
}

void pack_data(const Matrix& w, const SourceRow* rows, int block) {
  const size_t row_bytes = source_row_bytes(w.kind, w.k);
  uint8_t* to = w.data + static_cast<size_t>(block) * block_bytes(w);
  if (w.kind == Kind::I8 && rows[0].mask) return pack_whole(w, rows, to);
  const auto same = [](auto word) { return word; };
  switch (w.kind) {
    case Kind::F32: return transpose_block<uint32_t>(rows, row_bytes, w.k_pad, to, same);
    case Kind::F16: return transpose_block<uint16_t>(rows, row_bytes, w.k_pad, to, same);
    case Kind::BF16: return transpose_block<uint32_t>(rows, row_bytes, w.k_pad / 2, to, same);
    case Kind::I8:
      return transpose_block<uint32_t>(rows, row_bytes, w.k_pad / 4, to, [](uint32_t x) { return x ^ 0x80808080u; });
    case Kind::F8: return pack_float8(w, rows, to);
    case Kind::I8Sparse:
    case Kind::BF16Sparse: return pack_sparse(w, rows, row_bytes, to);
    case Kind::I4: return transpose_block<uint32_t>(rows, row_bytes, w.k_pad / 8, to, interleave_nibbles);
  }
}

void pack_scales(const Matrix& w, const SourceRow* rows, int block) {
  const int groups = num_groups(w), given = divide_up(w.k, std::min(w.group, w.k));
  const size_t first = static_cast<size_t>(block) * groups * kBlockRows;
  const float factor = 1.0f / w.multiplier;
  for (int g = 0; g < groups; g++)
    for (int r = 0; r < kBlockRows; r++) {
      const bool real = rows[r].data && g < given;
      const size_t at = first + static_cast<size_t>(g) * kBlockRows + r;
      w.scales[at] = real ? to_f16(rows[r].scales[g] * factor) : uint16_t{0};
      if (w.zeros) w.zeros[at] = real && rows[r].zeros ? rows[r].zeros[g] : uint8_t{8};
    }
}

// The power of two that brings the largest scale to [2^14, 2^15): 28 binades below it stay normal f16.
float scale_multiplier(const Source* parts, int num_parts, Pool& pool) {
  std::vector<float> largest(pool.size(), 0.0f);
  for (int i = 0; i < num_parts; i++) {
    const Source& part = parts[i];
    const size_t count = static_cast<size_t>(part.n) * (part.group ? divide_up(part.k, part.group) : 1);
    constexpr size_t kChunk = 16384;
    pool.run(static_cast<int>((count + kChunk - 1) / kChunk), [&](int chunk, int thread) {
      const size_t end = std::min(count, (static_cast<size_t>(chunk) + 1) * kChunk);
      float top = largest[thread];
      for (size_t j = static_cast<size_t>(chunk) * kChunk; j < end; j++) {
        const float s = std::fabs(part.scales[j]);
        top = s > top && s <= 3.4e38f ? s : top;
      }
      largest[thread] = top;
    });
  }
  const float top = *std::max_element(largest.begin(), largest.end());
  if (top == 0) return 1.0f;
  int exponent;
  std::frexp(top, &exponent);  // top = [0.5, 1) * 2^exponent
  return std::ldexp(1.0f, std::max(exponent - 15, -125));
}

}  // namespace

size_t act_bytes(ActKind kind, int rows, int k_pad, int group) {
  const size_t values = static_cast<size_t>(rows) * k_pad;
  if (kind == ActKind::F32) return values * 4;
  if (kind == ActKind::BF16) return values * 2;
  return values * (kind == ActKind::Q16 ? 2 : 1) + static_cast<size_t>(rows) * divide_up(k_pad, group) * 8 + kVectorBytes;
}

Activations make_activations(ActKind kind, int rows, int k_pad, int group, uint8_t* memory) {
  Activations act{kind, rows, k_pad, group, memory, nullptr, nullptr};
  if (is_integer(kind)) {
    const size_t values = static_cast<size_t>(rows) * k_pad * (kind == ActKind::Q16 ? 2 : 1), groups = divide_up(k_pad, group);
    act.scales = reinterpret_cast<float*>(memory + values);
    act.sums = reinterpret_cast<int32_t*>(memory + values + static_cast<size_t>(rows) * groups * 4);
  }
  return act;
}

size_t source_row_bytes(Kind kind, int k) { return (static_cast<size_t>(k) * kind_bits(kind) + 7) / 8; }

size_t matrix_bytes(const Matrix& w) { return data_bytes(w) + scale_count(w) * (w.zeros ? 3 : 2); }

size_t scratch_bytes(const Matrix& w) {
  const size_t groups = is_integer(w.kind) ? divide_up(w.k_pad, w.act_group) : 0;
  const size_t panel = w.kind == Kind::I8Sparse ? static_cast<size_t>(kPanelBlocks) * kBlockRows * w.k_pad : 0;
  return panel + groups * kMaxTileRows * 4 + kVectorBytes;
}

int num_tiles(int rows, int tile_rows) { return divide_up(rows, tile_rows); }

int tile_of_row(int rows, int tile_rows, int row) {
  const int num = num_tiles(rows, tile_rows), base = rows / num, longer = rows % num * (base + 1);
  return row < longer ? row / (base + 1) : rows % num + (row - longer) / base;
}

int tile_first_row(int rows, int tile_rows, int tile) {
  const int num = num_tiles(rows, tile_rows);
  return tile * (rows / num) + std::min(tile, rows % num);
}

Matrix pack(const Source* parts, int num_parts, Pool& pool, bool fine_inputs) {
  Matrix w{};
  w.kind = parts[0].kind == Kind::I8Sparse && fine_inputs ? Kind::I8 : parts[0].kind;  // for models too small to gain
  w.k = parts[0].k;
  bool zeros = false;
  for (int i = 0; i < num_parts; i++) {
    w.n += parts[i].n;
    zeros = zeros || parts[i].zeros;
  }
  w.n_pad = round_up(w.n, kBlockRows);
  w.k_pad = round_up(w.k, kPadK);
  w.act = act_kind(w.kind, fine_inputs);
  w.multiplier = 1.0f;
  if (has_scales(w.kind)) {
    w.group = parts[0].group ? parts[0].group : w.k_pad;
    if (is_integer(w.kind)) w.act_group = std::min(w.group, 128);
    w.multiplier = scale_multiplier(parts, num_parts, pool);
  }
  w.data = static_cast<uint8_t*>(allocate(data_bytes(w) + scale_count(w) * (zeros ? 3 : 2)));
  if (has_scales(w.kind)) {
    w.scales = reinterpret_cast<uint16_t*>(w.data + data_bytes(w));
    if (zeros) w.zeros = w.data + data_bytes(w) + scale_count(w) * 2;
  }
  const int num_blocks = w.n_pad / kBlockRows, step = std::max(1, num_blocks / (16 * pool.size()));
  pool.run(divide_up(num_blocks, step), [&](int chunk, int) {
    for (int block = chunk * step; block < std::min(num_blocks, (chunk + 1) * step); block++) {
      SourceRow rows[kBlockRows];
      for (int r = 0; r < kBlockRows; r++) rows[r] = source_row(parts, num_parts, block * kBlockRows + r);
      pack_data(w, rows, block);
      if (w.scales) pack_scales(w, rows, block);
    }
  });
  return w;
}

void release(Matrix& w) {
  if (w.data) deallocate(w.data, matrix_bytes(w));
  w.data = nullptr;
  w.scales = nullptr;
  w.zeros = nullptr;
}

void linear(Pool& pool, const LinearKernels& kernels, const Matrix& w, const Activations& act, const Output& out,
            uint8_t* const* scratch) {
  // What one row block costs a thread, roughly: its bytes at 16 GB/s or its products at 400 GOPS.
  const int num_blocks = w.n_pad / kBlockRows;
  const double bytes = static_cast<double>(matrix_bytes(w)) / num_blocks;
  const double microseconds = std::max(bytes / 16e3, 2.0 * kBlockRows * w.k_pad * act.rows / 400e3);
  constexpr double kShortest = 0.5, kLongest = 50;  // microseconds a chunk: claiming one costs 0.03
  constexpr int kChunksPerThread = 12;
  int step = divide_up(num_blocks, kChunksPerThread * pool.size());
  step = std::max(step, static_cast<int>(kShortest / microseconds));
  step = std::min(step, static_cast<int>(kLongest / microseconds));
  step = std::max(round_up(step, 4), 4);  // whole passes of the kernels that take several row blocks at once
  if (num_blocks < 8 * pool.size()) step = divide_up(num_blocks, std::min(num_blocks, 4 * pool.size()));
  pool.run(divide_up(num_blocks, step), [&](int chunk, int thread) {
    kernels.product(w, act, chunk * step, std::min(num_blocks, (chunk + 1) * step), out, scratch[thread]);
  });
}

}  // namespace hasten
