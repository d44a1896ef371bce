// A whole decoder-only transformer, run one step a call: described by plain data, its weights packed, its KV cache paged.
// Knows nothing of files, of Python or of scheduling.
//
// Features are those of ModelSpec (src/hasten/model/spec.py), where each field is explained; names of weights too.
#pragma once

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "rope.h"

namespace hasten {

enum class Norm : uint8_t { Rms, Layer };
enum class QkNorm : uint8_t { None, Head, Full };

struct RopeSpec {
  std::vector<float> inv_freq, long_inv_freq;
  float scale = 1.0f;
  int original_max = 0;
};

struct LayerSpec {
  int num_heads = 0, num_kv_heads = 0, head_dim = 0, intermediate_size = 0, rope = 0, window = 0;
  int experts = 0, active_experts = 0;
};

struct DecoderSpec {
  int vocab_size = 0, hidden_size = 0, max_position = 0;
  std::vector<LayerSpec> layers;
  std::vector<RopeSpec> ropes;
  Norm norm = Norm::Rms;
  float norm_eps = 1e-6f;
  bool pre_norm = true, post_norm = false, parallel_residual = false;
  QkNorm qk_norm = QkNorm::None;
  Act activation = Act::Silu;
  bool gated_mlp = true, learned_positions = false, tied_head = false;
  float attention_scale = 1.0f, attention_softcap = 0.0f, final_softcap = 0.0f;
  float embedding_scale = 1.0f, residual_scale = 1.0f, logit_scale = 1.0f;
};

// One step's tokens; see Batch in src/hasten/backends/base.py.
struct StepBatch {
  int num_tokens, num_sequences, num_rows, table_width;
  const int32_t *tokens, *positions, *slots;       // [num_tokens]
  const int32_t *query_lens, *context_lens;        // [num_sequences]
  const int32_t* block_tables;                     // [num_sequences][table_width]
  const int32_t* rows;                             // [num_rows]
};

struct SourceMatrix {
  std::string name;     // canonical, for messages
  Source source;
  const int32_t* perm;  // [k] or nullptr
};

// Memory from memory.h that grows and is freed.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Buffer(Buffer&& other) noexcept : data_(other.data_), bytes_(other.bytes_) { other.data_ = nullptr, other.bytes_ = 0; }
  ~Buffer() { if (data_) deallocate(data_, bytes_); }
  void reset(size_t bytes);    // fresh and zeroed
  void reserve(size_t bytes) { if (bytes > bytes_) reset(bytes); }  // contents are lost when it grows
  uint8_t* data() const { return (uint8_t*)data_; }
  float* floats() const { return (float*)data_; }
  size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

// Matrices that read the same rows and write side by side (q, k, v; gate, up): one Matrix where their formats agree. One
// that is stored as two thin ones, NAME.a [r, k] then NAME.b [n, r], writes what `a` gives beside the others' outputs, and
// `b`, a stack of its own, takes it from there.
class Stack {
 public:
  Stack() = default;
  Stack(Stack&&) = default;
  Stack& operator=(Stack&&) = default;
  ~Stack();
  void pack(const std::vector<SourceMatrix>& sources, Pool& pool, bool fine_inputs);
  void set_bias(const std::string& name, const std::vector<float>& bias);  // of one source
  void pack_one(const SourceMatrix& matrix, Pool& pool, bool fine_inputs);
  void pack_side_by_side(const std::vector<SourceMatrix>& sources, Pool& pool, bool fine_inputs, bool thin, int column);
  void find_preparations();

  struct Part {
    Matrix matrix{};
    int column = 0;           // of its first output; of thin outputs where it is thin
    bool thin = false;
    int prepared = 0;         // which preparation of the rows it reads
    std::vector<int32_t> perm;
    std::vector<float> bias;
    std::vector<std::string> names;
    std::vector<int> widths;
  };
  std::vector<Part> parts;
  int outputs = 0, inputs = 0, thin_outputs = 0;
  struct Second {
    int thin_column, column;
  };
  std::vector<Stack> seconds;          // the b of each pair
  std::vector<Second> second_places;   // where it reads, and where it writes
  std::vector<int> preparations;  // a part for each distinct way in which rows must be prepared
};

// Wall time of forward by kind of work, in seconds; only counted while profiling.
struct Profile {
  double products = 0, attention = 0, total = 0;
};

class Decoder {
 public:
  Decoder(DecoderSpec spec, const Kernels& kernels, Pool& pool);
  ~Decoder();
  Decoder(const Decoder&) = delete;
  Decoder& operator=(const Decoder&) = delete;

  // Weights, in any order, then finish(). Errors are std::invalid_argument with the weight's name.
  // role is "embed", "position_embed", "head" (layer -1), "qkv", "o", "gate_up" or "down", or, where the MLP is split into
  // experts, "router", "gate_up.E" and "down.E" of expert E; sources in that order.
  void add_matrices(const std::string& role, int layer, const std::vector<SourceMatrix>& sources);
  void add_vector(const std::string& name, std::vector<float> values);
  void finish();

  size_t weight_bytes() const;
  size_t block_bytes(int block_size, KvKind kind) const;  // of one KV block over all layers
  void allocate(int num_blocks, int block_size, KvKind kind);
  void copy_block(int from, int to);
  // Logits [num_rows][vocab_size], overwritten by the next call; whoever holds the pointer may read them that long.
  std::shared_ptr<Buffer> forward(const StepBatch& batch);

  const DecoderSpec& spec() const { return spec_; }
  Pool& pool() const { return pool_; }
  const Kernels& kernels() const { return kernels_; }
  bool profiling = false;
  Profile profile;

 private:
  struct NormWeights {
    const float *weight = nullptr, *bias = nullptr;
  };
  struct Layer {
    LayerSpec spec;
    Stack qkv, o, gate_up, down;
    Stack router;                                // with experts, which then hold what gate_up and down hold
    std::vector<Stack> expert_gate_up, expert_down;
    const float* down_bias = nullptr;            // of all experts
    NormWeights attn_norm, attn_post_norm, mlp_norm, mlp_post_norm;
    const float *q_norm = nullptr, *k_norm = nullptr;
    KvLayout layout{};
    uint8_t* cache = nullptr;  // its part of the first block
    int q_width() const { return spec.num_heads * spec.head_dim; }
    int kv_width() const { return spec.num_kv_heads * spec.head_dim; }
  };
  struct Sequence {  // of the current batch
    int first_token, num_tokens, first_position, context_len;
    const int32_t* block_table;
  };
  struct AttentionChunk {  // heads are counted within the kv head's group
    int sequence, kv_head, first_head, num_heads, first_query, num_queries;
  };

  // weights.cpp
  const std::vector<float>* find_vector(const std::string& name) const;
  const float* take_vector(const std::string& name, size_t n, bool wanted);
  NormWeights take_norm(const std::string& name, bool wanted);
  void take_biases(Stack& stack, const std::vector<std::string>& names);
  Stack& stack_of(const std::string& role, int layer);
  void finish_layer(int i);
  template <class Fn> void each_stack(Fn fn) const;

  // decoder.cpp
  void check(const StepBatch& batch) const;
  void start(const StepBatch& batch);
  void reserve(int tokens, int rows);
  template <class Fn> void for_rows(int rows, int work, Fn fn);
  template <class Fn> void timed(double& seconds, Fn fn);
  void norm(const NormWeights& w, const float* x, float* out) const;
  void begin_rows(const Stack& stack, int rows, int which);
  void prepare_row(const Stack& stack, int which, const float* x, int row);
  void product(const Stack& stack, int which, float* y, ptrdiff_t stride, float scale, bool accumulate);
  void multiply(const Stack& stack, int which, float* y, ptrdiff_t stride, float scale, bool accumulate);
  void add_to_residual(const Stack& stack, int which, const NormWeights& post_norm);
  float* residual_row(int row);
  void embed(const StepBatch& batch);
  void run_layer(Layer& layer, bool last);
  void mlp(Layer& layer);
  void prepare_mlp(Layer& layer, const float* x, float* normed, int token);
  void choose_experts(const Layer& layer);
  void experts(Layer& layer);
  void attention(Layer& layer, bool last);
  void keep_wanted_rows(const Layer& layer);
  void normalize_full(Layer& layer, int token);
  void rotate_and_store(Layer& layer, int token, int kv_head);
  void plan_attention(const Layer& layer, int parts, bool all);
  void attend(Layer& layer, const AttentionChunk& chunk, int thread);
  void head();

  DecoderSpec spec_;
  const Kernels& kernels_;
  Pool& pool_;
  std::vector<std::pair<std::string, std::vector<float>>> vectors_;
  std::vector<bool> taken_;
  Stack embed_, positions_, head_;
  NormWeights final_norm_;
  std::vector<Layer> layers_;
  std::vector<RopeTable> ropes_, long_ropes_;
  Buffer cache_;
  int num_blocks_ = 0, block_size_ = 0;
  bool finished_ = false;

  // The step at hand.
  int num_tokens_ = 0;
  bool single_queries_ = false;                     // every sequence has one query
  std::vector<Sequence> sequences_;
  std::vector<int> sequence_of_;                    // [tokens]
  std::vector<int32_t> positions_of_, slots_;       // [tokens]
  std::vector<int32_t> rows_;                       // where logits are wanted
  std::vector<AttentionChunk> chunks_;
  const NormWeights* pending_ = nullptr;            // a post-norm whose input is still in y_
  Buffer x_, y_, wide_, attended_, thin_;
  Buffer normed_, scores_, part_;                   // of MLPs split into experts: what they read, the router's scores, one's result
  std::vector<std::vector<int>> chosen_;            // [experts], rows ascending
  std::shared_ptr<Buffer> logits_ = std::make_shared<Buffer>();
  Buffer act_memory_[3];                            // of three stacks' rows: attention's, the MLP's, and a second's
  std::vector<Activations> acts_[3];                // [preparations]
  std::vector<Buffer> scratch_, row_scratch_;       // one a thread
  std::vector<uint8_t*> product_scratch_;
};

// Numbers to be normalised or activated below which a phase is not worth its start.
constexpr int kSerialWork = 6144;

// fn(first, last, thread) over ranges of rows.
template <class Fn>
void Decoder::for_rows(int rows, int work, Fn fn) {
  if (rows == 1 || pool_.size() == 1 || (int64_t)rows * work < kSerialWork) return fn(0, rows, 0);
  const int chunks = std::min(rows, 4 * pool_.size());
  pool_.run(chunks, [&](int c, int thread) {
    fn((int)((int64_t)rows * c / chunks), (int)((int64_t)rows * (c + 1) / chunks), thread);
  });
}

}  // namespace hasten
