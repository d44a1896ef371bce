// Choosing one token a row of logits. What each parameter means and in which order they act: SamplingBatch in
// src/hasten/backends/base.py; backends/reference_sampling.py is the slow reference of this file.
#pragma once

#include <cstdint>
#include <vector>

#include "ops.h"
#include "pool.h"

namespace hasten {

struct SamplingParams {  // arrays over rows, and CSR arrays over rows
  const float* temperature;
  const int32_t* top_k;
  const float *top_p, *min_p, *repetition, *presence, *frequency;
  const uint64_t *seeds, *counters;
  const int32_t *num_logprobs, *targets;
  const int32_t *seen_offsets, *seen_ids, *seen_counts;
  const int32_t *bias_offsets, *bias_ids;
  const float* bias_values;
};

struct SamplingResult {
  int32_t* tokens;            // [rows]; -1 where a logit is NaN
  float* logprobs;            // [rows] or nullptr
  float* target_logprobs;     // [rows] or nullptr
  int num_top;                // columns of the two below
  int32_t* top_ids;
  float* top_logprobs;
};

struct RowSampler;

// Keeps its memory, about 20 bytes a token of the vocabulary and thread as far as they are touched, from call to call.
class Sampler {
 public:
  Sampler(Pool& pool, const OpKernels& ops);
  ~Sampler();
  Sampler(const Sampler&) = delete;
  Sampler& operator=(const Sampler&) = delete;

  // The highest logit of each row, the lowest id among equals.
  void greedy(const float* logits, int rows, int vocab_size, int32_t* tokens);
  // logits [rows][vocab_size] are changed on the way and put back.
  void sample(float* logits, int rows, int vocab_size, const SamplingParams& params, const SamplingResult& result);
  Pool& pool() const { return pool_; }

 private:
  Pool& pool_;
  const OpKernels& ops_;
  std::vector<RowSampler> rows_;  // one a thread
  std::vector<int32_t> best_;     // of each piece of a row
};

// In [0, 1): the first 53 bits of Philox 4x32-10 (Salmon et al. 2011), key `seed`, counter (counter, 0).
double philox_uniform(uint64_t seed, uint64_t counter);

}  // namespace hasten
