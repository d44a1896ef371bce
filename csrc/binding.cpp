// hasten._core: the decoder, the sampler and the machine's probes, as Python sees them. Arrays are borrowed, never copied,
// where their type and order fit; the GIL is released while anything computes. Errors are ValueError with one line.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "decoder.h"
#include "sampling.h"

namespace nb = nanobind;
using namespace hasten;

namespace {

template <class T, int Dims>
using In = nb::ndarray<const T, nb::ndim<Dims>, nb::c_contig, nb::device::cpu>;
using AnyIn = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;

const Kernels& kernels_of(const std::optional<std::string>& isa) {
  const char* wanted = isa ? isa->c_str() : std::getenv("HASTEN_ISA");
  const Kernels* k = select_kernels(wanted);
  if (k) return *k;
  std::string names;
  for (const char* const* name = available_isas(); *name; name++) names += (names.empty() ? "" : ", ") + std::string(*name);
  throw nb::value_error(("instruction set '" + std::string(wanted) + "' is not available here, only " + names).c_str());
}

KvKind kv_kind(const std::string& name) {
  if (name == "fp32") return KvKind::F32;
  if (name == "bf16") return KvKind::BF16;
  if (name == "int8") return KvKind::I8;
  throw nb::value_error(("KV cache dtype is '" + name + "', expected fp32, bf16 or int8").c_str());
}

template <class Enum>
Enum choose(const char* what, const std::string& name, std::initializer_list<std::pair<const char*, Enum>> known) {
  for (const auto& entry : known)
    if (name == entry.first) return entry.second;
  throw nb::value_error((std::string(what) + " '" + name + "' is not supported").c_str());
}

// A new numpy array over memory of our own.
template <class T>
nb::object new_array(std::vector<T> values, std::initializer_list<size_t> shape) {
  auto* held = new std::vector<T>(std::move(values));
  nb::capsule owner(held, [](void* p) noexcept { delete (std::vector<T>*)p; });
  return nb::cast(nb::ndarray<nb::numpy, T>(held->data(), shape, owner));
}

template <class T>
void expect_size(const char* what, const T& array, size_t n) {
  if (array.shape(0) != n)
    throw nb::value_error((std::string(what) + " has " + std::to_string(array.shape(0)) + " entries, expected " +
                           std::to_string(n)).c_str());
}

// A Weight of hasten.model.formats, its arrays kept alive.
struct BorrowedWeight {
  SourceMatrix matrix{};
  AnyIn data;
  std::optional<In<float, 2>> scales;
  std::optional<In<uint8_t, 2>> zeros;
  std::optional<In<int32_t, 1>> perm;

  BorrowedWeight(std::string name, nb::handle weight) {
    const nb::object format = weight.attr("format");
    Source& s = matrix.source;
    s.kind = choose<Kind>("weight kind", nb::cast<std::string>(format.attr("kind")),
                          {{"fp32", Kind::F32}, {"fp16", Kind::F16}, {"bf16", Kind::BF16}, {"int8", Kind::I8},
                           {"int4", Kind::I4}});
    const nb::tuple shape = nb::cast<nb::tuple>(weight.attr("shape"));
    s.n = nb::cast<int>(shape[0]);
    s.k = nb::cast<int>(shape[1]);
    s.group = nb::cast<int>(format.attr("group_size"));
    matrix.name = std::move(name);
    data = nb::cast<AnyIn>(weight.attr("data"));
    const bool integer = s.kind == Kind::I8 || s.kind == Kind::I4;
    const size_t groups = s.group > 0 ? ((size_t)s.k + s.group - 1) / s.group : 1;
    const size_t bits[] = {32, 16, 16, 8, 4};
    require(s.n > 0 && s.k > 0 && data.ndim() == 2 && data.shape(0) == (size_t)s.n &&
                data.shape(1) * data.itemsize() == ((size_t)s.k * bits[(int)s.kind] + 7) / 8,
            "data does not fit its shape and kind");
    s.data = data.data();
    if (integer) {
      scales = nb::cast<std::optional<In<float, 2>>>(weight.attr("scales"));
      zeros = nb::cast<std::optional<In<uint8_t, 2>>>(weight.attr("zeros"));
      require(scales && scales->shape(0) == (size_t)s.n && scales->shape(1) == groups, "scales do not fit its groups");
      require(!zeros || (zeros->shape(0) == (size_t)s.n && zeros->shape(1) == groups), "zeros do not fit its groups");
      s.scales = scales->data();
      s.zeros = zeros ? zeros->data() : nullptr;
    }
    perm = nb::cast<std::optional<In<int32_t, 1>>>(weight.attr("perm"));
    if (perm) {
      require(perm->shape(0) == (size_t)s.k, "perm does not have an entry a column");
      for (int i = 0; i < s.k; i++) require(perm->data()[i] >= 0 && perm->data()[i] < s.k, "perm names a column outside");
      matrix.perm = perm->data();
    }
  }

  void require(bool ok, const char* what) const {
    if (!ok) throw nb::value_error(("weight " + matrix.name + ": " + what).c_str());
  }
};

nb::object forward(Decoder& decoder, In<int32_t, 1> tokens, In<int32_t, 1> positions, In<int32_t, 1> slots,
                   In<int32_t, 1> query_lens, In<int32_t, 1> context_lens, In<int32_t, 2> block_tables,
                   In<int32_t, 1> rows) {
  const size_t T = tokens.shape(0), B = query_lens.shape(0), R = rows.shape(0);
  expect_size("positions", positions, T);
  expect_size("slots", slots, T);
  expect_size("context_lens", context_lens, B);
  expect_size("block_tables", block_tables, B);
  StepBatch batch{(int)T, (int)B, (int)R, (int)block_tables.shape(1), tokens.data(), positions.data(), slots.data(),
                  query_lens.data(), context_lens.data(), block_tables.data(), rows.data()};
  std::shared_ptr<Buffer> logits;
  {
    nb::gil_scoped_release release;
    logits = decoder.forward(batch);
  }
  auto* held = new std::shared_ptr<Buffer>(logits);
  nb::capsule owner(held, [](void* p) noexcept { delete (std::shared_ptr<Buffer>*)p; });
  const size_t V = (size_t)decoder.spec().vocab_size;
  return nb::cast(nb::ndarray<nb::numpy, float, nb::ndim<2>>(logits->floats(), {R, V}, owner));
}

using Logits = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

nb::object greedy(Pool& pool, Logits logits, const std::optional<std::string>& isa) {
  const Kernels& k = kernels_of(isa);
  std::vector<int32_t> tokens(logits.shape(0));
  {
    nb::gil_scoped_release release;
    sample_greedy(pool, k.ops, logits.data(), (int)logits.shape(0), (int)logits.shape(1), tokens.data());
  }
  const size_t n = tokens.size();
  return new_array(std::move(tokens), {n});
}

void check_csr(const char* what, const In<int32_t, 1>& offsets, const In<int32_t, 1>& ids, size_t values, size_t rows,
               int vocab) {
  expect_size(what, offsets, rows + 1);
  bool ok = offsets.data()[0] == 0 && (size_t)offsets.data()[rows] == ids.shape(0) && values == ids.shape(0);
  for (size_t r = 0; r < rows; r++) ok = ok && offsets.data()[r] <= offsets.data()[r + 1];
  if (!ok) throw nb::value_error((std::string(what) + " do not fit their ids and values").c_str());
  for (size_t i = 0; i < ids.shape(0); i++)
    if (ids.data()[i] < 0 || ids.data()[i] >= vocab)
      throw nb::value_error(("token " + std::to_string(ids.data()[i]) + " is outside the vocabulary").c_str());
}

// params: a SamplingBatch. Returns (tokens, logprobs, target_logprobs, top_ids, top_logprobs), None where no row asked.
nb::tuple sample_rows(Pool& pool, Logits logits, nb::handle params, const std::optional<std::string>& isa) {
  const Kernels& k = kernels_of(isa);
  const size_t R = logits.shape(0), V = logits.shape(1);
  const auto floats = [&](const char* name) { return nb::cast<In<float, 1>>(params.attr(name)); };
  const auto ints = [&](const char* name) { return nb::cast<In<int32_t, 1>>(params.attr(name)); };
  const In<float, 1> temperature = floats("temperature"), top_p = floats("top_p"), min_p = floats("min_p"),
                     repetition = floats("repetition"), presence = floats("presence"), frequency = floats("frequency"),
                     bias_values = floats("bias_values");
  const In<int32_t, 1> top_k = ints("top_k"), num_logprobs = ints("num_logprobs"), targets = ints("targets"),
                       seen_offsets = ints("seen_offsets"), seen_ids = ints("seen_ids"), seen_counts = ints("seen_counts"),
                       bias_offsets = ints("bias_offsets"), bias_ids = ints("bias_ids");
  const auto seeds = nb::cast<In<uint64_t, 1>>(params.attr("seeds"));
  const auto counters = nb::cast<In<uint64_t, 1>>(params.attr("counters"));
  for (const auto* a : {&temperature, &top_p, &min_p, &repetition, &presence, &frequency}) expect_size("a parameter", *a, R);
  for (const auto* a : {&top_k, &num_logprobs, &targets}) expect_size("a parameter", *a, R);
  expect_size("seeds", seeds, R);
  expect_size("counters", counters, R);
  check_csr("seen_offsets", seen_offsets, seen_ids, seen_counts.shape(0), R, (int)V);
  check_csr("bias_offsets", bias_offsets, bias_ids, bias_values.shape(0), R, (int)V);
  bool wants_logprobs = false, wants_targets = false;
  int num_top = 0;
  for (size_t r = 0; r < R; r++) {
    wants_logprobs = wants_logprobs || num_logprobs.data()[r] >= 0;
    wants_targets = wants_targets || targets.data()[r] >= 0;
    num_top = std::max(num_top, num_logprobs.data()[r]);
    if (targets.data()[r] >= (int)V)
      throw nb::value_error(("token " + std::to_string(targets.data()[r]) + " is outside the vocabulary").c_str());
  }
  std::vector<int32_t> tokens(R), top_ids(R * num_top);
  std::vector<float> logprobs(wants_logprobs ? R : 0), target_logprobs(wants_targets ? R : 0), top_logprobs(R * num_top);
  const SamplingParams p{temperature.data(), top_k.data(), top_p.data(), min_p.data(), repetition.data(), presence.data(),
                         frequency.data(), seeds.data(), counters.data(), num_logprobs.data(), targets.data(),
                         seen_offsets.data(), seen_ids.data(), seen_counts.data(), bias_offsets.data(), bias_ids.data(),
                         bias_values.data()};
  const SamplingResult result{tokens.data(), wants_logprobs ? logprobs.data() : nullptr,
                              wants_targets ? target_logprobs.data() : nullptr, num_top, top_ids.data(),
                              top_logprobs.data()};
  {
    nb::gil_scoped_release release;
    sample(pool, k.ops, logits.data(), (int)R, (int)V, p, result);
  }
  const size_t K = (size_t)num_top;
  return nb::make_tuple(new_array(std::move(tokens), {R}), wants_logprobs ? new_array(std::move(logprobs), {R}) : nb::none(),
                        wants_targets ? new_array(std::move(target_logprobs), {R}) : nb::none(),
                        wants_logprobs ? new_array(std::move(top_ids), {R, K}) : nb::none(),
                        wants_logprobs ? new_array(std::move(top_logprobs), {R, K}) : nb::none());
}

// One packed matrix (or several stacked), for tests and benchmarks of the products alone.
class Linear {
 public:
  Linear(Pool& pool, const std::vector<nb::object>& weights, const std::optional<In<float, 1>>& bias) : pool_(pool) {
    std::vector<BorrowedWeight> held;
    std::vector<SourceMatrix> sources;
    for (const nb::object& w : weights) held.emplace_back("of the product", w);
    for (const BorrowedWeight& w : held) sources.push_back(w.matrix);
    if (sources.empty()) throw nb::value_error("no weights were given");
    stack_.pack(sources, pool);
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
    const Kernels& k = kernels_of(isa);
    const size_t M = x.shape(0), N = stack_.outputs;
    if (x.shape(1) != (size_t)stack_.inputs) throw nb::value_error("x does not have as many columns as the weights");
    if (onto && (onto->shape(0) != M || onto->shape(1) != N)) throw nb::value_error("onto does not have the result's shape");
    std::vector<float> y(M * N);
    if (onto) std::memcpy(y.data(), onto->data(), 4 * M * N);
    if (M > 0) {
      nb::gil_scoped_release release;
      const ActKind kind = act_kind(matrix().kind);
      acts_.reserve(act_bytes(kind, (int)M, matrix().k_pad, matrix().act_group));
      Activations act = make_activations(kind, (int)M, matrix().k_pad, matrix().act_group, acts_.data());
      k.linear.prepare(x.data(), stack_.inputs, stack_.inputs, matrix().perm, act, 0, (int)M);
      linear(pool_, k.linear, matrix(), act, {y.data(), (ptrdiff_t)N, scale, onto.has_value()}, scratch_pointers_.data());
    }
    return new_array(std::move(y), {M, N});
  }

  // Seconds of each of `repeats` products with M rows that are prepared already.
  std::vector<double> time(int rows, int repeats, const std::optional<std::string>& isa) {
    const Kernels& k = kernels_of(isa);
    if (rows < 1) throw nb::value_error("rows must be positive");
    nb::gil_scoped_release release;
    const ActKind kind = act_kind(matrix().kind);
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
  Matrix& matrix() { return stack_.parts[0].matrix; }
  Pool& pool_;
  Stack stack_;
  std::vector<float> bias_;
  Buffer acts_;
  std::vector<Buffer> scratch_;
  std::vector<uint8_t*> scratch_pointers_;
};

// Multiplications and additions a second, at best, over all threads.
double arithmetic_peak(const std::string& kind, int threads, double seconds) {
  const bool bf16 = choose<bool>("arithmetic", kind, {{"bf16", true}, {"int8", false}});
  const Kernels& k = kernels_of(std::nullopt);
  nb::gil_scoped_release release;
  Pool pool(threads);
  std::vector<float> sink((size_t)pool.size() * 16);
  const auto now = [] { return std::chrono::steady_clock::now(); };
  double best = 0.0;
  for (const auto end = now() + std::chrono::duration<double>(seconds); now() < end;) {
    std::vector<double> done(pool.size() * 4);
    const auto begin = now();
    pool.run((int)done.size(), [&](int c, int thread) { done[c] = k.ops.burn(bf16, 100000, &sink[(size_t)thread * 16]); });
    double sum = 0.0;
    for (double d : done) sum += d;
    best = std::max(best, sum / std::chrono::duration<double>(now() - begin).count());
  }
  return best;
}

void add_matrices(Decoder& decoder, const std::string& role, int layer,
                  const std::vector<std::pair<std::string, nb::object>>& weights) {
  std::vector<BorrowedWeight> held;
  std::vector<SourceMatrix> sources;
  for (const auto& w : weights) held.emplace_back(w.first, w.second);
  for (const BorrowedWeight& w : held) sources.push_back(w.matrix);
  if (sources.empty()) throw nb::value_error(("no weights were given for " + role).c_str());
  nb::gil_scoped_release release;
  decoder.add_matrices(role, layer, sources);
}

// A ModelSpec of hasten.model.spec.
DecoderSpec read_spec(nb::handle spec) {
  DecoderSpec s;
  const auto number = [&](const char* name) { return nb::cast<double>(spec.attr(name)); };
  const auto flag = [&](const char* name) { return nb::cast<bool>(spec.attr(name)); };
  const auto text = [&](const char* name) { return nb::cast<std::string>(spec.attr(name)); };
  const auto numbers = [](nb::handle array) {
    const auto a = nb::cast<In<float, 1>>(array);
    return std::vector<float>(a.data(), a.data() + a.shape(0));
  };
  s.vocab_size = (int)number("vocab_size");
  s.hidden_size = (int)number("hidden_size");
  s.max_position = (int)number("max_position");
  for (nb::handle l : spec.attr("layers")) {
    const auto field = [&](const char* name) { return nb::cast<int>(l.attr(name)); };
    s.layers.push_back({field("num_heads"), field("num_kv_heads"), field("head_dim"), field("intermediate_size"),
                        field("rope"), field("window")});
  }
  for (nb::handle r : spec.attr("ropes")) {
    RopeSpec rope;
    rope.inv_freq = numbers(r.attr("inv_freq"));
    if (!r.attr("long_inv_freq").is_none()) rope.long_inv_freq = numbers(r.attr("long_inv_freq"));
    rope.scale = (float)nb::cast<double>(r.attr("scale"));
    rope.original_max = nb::cast<int>(r.attr("original_max"));
    s.ropes.push_back(std::move(rope));
  }
  s.norm = choose<Norm>("norm", text("norm"), {{"rms", Norm::Rms}, {"layer", Norm::Layer}});
  s.norm_eps = (float)number("norm_eps");
  s.pre_norm = flag("pre_norm");
  s.post_norm = flag("post_norm");
  s.parallel_residual = flag("parallel_residual");
  s.qk_norm = choose<QkNorm>("qk_norm", text("qk_norm"),
                             {{"none", QkNorm::None}, {"head", QkNorm::Head}, {"full", QkNorm::Full}});
  s.activation = choose<Act>("activation", text("activation"),
                             {{"silu", Act::Silu}, {"gelu", Act::Gelu}, {"gelu_tanh", Act::GeluTanh}});
  s.gated_mlp = flag("gated_mlp");
  s.learned_positions = flag("learned_positions");
  s.tied_head = flag("tied_head");
  s.attention_scale = (float)number("attention_scale");
  s.attention_softcap = (float)number("attention_softcap");
  s.final_softcap = (float)number("final_softcap");
  s.embedding_scale = (float)number("embedding_scale");
  s.residual_scale = (float)number("residual_scale");
  s.logit_scale = (float)number("logit_scale");
  return s;
}

}  // namespace

NB_MODULE(_core, m) {
  m.doc() = "The compiled core of hasten's CPU backend.";
  m.def("isa", [](const std::optional<std::string>& isa) { return std::string(kernels_of(isa).isa); },
        nb::arg("isa") = nb::none(),
        "The instruction set that is used: the one asked for, else HASTEN_ISA, else the best this CPU has.");
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const char* const* name = available_isas(); *name; name++) names.push_back(*name);
    return names;
  }, "Instruction sets that this build has and this CPU can run, best first.");
  m.def("read_bandwidth", [](int threads, size_t bytes, double seconds) { return read_bandwidth(threads, bytes, seconds); },
        nb::arg("threads"), nb::arg("bytes"), nb::arg("seconds"), nb::call_guard<nb::gil_scoped_release>(),
        "Bytes a second read from memory, at best.");
  m.def("arithmetic_peak", &arithmetic_peak, nb::arg("kind"), nb::arg("threads"), nb::arg("seconds"),
        "Multiplications and additions a second at best; kind is 'int8' or 'bf16'.");
  m.def("available_cores", &available_cores,
        "Physical cores that this process may run on, no more than its control group grants; what Pool(0) takes.");
  m.def("huge_page_bytes", &huge_page_bytes, "Bytes of this process that huge pages back.");
  m.def("philox_uniform", &philox_uniform, nb::arg("seed"), nb::arg("counter"), "The number in [0, 1) that a draw uses.");

  nb::class_<Pool>(m, "Pool", "Threads that share the work of a step.")
      .def(nb::init<int>(), nb::arg("threads") = 0, "threads counts the caller; 0 takes one a usable core.")
      .def_prop_ro("size", &Pool::size);

  nb::class_<Decoder>(m, "Decoder", "A decoder-only transformer; see backends/base.py for what a step is.")
      .def("__init__", [](Decoder* self, nb::handle spec, Pool& pool, const std::optional<std::string>& isa) {
        const Kernels& k = kernels_of(isa);
        new (self) Decoder(read_spec(spec), k, pool);
      }, nb::arg("spec"), nb::arg("pool"), nb::arg("isa") = nb::none(), nb::keep_alive<1, 3>())
      .def("add_matrices", &add_matrices, nb::arg("role"), nb::arg("layer"), nb::arg("weights"),
           "Pack the (name, Weight) pairs of one role: embed, position_embed, head, qkv, o, gate_up or down.")
      .def("add_vector", [](Decoder& d, const std::string& name, In<float, 1> values) {
        d.add_vector(name, std::vector<float>(values.data(), values.data() + values.shape(0)));
      }, nb::arg("name"), nb::arg("values"))
      .def("finish", &Decoder::finish, nb::call_guard<nb::gil_scoped_release>(),
           "No more weights; ValueError if one is missing.")
      .def("block_bytes", [](const Decoder& d, int block_size, const std::string& dtype) {
        return d.block_bytes(block_size, kv_kind(dtype));
      }, nb::arg("block_size"), nb::arg("dtype"))
      .def("allocate", [](Decoder& d, int num_blocks, int block_size, const std::string& dtype) {
        d.allocate(num_blocks, block_size, kv_kind(dtype));
      }, nb::arg("num_blocks"), nb::arg("block_size"), nb::arg("dtype"))
      .def("copy_block", &Decoder::copy_block, nb::arg("source"), nb::arg("destination"))
      .def("forward", &forward, nb::arg("tokens"), nb::arg("positions"), nb::arg("slots"), nb::arg("query_lens"),
           nb::arg("context_lens"), nb::arg("block_tables"), nb::arg("rows"))
      .def_prop_ro("weight_bytes", &Decoder::weight_bytes)
      .def_rw("profiling", &Decoder::profiling, "Count the time of forward by kind of work.")
      .def("take_profile", [](Decoder& d) {
        nb::dict seconds;
        seconds["total"] = d.profile.total;
        seconds["products"] = d.profile.products;
        seconds["attention"] = d.profile.attention;
        d.profile = {};
        return seconds;
      }, "Seconds since the last call of this, by kind of work.");

  m.def("sample_greedy", &greedy, nb::arg("pool"), nb::arg("logits"), nb::arg("isa") = nb::none());
  m.def("sample", &sample_rows, nb::arg("pool"), nb::arg("logits"), nb::arg("params"), nb::arg("isa") = nb::none());

  nb::class_<Linear>(m, "Linear", "Packed weights of one product, for tests and benchmarks.")
      .def(nb::init<Pool&, const std::vector<nb::object>&, const std::optional<In<float, 1>>&>(), nb::arg("pool"),
           nb::arg("weights"), nb::arg("bias") = nb::none(), nb::keep_alive<1, 2>())
      .def("product", &Linear::product, nb::arg("x"), nb::arg("isa") = nb::none(), nb::arg("scale") = 1.0f,
           nb::arg("onto") = nb::none())
      .def("time", &Linear::time, nb::arg("rows"), nb::arg("repeats"), nb::arg("isa") = nb::none())
      .def("row", &Linear::row, nb::arg("index"), nb::arg("scale") = 1.0f, nb::arg("isa") = nb::none());
}
