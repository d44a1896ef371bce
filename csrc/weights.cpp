// A decoder's weights: which there must be, their shapes, and how they are stacked and packed. The step is in decoder.cpp.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "decoder.h"

namespace hasten {
namespace {

// Hidden units of a model that 8-bit activations disturb: at some products, at all. As activation_bits in model/formats.py.
constexpr int kNarrow = 256, kVeryNarrow = 128;

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument(message); }

std::string shape(int n, int k) { return "[" + std::to_string(n) + ", " + std::to_string(k) + "]"; }

bool same_perm(const SourceMatrix& a, const SourceMatrix& b) {
  if (!a.perm || !b.perm) return a.perm == b.perm;
  return memcmp(a.perm, b.perm, sizeof(int32_t) * a.source.k) == 0;
}

bool stackable(const SourceMatrix& a, const SourceMatrix& b) {
  return a.source.kind == b.source.kind && a.source.group == b.source.group && same_perm(a, b) &&
         !a.source.zeros == !b.source.zeros;
}

bool ends_with(const std::string& name, const char* end) {
  const size_t n = strlen(end);
  return name.size() >= n && !name.compare(name.size() - n, n, end);
}

// Rows prepared for one matrix serve the other too.
bool same_preparation(const Stack::Part& a, const Stack::Part& b) {
  return a.matrix.act == b.matrix.act && a.matrix.act_group == b.matrix.act_group && a.perm == b.perm;
}

}  // namespace

void Buffer::reset(size_t bytes) {
  if (data_) deallocate(data_, bytes_);
  data_ = nullptr;
  bytes_ = 0;
  if (bytes) data_ = hasten::allocate(bytes);
  bytes_ = bytes;
}

Stack::~Stack() {
  for (Part& part : parts) {
    part.matrix.bias = nullptr;  // ours, not the packer's
    part.matrix.perm = nullptr;
    release(part.matrix);
  }
}

void Stack::pack(const std::vector<SourceMatrix>& sources, Pool& pool, bool fine_inputs) {
  inputs = sources[0].source.k;
  std::vector<SourceMatrix> thin, wide;  // what reads the rows
  for (const SourceMatrix& m : sources) {
    if (ends_with(m.name, ".a")) {
      thin.push_back(m);
      thin_outputs += m.source.n;
    } else if (ends_with(m.name, ".b")) {  // right behind its a
      if (!wide.empty()) pack_side_by_side(wide, pool, fine_inputs, false, outputs);
      for (const SourceMatrix& w : wide) outputs += w.source.n;
      wide.clear();
      seconds.emplace_back();
      seconds.back().pack_one(m, pool, fine_inputs);
      second_places.push_back({thin_outputs - m.source.k, outputs});
      outputs += m.source.n;
    } else {
      wide.push_back(m);
    }
  }
  pack_side_by_side(wide, pool, fine_inputs, false, outputs);
  for (const SourceMatrix& w : wide) outputs += w.source.n;
  pack_side_by_side(thin, pool, fine_inputs, true, 0);
  find_preparations();
}

// Neighbours of one format become one Matrix; the first output is `column`.
void Stack::pack_side_by_side(const std::vector<SourceMatrix>& sources, Pool& pool, bool fine_inputs, bool thin, int column) {
  for (size_t i = 0; i < sources.size();) {
    size_t end = i + 1;
    while (end < sources.size() && stackable(sources[i], sources[end])) end++;
    Part part;
    part.thin = thin;
    part.column = column;
    std::vector<Source> rows;
    for (; i < end; i++) {
      rows.push_back(sources[i].source);
      part.names.push_back(sources[i].name);
      part.widths.push_back(sources[i].source.n);
      column += sources[i].source.n;
    }
    if (sources[end - 1].perm) part.perm.assign(sources[end - 1].perm, sources[end - 1].perm + inputs);
    part.matrix = hasten::pack(rows.data(), (int)rows.size(), pool, fine_inputs);
    parts.push_back(std::move(part));
  }
}

void Stack::pack_one(const SourceMatrix& matrix, Pool& pool, bool fine_inputs) {
  inputs = matrix.source.k;
  outputs = matrix.source.n;
  Part part;
  part.names = {matrix.name};
  part.widths = {outputs};
  if (matrix.perm) part.perm.assign(matrix.perm, matrix.perm + inputs);
  part.matrix = hasten::pack(&matrix.source, 1, pool, fine_inputs);
  parts.push_back(std::move(part));
  find_preparations();
}

void Stack::find_preparations() {
  for (size_t i = 0; i < parts.size(); i++) {
    Part& part = parts[i];
    if (!part.perm.empty()) part.matrix.perm = part.perm.data();
    const auto known = std::find_if(preparations.begin(), preparations.end(),
                                    [&](int other) { return same_preparation(parts[other], part); });
    part.prepared = (int)(known - preparations.begin());
    if (known == preparations.end()) preparations.push_back((int)i);
  }
}

void Stack::set_bias(const std::string& name, const std::vector<float>& bias) {
  for (Stack& second : seconds) second.set_bias(name, bias);
  for (Part& part : parts) {
    int first = 0;
    for (size_t i = 0; i < part.names.size(); first += part.widths[i++]) {
      if (part.names[i] != name) continue;
      if ((int)bias.size() != part.widths[i])
        fail(name + ".bias has " + std::to_string(bias.size()) + " numbers, expected " + std::to_string(part.widths[i]));
      part.bias.resize(part.matrix.n_pad, 0.0f);
      std::copy(bias.begin(), bias.end(), part.bias.begin() + first);
      part.matrix.bias = part.bias.data();
    }
  }
}

Stack& Decoder::stack_of(const std::string& role, int layer) {
  if (role == "embed") return embed_;
  if (role == "position_embed") return positions_;
  if (role == "head") return head_;
  if (layer < 0 || layer >= (int)layers_.size()) fail("layer " + std::to_string(layer) + " is not in the model");
  Layer& l = layers_[layer];
  if (const size_t dot = role.find('.'); dot != std::string::npos) {
    const int e = std::stoi(role.substr(dot + 1));
    if (e < 0 || e >= l.spec.experts) fail("layer " + std::to_string(layer) + " has no expert " + std::to_string(e));
    return role[0] == 'g' ? l.expert_gate_up[e] : l.expert_down[e];
  }
  if (role == "router") return l.router;
  if (role == "qkv") return l.qkv;
  if (role == "o") return l.o;
  if (role == "gate_up") return l.gate_up;
  if (role == "down") return l.down;
  fail("unknown role of a weight: " + role);
}

void Decoder::add_matrices(const std::string& place, int layer, const std::vector<SourceMatrix>& sources) {
  if (finished_) fail("weights were added after finish()");
  Stack& stack = stack_of(place, layer);
  const std::string role = place.substr(0, place.find('.'));
  if (!stack.parts.empty()) fail("weight " + sources.at(0).name + " was given twice");
  const int H = spec_.hidden_size;
  std::vector<std::pair<int, int>> shapes;  // expected [n, k] of each source
  if (role == "embed" || role == "head") {
    shapes = {{spec_.vocab_size, H}};
  } else if (role == "position_embed") {
    shapes = {{spec_.max_position, H}};
  } else {
    const Layer& l = layers_[layer];
    const int q = l.q_width(), kv = l.kv_width();
    const int inner = l.spec.intermediate_size / (role == place ? 1 : l.spec.experts);
    if (role == "router") shapes = {{l.spec.experts, H}};
    if (role == "qkv") shapes = {{q, H}, {kv, H}, {kv, H}};
    if (role == "o") shapes = {{H, q}};
    if (role == "gate_up") shapes.assign(spec_.gated_mlp ? 2 : 1, {inner, H});
    if (role == "down") shapes = {{H, inner}};
  }
  size_t at = 0;  // in shapes
  bool thin = false;
  for (size_t i = 0; i < sources.size() && at < shapes.size(); i++) {
    const Source& s = sources[i].source;
    auto [n, k] = shapes[at];
    if (ends_with(sources[i].name, ".a") && i + 1 < sources.size())
      n = s.n, thin = true;  // its rank is checked with b
    else if (ends_with(sources[i].name, ".b") && i > 0)
      k = sources[i - 1].source.n, at++;
    else
      at++;
    if (s.n != n || s.k != k)
      fail("weight " + sources[i].name + " has shape " + shape(s.n, s.k) + ", expected " + shape(n, k));
  }
  for (const SourceMatrix& m : sources)
    if (!kernels_.linear.takes(m.source.kind))
      fail("weight " + m.name + " has a format that " + kernels_.isa + " kernels do not multiply on this CPU");
  if (at != shapes.size() || (!thin && sources.size() != shapes.size()))
    fail(role + " takes " + std::to_string(shapes.size()) + " matrices, found " + std::to_string(sources.size()));
  // What writes to the residual stream or gives the logits is where 8 bits cost most agreement (docs/log.md).
  const bool sensitive = role == "o" || role == "down" || role == "head" || role == "embed";
  stack.pack(sources, pool_, H <= (sensitive && !thin ? kNarrow : kVeryNarrow));
}

void Decoder::add_vector(const std::string& name, std::vector<float> values) {
  if (finished_) fail("weights were added after finish()");
  if (find_vector(name)) fail("weight " + name + " was given twice");
  vectors_.emplace_back(name, std::move(values));
}

const std::vector<float>* Decoder::find_vector(const std::string& name) const {
  for (const auto& v : vectors_)
    if (v.first == name) return &v.second;
  return nullptr;
}

const float* Decoder::take_vector(const std::string& name, size_t n, bool wanted) {
  for (size_t i = 0; i < vectors_.size(); i++) {
    if (vectors_[i].first != name) continue;
    if (vectors_[i].second.size() != n)
      fail("weight " + name + " has " + std::to_string(vectors_[i].second.size()) + " numbers, expected " +
           std::to_string(n));
    taken_[i] = true;
    return vectors_[i].second.data();
  }
  if (wanted) fail("weight " + name + " is missing");
  return nullptr;
}

Decoder::NormWeights Decoder::take_norm(const std::string& name, bool wanted) {
  NormWeights w;
  if (!wanted) return w;
  w.weight = take_vector(name, spec_.hidden_size, true);
  if (spec_.norm == Norm::Layer) w.bias = take_vector(name + ".bias", spec_.hidden_size, false);
  return w;
}

void Decoder::take_biases(Stack& stack, const std::vector<std::string>& names) {
  if (stack.parts.empty()) fail("weight " + names[0] + " is missing");
  for (size_t i = 0; i < vectors_.size(); i++)
    for (const std::string& name : names)
      if (vectors_[i].first == name + ".bias") stack.set_bias(name, vectors_[i].second), taken_[i] = true;
}

void Decoder::finish_layer(int i) {
  Layer& l = layers_[i];
  const std::string prefix = "layers." + std::to_string(i) + ".";
  take_biases(l.qkv, {prefix + "q", prefix + "k", prefix + "v", prefix + "q.b", prefix + "k.b", prefix + "v.b"});
  take_biases(l.o, {prefix + "o", prefix + "o.b"});
  if (l.spec.experts) {
    take_biases(l.router, {prefix + "router"});
    for (int e = 0; e < l.spec.experts; e++) {
      const std::string end = "." + std::to_string(e);
      take_biases(l.expert_gate_up[e], {prefix + "up" + end, prefix + "gate" + end});
      if (l.expert_down[e].parts.empty()) fail("weight " + prefix + "down is missing");
    }
    l.down_bias = take_vector(prefix + "down.bias", spec_.hidden_size, false);
  } else {
    take_biases(l.gate_up, {prefix + "up", prefix + "gate", prefix + "up.b", prefix + "gate.b"});
    take_biases(l.down, {prefix + "down", prefix + "down.b"});
  }
  l.attn_norm = take_norm(prefix + "attn_norm", spec_.pre_norm);
  l.mlp_norm = take_norm(prefix + "mlp_norm", spec_.pre_norm);
  l.attn_post_norm = take_norm(prefix + "attn_post_norm", spec_.post_norm);
  l.mlp_post_norm = take_norm(prefix + "mlp_post_norm", spec_.post_norm);
  if (spec_.qk_norm == QkNorm::None) return;
  const bool full = spec_.qk_norm == QkNorm::Full;
  l.q_norm = take_vector(prefix + "q_norm", full ? l.q_width() : l.spec.head_dim, true);
  l.k_norm = take_vector(prefix + "k_norm", full ? l.kv_width() : l.spec.head_dim, true);
}

void Decoder::finish() {
  if (finished_) fail("finish() was called twice");
  taken_.assign(vectors_.size(), false);
  for (size_t i = 0; i < layers_.size(); i++) finish_layer((int)i);
  if (embed_.parts.empty()) fail("weight embed is missing");
  if (spec_.learned_positions && positions_.parts.empty()) fail("weight position_embed is missing");
  if (spec_.tied_head && !head_.parts.empty()) fail("weight head is there, but the model ties it to embed");
  take_biases(spec_.tied_head ? embed_ : head_, {spec_.tied_head ? "embed" : "head"});
  if (spec_.tied_head)
    if (const float* bias = take_vector("head.bias", spec_.vocab_size, false))
      embed_.set_bias("embed", std::vector<float>(bias, bias + spec_.vocab_size));
  final_norm_ = take_norm("final_norm", true);
  for (size_t i = 0; i < taken_.size(); i++)
    if (!taken_[i]) fail("weight " + vectors_[i].first + " is not part of this model");
  size_t scratch = 64;
  each_stack([&](const Stack& s) {
    for (const Stack::Part& part : s.parts) scratch = std::max(scratch, scratch_bytes(part.matrix));
  });
  for (int t = 0; t < pool_.size(); t++) {
    scratch_[t].reserve(scratch);
    product_scratch_.push_back(scratch_[t].data());
  }
  finished_ = true;
}

template <class Fn>
void Decoder::each_stack(Fn fn) const {
  fn(embed_), fn(positions_), fn(head_);
  for (const Layer& l : layers_) {
    for (const Stack* s : {&l.qkv, &l.o, &l.gate_up, &l.down, &l.router}) {
      fn(*s);
      for (const Stack& second : s->seconds) fn(second);
    }
    for (const Stack& s : l.expert_gate_up) fn(s);
    for (const Stack& s : l.expert_down) fn(s);
  }
}

size_t Decoder::weight_bytes() const {
  size_t bytes = 0;
  each_stack([&](const Stack& s) {
    for (const Stack::Part& part : s.parts) bytes += matrix_bytes(part.matrix);
  });
  return bytes;
}

}  // namespace hasten
