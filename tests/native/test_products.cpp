// Products of every kind, shape and instruction set against sums in double. Shapes are odd, memory is exactly as long as it
// must be, so that a sanitizer sees any access beyond.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "kernels.h"

using namespace hasten;

namespace {

std::mt19937 random_bits(1);
float uniform() { return std::uniform_real_distribution<float>(-1.0f, 1.0f)(random_bits); }

void require(bool condition, const std::string& what) {
  if (condition) return;
  std::fprintf(stderr, "products: %s\n", what.c_str());
  std::exit(1);
}

// A matrix as a checkpoint stores it, and what it stands for.
struct Weights {
  std::vector<uint8_t> data, zeros, mask;
  std::vector<float> scales;
  std::vector<double> values;
  Source source;
};

Weights make_weights(Kind kind, int n, int k, int group, bool asymmetric) {
  Weights w;
  const int groups = group ? (k + group - 1) / group : 1;
  for (int i = 0; i < n * groups; i++) {
    w.scales.push_back((float)(1024 + random_bits() % 1024) / 65536.0f);  // f16 holds it
    if (asymmetric) w.zeros.push_back((uint8_t)(random_bits() % 16));
  }
  const Kind stored = kind == Kind::I8Sparse ? Kind::I8 : kind == Kind::BF16Sparse ? Kind::BF16 : kind;
  if (is_sparse(kind)) w.mask.resize((size_t)n * ((k + 7) / 8));
  for (int r = 0; r < n; r++) {
    int first = 0, second = 0;  // the two of four columns that are kept
    if (kind == Kind::I4) w.data.resize((size_t)(r + 1) * ((k + 1) / 2));
    for (int c = 0; c < k; c++) {
      const int g = r * groups + (group ? c / group : 0);
      float f = uniform();
      if (is_sparse(kind)) {
        if (c % 4 == 0) first = (int)(random_bits() % 4), second = (first + 1 + (int)(random_bits() % 3)) % 4;
        if (c % 4 != first && c % 4 != second) {
          w.values.push_back(0.0);
          continue;
        }
        uint8_t& byte = w.mask[(size_t)r * ((k + 7) / 8) + c / 8];
        byte = (uint8_t)(byte | 1 << c % 8);
      }
      if (kind == Kind::F32) {
        w.data.insert(w.data.end(), (uint8_t*)&f, (uint8_t*)&f + 4);
      } else if (stored == Kind::BF16) {
        uint32_t bits;
        memcpy(&bits, &f, 4);
        bits &= 0xffff0000;
        memcpy(&f, &bits, 4);
        w.data.push_back((uint8_t)(bits >> 16)), w.data.push_back((uint8_t)(bits >> 24));
      } else if (kind == Kind::F16) {  // a multiple of 1/16 in [-1, 1]: sign, and integer part normalised by hand
        const int sixteenths = (int)std::lround(f * 16);
        f = (float)sixteenths / 16;
        int exponent = 0;
        const float mantissa = std::frexp(std::fabs(f), &exponent);
        const int normal = (f < 0) << 15 | (exponent + 14) << 10 | (int)((mantissa * 2 - 1) * 1024);
        const uint16_t bits = (uint16_t)(sixteenths == 0 ? 0 : normal);
        w.data.push_back((uint8_t)bits), w.data.push_back((uint8_t)(bits >> 8));
      } else if (stored == Kind::I8) {
        const int8_t q = (int8_t)std::lround(f * 127);
        w.data.push_back((uint8_t)q);
        f = (float)q * w.scales[g];
      } else if (kind == Kind::F8) {
        const int code = (int)(random_bits() % 127), exponent = code >> 3, mantissa = code & 7;
        const bool minus = random_bits() % 2;
        w.data.push_back((uint8_t)(code | minus << 7));
        f = std::ldexp((float)(exponent ? mantissa + 8 : mantissa), (exponent ? exponent : 1) - 10);
        f *= (minus ? -1.0f : 1.0f) * w.scales[g];
      } else {
        const int q = (int)(random_bits() % 16);
        uint8_t& byte = w.data[(size_t)r * ((k + 1) / 2) + c / 2];
        byte = (uint8_t)(byte | q << (c % 2 * 4));
        f = (float)(q - (asymmetric ? w.zeros[g] : 8)) * w.scales[g];
      }
      w.values.push_back(f);
    }
  }
  w.source = {kind, n, k, group, w.data.data(), w.scales.data(), asymmetric ? w.zeros.data() : nullptr,
              is_sparse(kind) ? w.mask.data() : nullptr};
  return w;
}

// The inputs in the order of the weights' columns, as a product sees them: rounded to bf16, or to 8 or 16 bits a group.
std::vector<double> rounded_inputs(const std::vector<float>& x, int rows, int columns, const Matrix& w) {
  const float largest = w.act == ActKind::Q16 ? 32258.0f : 127.0f;
  const bool quantised = w.act == ActKind::Q8 || w.act == ActKind::Q16;
  std::vector<double> out;
  for (int r = 0; r < rows; r++) {
    std::vector<float> row(columns);
    for (int c = 0; c < columns; c++) row[c] = x[(size_t)r * columns + (w.perm ? w.perm[c] : c)];
    const int group = quantised ? w.act_group : columns;
    for (int first = 0; first < columns; first += group) {
      const int last = std::min(first + group, columns);
      float top = 0.0f;
      for (int c = first; c < last; c++) top = std::max(top, std::fabs(row[c]));
      const float scale = top / largest, inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
      for (int c = first; c < last; c++) {
        float v = row[c];
        if (w.act == ActKind::BF16) {
          uint32_t bits;
          memcpy(&bits, &v, 4);
          bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
          memcpy(&v, &bits, 4);
        } else if (quantised) {
          v = std::nearbyint(v * inverse) * scale;
        }
        out.push_back(v);
      }
    }
  }
  return out;
}

void check(const Kernels& k, Pool& pool, Kind kind, int n, int columns, int group, bool asymmetric, int rows,
           bool fine_inputs = false) {
  const std::string where = std::string(k.isa) + " kind " + std::to_string((int)kind) + " [" + std::to_string(n) + ", " +
                            std::to_string(columns) + "] group " + std::to_string(group) + " rows " + std::to_string(rows);
  if (!k.linear.takes(kind)) return;
  Weights weights = make_weights(kind, n, columns, group, asymmetric);
  std::vector<int32_t> perm;
  if (rows % 2) {
    for (int c = 0; c < columns; c++) perm.push_back((c * 7 + 3) % columns);
    if (columns % 7 == 0) perm.clear();
  }
  Matrix w = pack(&weights.source, 1, pool, fine_inputs);
  std::vector<float> bias(w.n_pad);
  for (int i = 0; i < n; i++) bias[i] = uniform();
  w.bias = bias.data();
  w.perm = perm.empty() ? nullptr : perm.data();
  std::vector<float> x((size_t)rows * columns), y((size_t)rows * n, 0.25f);
  for (float& v : x) v = uniform();
  std::vector<uint8_t> memory(act_bytes(w.act, rows, w.k_pad, w.act_group) + 64), scratch(scratch_bytes(w) + 64);
  const auto aligned = [](std::vector<uint8_t>& m) { return (uint8_t*)(((uintptr_t)m.data() + 63) & ~(uintptr_t)63); };
  Activations act = make_activations(w.act, rows, w.k_pad, w.act_group, aligned(memory));
  k.linear.prepare(x.data(), columns, columns, w.perm, act, 0, rows);
  std::vector<std::vector<uint8_t>> scratches(pool.size(), scratch);
  std::vector<uint8_t*> pointers;
  for (auto& s : scratches) pointers.push_back(aligned(s));
  linear(pool, k.linear, w, act, {y.data(), n, 2.0f, true}, pointers.data());

  const std::vector<double> inputs = rounded_inputs(x, rows, columns, w);
  for (int r = 0; r < rows; r++)
    for (int i = 0; i < n; i++) {
      double sum = bias[i], size = 0.0;
      for (int c = 0; c < columns; c++) {
        const double v = weights.values[(size_t)i * columns + c];
        const double term = v * inputs[(size_t)r * columns + c];
        sum += term;
        size += std::fabs(term);
      }
      const double got = (y[(size_t)r * n + i] - 0.25) / 2.0;
      require(std::fabs(got - sum) <= 1e-5 * (size + 1.0),
              where + ": " + std::to_string(got) + " for " + std::to_string(sum));
    }
  std::vector<float> row(columns);
  k.linear.row(w, n - 1, 3.0f, row.data());
  for (int c = 0; c < columns; c++) {
    const double v = weights.values[(size_t)(n - 1) * columns + c];
    require(std::fabs(row[w.perm ? perm[c] : c] - 3.0 * v) < 1e-5, where + ": a row differs");
  }
  w.bias = nullptr, w.perm = nullptr;
  release(w);
}

}  // namespace

int main() {
  Pool pool(2);
  for (const char* const* isa = available_isas(); *isa; isa++) {
    const Kernels& k = *select_kernels(*isa);
    for (int rows : {1, 2, 5, 13, 29})
      for (int n : {1, 17, 100}) {
        for (Kind kind : {Kind::F32, Kind::F16, Kind::BF16})
          for (int columns : {1, 36, 130}) check(k, pool, kind, n, columns, 0, false, rows);
        for (int columns : {4, 36, 172}) {
          for (Kind kind : {Kind::F8, Kind::I8Sparse, Kind::BF16Sparse}) check(k, pool, kind, n, columns, 0, false, rows);
          check(k, pool, Kind::I8Sparse, n, columns, 0, false, rows, true);
        }
        for (int columns : {2, 72, 172}) {
          check(k, pool, Kind::I8, n, columns, 0, false, rows, true);
          check(k, pool, Kind::I8, n, columns, 0, false, rows);
          check(k, pool, Kind::I4, n, columns, 0, rows == 2, rows);
        }
        for (int group : {32, 64, 128}) {
          for (Kind kind : {Kind::F8, Kind::I8Sparse}) check(k, pool, kind, n, 3 * group, group, false, rows);
          for (bool asymmetric : {false, true}) {
            if (!asymmetric)
              for (bool fine_inputs : {false, true})
                check(k, pool, Kind::I8, n, 3 * group, group, false, rows, fine_inputs);
            check(k, pool, Kind::I4, n, 3 * group, group, asymmetric, rows);
          }
        }
      }
  }
  std::puts("products: ok");
}
