// Whole steps of tiny random models with odd widths, on every instruction set and KV cache: chunks give the bits of one
// prefill, and the sampler runs over what comes out. Meant for sanitizers; numbers are compared with references in Python.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>

#include "decoder.h"
#include "sampling.h"

using namespace hasten;

namespace {

constexpr int kBlock = 16, kTokens = 75, kVocab = 131;
std::mt19937 random_bits(2);

void require(bool condition, const std::string& what) {
  if (condition) return;
  std::fprintf(stderr, "decoder: %s\n", what.c_str());
  std::exit(1);
}

std::vector<float> numbers(int n, float size) {
  std::vector<float> v(n);
  for (float& x : v) x = size * std::uniform_real_distribution<float>(-1.0f, 1.0f)(random_bits);
  return v;
}

// Three layers of different widths: a window, no rope, softcaps, post-norms, biases, grouped queries. Of a compressed model
// the second is of low rank in parts (see fill) and the third split into experts.
DecoderSpec make_spec(int variant, bool compressed) {
  DecoderSpec s;
  s.vocab_size = kVocab;
  s.hidden_size = 36;
  s.max_position = 128;
  s.layers = {{6, 2, 10, 50, 0, 0}, {3, 1, 18, 70, -1, 20}, {4, 4, 12, 33, 0, 37}};
  if (compressed) s.layers[2].experts = 3, s.layers[2].active_experts = 2;
  RopeSpec rope;
  rope.inv_freq = {1.0f, 0.3f, 0.1f, 0.01f};
  s.ropes = {rope};
  s.norm = variant == 1 ? Norm::Layer : Norm::Rms;
  s.post_norm = variant == 0;
  s.parallel_residual = variant == 1;
  s.gated_mlp = variant != 1;
  s.learned_positions = variant == 1;
  s.qk_norm = variant == 0 ? QkNorm::Head : variant == 2 ? QkNorm::Full : QkNorm::None;
  s.activation = variant == 0 ? Act::GeluTanh : variant == 1 ? Act::Gelu : Act::Silu;
  s.tied_head = variant == 2;
  s.attention_scale = 0.3f;
  s.attention_softcap = variant == 0 ? 5.0f : 0.0f;
  s.final_softcap = variant == 0 ? 10.0f : 0.0f;
  return s;
}

// A matrix as a checkpoint stores it, of random numbers about 1 / sqrt(k) large; memory exactly as long as it must be.
struct Stored {
  std::vector<uint8_t> data, zeros;
  std::vector<float> scales;
  Source source{};
};

Stored store(Kind kind, int group, int n, int k) {
  Stored s;
  const std::vector<float> values = numbers(n * k, 2.0f / std::sqrt((float)k));
  s.data.resize(n * source_row_bytes(kind, k));
  if (kind == Kind::F32) memcpy(s.data.data(), values.data(), s.data.size());
  if (kind == Kind::BF16)
    for (size_t i = 0; i < values.size(); i++) memcpy(&s.data[2 * i], (const uint8_t*)&values[i] + 2, 2);
  if (kind == Kind::I8 || kind == Kind::I4) {
    for (uint8_t& byte : s.data) byte = (uint8_t)random_bits();
    const int groups = group ? (k + group - 1) / group : 1;
    s.scales.assign((size_t)n * groups, (kind == Kind::I8 ? 0.02f : 0.25f) / std::sqrt((float)k));
    if (kind == Kind::I4 && group) s.zeros.assign((size_t)n * groups, 7);
  }
  s.source = {kind, n, k, group, s.data.data(), s.scales.empty() ? nullptr : s.scales.data(),
              s.zeros.empty() ? nullptr : s.zeros.data()};
  return s;
}

// The sources of a place; `rank` > 0: the last of them is two thin ones. `role` may be that of one expert, "down.2".
void add(Decoder& d, const std::string& place, int layer, std::vector<std::pair<int, int>> shapes, bool bias, int rank = 0) {
  const std::string role = place.substr(0, place.find('.')), expert = place.substr(role.size());
  const int outputs = shapes.back().first;
  if (rank) shapes.push_back({outputs, rank}), shapes[shapes.size() - 2].first = rank;
  const int whole = (int)shapes.size() - (rank ? 1 : 0);  // matrices as the model names them
  const char* names[][3] = {{"q", "k", "v"}, {"gate", "up", ""}};
  const std::string prefix = "layers." + std::to_string(layer) + ".";
  // From layer 1 on parts of one stack differ: other kinds, groups and zeros side by side.
  const std::pair<Kind, int> formats[] = {{Kind::F32, 0}, {Kind::I4, 32}, {Kind::I8, 0}, {Kind::BF16, 0},
                                          {Kind::I8, 64}, {Kind::I4, 0}};
  std::vector<Stored> data;
  std::vector<SourceMatrix> sources;
  for (size_t i = 0; i < shapes.size(); i++) {
    const auto [kind, group] = formats[layer < 1 ? 0 : (5 * layer + role.size() + i) % 6];
    data.push_back(store(kind, group, shapes[i].first, shapes[i].second));
  }
  for (int i = 0; i < (int)shapes.size(); i++) {
    const int named = std::min(i, whole - 1);
    const bool a = rank && i == whole - 1, b = i == whole;
    std::string name = role;
    if (role == "qkv") name = prefix + names[0][named];
    else if (role == "gate_up") name = prefix + (whole == 1 ? "up" : names[1][named]) + expert;
    else if (layer >= 0) name = prefix + place;
    name += a ? ".a" : b ? ".b" : "";
    sources.push_back({name, data[i].source, nullptr});
    if (bias && !a) d.add_vector(name + ".bias", numbers(shapes[i].first, 0.1f));
  }
  d.add_matrices(place, layer, sources);
}

// An MLP in experts: each has its rows of gate and up and its columns of down, and down's bias is of all of them.
void fill_experts(Decoder& d, int layer, bool bias) {
  const LayerSpec& l = d.spec().layers[layer];
  const int H = d.spec().hidden_size, inner = l.intermediate_size / l.experts;
  add(d, "router", layer, {{l.experts, H}}, false);
  for (int e = 0; e < l.experts; e++) {
    const std::string end = "." + std::to_string(e);
    add(d, "gate_up" + end, layer, std::vector<std::pair<int, int>>(d.spec().gated_mlp ? 2 : 1, {inner, H}), bias);
    add(d, "down" + end, layer, {{H, inner}}, false);
  }
  if (bias) d.add_vector("layers." + std::to_string(layer) + ".down.bias", numbers(H, 0.1f));
}

void fill(Decoder& d, bool compressed) {
  const DecoderSpec& s = d.spec();
  const int H = s.hidden_size;
  const bool bias = s.norm == Norm::Layer;
  const auto norm = [&](const std::string& name) {
    std::vector<float> w = numbers(H, 0.2f);
    for (float& v : w) v += 1.0f;
    d.add_vector(name, w);
    if (bias) d.add_vector(name + ".bias", numbers(H, 0.1f));
  };
  add(d, "embed", -1, {{kVocab, H}}, false);
  if (s.learned_positions) add(d, "position_embed", -1, {{s.max_position, H}}, false);
  if (!s.tied_head) add(d, "head", -1, {{kVocab, H}}, bias);
  norm("final_norm");
  for (int i = 0; i < (int)s.layers.size(); i++) {
    const LayerSpec& l = s.layers[i];
    const int q = l.num_heads * l.head_dim, kv = l.num_kv_heads * l.head_dim;
    const int rank = compressed && i == 1 ? 9 : 0;
    const int mlp_rank = rank ? 16 : 0;  // fills its buffer, so that a sanitizer sees the end
    add(d, "qkv", i, {{q, H}, {kv, H}, {kv, H}}, bias, rank);
    add(d, "o", i, {{H, q}}, bias, rank);
    if (l.experts) fill_experts(d, i, bias);
    else {
      const std::pair<int, int> up = {l.intermediate_size, H};
      add(d, "gate_up", i, std::vector<std::pair<int, int>>(s.gated_mlp ? 2 : 1, up), bias, mlp_rank);
      add(d, "down", i, {{H, l.intermediate_size}}, bias, mlp_rank);
    }
    const std::string prefix = "layers." + std::to_string(i) + ".";
    norm(prefix + "attn_norm"), norm(prefix + "mlp_norm");
    if (s.post_norm) norm(prefix + "attn_post_norm"), norm(prefix + "mlp_post_norm");
    if (s.qk_norm == QkNorm::None) continue;
    const bool full = s.qk_norm == QkNorm::Full;
    d.add_vector(prefix + "q_norm", std::vector<float>(full ? q : l.head_dim, 1.1f));
    d.add_vector(prefix + "k_norm", std::vector<float>(full ? kv : l.head_dim, 0.9f));
  }
  d.finish();
}

// Logits of all tokens of one sequence, fed in pieces, beside a second sequence of one token a step.
std::vector<float> run(Decoder& d, const std::vector<int>& sizes) {
  const std::vector<int32_t> tables = {7, 2, 9, 0, 4, 1, 3, 5, 6, 8};  // two sequences, five blocks each
  std::vector<float> all;
  int first = 0, other = 0;
  for (int size : sizes) {
    std::vector<int32_t> tokens, positions, slots, rows;
    const auto append = [&](int sequence, int position) {
      tokens.push_back((position * 37 + 11 * sequence) % kVocab);
      positions.push_back(position);
      slots.push_back(tables[(size_t)sequence * 5 + position / kBlock] * kBlock + position % kBlock);
    };
    for (int i = 0; i < size; i++) append(0, first + i), rows.push_back(i);
    append(1, other);
    const std::vector<int32_t> queries = {size, 1}, contexts = {first + size, other + 1};
    const StepBatch batch{size + 1, 2, size, 5, tokens.data(), positions.data(), slots.data(), queries.data(),
                          contexts.data(), tables.data(), rows.data()};
    const std::shared_ptr<Buffer> logits = d.forward(batch);
    all.insert(all.end(), logits->floats(), logits->floats() + (size_t)size * kVocab);
    first += size, other = (other + 1) % 70;
  }
  return all;
}

void check_sampler(Pool& pool, const Kernels& k, std::vector<float> logits) {
  const int rows = (int)logits.size() / kVocab;
  const std::vector<float> before = logits, one(rows, 1.0f), zero(rows, 0.0f), top_p(rows, 0.7f), bias = {2.0f};
  std::vector<int32_t> top_k(rows, 20), num(rows, 3), targets(rows, 5);
  std::vector<int32_t> offsets(rows + 1, 1), ids = {kVocab - 1}, counts = {2};
  std::vector<uint64_t> seeds(rows, 9), counters(rows);
  offsets[0] = 0;
  for (int i = 0; i < rows; i++) counters[i] = i, top_k[i] = i % 3 ? 20 : 0;
  const SamplingParams p{one.data(), top_k.data(), top_p.data(), zero.data(), one.data(), one.data(), one.data(),
                         seeds.data(), counters.data(), num.data(), targets.data(), offsets.data(), ids.data(),
                         counts.data(), offsets.data(), ids.data(), bias.data()};
  std::vector<int32_t> tokens(rows), top_ids(rows * 3);
  std::vector<float> logprobs(rows), target_logprobs(rows), top_logprobs(rows * 3);
  Sampler sampler(pool, k.ops);
  sampler.sample(logits.data(), rows, kVocab, p,
         {tokens.data(), logprobs.data(), target_logprobs.data(), 3, top_ids.data(), top_logprobs.data()});
  require(logits == before, "the sampler left logits changed");
  for (int r = 0; r < rows; r++) {
    require(tokens[r] >= 0 && tokens[r] < kVocab, "a token outside the vocabulary");
    require(logprobs[r] <= top_logprobs[(size_t)r * 3], "a token more probable than the best");
  }
  sampler.greedy(logits.data(), rows, kVocab, tokens.data());
  for (int r = 0; r < rows; r++) require(tokens[r] == top_ids[(size_t)r * 3], "greedy does not take the best");
}

// Logits that masks and broken models leave, of small and large vocabularies, under every cut.
void check_hostile_logits(Pool& pool, const Kernels& k) {
  Sampler sampler(pool, k.ops);
  const float infinity = INFINITY;
  for (int vocab : {5, 512, 43001}) {
    const int rows = 6;
    std::vector<float> logits((size_t)rows * vocab, -infinity);
    const auto row = [&](int r) { return logits.data() + (size_t)r * vocab; };
    for (int i = 0; i < vocab; i++) {
      if (i % 50 == 3) row(0)[i] = (float)(i % 7);         // few that are not -inf
      row(2)[i] = i % 2 ? 0.0f : -1e-38f;                  // hardly different
      row(3)[i] = i % 3 ? 3e38f : -3e38f;                  // as different as can be
      row(4)[i] = row(5)[i] = (float)(i % 11);
    }
    row(4)[vocab - 1] = std::nanf("");
    row(5)[vocab / 2] = infinity;
    for (int top_k : {0, 1, 50, vocab / 128 + 1, vocab, vocab + 7})
      for (float top : {0.0f, 0.3f, 0.9f, 1.0f})
        for (float least : {0.0f, 0.2f}) {
          const std::vector<float> before = logits, one(rows, 1.0f), zero(rows, 0.0f), top_p(rows, top), min_p(rows, least);
          const std::vector<int32_t> cut(rows, top_k), num(rows, 4), targets(rows, vocab - 1), none(rows + 1, 0);
          const std::vector<uint64_t> seeds(rows, 5), counters(rows, 6);
          std::vector<int32_t> tokens(rows), top_ids(rows * 4);
          std::vector<float> logprobs(rows), target_logprobs(rows), top_logprobs(rows * 4);
          sampler.sample(logits.data(), rows, vocab,
                         {one.data(), cut.data(), top_p.data(), min_p.data(), one.data(), zero.data(), zero.data(),
                          seeds.data(), counters.data(), num.data(), targets.data(), none.data(), none.data(),
                          none.data(), none.data(), none.data(), zero.data()},
                         {tokens.data(), logprobs.data(), target_logprobs.data(), 4, top_ids.data(), top_logprobs.data()});
          require(memcmp(logits.data(), before.data(), 4 * logits.size()) == 0, "the sampler left logits changed");
          for (int r : {0, 2, 3}) {
            require(tokens[r] >= 0 && tokens[r] < vocab, "a token outside the vocabulary");
            require(std::isfinite(row(r)[tokens[r]]), "a token that is cut off");
          }
          require(tokens[3] % 3 != 0 && tokens[4] == -1 && tokens[5] == vocab / 2, "not the token that is left");
        }
  }
}

void check_model(Pool& pool, const std::string& isa, int variant, bool compressed) {
  const Kernels& k = *select_kernels(isa.c_str());
  random_bits.seed(variant);
  Decoder d(make_spec(variant, compressed), k, pool);
  fill(d, compressed);
  // The cache knows nothing of how weights are stored, so one kind of it will do for those.
  for (KvKind kind : compressed ? std::vector<KvKind>{KvKind::F32} : std::vector<KvKind>{KvKind::F32, KvKind::BF16, KvKind::I8}) {
    const std::string where = isa + " variant " + std::to_string(variant) + " kv " + std::to_string((int)kind) +
                              (compressed ? " compressed" : "");
    d.allocate(10, kBlock, kind);
    const std::vector<float> whole = run(d, {kTokens});
    d.allocate(10, kBlock, kind);
    const std::vector<float> chunks = run(d, {1, 31, 1, 1, 30, 11});
    for (float v : whole) require(std::isfinite(v), where + ": a logit is not finite");
    require(whole == chunks, where + ": chunks change the result");
    d.copy_block(7, 6);
    check_sampler(pool, k, whole);
  }
}

}  // namespace

int main() {
  Pool pool(3);
  for (const char* const* isa = available_isas(); *isa; isa++) check_hostile_logits(pool, *select_kernels(*isa));
  for (int variant = 0; variant < 3; variant++)
    for (const char* const* isa = available_isas(); *isa; isa++)
      for (bool compressed : {false, true}) check_model(pool, *isa, variant, compressed);
  std::puts("decoder: ok");
}
