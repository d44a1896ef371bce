#include "simd_avx512.h"

#include "kernels.h"

namespace hasten {
namespace {
#include "linear.inc"
#include "ops.inc"
#include "attention.inc"
}  // namespace

constexpr Kernels kernels_avx512 = {"avx512", linear_kernels, op_kernels};

}  // namespace hasten
