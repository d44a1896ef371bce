// hasten._core: the decoder, the sampler and the machine's probes, as Python sees them. Arrays are borrowed, never copied;
// whatever computes does so without the GIL, one thread at a time (Alone). Errors are ValueError with one line.
#include "binding.h"

#include <chrono>
#include <cstdlib>
#include <stdexcept>

using namespace hasten;

namespace hasten {

const Kernels& kernels_of(const std::optional<std::string>& isa) {
  const char* wanted = isa ? isa->c_str() : std::getenv("HASTEN_ISA");
  const Kernels* k = select_kernels(wanted);
  if (k) return *k;
  std::string names;
  for (const char* const* name = available_isas(); *name; name++) names += (names.empty() ? "" : ", ") + std::string(*name);
  throw nb::value_error(("instruction set '" + std::string(wanted) + "' is not available here, only " + names).c_str());
}

}  // namespace hasten

namespace {

KvKind kv_kind(const std::string& name) {
  if (name == "fp32") return KvKind::F32;
  if (name == "bf16") return KvKind::BF16;
  if (name == "int8") return KvKind::I8;
  throw nb::value_error(("KV cache dtype is '" + name + "', expected fp32, bf16 or int8").c_str());
}

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
    const Alone alone(decoder.pool());
    logits = decoder.forward(batch);
  }
  auto* held = new std::shared_ptr<Buffer>(logits);
  nb::capsule owner(held, [](void* p) noexcept { delete (std::shared_ptr<Buffer>*)p; });
  const size_t V = (size_t)decoder.spec().vocab_size;
  return nb::cast(nb::ndarray<nb::numpy, float, nb::ndim<2>>(logits->floats(), {R, V}, owner));
}

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
  const Alone alone(decoder.pool());
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
                        field("rope"), field("window"), field("experts"), field("active_experts")});
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
  m.attr("interface") = 2;  // as in src/hasten/hardware.py: both are raised where what Python calls changes
  m.def("isa", [](const std::optional<std::string>& isa) { return std::string(kernels_of(isa).isa); },
        nb::arg("isa") = nb::none(),
        "The instruction set that is used: the one asked for, else HASTEN_ISA, else the best this CPU has.");
  m.def("takes", [](const std::string& format, const std::optional<std::string>& isa) {
    return kernels_of(isa).linear.takes(choose<Kind>("format", format,
        {{"fp8", Kind::F8}, {"int8-2of4", Kind::I8Sparse}, {"bf16-2of4", Kind::BF16Sparse}}));
  }, nb::arg("format"), nb::arg("isa") = nb::none(),
        "Whether its kernels multiply such weights as they are: fp8, int8-2of4 or bf16-2of4.");
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

  nb::class_<Pool>(m, "Pool", "Threads that share the work of a step.")
      .def(nb::init<int>(), nb::arg("threads") = 0,
           "threads counts the caller; 0 takes one a usable core. ValueError for absurdly many, RuntimeError where the system\n"
           "refuses one.")
      .def_prop_ro("size", &Pool::size);

  nb::class_<Decoder>(m, "Decoder", "A decoder-only transformer; see backends/base.py for what a step is.")
      .def("__init__", [](Decoder* self, nb::handle spec, Pool& pool, const std::optional<std::string>& isa) {
        const Kernels& k = kernels_of(isa);
        new (self) Decoder(read_spec(spec), k, pool);
      }, nb::arg("spec"), nb::arg("pool"), nb::arg("isa") = nb::none(), nb::keep_alive<1, 3>())
      .def("add_matrices", &add_matrices, nb::arg("role"), nb::arg("layer"), nb::arg("weights"),
           "Pack the (name, Weight) pairs of one role: embed, position_embed, head, qkv, o, gate_up or down.")
      .def("add_vector", [](Decoder& d, const std::string& name, In<float, 1> values) {
        const Alone alone(d.pool());
        d.add_vector(name, std::vector<float>(values.data(), values.data() + values.shape(0)));
      }, nb::arg("name"), nb::arg("values").noconvert())
      .def("finish", [](Decoder& d) {
        const Alone alone(d.pool());
        d.finish();
      }, "No more weights; ValueError if one is missing.")
      .def("block_bytes", [](const Decoder& d, int block_size, const std::string& dtype) {
        return d.block_bytes(block_size, kv_kind(dtype));
      }, nb::arg("block_size"), nb::arg("dtype"))
      .def("allocate", [](Decoder& d, int num_blocks, int block_size, const std::string& dtype) {
        const KvKind kind = kv_kind(dtype);
        const Alone alone(d.pool());
        d.allocate(num_blocks, block_size, kind);
      }, nb::arg("num_blocks"), nb::arg("block_size"), nb::arg("dtype"))
      .def("copy_block", [](Decoder& d, int source, int destination) {
        const Alone alone(d.pool());
        d.copy_block(source, destination);
      }, nb::arg("source"), nb::arg("destination"))
      .def("forward", &forward, nb::arg("tokens").noconvert(), nb::arg("positions").noconvert(),
           nb::arg("slots").noconvert(), nb::arg("query_lens").noconvert(), nb::arg("context_lens").noconvert(),
           nb::arg("block_tables").noconvert(), nb::arg("rows").noconvert())
      .def_prop_ro("weight_bytes", [](const Decoder& d) {
        const Alone alone(d.pool());
        return d.weight_bytes();
      })
      .def_rw("profiling", &Decoder::profiling, "Count the time of forward by kind of work.")
      .def("take_profile", [](Decoder& d) {
        const Profile p = std::exchange(d.profile, {});
        nb::dict seconds;
        seconds["total"] = p.total;
        seconds["products"] = p.products;
        seconds["attention"] = p.attention;
        return seconds;
      }, "Seconds since the last call of this, by kind of work.");

  bind_sampler(m);
  bind_linear(m);
}
