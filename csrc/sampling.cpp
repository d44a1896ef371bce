// No row is ever sorted whole. A bound below the last token that can be kept is found first (from the largest logits of
// short blocks for top-k, from the mass above a few depths for top-p); what lies above it is collected in the order of ids
// and cut exactly. Tokens rank by logit, equal ones by id, the lower first.
#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

namespace hasten {
namespace {

constexpr int kBlock = 128;      // logits of one block whose largest is known
constexpr int kPiece = 4096;     // weights computed at once when nothing is cut off
constexpr int kGroup = 16;       // ids that share one number of the draw, see backends/base.py
constexpr int kBuckets = 1024;
constexpr float kNothing = -std::numeric_limits<float>::infinity();

// Philox 4x32-10 (Salmon et al. 2011): key (seed low, seed high), counter (counter low, counter high, which, 0).
void philox(uint64_t seed, uint64_t counter, uint32_t which, uint32_t* words) {
  uint32_t c0 = (uint32_t)counter, c1 = (uint32_t)(counter >> 32), c2 = which, c3 = 0;
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < 10; round++) {
    const uint64_t p0 = (uint64_t)0xD2511F53 * c0, p1 = (uint64_t)0xCD9E8D57 * c2;
    c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
    c1 = (uint32_t)p1;
    c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
    c3 = (uint32_t)p0;
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

struct Token {
  float logit;
  int id;
};

bool before(const Token& a, const Token& b) { return a.logit > b.logit || (a.logit == b.logit && a.id < b.id); }

}  // namespace

// One row at a time. Everything has its room before the row starts: nothing is allocated, hence thrown, while threads run.
struct RowSampler {
  const OpKernels& ops;
  float* x = nullptr;  // the row
  int n = 0, capacity = 0;
  // Tokens kept so far, by rising id; weight = exp((logit - top) / temperature). Room for all, touched as far as needed.
  int kept = 0;
  std::unique_ptr<int[]> ids;
  std::unique_ptr<float[]> logits, weights;
  std::vector<float> maxima, largest;  // of blocks; scratch for the k-th of them
  std::vector<Token> ranked;           // scratch for ranking
  std::vector<double> sums;
  std::vector<Token> changed;          // logits before penalties and bias

  explicit RowSampler(const OpKernels& kernels) : ops(kernels) {}
  void reserve(int vocab_size, int changes);
  int sample(const SamplingParams& p, int row, const SamplingResult& out);
  void adjust(const SamplingParams& p, int row);
  void restore();
  void find_maxima();
  float kth_bound(int k);
  float lower_bound(float top, float scale, float top_p, float min_p, double* mass) const;
  void collect(float bound);
  void keep(const Token& last);
  void keep_top_k(int k);
  void keep_top_p(float top, float bottom, double mass);
  int draw(const SamplingParams& p, int row, int best);
  int draw_all(const SamplingParams& p, int row, float top, float scale);
  void best_logprobs(const SamplingParams& p, int row, double log_total, const SamplingResult& out);
};

// Room for a vocabulary and for this many changed logits a row.
void RowSampler::reserve(int vocab_size, int changes) {
  n = vocab_size;
  changed.reserve(changes);
  if (n <= capacity) return;
  capacity = 0;  // should memory run out half-way
  ids.reset(new int[n + kBlock]);
  logits.reset(new float[n + kBlock]);
  weights.reset(new float[n + kBlock]);
  maxima.reserve((n + kBlock - 1) / kBlock);
  largest.reserve((n + kBlock - 1) / kBlock);
  ranked.reserve(n);
  sums.reserve(kBuckets);
  capacity = n;
}

void RowSampler::adjust(const SamplingParams& p, int row) {
  changed.clear();
  for (int i = p.seen_offsets[row]; i < p.seen_offsets[row + 1]; i++) {
    float& v = x[p.seen_ids[i]];
    changed.push_back({v, p.seen_ids[i]});
    v = v > 0.0f ? v / p.repetition[row] : v * p.repetition[row];
    if (p.seen_counts[i] > 0) v -= p.presence[row];
    v = (float)((double)v - (double)p.frequency[row] * p.seen_counts[i]);
  }
  for (int i = p.bias_offsets[row]; i < p.bias_offsets[row + 1]; i++) {
    changed.push_back({x[p.bias_ids[i]], p.bias_ids[i]});
    x[p.bias_ids[i]] += p.bias_values[i];
  }
}

void RowSampler::restore() {
  for (size_t i = changed.size(); i-- > 0;) x[changed[i].id] = changed[i].logit;
}

void RowSampler::find_maxima() {
  maxima.clear();
  for (int i = 0; i < n; i += kBlock) maxima.push_back(ops.max(x + i, std::min(kBlock, n - i)));
}

// A bound that at least k logits reach: the k-th largest of the blocks' largest.
float RowSampler::kth_bound(int k) {
  if (k > (int)maxima.size()) return kNothing;
  largest = maxima;
  std::nth_element(largest.begin(), largest.begin() + (k - 1), largest.end(), std::greater<float>());
  return largest[k - 1];
}

void RowSampler::collect(float bound) {
  int* to_ids = ids.get();
  float* to_logits = logits.get();
  int j = 0;  // not `kept`: the stores might change it, for all that a compiler knows
  for (size_t b = 0; b < maxima.size(); b++) {
    if (maxima[b] < bound) continue;
    const int first = (int)b * kBlock, end = std::min(first + kBlock, n);
    for (int i = first; i < end; i++) {  // without a branch: every place is written, few are kept
      const float v = x[i];
      to_ids[j] = i;
      to_logits[j] = v;
      j += v >= bound;
    }
  }
  kept = j;
}

// Drops what ranks after `last`.
void RowSampler::keep(const Token& last) {
  int* at_id = ids.get();
  float *at_logit = logits.get(), *at_weight = weights.get();
  const int count = kept;
  int j = 0;
  for (int i = 0; i < count; i++) {
    const int id = at_id[i];
    const float logit = at_logit[i];
    at_id[j] = id;
    at_logit[j] = logit;
    at_weight[j] = at_weight[i];
    j += (logit > last.logit) | ((logit == last.logit) & (id <= last.id));
  }
  kept = j;
}

void RowSampler::keep_top_k(int k) {
  if (k >= kept) return;
  ranked.clear();
  for (int i = 0; i < kept; i++) ranked.push_back({logits[i], ids[i]});
  std::nth_element(ranked.begin(), ranked.begin() + (k - 1), ranked.end(), before);
  keep(ranked[k - 1]);
}

// Keeps the shortest run of tokens, best first, whose weights reach `mass`. Buckets of falling logit bound the place where
// the sum crosses it; only that bucket is sorted. No logit is below `bottom`.
void RowSampler::keep_top_p(float top, float bottom, double mass) {
  if (bottom == kNothing) {
    bottom = top;
    for (int i = 0; i < kept; i++) bottom = std::min(bottom, logits[i]);
  }
  const float width = top - bottom;
  // Widths near the ends of the range of floats leave no way to tell buckets apart: one of them then holds all.
  const float per_unit = std::isfinite((kBuckets - 1) / width) ? (kBuckets - 1) / width : 0.0f;
  const auto bucket_of = [&](float v) {
    const float bucket = (top - v) * per_unit;
    return bucket >= 0.0f && bucket < kBuckets - 1 ? (int)bucket : v == top ? 0 : kBuckets - 1;
  };
  sums.assign(kBuckets, 0.0);
  for (int i = 0; i < kept; i++) sums[bucket_of(logits[i])] += weights[i];
  double sum = 0.0;
  int crossing = 0;
  while (crossing < kBuckets && sum + sums[crossing] < mass) sum += sums[crossing++];
  if (crossing == kBuckets) return;  // by rounding, all of them together stay below
  ranked.clear();
  for (int i = 0; i < kept; i++)
    if (bucket_of(logits[i]) == crossing) ranked.push_back({logits[i], i});  // places rank as ids do
  std::sort(ranked.begin(), ranked.end(), before);
  int last = ranked[0].id;
  for (const Token& t : ranked) {
    last = t.id;
    sum += weights[last];
    if (sum >= mass) break;
  }
  keep({logits[last], ids[last]});
}

namespace {

// The draw among tokens that come by rising id. Groups of kGroup ids race: each has its weight over an exponential number of
// its own, and the greatest wins; within it, tokens are walked until their weights exceed a uniform share of the group's.
struct Race {
  uint64_t seed, counter;
  double best = -1.0;  // of the groups so far
  int first = 0;       // id at which the winner begins
  uint32_t words[4] = {};
  int num_known = -1;  // which four groups `words` are of

  // Whether the group that begins at `id` leads now.
  bool enter(int id, double weight) {
    if (!(weight > 0.0)) return false;
    const int group = id / kGroup;
    if (group / 4 != num_known) {
      num_known = group / 4;
      philox(seed, counter, 1 + (uint32_t)num_known, words);
    }
    const double value = weight / -std::log(((double)words[group % 4] + 0.5) * 0x1p-32);
    if (!(value > best)) return false;
    best = value;
    first = group * kGroup;
    return true;
  }
};

// Index of the token drawn from a group's weights.
int draw_in_group(const float* weights, int count, double u) {
  double total = 0.0, sum = 0.0;
  for (int i = 0; i < count; i++) total += weights[i];
  int last = 0;
  for (int i = 0; i < count; i++) {
    sum += weights[i];
    if (weights[i] > 0.0f) last = i;
    if (sum > u * total) break;
  }
  return last;
}

}  // namespace

// All tokens may be drawn.
int RowSampler::draw_all(const SamplingParams& p, int row, float top, float scale) {
  Race race{p.seeds[row], p.counters[row]};
  float here[kPiece], winner[kGroup];
  int num_winner = 0;
  for (int piece = 0; piece < n; piece += kPiece) {
    const int count = std::min(kPiece, n - piece);
    ops.exp_scaled(x + piece, top, scale, count, here);
    for (int i = 0; i < count; i += kGroup) {
      const int size = std::min(kGroup, count - i);
      double weight = 0.0;
      for (int j = 0; j < size; j++) weight += here[i + j];
      if (!race.enter(piece + i, weight)) continue;
      std::copy(here + i, here + i + size, winner);
      num_winner = size;
    }
  }
  return race.first + draw_in_group(winner, num_winner, philox_uniform(p.seeds[row], p.counters[row]));
}

int RowSampler::draw(const SamplingParams& p, int row, int best) {
  const float top = x[best], scale = 1.0f / p.temperature[row];
  if (!std::isfinite(top) || !std::isfinite(scale)) return best;
  const int k = p.top_k[row] > 0 ? std::min(p.top_k[row], n) : n;
  const float top_p = p.top_p[row], min_p = p.min_p[row];
  if (k == n && top_p >= 1.0f && min_p <= 0.0f) return draw_all(p, row, top, scale);
  double mass = 0.0;  // of what top-k leaves

  find_maxima();
  const float bound = std::min(top, k < n ? kth_bound(k) : lower_bound(top, scale, top_p, min_p, &mass));
  collect(std::max(bound, -std::numeric_limits<float>::max()));  // what is -inf is never drawn
  ops.exp_scaled(logits.get(), top, scale, kept, weights.get());
  keep_top_k(k);
  if (k < n)
    for (int i = 0; i < kept; i++) mass += weights[i];
  if (top_p < 1.0f) keep_top_p(top, bound, (double)top_p * mass);

  Race race{p.seeds[row], p.counters[row]};
  int winner = 0, num_winner = 0;
  for (int i = 0, end = 0; i < kept; i = end) {
    double weight = 0.0;
    for (; end < kept && ids[end] / kGroup == ids[i] / kGroup; end++) {
      if (weights[end] < min_p) weights[end] = 0.0f;
      weight += weights[end];
    }
    if (race.enter(ids[i], weight)) winner = i, num_winner = end - i;
  }
  return ids[winner + draw_in_group(&weights[winner], num_winner, philox_uniform(p.seeds[row], p.counters[row]))];
}

// A logit that no token kept by top-p or min-p is below. *mass: the sum of all weights, where top_p needs it.
float RowSampler::lower_bound(float top, float scale, float top_p, float min_p, double* mass) const {
  float bound = kNothing;
  if (min_p > 0.0f) bound = (float)(top + std::log((double)min_p) / scale - 1e-3);
  if (top_p >= 1.0f) return bound;
  const float depths[kBounds] = {1.0f, 2.0f, 3.5f, 5.0f, 6.5f, 8.0f, 10.0f, 12.0f};
  float bounds[kBounds];
  double above[kBounds + 1];
  for (int i = 0; i < kBounds; i++) bounds[i] = top - depths[i] / scale;
  ops.sum_exp_above(x, top, scale, bounds, n, above);
  *mass = above[kBounds];
  for (int i = 0; i < kBounds; i++)
    if (above[i] * (1.0 - 1e-6) >= (double)top_p * *mass) return std::max(bound, bounds[i]);
  // Tokens lighter than this weigh (1 - top_p) of the total at most, all together: the others hold the rest.
  const double lightest = (1.0 - (double)top_p) * *mass / n;
  return std::max(bound, (float)(top + std::log(lightest) / scale - 1e-3));
}

void RowSampler::best_logprobs(const SamplingParams& p, int row, double log_total, const SamplingResult& out) {
  int32_t* best_ids = out.top_ids + (size_t)row * out.num_top;
  float* values = out.top_logprobs + (size_t)row * out.num_top;
  std::fill(best_ids, best_ids + out.num_top, -1);
  std::fill(values, values + out.num_top, kNothing);
  const int k = std::min(p.num_logprobs[row], n);
  if (k < 1) return;
  find_maxima();
  collect(kth_bound(k));
  ranked.clear();
  for (int i = 0; i < kept; i++) ranked.push_back({logits[i], ids[i]});
  std::partial_sort(ranked.begin(), ranked.begin() + k, ranked.end(), before);
  for (int i = 0; i < k; i++) {
    best_ids[i] = ranked[i].id;
    values[i] = (float)((double)ranked[i].logit - log_total);
  }
}

int RowSampler::sample(const SamplingParams& p, int row, const SamplingResult& out) {
  int best = ops.argmax(x, n);
  const float nothing = std::numeric_limits<float>::quiet_NaN();
  if (out.logprobs) out.logprobs[row] = nothing;
  if (out.target_logprobs) out.target_logprobs[row] = kNothing;
  double log_total = 0.0;
  const bool wants_target = out.target_logprobs && p.targets[row] >= 0;
  if (best >= 0 && (out.logprobs || wants_target))
    log_total = (double)x[best] + std::log(ops.sum_exp(x, x[best], 1.0f, n));
  if (out.num_top > 0) {
    if (best >= 0) best_logprobs(p, row, log_total, out);
    else std::fill(out.top_ids + (size_t)row * out.num_top, out.top_ids + (size_t)(row + 1) * out.num_top, -1);
  }
  if (best < 0) return -1;
  if (wants_target) out.target_logprobs[row] = (float)((double)x[p.targets[row]] - log_total);

  adjust(p, row);
  if (!changed.empty()) best = ops.argmax(x, n);
  const int token = best < 0 ? -1 : p.temperature[row] > 0.0f ? draw(p, row, best) : best;
  restore();
  if (out.logprobs && token >= 0) out.logprobs[row] = (float)((double)x[token] - log_total);
  return token;
}

double philox_uniform(uint64_t seed, uint64_t counter) {
  uint32_t words[4];
  philox(seed, counter, 0, words);
  return (double)(((uint64_t)words[0] << 32 | words[1]) >> 11) * 0x1p-53;
}

Sampler::Sampler(Pool& pool, const OpKernels& ops) : pool_(pool), ops_(ops) {
  for (int t = 0; t < pool.size(); t++) rows_.emplace_back(ops);
}

Sampler::~Sampler() = default;

void Sampler::greedy(const float* logits, int rows, int n, int32_t* tokens) {
  // Rows in pieces, so that few rows still use all threads.
  const int pieces = rows >= 2 * pool_.size() ? 1 : std::max(1, std::min(2 * pool_.size(), n / 8192));
  best_.resize((size_t)rows * pieces);
  const auto begin = [&](int piece) { return (int)((int64_t)n * piece / pieces); };
  pool_.run(rows * pieces, [&](int chunk, int) {
    const int first = begin(chunk % pieces), last = begin(chunk % pieces + 1);
    const int at = ops_.argmax(logits + (size_t)(chunk / pieces) * n + first, last - first);
    best_[chunk] = at < 0 ? -1 : first + at;
  });
  for (int r = 0; r < rows; r++) {
    const float* x = logits + (size_t)r * n;
    const int32_t* found = best_.data() + (size_t)r * pieces;
    int32_t token = found[0];
    for (int i = 1; i < pieces && token >= 0; i++)
      if (found[i] < 0 || x[found[i]] > x[token]) token = found[i];
    tokens[r] = token;
  }
}

void Sampler::sample(float* logits, int rows, int n, const SamplingParams& p, const SamplingResult& result) {
  int changes = 0;
  for (int r = 0; r < rows; r++)
    changes = std::max(changes, p.seen_offsets[r + 1] - p.seen_offsets[r] + p.bias_offsets[r + 1] - p.bias_offsets[r]);
  for (RowSampler& sampler : rows_) sampler.reserve(n, changes);
  pool_.run(rows, [&](int row, int thread) {
    RowSampler& sampler = rows_[thread];
    sampler.x = logits + (size_t)row * n;
    result.tokens[row] = sampler.sample(p, row, result);
  });
}

}  // namespace hasten
