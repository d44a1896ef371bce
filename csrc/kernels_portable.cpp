#include "simd_portable.h"

#include "kernels.h"

namespace hasten {
namespace {
#include "linear.inc"
#include "ops.inc"
#include "attention.inc"
}  // namespace

constexpr Kernels kernels_portable = {"portable", linear_kernels, op_kernels};

}  // namespace hasten
