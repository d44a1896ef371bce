// Sizes of the KV cache and of attention's scratch: what is the same for every instruction set.
#include "ops.h"

#include <cstring>

namespace hasten {

KvLayout make_kv_layout(KvKind kind, int block_size, int num_kv_heads, int head_dim) {
  KvLayout l{kind, block_size, num_kv_heads, head_dim, (head_dim + 15) & ~15, 0, 0, 0, 0, 0};
  const size_t numbers = (size_t)kTileKeys * l.head_dim_pad;
  const size_t scales = kind == KvKind::I8 ? kTileKeys * sizeof(float) : 0;
  l.k_bytes = l.v_bytes = numbers * (kind == KvKind::F32 ? 4 : kind == KvKind::BF16 ? 2 : 1) + scales;
  l.head_bytes = (size_t)(block_size / kTileKeys) * (l.k_bytes + l.v_bytes);
  l.block_bytes = l.block_stride = l.head_bytes * num_kv_heads;
  return l;
}

void clear_values(const KvLayout& l, uint8_t* cache, int slot) {
  const int block = slot / l.block_size, tile = slot % l.block_size / kTileKeys;
  for (int head = 0; head < l.num_kv_heads; head++) {
    uint8_t* values = cache + block * l.block_stride + head * l.head_bytes + (size_t)(l.block_size / kTileKeys) * l.k_bytes;
    memset(values + tile * l.v_bytes, 0, l.v_bytes);
  }
}

int attention_queries(int group) { return group >= 32 ? 1 : 32 / group; }

size_t attention_scratch_bytes(const KvLayout& l, int group) {
  const size_t rows = (size_t)attention_queries(group) * group;
  // Per row: the query and its running sum of values (both at most [d] f32), a query's scales and sums [d / 16] each,
  // probabilities of one key block [64], the running maximum and sum, and 64 bytes so that each array can be aligned.
  return rows * (2 * 4 * (size_t)l.head_dim_pad + 2 * 4 * (size_t)l.head_dim_pad / 16 + 4 * 64 + 4 * 16 + 4) + 8 * 64;
}

}  // namespace hasten
