#include "simd_avx2.h"

#include "kernels.h"

namespace hasten {
namespace {
#include "linear.inc"
#include "ops.inc"
#include "attention.inc"
}  // namespace

constexpr Kernels kernels_avx2 = {"avx2", linear_kernels, op_kernels};

}  // namespace hasten
