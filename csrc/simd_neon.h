// simd.h over AArch64 Advanced SIMD with the dot product (Armv8.2): four registers a vector.
#pragma once

#include <arm_neon.h>

#include "simd.h"

namespace hasten {
namespace {

struct F {
  float32x4_t v[4];
};
struct I {
  int32x4_t v[4];
};

#define HASTEN_QUARTERS(type, expression)              \
  type r;                                              \
  HASTEN_UNROLL                                        \
  for (int i = 0; i < 4; i++) r.v[i] = (expression);   \
  return r

HASTEN_INLINE F load(const float* p) { HASTEN_QUARTERS(F, vld1q_f32(p + 4 * i)); }
HASTEN_INLINE void store(float* p, F a) {
  for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, a.v[i]);
}
HASTEN_INLINE F load_n(const float* p, int n) {
  float lanes[16] = {};
  __builtin_memcpy(lanes, p, 4 * (size_t)n);
  return load(lanes);
}
HASTEN_INLINE void store_n(float* p, F a, int n) {
  float lanes[16];
  store(lanes, a);
  __builtin_memcpy(p, lanes, 4 * (size_t)n);
}
HASTEN_INLINE F set1(float a) { HASTEN_QUARTERS(F, vdupq_n_f32(a)); }
HASTEN_INLINE F zero() { return set1(0.0f); }
HASTEN_INLINE F add(F a, F b) { HASTEN_QUARTERS(F, vaddq_f32(a.v[i], b.v[i])); }
HASTEN_INLINE F sub(F a, F b) { HASTEN_QUARTERS(F, vsubq_f32(a.v[i], b.v[i])); }
HASTEN_INLINE F mul(F a, F b) { HASTEN_QUARTERS(F, vmulq_f32(a.v[i], b.v[i])); }
HASTEN_INLINE F div(F a, F b) { HASTEN_QUARTERS(F, vdivq_f32(a.v[i], b.v[i])); }
// vminq would give NaN if either is one; simd.h promises the second operand.
HASTEN_INLINE F min(F a, F b) { HASTEN_QUARTERS(F, vbslq_f32(vcltq_f32(a.v[i], b.v[i]), a.v[i], b.v[i])); }
HASTEN_INLINE F max(F a, F b) { HASTEN_QUARTERS(F, vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), a.v[i], b.v[i])); }
HASTEN_INLINE F fma(F a, F b, F c) { HASTEN_QUARTERS(F, vfmaq_f32(c.v[i], a.v[i], b.v[i])); }
HASTEN_INLINE F fnma(F a, F b, F c) { HASTEN_QUARTERS(F, vfmsq_f32(c.v[i], a.v[i], b.v[i])); }
HASTEN_INLINE F sqrt(F a) { HASTEN_QUARTERS(F, vsqrtq_f32(a.v[i])); }
HASTEN_INLINE F neg(F a) { HASTEN_QUARTERS(F, vnegq_f32(a.v[i])); }
HASTEN_INLINE F abs(F a) { HASTEN_QUARTERS(F, vabsq_f32(a.v[i])); }
HASTEN_INLINE F copysign(F a, F sign) {
  HASTEN_QUARTERS(F, vbslq_f32(vdupq_n_u32(0x80000000u), sign.v[i], a.v[i]));
}
HASTEN_INLINE F round(F a) { HASTEN_QUARTERS(F, vrndnq_f32(a.v[i])); }
HASTEN_INLINE F select_lt(F a, F b, F yes, F no) {
  HASTEN_QUARTERS(F, vbslq_f32(vcltq_f32(a.v[i], b.v[i]), yes.v[i], no.v[i]));
}
HASTEN_INLINE float32x4_t scale_quarter(float32x4_t a, float32x4_t n) {  // two factors: right below the normal range too
  const int32x4_t whole = vcvtnq_s32_f32(n), half = vshrq_n_s32(whole, 1), bias = vdupq_n_s32(127);
  a = vmulq_f32(a, vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(half, bias), 23)));
  return vmulq_f32(a, vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vsubq_s32(whole, half), bias), 23)));
}
HASTEN_INLINE F scale_by_power_of_two(F a, F n) { HASTEN_QUARTERS(F, scale_quarter(a.v[i], n.v[i])); }

HASTEN_INLINE float reduce_add(F a) {
  const float32x4_t b = vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3]));
  const float32x2_t c = vadd_f32(vget_low_f32(b), vget_high_f32(b));
  return vget_lane_f32(c, 0) + vget_lane_f32(c, 1);
}
HASTEN_INLINE float reduce_max(F a) {
  return vmaxvq_f32(vmaxq_f32(vmaxq_f32(a.v[0], a.v[2]), vmaxq_f32(a.v[1], a.v[3])));
}

HASTEN_INLINE F load_bf16(const uint16_t* p) {
  HASTEN_QUARTERS(F, vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16)));
}
HASTEN_INLINE void store_bf16(uint16_t* p, F a) {
  for (int i = 0; i < 4; i++) {
    const uint32x4_t bits = vreinterpretq_u32_f32(a.v[i]);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t up = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t number = vceqq_f32(a.v[i], a.v[i]);
    vst1_u16(p + 4 * i, vshrn_n_u32(vbslq_u32(number, up, vdupq_n_u32(0x7fc00000)), 16));
  }
}
HASTEN_INLINE F load_f16(const uint16_t* p) {
  HASTEN_QUARTERS(F, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))));
}

HASTEN_INLINE I iset1(int32_t a) { HASTEN_QUARTERS(I, vdupq_n_s32(a)); }
HASTEN_INLINE I izero() { return iset1(0); }
HASTEN_INLINE I iload(const int32_t* p) { HASTEN_QUARTERS(I, vld1q_s32(p + 4 * i)); }
HASTEN_INLINE void istore(int32_t* p, I a) {
  for (int i = 0; i < 4; i++) vst1q_s32(p + 4 * i, a.v[i]);
}
HASTEN_INLINE void store_i8(int8_t* p, I a) {
  const int16x8_t low = vcombine_s16(vmovn_s32(a.v[0]), vmovn_s32(a.v[1]));
  const int16x8_t high = vcombine_s16(vmovn_s32(a.v[2]), vmovn_s32(a.v[3]));
  vst1q_s8(p, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
}
HASTEN_INLINE I iload_s16(int16x8_t low, int16x8_t high) {
  return {{vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low), vmovl_s16(vget_low_s16(high)), vmovl_high_s16(high)}};
}
HASTEN_INLINE I iload_u8(const uint8_t* p) {
  const uint8x16_t b = vld1q_u8(p);
  return iload_s16(vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(b))), vreinterpretq_s16_u16(vmovl_high_u8(b)));
}
HASTEN_INLINE I iadd(I a, I b) { HASTEN_QUARTERS(I, vaddq_s32(a.v[i], b.v[i])); }
HASTEN_INLINE I imul(I a, I b) { HASTEN_QUARTERS(I, vmulq_s32(a.v[i], b.v[i])); }
HASTEN_INLINE int32_t ireduce_add(I a) {
  return vaddvq_s32(vaddq_s32(vaddq_s32(a.v[0], a.v[2]), vaddq_s32(a.v[1], a.v[3])));
}
HASTEN_INLINE F select_lt(I a, I b, F yes, F no) {
  HASTEN_QUARTERS(F, vbslq_f32(vcltq_s32(a.v[i], b.v[i]), yes.v[i], no.v[i]));
}
HASTEN_INLINE F to_float(I a) { HASTEN_QUARTERS(F, vcvtq_f32_s32(a.v[i])); }
HASTEN_INLINE I to_int(F a) { HASTEN_QUARTERS(I, vcvtnq_s32_f32(a.v[i])); }
HASTEN_INLINE F load_i8(const int8_t* p) {
  const int8x16_t b = vld1q_s8(p);
  return to_float(iload_s16(vmovl_s8(vget_low_s8(b)), vmovl_high_s8(b)));
}

// What the products are made of; see simd_avx512.h. The dot product takes signed bytes: int8 weights lose their offset.
struct Bytes {
  int8x16_t v[4];
};
using Partial = I;
struct Pairs {
  F even, odd;
};
using Columns = int8x16_t;
constexpr int kByteOffset = 0;

HASTEN_INLINE Bytes load_bytes(const uint8_t* p) {
  HASTEN_QUARTERS(Bytes, vreinterpretq_s8_u8(veorq_u8(vld1q_u8(p + 16 * i), vdupq_n_u8(128))));
}
HASTEN_INLINE Bytes low_nibbles(const uint8_t* p) {
  HASTEN_QUARTERS(Bytes, vreinterpretq_s8_u8(vandq_u8(vld1q_u8(p + 16 * i), vdupq_n_u8(15))));
}
HASTEN_INLINE Bytes high_nibbles(const uint8_t* p) {
  HASTEN_QUARTERS(Bytes, vreinterpretq_s8_u8(vshrq_n_u8(vld1q_u8(p + 16 * i), 4)));
}
HASTEN_INLINE Columns columns_of(int32_t a) { return vreinterpretq_s8_s32(vdupq_n_s32(a)); }
HASTEN_INLINE Columns columns(const uint8_t* p) {
  int32_t a;
  __builtin_memcpy(&a, p, 4);
  return columns_of(a);
}
HASTEN_INLINE I dot4(I acc, Bytes w, Columns a) { HASTEN_QUARTERS(I, vdotq_s32(acc.v[i], w.v[i], a)); }
HASTEN_INLINE Partial open(I acc) { return acc; }
HASTEN_INLINE Partial dot4_small(Partial acc, Bytes w, Columns a) { return dot4(acc, w, a); }
HASTEN_INLINE I close(I, Partial part) { return part; }

HASTEN_INLINE Pairs load_pairs(const uint8_t* p) {
  Pairs r;
  for (int i = 0; i < 4; i++) {
    const uint32x4_t u = vreinterpretq_u32_u8(vld1q_u8(p + 16 * i));
    r.even.v[i] = vreinterpretq_f32_u32(vshlq_n_u32(u, 16));
    r.odd.v[i] = vreinterpretq_f32_u32(vandq_u32(u, vdupq_n_u32(0xffff0000u)));
  }
  return r;
}
HASTEN_INLINE F dot2(F acc, Pairs w, Columns a) {
  const uint32x4_t u = vreinterpretq_u32_s8(a);
  const float32x4_t even = vreinterpretq_f32_u32(vshlq_n_u32(u, 16));
  const float32x4_t odd = vreinterpretq_f32_u32(vandq_u32(u, vdupq_n_u32(0xffff0000u)));
  HASTEN_QUARTERS(F, vfmaq_f32(vfmaq_f32(acc.v[i], w.even.v[i], even), w.odd.v[i], odd));
}

HASTEN_INLINE I dot4_u8s8(I acc, const uint8_t* w, int32_t a) {
  const int32_t sum = (int8_t)a + (int8_t)(a >> 8) + (int8_t)(a >> 16) + (int8_t)(a >> 24);
  return dot4(iadd(acc, iset1(128 * sum)), load_bytes(w), columns_of(a));
}
HASTEN_INLINE F dot2_bf16(F acc, const uint16_t* w, uint32_t a) {
  return dot2(acc, load_pairs((const uint8_t*)w), columns_of((int32_t)a));
}

constexpr int kTileRows = 4;
constexpr int float_blocks(int rows) { return rows <= 2 ? 2 : 1; }

#include "simd_math.h"

}  // namespace
}  // namespace hasten
