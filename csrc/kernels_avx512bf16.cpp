#include "simd_avx512.h"

#include "kernels.h"

namespace hasten {
namespace {
#include "linear.inc"
#include "ops.inc"
#include "attention.inc"
}  // namespace

constexpr Kernels kernels_avx512bf16 = {"avx512bf16", linear_kernels, op_kernels};

}  // namespace hasten
