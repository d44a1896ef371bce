// The step: embedding, layers, head, as phases over the pool. Weights are in weights.cpp, the MLP in mlp.cpp.
//
// x_ [tokens, H] is the residual stream, wide_ holds q, k, v and then gate, up side by side, attended_ the heads' outputs.
// Rows are prepared (quantised, interleaved) once for each stack of matrices that reads them, in the same pass as the norm
// or the activation that makes them. With few rows such a pass runs on the caller alone: a phase costs about a microsecond.
#include "decoder.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>

namespace hasten {
namespace {

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument(message); }

void check_range(const char* what, const int32_t* values, int n, int limit) {
  for (int i = 0; i < n; i++)
    if (values[i] < 0 || values[i] >= limit)
      fail(std::string(what) + " " + std::to_string(values[i]) + " is outside [0, " + std::to_string(limit) + ")");
}

size_t floats(size_t rows, size_t width) { return rows * ((width + 15) & ~(size_t)15) * sizeof(float); }

}  // namespace

Decoder::Decoder(DecoderSpec spec, const Kernels& kernels, Pool& pool)
    : spec_(std::move(spec)), kernels_(kernels), pool_(pool) {
  if (spec_.vocab_size < 1 || spec_.hidden_size < 1 || spec_.layers.empty())
    fail("the model's spec has no layers or no width");
  if (spec_.parallel_residual && spec_.post_norm) fail("a parallel residual with post-norms is not supported");
  for (const RopeSpec& r : spec_.ropes) {
    ropes_.emplace_back(r.inv_freq, r.scale);
    long_ropes_.emplace_back(r.long_inv_freq, r.scale);
  }
  layers_.resize(spec_.layers.size());
  for (size_t i = 0; i < layers_.size(); i++) {
    const LayerSpec& l = layers_[i].spec = spec_.layers[i];
    const std::string where = "layer " + std::to_string(i) + " ";
    if (l.num_heads < 1 || l.num_kv_heads < 1 || l.num_heads % l.num_kv_heads || l.head_dim < 1 || l.intermediate_size < 1)
      fail(where + "has " + std::to_string(l.num_heads) + " heads over " + std::to_string(l.num_kv_heads) +
           " KV heads: expected a positive multiple");
    if (l.experts && (l.intermediate_size % l.experts || l.active_experts < 1 || l.active_experts > l.experts))
      fail(where + "cannot be split into " + std::to_string(l.experts) + " experts");
    layers_[i].expert_gate_up.resize(l.experts);
    layers_[i].expert_down.resize(l.experts);
    if (l.rope >= (int)ropes_.size()) fail(where + "names a rope that the spec does not have");
    if (l.rope >= 0 && ropes_[l.rope].rotary_dim() > l.head_dim) fail(where + "rotates more dimensions than a head has");
  }
  scratch_.resize(pool_.size());
  row_scratch_.resize(pool_.size());
}

Decoder::~Decoder() = default;

size_t Decoder::block_bytes(int block_size, KvKind kind) const {
  if (block_size < 1 || block_size % kTileKeys)
    fail("block_size " + std::to_string(block_size) + " is not a multiple of " + std::to_string(kTileKeys));
  size_t bytes = 0;
  for (const LayerSpec& l : spec_.layers) bytes += make_kv_layout(kind, block_size, l.num_kv_heads, l.head_dim).block_bytes;
  return bytes;
}

void Decoder::allocate(int num_blocks, int block_size, KvKind kind) {
  if (num_blocks < 1) fail("num_blocks is " + std::to_string(num_blocks) + ", expected at least 1");
  const size_t stride = block_bytes(block_size, kind);
  if ((int64_t)num_blocks * block_size > INT32_MAX)
    fail(std::to_string(num_blocks) + " blocks of " + std::to_string(block_size) + " are more slots than 32 bits can number");
  num_blocks_ = 0;
  cache_.reset(0);  // first, so that there are never two
  cache_.reset(num_blocks * stride);
  uint8_t* at = cache_.data();
  size_t scratch = 64;
  for (Layer& l : layers_) {
    l.layout = make_kv_layout(kind, block_size, l.spec.num_kv_heads, l.spec.head_dim);
    l.layout.block_stride = stride;
    l.cache = at;
    at += l.layout.block_bytes;
    scratch = std::max(scratch, attention_scratch_bytes(l.layout, l.spec.num_heads / l.spec.num_kv_heads));
  }
  for (Buffer& b : row_scratch_) b.reserve(std::max(scratch, floats(1, spec_.hidden_size)));
  num_blocks_ = num_blocks;
  block_size_ = block_size;
}

void Decoder::copy_block(int from, int to) {
  const int32_t both[] = {from, to};
  check_range("block", both, 2, num_blocks_);
  const size_t stride = layers_[0].layout.block_stride;
  if (from != to) memcpy(cache_.data() + to * stride, cache_.data() + from * stride, stride);
}

void Decoder::check(const StepBatch& b) const {
  if (!finished_) fail("forward was called before all weights were loaded");
  if (!num_blocks_) fail("forward was called before the KV cache was allocated");
  check_range("token", b.tokens, b.num_tokens, spec_.vocab_size);
  check_range("slot", b.slots, b.num_tokens, num_blocks_ * block_size_);
  check_range("row", b.rows, b.num_rows, b.num_tokens);
  for (int r = 1; r < b.num_rows; r++)
    if (b.rows[r] <= b.rows[r - 1]) fail("rows are not ascending");
  if (spec_.learned_positions) check_range("position", b.positions, b.num_tokens, spec_.max_position);
  int token = 0;
  for (int s = 0; s < b.num_sequences; s++) {
    const int queries = b.query_lens[s], context = b.context_lens[s];
    if (queries < 1 || queries > context || queries > b.num_tokens - token)
      fail("sequence " + std::to_string(s) + " has " + std::to_string(queries) + " queries of a context of " +
           std::to_string(context) + " in a batch of " + std::to_string(b.num_tokens) + " tokens");
    const int blocks = (context + block_size_ - 1) / block_size_;
    if (blocks > b.table_width) fail("sequence " + std::to_string(s) + " is longer than its block table");
    const int32_t* table = b.block_tables + (size_t)s * b.table_width;
    check_range("block", table, blocks, num_blocks_);
    for (int i = 0; i < queries; i++, token++) {
      const int position = context - queries + i;
      if (b.positions[token] != position)
        fail("token " + std::to_string(token) + " has position " + std::to_string(b.positions[token]) + ", expected " +
             std::to_string(position) + " from the sequence's lengths");
      if (b.slots[token] != table[position / block_size_] * block_size_ + position % block_size_)
        fail("token " + std::to_string(token) + " has slot " + std::to_string(b.slots[token]) +
             ", which is not its place in the block table");
    }
  }
  if (token != b.num_tokens) fail("query_lens sum to " + std::to_string(token) + ", not to the batch's tokens");
}

void Decoder::start(const StepBatch& b) {
  num_tokens_ = b.num_tokens;
  positions_of_.assign(b.positions, b.positions + b.num_tokens);
  slots_.assign(b.slots, b.slots + b.num_tokens);
  rows_.assign(b.rows, b.rows + b.num_rows);
  sequences_.clear();
  sequence_of_.clear();
  single_queries_ = true;
  int longest = 0;
  for (int s = 0, token = 0; s < b.num_sequences; token += b.query_lens[s++]) {
    sequences_.push_back({token, b.query_lens[s], b.context_lens[s] - b.query_lens[s], b.context_lens[s],
                          b.block_tables + (size_t)s * b.table_width});
    sequence_of_.insert(sequence_of_.end(), b.query_lens[s], s);
    single_queries_ = single_queries_ && b.query_lens[s] == 1;
    longest = std::max(longest, b.context_lens[s]);
  }
  for (size_t i = 0; i < ropes_.size(); i++) {
    ropes_[i].grow(longest);
    if (long_ropes_[i].rotary_dim() && longest > spec_.ropes[i].original_max) long_ropes_[i].grow(longest);
  }
  reserve(b.num_tokens, b.num_rows);
}

void Decoder::reserve(int tokens, int rows) {
  size_t wide = 0, attended = 0, acts = 0, thin = 0, most_experts = 0;
  const std::function<void(const Stack&, int)> stack_acts = [&](const Stack& s, int n) {
    size_t bytes = 0;
    thin = std::max<size_t>(thin, s.thin_outputs);
    for (const Stack& second : s.seconds) stack_acts(second, n);
    for (int p : s.preparations) {
      const Matrix& w = s.parts[p].matrix;
      bytes += (act_bytes(w.act, n, w.k_pad, w.act_group) + 63) & ~(size_t)63;
    }
    acts = std::max(acts, bytes);
  };
  for (const Layer& l : layers_) {
    wide = std::max<size_t>({wide, (size_t)l.q_width() + 2 * l.kv_width(), (size_t)l.gate_up.outputs});
    attended = std::max<size_t>(attended, l.q_width());
    stack_acts(l.qkv, tokens), stack_acts(l.o, tokens), stack_acts(l.gate_up, tokens), stack_acts(l.down, tokens);
    if (!l.spec.experts) continue;
    most_experts = std::max<size_t>(most_experts, l.spec.experts);
    stack_acts(l.router, tokens);
    for (int e = 0; e < l.spec.experts; e++) {
      wide = std::max<size_t>(wide, l.expert_gate_up[e].outputs);
      stack_acts(l.expert_gate_up[e], tokens), stack_acts(l.expert_down[e], tokens);
    }
  }
  if (most_experts) {
    normed_.reserve(floats(tokens, spec_.hidden_size));
    part_.reserve(floats(tokens, spec_.hidden_size));
    scores_.reserve(floats(tokens, most_experts));
  }
  stack_acts(spec_.tied_head ? embed_ : head_, rows);
  x_.reserve(floats(tokens, spec_.hidden_size));
  if (spec_.post_norm) y_.reserve(floats(tokens, spec_.hidden_size));
  wide_.reserve(floats(tokens, wide));
  attended_.reserve(floats(tokens, attended));
  if (thin) thin_.reserve(floats(tokens, thin));
  for (Buffer& memory : act_memory_) memory.reserve(acts);
  const size_t logits = (size_t)rows * spec_.vocab_size * sizeof(float);
  if (logits > logits_->bytes()) {
    logits_ = std::make_shared<Buffer>();
    logits_->reset(logits);
  }
}

template <class Fn>
void Decoder::timed(double& seconds, Fn fn) {
  if (!profiling) return fn();
  const auto begin = std::chrono::steady_clock::now();
  fn();
  seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

void Decoder::norm(const NormWeights& w, const float* x, float* out) const {
  if (spec_.norm == Norm::Rms) return kernels_.ops.rms_norm(x, w.weight, spec_.norm_eps, spec_.hidden_size, out);
  kernels_.ops.layer_norm(x, w.weight, w.bias, spec_.norm_eps, spec_.hidden_size, out);
}

void Decoder::begin_rows(const Stack& stack, int rows, int which) {
  acts_[which].clear();
  uint8_t* memory = act_memory_[which].data();
  for (int p : stack.preparations) {
    const Matrix& w = stack.parts[p].matrix;
    acts_[which].push_back(make_activations(w.act, rows, w.k_pad, w.act_group, memory));
    memory += (act_bytes(w.act, rows, w.k_pad, w.act_group) + 63) & ~(size_t)63;
  }
}

void Decoder::prepare_row(const Stack& stack, int which, const float* x, int row) {
  for (size_t i = 0; i < stack.preparations.size(); i++) {
    const Matrix& w = stack.parts[stack.preparations[i]].matrix;
    kernels_.linear.prepare(x, 0, w.k, w.perm, acts_[which][i], row, row + 1);
  }
}

void Decoder::product(const Stack& stack, int which, float* y, ptrdiff_t stride, float scale, bool accumulate) {
  timed(profile.products, [&] { multiply(stack, which, y, stride, scale, accumulate); });
}

void Decoder::multiply(const Stack& stack, int which, float* y, ptrdiff_t stride, float scale, bool accumulate) {
  for (const Stack::Part& part : stack.parts) {
    const Output thin{thin_.floats() + part.column, stack.thin_outputs, 1.0f, false};
    const Output wide{y + part.column, stride, scale, accumulate};
    linear(pool_, kernels_.linear, part.matrix, acts_[which][part.prepared], part.thin ? thin : wide, product_scratch_.data());
  }
  for (size_t i = 0; i < stack.seconds.size(); i++) {
    const Stack& second = stack.seconds[i];
    const int rows = acts_[which][0].rows;
    begin_rows(second, rows, 2);
    for_rows(rows, second.inputs, [&](int first, int last, int) {
      for (int t = first; t < last; t++)
        prepare_row(second, 2, thin_.floats() + (size_t)t * stack.thin_outputs + stack.second_places[i].thin_column, t);
    });
    multiply(second, 2, y + stack.second_places[i].column, stride, scale, accumulate);
  }
}

void Decoder::add_to_residual(const Stack& stack, int which, const NormWeights& post_norm) {
  const int H = spec_.hidden_size;
  if (!spec_.post_norm) return product(stack, which, x_.floats(), H, spec_.residual_scale, true);
  product(stack, which, y_.floats(), H, 1.0f, false);
  pending_ = &post_norm;  // applied by the pass that next reads the row
}

float* Decoder::residual_row(int row) {
  float* x = x_.floats() + (size_t)row * spec_.hidden_size;
  if (pending_) {
    float* y = y_.floats() + (size_t)row * spec_.hidden_size;
    norm(*pending_, y, y);
    kernels_.ops.add(x, y, spec_.residual_scale, spec_.hidden_size);
  }
  return x;
}

void Decoder::embed(const StepBatch& b) {
  const int H = spec_.hidden_size;
  for_rows(b.num_tokens, 8 * H, [&](int first, int last, int thread) {
    for (int t = first; t < last; t++) {
      float* x = x_.floats() + (size_t)t * H;
      kernels_.linear.row(embed_.parts[0].matrix, b.tokens[t], spec_.embedding_scale, x);
      if (spec_.learned_positions) {
        float* position = row_scratch_[thread].floats();
        kernels_.linear.row(positions_.parts[0].matrix, b.positions[t], 1.0f, position);
        kernels_.ops.add(x, position, 1.0f, H);
      }
      if (b.positions[t] % kTileKeys == 0)
        for (Layer& l : layers_) clear_values(l.layout, l.cache, b.slots[t]);
    }
  });
}

void Decoder::run_layer(Layer& l, bool last) {
  const int T = num_tokens_, q_width = l.q_width();
  begin_rows(l.qkv, T, 0);
  if (spec_.parallel_residual) begin_rows(l.spec.experts ? l.router : l.gate_up, T, 1);
  for_rows(T, spec_.hidden_size, [&](int first, int end, int thread) {
    float* normed = row_scratch_[thread].floats();
    for (int t = first; t < end; t++) {
      const float* x = residual_row(t);
      if (spec_.pre_norm) norm(l.attn_norm, x, normed);
      prepare_row(l.qkv, 0, spec_.pre_norm ? normed : x, t);
      if (!spec_.parallel_residual) continue;
      prepare_mlp(l, x, normed, t);
    }
  });
  pending_ = nullptr;
  product(l.qkv, 0, wide_.floats(), l.qkv.outputs, 1.0f, false);
  timed(profile.attention, [&] { attention(l, last); });
  if (last && !spec_.parallel_residual) keep_wanted_rows(l);
  if (!num_tokens_) return;
  begin_rows(l.o, num_tokens_, 0);
  for_rows(num_tokens_, q_width, [&](int first, int end, int) {
    for (int t = first; t < end; t++) prepare_row(l.o, 0, attended_.floats() + (size_t)t * q_width, t);
  });
  add_to_residual(l.o, 0, l.attn_post_norm);
  mlp(l);
}

// After the last layer's keys and values are stored, tokens without logits have nothing left to give.
void Decoder::keep_wanted_rows(const Layer& l) {
  const size_t H = spec_.hidden_size, width = l.q_width();
  for (size_t r = 0; r < rows_.size(); r++) {  // rows ascend: none is overwritten before it has moved
    const size_t from = rows_[r];
    if (from == r) continue;
    memcpy(x_.floats() + r * H, x_.floats() + from * H, H * sizeof(float));
    memcpy(attended_.floats() + r * width, attended_.floats() + from * width, width * sizeof(float));
    rows_[r] = (int32_t)r;
  }
  num_tokens_ = (int)rows_.size();
}

void Decoder::attention(Layer& l, bool last) {
  const int T = num_tokens_, kv_heads = l.spec.num_kv_heads, group = l.spec.num_heads / kv_heads;
  const int units = (int)sequences_.size() * kv_heads;
  const bool enough = units >= pool_.size() || group == 1;
  const bool fused = single_queries_ && enough;  // a sequence's one key is written by the chunk that needs it
  if (spec_.qk_norm == QkNorm::Full)
    for_rows(T, l.q_width(), [&](int first, int last, int) {
      for (int t = first; t < last; t++) normalize_full(l, t);
    });
  if (!fused)
    for_rows(T, l.qkv.outputs, [&](int first, int last, int) {
      for (int t = first; t < last; t++)
        for (int head = 0; head < kv_heads; head++) rotate_and_store(l, t, head);
    });
  // Few units: heads that share keys are spread over the threads, which then read the keys once each.
  plan_attention(l, enough ? 1 : std::min(group, (pool_.size() + units - 1) / units), fused || !last);
  pool_.run((int)chunks_.size(), [&](int c, int thread) {
    const AttentionChunk& chunk = chunks_[c];
    if (fused) rotate_and_store(l, sequences_[chunk.sequence].first_token, chunk.kv_head);
    attend(l, chunk, thread);
  });
}

// The longest pieces of work first, so that threads end together. Not `all`: only queries whose logits are wanted count.
void Decoder::plan_attention(const Layer& l, int parts, bool all) {
  const int group = l.spec.num_heads / l.spec.num_kv_heads, heads = (group + parts - 1) / parts;
  const int most = attention_queries(group);
  chunks_.clear();
  for (int s = 0; s < (int)sequences_.size(); s++) {
    const int queries = sequences_[s].num_tokens;
    for (int first = (queries - 1) / most * most; first >= 0; first -= most) {
      const int begin = sequences_[s].first_token + first, end = begin + std::min(most, queries - first);
      const auto wanted = std::lower_bound(rows_.begin(), rows_.end(), begin);
      if (!all && (wanted == rows_.end() || *wanted >= end)) continue;
      for (int kv_head = 0; kv_head < l.spec.num_kv_heads; kv_head++)
        for (int head = 0; head < group; head += heads)
          chunks_.push_back({s, kv_head, head, std::min(heads, group - head), first, std::min(most, queries - first)});
    }
  }
}

void Decoder::normalize_full(Layer& l, int token) {
  float* q = wide_.floats() + (size_t)token * l.qkv.outputs;
  float* k = q + l.q_width();
  kernels_.ops.rms_norm(q, l.q_norm, spec_.norm_eps, l.q_width(), q);
  kernels_.ops.rms_norm(k, l.k_norm, spec_.norm_eps, l.kv_width(), k);
}

// One token's queries of one group, its key and its value: norm, rotate, write to the cache.
void Decoder::rotate_and_store(Layer& l, int token, int kv_head) {
  const int d = l.spec.head_dim, group = l.spec.num_heads / l.spec.num_kv_heads, position = positions_of_[token];
  float* row = wide_.floats() + (size_t)token * l.qkv.outputs;
  float* q = row + kv_head * group * d;
  float* k = row + l.q_width() + kv_head * d;
  const float* v = row + l.q_width() + l.kv_width() + kv_head * d;
  if (spec_.qk_norm == QkNorm::Head) {
    for (int h = 0; h < group; h++) kernels_.ops.rms_norm(q + h * d, l.q_norm, spec_.norm_eps, d, q + h * d);
    kernels_.ops.rms_norm(k, l.k_norm, spec_.norm_eps, d, k);
  }
  if (l.spec.rope >= 0) {
    const RopeSpec& rope = spec_.ropes[l.spec.rope];
    const bool far = !rope.long_inv_freq.empty() && sequences_[sequence_of_[token]].context_len > rope.original_max;
    const RopeTable& table = far ? long_ropes_[l.spec.rope] : ropes_[l.spec.rope];
    const float *c = table.cosines(position), *s = table.sines(position);
    for (int h = 0; h < group; h++) kernels_.ops.rope(q + h * d, c, s, table.rotary_dim());
    kernels_.ops.rope(k, c, s, table.rotary_dim());
  }
  kernels_.ops.write_kv(l.layout, l.cache, slots_[token], kv_head, k, v);
}

void Decoder::attend(Layer& l, const AttentionChunk& c, int thread) {
  const Sequence& s = sequences_[c.sequence];
  const int d = l.spec.head_dim, group = l.spec.num_heads / l.spec.num_kv_heads, q_width = l.q_width();
  const size_t token = s.first_token + c.first_query;
  const ptrdiff_t head = (ptrdiff_t)(c.kv_head * group + c.first_head) * d;
  AttentionJob job;
  job.layout = &l.layout;
  job.cache = l.cache;
  job.block_table = s.block_table;
  job.kv_head = c.kv_head;
  job.group = c.num_heads;
  job.first_position = s.first_position + c.first_query;
  job.num_queries = c.num_queries;
  job.window = l.spec.window;
  job.scale = spec_.attention_scale;
  job.softcap = spec_.attention_softcap;
  job.q = wide_.floats() + token * l.qkv.outputs + head;
  job.q_stride = l.qkv.outputs;
  job.out = attended_.floats() + token * q_width + head;
  job.out_stride = q_width;
  kernels_.ops.attend(job, row_scratch_[thread].data());
}

void Decoder::head() {
  const int V = spec_.vocab_size, R = (int)rows_.size();
  const Stack& stack = spec_.tied_head ? embed_ : head_;
  begin_rows(stack, R, 0);
  for_rows(R, spec_.hidden_size, [&](int first, int last, int thread) {
    float* normed = row_scratch_[thread].floats();
    for (int r = first; r < last; r++) {
      norm(final_norm_, residual_row(rows_[r]), normed);
      prepare_row(stack, 0, normed, r);
    }
  });
  product(stack, 0, logits_->floats(), V, spec_.logit_scale, false);
  if (spec_.final_softcap > 0.0f) {
    constexpr int piece = 8192;
    const int pieces = (V + piece - 1) / piece;
    pool_.run(R * pieces, [&](int c, int) {
      const int first = c % pieces * piece;
      float* logits = logits_->floats() + (size_t)(c / pieces) * V + first;
      kernels_.ops.softcap(logits, spec_.final_softcap, std::min(piece, V - first));
    });
  }
}

std::shared_ptr<Buffer> Decoder::forward(const StepBatch& batch) {
  check(batch);
  if (!batch.num_tokens) return logits_;
  timed(profile.total, [&] {
    start(batch);
    embed(batch);
    pending_ = nullptr;
    for (Layer& l : layers_) run_layer(l, &l == &layers_.back());
    if (batch.num_rows) head();
  });
  return logits_;
}

}  // namespace hasten
