// The table of one instruction set's kernels, and the choice among them.
#pragma once

#include "linear.h"
#include "ops.h"

namespace hasten {

struct Kernels {
  const char* isa;  // "avx512bf16", "avx512", "avx2", "neon", "portable"
  LinearKernels linear;
  OpKernels ops;
};

extern const Kernels kernels_avx512bf16, kernels_avx512, kernels_avx2, kernels_neon, kernels_portable;  // where compiled

// The best table this CPU can run. `isa` forces one (from HASTEN_ISA): nullptr is returned if this CPU or build lacks it.
const Kernels* select_kernels(const char* isa);
// Names of the tables that this CPU can run, best first; nullptr ends the list.
const char* const* available_isas();

}  // namespace hasten
