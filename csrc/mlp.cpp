// The MLP of a layer: all of it, or, where it is split, a router and the experts that it chooses. Part of the step that
// decoder.cpp describes.
#include <algorithm>
#include <cstring>

#include "decoder.h"

namespace hasten {

// Norm of one token and its preparation for what reads it: the router's rows are kept for the experts too.
void Decoder::prepare_mlp(Layer& l, const float* x, float* normed, int t) {
  if (l.spec.experts) normed = normed_.floats() + (size_t)t * spec_.hidden_size;
  if (spec_.pre_norm) norm(l.mlp_norm, x, normed);
  else if (l.spec.experts) memcpy(normed, x, spec_.hidden_size * sizeof(float));
  const float* read = spec_.pre_norm || l.spec.experts ? normed : x;
  prepare_row(l.spec.experts ? l.router : l.gate_up, 1, read, t);
}

// Rows of each expert: those whose router score for it is among the largest, the first where they are equal.
void Decoder::choose_experts(const Layer& l) {
  const int E = l.spec.experts;
  product(l.router, 1, scores_.floats(), E, 1.0f, false);
  chosen_.assign(E, {});
  std::vector<int> order(E);
  for (int t = 0; t < num_tokens_; t++) {
    const float* scores = scores_.floats() + (size_t)t * E;
    for (int e = 0; e < E; e++) order[e] = e;
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return scores[a] > scores[b]; });
    for (int i = 0; i < l.spec.active_experts; i++) chosen_[order[i]].push_back(t);
  }
}

// Expert after expert over the rows that chose it: a row's sum is in the experts' order whatever its batch.
void Decoder::experts(Layer& l) {
  const int T = num_tokens_, H = spec_.hidden_size, inner = l.spec.intermediate_size / l.spec.experts;
  choose_experts(l);
  float* sum = spec_.post_norm ? y_.floats() : x_.floats();
  const float scale = spec_.post_norm ? 1.0f : spec_.residual_scale;
  if (spec_.post_norm) memset(sum, 0, (size_t)T * H * sizeof(float));
  for (int t = 0; l.down_bias && t < T; t++) kernels_.ops.add(sum + (size_t)t * H, l.down_bias, scale, H);
  for (int e = 0; e < l.spec.experts; e++) {
    const std::vector<int>& rows = chosen_[e];
    const Stack &up = l.expert_gate_up[e], &down = l.expert_down[e];
    const int n = (int)rows.size(), width = up.outputs;
    if (!n) continue;
    begin_rows(up, n, 1);
    for_rows(n, H, [&](int first, int last, int) {
      for (int i = first; i < last; i++) prepare_row(up, 1, normed_.floats() + (size_t)rows[i] * H, i);
    });
    product(up, 1, wide_.floats(), width, 1.0f, false);
    begin_rows(down, n, 0);
    for_rows(n, 2 * inner, [&](int first, int last, int) {
      for (int i = first; i < last; i++) {
        float* gate = wide_.floats() + (size_t)i * width;
        kernels_.ops.activate(spec_.activation, gate, spec_.gated_mlp ? gate + inner : nullptr, inner, gate);
        prepare_row(down, 0, gate, i);
      }
    });
    product(down, 0, part_.floats(), H, 1.0f, false);
    for_rows(n, H, [&](int first, int last, int) {
      for (int i = first; i < last; i++)
        kernels_.ops.add(sum + (size_t)rows[i] * H, part_.floats() + (size_t)i * H, scale, H);
    });
  }
  if (spec_.post_norm) pending_ = &l.mlp_post_norm;
}

void Decoder::mlp(Layer& l) {
  const int T = num_tokens_, inner = l.spec.intermediate_size, width = l.gate_up.outputs;
  if (!spec_.parallel_residual) {
    begin_rows(l.spec.experts ? l.router : l.gate_up, T, 1);
    for_rows(T, spec_.hidden_size, [&](int first, int last, int thread) {
      float* normed = row_scratch_[thread].floats();
      for (int t = first; t < last; t++) {
        prepare_mlp(l, residual_row(t), normed, t);
      }
    });
    pending_ = nullptr;
  }
  if (l.spec.experts) return experts(l);
  product(l.gate_up, 1, wide_.floats(), width, 1.0f, false);
  begin_rows(l.down, T, 0);
  for_rows(T, 2 * inner, [&](int first, int last, int) {
    for (int t = first; t < last; t++) {
      float* gate = wide_.floats() + (size_t)t * width;
      kernels_.ops.activate(spec_.activation, gate, spec_.gated_mlp ? gate + inner : nullptr, inner, gate);
      prepare_row(l.down, 0, gate, t);
    }
  });
  add_to_residual(l.down, 0, l.mlp_post_norm);
}

}  // namespace hasten
