// The 16-lane vectors that linear.inc, ops.inc and attention.inc are written over. Each simd_*.h defines, inside an unnamed
// namespace, the same names; the file that includes it is compiled with that instruction set's flags. Code compiled so must
// not instantiate templates of the standard library: the linker would keep one copy for all, perhaps the one this CPU lacks.
//
//   F (16 float), I (16 int32)
//   F  load(const float*)  store(float*, F)  load_n(p, n), store_n(p, F, n): n of 16 lanes, other lanes read as 0
//   F  set1(float)  zero()
//   F  add sub mul div min max (F, F)   min and max give the second operand if either is NaN
//   F  fma(a, b, c) = a * b + c   fnma(a, b, c) = c - a * b   sqrt(F)   neg(F)   abs(F)   copysign(F, sign)
//   F  round(F)                                  to nearest even, |x| < 2^22
//   F  select_lt(a, b, yes, no)                  a < b ? yes : no, for a, b of F or of I
//   F  scale_by_power_of_two(F a, F n)           a * 2^n, n integral in [-252, 252]
//   float reduce_add(F)  reduce_max(F)           one fixed tree of additions in every instruction set
//   F  load_bf16(const uint16_t*)  store_bf16(uint16_t*, F)   round to nearest even
//   F  load_f16(const uint16_t*)
//   F  load_i8(const int8_t*)                    16 signed bytes to float
//   F  exp(F)  tanh(F)  erf(F)                   relative error under 2e-7, 2e-6, 2e-6; exp(-inf) = 0
//   I  izero()  iset1(int32_t)  iload  istore  iload_u8(const uint8_t*)  iadd  imul;   int32_t ireduce_add(I)
//   F  to_float(I);   I to_int(F)   round to nearest even, |x| < 2^22;   store_i8(int8_t*, I)  low byte of each lane
//   I  dot4_u8s8(I acc, const uint8_t* w, int32_t a)    acc[r] += sum_j w[4r + j] * (int8 j of a); exact, 64 bytes of w,
//                                                       a in [-127, 127]
//   F  dot2_bf16(F acc, const uint16_t* w, uint32_t a)  acc[r] += sum_j w[2r + j] * (bf16 j of a)
//   Bytes, Partial, Pairs, Columns, their loads and products, and the tile sizes: for linear.inc (see simd_avx512.h)
//
// F16C and FMA come with AVX2 in every CPU that has it; the portable path uses plain C++ and lets the compiler vectorise.
#pragma once

#include <stddef.h>
#include <stdint.h>

#define HASTEN_INLINE inline __attribute__((always_inline))
// Before a loop whose vectors must stay in registers: a compiler left alone gives up on tiles of this size. Not under a
// sanitizer, whose checks would make it compile for many minutes.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define HASTEN_UNROLL
#else
#define HASTEN_UNROLL _Pragma("GCC unroll 16")
#endif
