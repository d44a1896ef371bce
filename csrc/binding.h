// What the parts of hasten._core share: arrays as they come from Python and go back, and who may compute when.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <initializer_list>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "decoder.h"

namespace hasten {

namespace nb = nanobind;

// An array argument: borrowed, never copied. Declared with noconvert(), so that another type or order is a TypeError.
template <class T, int Dims>
using In = nb::ndarray<const T, nb::ndim<Dims>, nb::c_contig, nb::device::cpu>;

// Work without the GIL, by one thread at a time: a pool has one caller, and what computes with it keeps its state between
// phases.
class Alone {
 public:
  explicit Alone(Pool& pool) : lock_(pool.one_caller) {}

 private:
  nb::gil_scoped_release release_;  // before the lock: its holder may be waiting for the GIL
  std::lock_guard<std::mutex> lock_;
};

// The table of an instruction set; of HASTEN_ISA or the best one where none is named. ValueError where it is not there.
const Kernels& kernels_of(const std::optional<std::string>& isa);

// An array that is an attribute of `object`.
template <class T, int Dims>
In<T, Dims> array_of(nb::handle object, const char* name) {
  In<T, Dims> array;
  if (!nb::try_cast(nb::handle(nb::getattr(object, name)), array, false))
    throw nb::type_error((std::string(name) + " is not a contiguous array of its type").c_str());
  return array;
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
  BorrowedWeight(std::string name, nb::handle weight);
  SourceMatrix matrix{};

 private:
  void require(bool ok, const char* what) const;
  void borrow_mask(const std::optional<In<uint8_t, 2>>& mask);
  nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu> data_;
  std::optional<In<float, 2>> scales_;
  std::optional<In<uint8_t, 2>> zeros_, mask_;
  std::optional<In<int32_t, 1>> perm_;
};

void bind_sampler(nb::module_& m);
void bind_linear(nb::module_& m);

}  // namespace hasten
