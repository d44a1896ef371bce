// The sampler as Python sees it: a SamplingBatch of backends/base.py in, the fields of a Sampled out.
#include <algorithm>

#include "binding.h"
#include "sampling.h"

namespace hasten {
namespace {

using Logits = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// A SamplingBatch, its arrays kept alive and checked: rows, offsets and ids are what the sampler relies on.
struct BorrowedParams {
  In<float, 1> temperature, top_p, min_p, repetition, presence, frequency, bias_values;
  In<int32_t, 1> top_k, num_logprobs, targets, seen_offsets, seen_ids, seen_counts, bias_offsets, bias_ids;
  In<uint64_t, 1> seeds, counters;
  bool wants_logprobs = false, wants_targets = false;
  int num_top = 0;

  BorrowedParams(nb::handle params, size_t rows, int vocab) {
    const auto read = [&](auto& array, const char* name, size_t n) {
      array = array_of<typename std::remove_reference_t<decltype(array)>::Scalar, 1>(params, name);
      expect_size(name, array, n);
    };
    const auto read_all = [&](auto& array, const char* name) {
      array = array_of<typename std::remove_reference_t<decltype(array)>::Scalar, 1>(params, name);
    };
    read(temperature, "temperature", rows), read(top_k, "top_k", rows), read(top_p, "top_p", rows);
    read(min_p, "min_p", rows), read(repetition, "repetition", rows), read(presence, "presence", rows);
    read(frequency, "frequency", rows), read(seeds, "seeds", rows), read(counters, "counters", rows);
    read(num_logprobs, "num_logprobs", rows), read(targets, "targets", rows);
    read(seen_offsets, "seen_offsets", rows + 1), read(bias_offsets, "bias_offsets", rows + 1);
    read_all(seen_ids, "seen_ids"), read_all(bias_ids, "bias_ids");
    read(seen_counts, "seen_counts", seen_ids.shape(0)), read(bias_values, "bias_values", bias_ids.shape(0));
    check_lists("seen_offsets", seen_offsets, seen_ids, rows, vocab);
    check_lists("bias_offsets", bias_offsets, bias_ids, rows, vocab);
    for (size_t r = 0; r < rows; r++) {
      wants_logprobs = wants_logprobs || num_logprobs.data()[r] >= 0;
      wants_targets = wants_targets || targets.data()[r] >= 0;
      num_top = std::max(num_top, num_logprobs.data()[r]);
      if (targets.data()[r] >= vocab) refuse_token(targets.data()[r]);
    }
  }

  SamplingParams pointers() const {
    return {temperature.data(), top_k.data(), top_p.data(), min_p.data(), repetition.data(), presence.data(),
            frequency.data(), seeds.data(), counters.data(), num_logprobs.data(), targets.data(), seen_offsets.data(),
            seen_ids.data(), seen_counts.data(), bias_offsets.data(), bias_ids.data(), bias_values.data()};
  }

 private:
  [[noreturn]] static void refuse_token(int32_t token) {
    throw nb::value_error(("token " + std::to_string(token) + " is outside the vocabulary").c_str());
  }

  static void check_lists(const char* what, const In<int32_t, 1>& offsets, const In<int32_t, 1>& ids, size_t rows,
                          int vocab) {
    const int32_t* at = offsets.data();
    bool ok = at[0] == 0 && at[rows] >= 0 && (size_t)at[rows] == ids.shape(0);
    for (size_t r = 0; r < rows; r++) ok = ok && at[r] <= at[r + 1];
    if (!ok) throw nb::value_error((std::string(what) + " do not fit their ids and values").c_str());
    for (size_t i = 0; i < ids.shape(0); i++)
      if (ids.data()[i] < 0 || ids.data()[i] >= vocab) refuse_token(ids.data()[i]);
  }
};

nb::object greedy(Sampler& sampler, Logits logits) {
  const size_t rows = logits.shape(0);
  std::vector<int32_t> tokens(rows);
  {
    const Alone alone(sampler.pool());
    sampler.greedy(logits.data(), (int)rows, (int)logits.shape(1), tokens.data());
  }
  return new_array(std::move(tokens), {rows});
}

// Returns (tokens, logprobs, target_logprobs, top_ids, top_logprobs), None where no row asked.
nb::tuple sample(Sampler& sampler, Logits logits, nb::handle params) {
  const size_t R = logits.shape(0), V = logits.shape(1);
  const BorrowedParams p(params, R, (int)V);
  const size_t K = (size_t)p.num_top;
  std::vector<int32_t> tokens(R), top_ids(R * K);
  std::vector<float> logprobs(R), targets(R), top_logprobs(R * K);
  {
    const Alone alone(sampler.pool());
    sampler.sample(logits.data(), (int)R, (int)V, p.pointers(),
                   {tokens.data(), p.wants_logprobs ? logprobs.data() : nullptr,
                    p.wants_targets ? targets.data() : nullptr, p.num_top, top_ids.data(), top_logprobs.data()});
  }
  const auto array_if = [](bool wanted, auto values, std::initializer_list<size_t> shape) -> nb::object {
    return wanted ? new_array(std::move(values), shape) : nb::none();
  };
  return nb::make_tuple(new_array(std::move(tokens), {R}), array_if(p.wants_logprobs, std::move(logprobs), {R}),
                        array_if(p.wants_targets, std::move(targets), {R}),
                        array_if(p.wants_logprobs, std::move(top_ids), {R, K}),
                        array_if(p.wants_logprobs, std::move(top_logprobs), {R, K}));
}

}  // namespace

void bind_sampler(nb::module_& m) {
  m.def("philox_uniform", &philox_uniform, nb::arg("seed"), nb::arg("counter"), "The number in [0, 1) that a draw uses.");
  nb::class_<Sampler>(m, "Sampler", "Chooses a token a row of logits [rows, vocabulary]; keeps its memory between calls.")
      .def("__init__", [](Sampler* self, Pool& pool, const std::optional<std::string>& isa) {
        new (self) Sampler(pool, kernels_of(isa).ops);
      }, nb::arg("pool"), nb::arg("isa") = nb::none(), nb::keep_alive<1, 2>())
      .def("greedy", &greedy, nb::arg("logits").noconvert(), "The best token of each row; -1 where a logit is NaN.")
      .def("sample", &sample, nb::arg("logits").noconvert(), nb::arg("params"),
           "A token of each row as a SamplingBatch says. Logits are changed on the way and put back.");
}

}  // namespace hasten
