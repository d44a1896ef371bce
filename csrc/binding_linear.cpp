// A Weight of hasten.model.formats as the core borrows it, and one packed matrix alone, for tests and benchmarks.
#include <algorithm>
#include <chrono>
#include <cstring>

#include "binding.h"

namespace hasten {

BorrowedWeight::BorrowedWeight(std::string name, nb::handle weight) {
  const nb::object format = weight.attr("format");
  Source& s = matrix.source;
  s.kind = choose<Kind>("weight kind", nb::cast<std::string>(format.attr("kind")),
                        {{"fp32", Kind::F32}, {"fp16", Kind::F16}, {"bf16", Kind::BF16}, {"fp8", Kind::F8},
                         {"int8", Kind::I8}, {"int4", Kind::I4}});
  const nb::tuple shape = nb::cast<nb::tuple>(weight.attr("shape"));
  s.n = nb::cast<int>(shape[0]);
  s.k = nb::cast<int>(shape[1]);
  matrix.name = std::move(name);
  const bool sparse = nb::cast<bool>(format.attr("sparse24"));
  require(!sparse || s.kind == Kind::I8 || s.kind == Kind::BF16, "only int8 and bf16 can be 2:4");
  if (sparse) s.kind = s.kind == Kind::I8 ? Kind::I8Sparse : Kind::BF16Sparse;
  data_ = nb::cast<nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>>(weight.attr("data"));
  const bool scaled = is_integer(s.kind) || s.kind == Kind::F8;
  s.group = scaled ? nb::cast<int>(format.attr("group_size")) : 0;
  require(s.group == 0 || s.group == 32 || s.group == 64 || s.group == 128, "group_size is not 0, 32, 64 or 128");
  const size_t groups = s.group > 0 ? ((size_t)s.k + s.group - 1) / s.group : 1;
  require(s.n > 0 && s.k > 0 && data_.ndim() == 2 && data_.shape(0) == (size_t)s.n &&
              data_.shape(1) * data_.itemsize() == source_row_bytes(s.kind, s.k),
          "data does not fit its shape and kind");
  s.data = data_.data();
  if (scaled) {
    scales_ = nb::cast<std::optional<In<float, 2>>>(weight.attr("scales"));
    zeros_ = nb::cast<std::optional<In<uint8_t, 2>>>(weight.attr("zeros"));
    require(scales_ && scales_->shape(0) == (size_t)s.n && scales_->shape(1) == groups, "scales do not fit its groups");
    require(!zeros_ || (zeros_->shape(0) == (size_t)s.n && zeros_->shape(1) == groups), "zeros do not fit its groups");
    s.scales = scales_->data();
    s.zeros = zeros_ ? zeros_->data() : nullptr;
  }
  if (sparse) borrow_mask(nb::cast<std::optional<In<uint8_t, 2>>>(weight.attr("mask")));
  perm_ = nb::cast<std::optional<In<int32_t, 1>>>(weight.attr("perm"));
  if (perm_) {
    require(perm_->shape(0) == (size_t)s.k, "perm does not have an entry a column");
    std::vector<bool> named(s.k);
    for (int i = 0; i < s.k; i++) {
      const int column = perm_->data()[i];
      require(column >= 0 && column < s.k && !named[column], "perm does not name every column once");
      named[column] = true;
    }
    matrix.perm = perm_->data();
  }
}

void BorrowedWeight::borrow_mask(const std::optional<In<uint8_t, 2>>& mask) {
  Source& s = matrix.source;
  const size_t row_bytes = ((size_t)s.k + 7) / 8, last = row_bytes - 1;
  require(s.k % 4 == 0 && mask && mask->shape(0) == (size_t)s.n && mask->shape(1) == row_bytes,
          "its mask does not fit its shape");
  mask_ = mask;
  s.mask = mask_->data();
  const auto two = [](int bits) { return bits == 3 || bits == 5 || bits == 6 || bits == 9 || bits == 10 || bits == 12; };
  bool fits[256];
  for (int byte = 0; byte < 256; byte++) fits[byte] = two(byte & 15) && two(byte >> 4);
  for (size_t row = 0; row < (size_t)s.n; row++) {
    const uint8_t* bits = s.mask + row * row_bytes;
    bool ok = s.k % 8 ? two(bits[last]) : fits[bits[last]];
    for (size_t i = 0; i < last; i++) ok = ok && fits[bits[i]];
    require(ok, "its mask does not keep two of each four columns");
  }
}

void BorrowedWeight::require(bool ok, const char* what) const {
  if (!ok) throw nb::value_error(("weight " + matrix.name + ": " + what).c_str());
}

namespace {

// One packed matrix (or several stacked), for tests and benchmarks of the products alone.
class Linear {
 public:
  Linear(Pool& pool, const std::vector<nb::object>& weights, const std::optional<In<float, 1>>& bias, bool fine_inputs)
      : pool_(pool) {
    std::vector<BorrowedWeight> held;
    std::vector<SourceMatrix> sources;
    for (const nb::object& w : weights) held.emplace_back("of the product", w);
    for (const BorrowedWeight& w : held) sources.push_back(w.matrix);
    if (sources.empty()) throw nb::value_error("no weights were given");
    {
      const Alone alone(pool);
      stack_.pack(sources, pool, fine_inputs);
    }
    if (stack_.parts.size() != 1) throw nb::value_error("weights of one product must have one kind, group size and order");
    if (bias) {
      expect_size("bias", *bias, stack_.outputs);
      bias_.assign(matrix().n_pad, 0.0f);
      std::memcpy(bias_.data(), bias->data(), 4 * bias->shape(0));
      matrix().bias = bias_.data();
    }
    scratch_.resize(pool.size());
    for (Buffer& b : scratch_) {
      b.reserve(scratch_bytes(matrix()));
      scratch_pointers_.push_back(b.data());
    }
  }

  // x [M, K] -> scale * (x W^T + bias) [M, N], added to `onto` where given.
  nb::object product(In<float, 2> x, const std::optional<std::string>& isa, float scale,
                     const std::optional<In<float, 2>>& onto) {
    const Kernels& k = kernels_for_matrix(isa);
    const size_t M = x.shape(0), N = stack_.outputs;
    if (x.shape(1) != (size_t)stack_.inputs) throw nb::value_error("x does not have as many columns as the weights");
    if (onto && (onto->shape(0) != M || onto->shape(1) != N)) throw nb::value_error("onto does not have the result's shape");
    std::vector<float> y(M * N);
    if (onto) std::memcpy(y.data(), onto->data(), 4 * M * N);
    if (M > 0) {
      const Alone alone(pool_);
      const ActKind kind = matrix().act;
      acts_.reserve(act_bytes(kind, (int)M, matrix().k_pad, matrix().act_group));
      Activations act = make_activations(kind, (int)M, matrix().k_pad, matrix().act_group, acts_.data());
      k.linear.prepare(x.data(), stack_.inputs, stack_.inputs, matrix().perm, act, 0, (int)M);
      linear(pool_, k.linear, matrix(), act, {y.data(), (ptrdiff_t)N, scale, onto.has_value()}, scratch_pointers_.data());
    }
    return new_array(std::move(y), {M, N});
  }

  // Seconds of each of `repeats` products with M rows that are prepared already.
  std::vector<double> time(int rows, int repeats, const std::optional<std::string>& isa) {
    const Kernels& k = kernels_for_matrix(isa);
    if (rows < 1) throw nb::value_error("rows must be positive");
    const Alone alone(pool_);
    const ActKind kind = matrix().act;
    std::vector<float> x((size_t)rows * stack_.inputs), y((size_t)rows * stack_.outputs);
    for (size_t i = 0; i < x.size(); i++) x[i] = (float)(i * 2654435761u >> 8 & 1023) / 1024.0f - 0.5f;
    acts_.reserve(act_bytes(kind, rows, matrix().k_pad, matrix().act_group));
    Activations act = make_activations(kind, rows, matrix().k_pad, matrix().act_group, acts_.data());
    k.linear.prepare(x.data(), stack_.inputs, stack_.inputs, matrix().perm, act, 0, rows);
    std::vector<double> seconds;
    for (int i = 0; i < repeats; i++) {
      const auto begin = std::chrono::steady_clock::now();
      linear(pool_, k.linear, matrix(), act, {y.data(), (ptrdiff_t)stack_.outputs, 1.0f, false}, scratch_pointers_.data());
      seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
    }
    return seconds;
  }

  nb::object row(int index, float scale, const std::optional<std::string>& isa) {
    if (index < 0 || index >= stack_.outputs) throw nb::value_error("row is outside the matrix");
    std::vector<float> out(stack_.inputs);
    kernels_of(isa).linear.row(matrix(), index, scale, out.data());
    const size_t n = out.size();
    return new_array(std::move(out), {n});
  }

 private:
  const Kernels& kernels_for_matrix(const std::optional<std::string>& isa) {
    const Kernels& k = kernels_of(isa);
    if (!k.linear.takes(matrix().kind))
      throw nb::value_error((std::string(k.isa) + " kernels do not multiply weights of this format on this CPU").c_str());
    return k;
  }

  Matrix& matrix() { return stack_.parts[0].matrix; }
  Pool& pool_;
  Stack stack_;
  std::vector<float> bias_;
  Buffer acts_;
  std::vector<Buffer> scratch_;
  std::vector<uint8_t*> scratch_pointers_;
};

}  // namespace

void bind_linear(nb::module_& m) {
  nb::class_<Linear>(m, "Linear", "Packed weights of one product, for tests and benchmarks.")
      .def(nb::init<Pool&, const std::vector<nb::object>&, const std::optional<In<float, 1>>&, bool>(), nb::arg("pool"),
           nb::arg("weights"), nb::arg("bias").noconvert() = nb::none(), nb::arg("fine_inputs") = false, nb::keep_alive<1, 2>(),
           "fine_inputs: int8 weights meet activations of 16 bits.")
      .def("product", &Linear::product, nb::arg("x").noconvert(), nb::arg("isa") = nb::none(), nb::arg("scale") = 1.0f,
           nb::arg("onto").noconvert() = nb::none())
      .def("time", &Linear::time, nb::arg("rows"), nb::arg("repeats"), nb::arg("isa") = nb::none())
      .def("row", &Linear::row, nb::arg("index"), nb::arg("scale") = 1.0f, nb::arg("isa") = nb::none());
}

}  // namespace hasten
