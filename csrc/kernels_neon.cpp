#include "simd_neon.h"

#include "kernels.h"

namespace hasten {
namespace {
#include "linear.inc"
#include "ops.inc"
#include "attention.inc"
}  // namespace

constexpr Kernels kernels_neon = {"neon", linear_kernels, op_kernels};

}  // namespace hasten
