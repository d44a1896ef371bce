// Everything of a decoder step but the products: norms, rotary positions, activations, attention, sampling's hot loops.
// ops.inc and attention.inc implement them once, over simd.h.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hasten {

enum class KvKind : uint8_t { F32, BF16, I8 };
enum class Act : uint8_t { Silu, Gelu, GeluTanh };

constexpr int kTileKeys = 16;  // keys of one KV tile; a block is a multiple of it

// The KV cache of one layer: [kv_head] of {K tiles, V tiles}, in every block. A block holds all layers, one after the other:
// memory is touched, hence taken, block by block.
//   F32   K [d][16], V [16][d]
//   BF16  K [d/2][16][2], V [16/2][d][2]
//   I8    K [d/4][16][4] as value + 128, V [16][d] signed, each followed by f32 scales [16]: one a token and head
// d is head_dim padded to a multiple of 16 with zeros. Plain data: the sizes are filled in by make_kv_layout.
struct KvLayout {
  KvKind kind;
  int block_size, num_kv_heads, head_dim, head_dim_pad;
  size_t k_bytes, v_bytes;  // one tile of K, of V, scales included
  size_t head_bytes;        // one head of one block
  size_t block_bytes;       // this layer's part of a block
  size_t block_stride;      // from one block to the next
};

KvLayout make_kv_layout(KvKind kind, int block_size, int num_kv_heads, int head_dim);

// Attention of `num_queries` consecutive queries of one sequence for one kv head and its group of query heads.
struct AttentionJob {
  const KvLayout* layout;
  const uint8_t* cache;        // this layer's part of the first block
  const int32_t* block_table;
  int kv_head, group;          // group: query heads that share this kv head
  int first_position;          // of the first query
  int num_queries;             // at most attention_queries(group)
  int window;                  // 0: all
  float scale, softcap;
  const float* q;              // [query][group][head_dim], strides below
  ptrdiff_t q_stride;          // between queries
  float* out;
  ptrdiff_t out_stride;
};

constexpr int kBounds = 8;

struct OpKernels {
  void (*rms_norm)(const float* x, const float* weight, float eps, int n, float* out);   // out may be x
  void (*layer_norm)(const float* x, const float* weight, const float* bias, float eps, int n, float* out);  // bias: or null
  void (*rope)(float* x, const float* cosine, const float* sine, int rotary_dim);        // one head, half-split pairs
  void (*activate)(Act act, const float* gate, const float* up, int n, float* out);      // up may be null: ungated
  void (*add)(float* x, const float* y, float scale, int n);                             // x += scale * y
  void (*softcap)(float* x, float cap, int n);
  // Keys and values of one token and head. A tile that a sequence has just begun must have been cleared (clear_values).
  void (*write_kv)(const KvLayout& layout, uint8_t* cache, int slot, int kv_head, const float* k, const float* v);
  void (*attend)(const AttentionJob& job, uint8_t* scratch);
  int (*argmax)(const float* x, int n);                                                  // lowest index wins; -1 if any NaN
  float (*max)(const float* x, int n);                                                   // n > 0, no NaN
  void (*exp_scaled)(const float* x, float max, float scale, int n, float* out);         // exp((x - max) * scale)
  double (*sum_exp)(const float* x, float max, float scale, int n);
  // sums[i]: of exp((x - max) * scale) where x >= bounds[i], for i < kBounds; sums[kBounds]: of all.
  void (*sum_exp_above)(const float* x, float max, float scale, const float* bounds, int n, double* sums);
  double (*burn)(bool bf16, int rounds, float* sink);                                    // for measuring: see ops.inc
};

// Zeroes the values of all heads in the tile that holds `slot`. Attention multiplies values that are not written yet by a
// probability of exactly zero; whatever was there before (a NaN of an earlier sequence) must not survive that.
void clear_values(const KvLayout& layout, uint8_t* cache, int slot);

int attention_queries(int group);  // the most queries of one job: enough to share each loaded tile, few enough to balance
size_t attention_scratch_bytes(const KvLayout& layout, int group);

}  // namespace hasten
