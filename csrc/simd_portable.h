// simd.h in plain C++: loops over 16 lanes that a compiler turns into whatever vectors the target has. No fma: without the
// instruction it would be a library call a lane, so this path's last bits differ from the others'.
#pragma once

#include <cmath>
#include <cstring>

#include "simd.h"

namespace hasten {
namespace {

struct F {
  float v[16];
};
struct I {
  int32_t v[16];
};

#define HASTEN_LANES(type, expression)          \
  type r;                                       \
  for (int i = 0; i < 16; i++) r.v[i] = (expression); \
  return r

HASTEN_INLINE float bits_to_float(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
HASTEN_INLINE uint32_t float_to_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}
HASTEN_INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, magnitude = h & 0x7fff;
  if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // Read as a float whose exponent is 112 too small, so that subnormals need no case of their own.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
}

HASTEN_INLINE F load(const float* p) { HASTEN_LANES(F, p[i]); }
HASTEN_INLINE void store(float* p, F a) { memcpy(p, a.v, 64); }
HASTEN_INLINE F load_n(const float* p, int n) { HASTEN_LANES(F, i < n ? p[i] : 0.0f); }
HASTEN_INLINE void store_n(float* p, F a, int n) { memcpy(p, a.v, 4 * (size_t)n); }
HASTEN_INLINE F set1(float a) { HASTEN_LANES(F, a); }
HASTEN_INLINE F zero() { return set1(0.0f); }
HASTEN_INLINE F add(F a, F b) { HASTEN_LANES(F, a.v[i] + b.v[i]); }
HASTEN_INLINE F sub(F a, F b) { HASTEN_LANES(F, a.v[i] - b.v[i]); }
HASTEN_INLINE F mul(F a, F b) { HASTEN_LANES(F, a.v[i] * b.v[i]); }
HASTEN_INLINE F div(F a, F b) { HASTEN_LANES(F, a.v[i] / b.v[i]); }
HASTEN_INLINE F min(F a, F b) { HASTEN_LANES(F, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
HASTEN_INLINE F max(F a, F b) { HASTEN_LANES(F, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
HASTEN_INLINE F fma(F a, F b, F c) { HASTEN_LANES(F, a.v[i] * b.v[i] + c.v[i]); }
HASTEN_INLINE F fnma(F a, F b, F c) { HASTEN_LANES(F, c.v[i] - a.v[i] * b.v[i]); }
HASTEN_INLINE F sqrt(F a) { HASTEN_LANES(F, __builtin_sqrtf(a.v[i])); }
HASTEN_INLINE F neg(F a) { HASTEN_LANES(F, -a.v[i]); }
HASTEN_INLINE F abs(F a) { HASTEN_LANES(F, __builtin_fabsf(a.v[i])); }
HASTEN_INLINE F copysign(F a, F sign) { HASTEN_LANES(F, __builtin_copysignf(a.v[i], sign.v[i])); }
// Adding 1.5 * 2^23 leaves no bit for the fraction: the sum is rounded to nearest even.
HASTEN_INLINE F round(F a) { HASTEN_LANES(F, (a.v[i] + 12582912.0f) - 12582912.0f); }
HASTEN_INLINE F select_lt(F a, F b, F yes, F no) { HASTEN_LANES(F, a.v[i] < b.v[i] ? yes.v[i] : no.v[i]); }
HASTEN_INLINE F scale_by_power_of_two(F a, F n) {
  F r;
  for (int i = 0; i < 16; i++) {  // in two factors, so that results below the normal range are right
    const int whole = (int)(n.v[i] == n.v[i] ? n.v[i] : 0.0f), half = whole / 2;
    r.v[i] = a.v[i] * bits_to_float((uint32_t)(127 + half) << 23) * bits_to_float((uint32_t)(127 + whole - half) << 23);
  }
  return r;
}

HASTEN_INLINE float reduce_add(F a) {
  for (int width = 8; width; width /= 2)
    for (int i = 0; i < width; i++) a.v[i] += a.v[i + width];
  return a.v[0];
}
HASTEN_INLINE float reduce_max(F a) {
  float m = a.v[0];
  for (int i = 1; i < 16; i++) m = a.v[i] > m ? a.v[i] : m;
  return m;
}

HASTEN_INLINE F load_bf16(const uint16_t* p) { HASTEN_LANES(F, bits_to_float((uint32_t)p[i] << 16)); }
HASTEN_INLINE void store_bf16(uint16_t* p, F a) {
  for (int i = 0; i < 16; i++) {
    const uint32_t u = float_to_bits(a.v[i]);
    p[i] = a.v[i] == a.v[i] ? (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16) : (uint16_t)0x7fc0;
  }
}
HASTEN_INLINE F load_f16(const uint16_t* p) { HASTEN_LANES(F, half_to_float(p[i])); }
HASTEN_INLINE F load_i8(const int8_t* p) { HASTEN_LANES(F, (float)p[i]); }

HASTEN_INLINE I iset1(int32_t a) { HASTEN_LANES(I, a); }
HASTEN_INLINE I izero() { return iset1(0); }
HASTEN_INLINE I iload(const int32_t* p) { HASTEN_LANES(I, p[i]); }
HASTEN_INLINE void istore(int32_t* p, I a) { memcpy(p, a.v, 64); }
HASTEN_INLINE void store_i8(int8_t* p, I a) {
  for (int i = 0; i < 16; i++) p[i] = (int8_t)a.v[i];
}
HASTEN_INLINE I iload_u8(const uint8_t* p) { HASTEN_LANES(I, p[i]); }
// Unsigned: lanes whose results nobody reads may overflow.
HASTEN_INLINE I iadd(I a, I b) { HASTEN_LANES(I, (int32_t)((uint32_t)a.v[i] + (uint32_t)b.v[i])); }
HASTEN_INLINE I imul(I a, I b) { HASTEN_LANES(I, (int32_t)((uint32_t)a.v[i] * (uint32_t)b.v[i])); }
HASTEN_INLINE int32_t ireduce_add(I a) {
  int32_t s = 0;
  for (int i = 0; i < 16; i++) s += a.v[i];
  return s;
}
HASTEN_INLINE F select_lt(I a, I b, F yes, F no) { HASTEN_LANES(F, a.v[i] < b.v[i] ? yes.v[i] : no.v[i]); }
HASTEN_INLINE F to_float(I a) { HASTEN_LANES(F, (float)a.v[i]); }
HASTEN_INLINE I to_int(F a) {
  const F b = round(a);  // NaN and what does not fit become 0: a conversion of them is not defined
  HASTEN_LANES(I, b.v[i] >= -0x1p31f && b.v[i] < 0x1p31f ? (int32_t)b.v[i] : 0);
}

// What the products are made of; see simd_avx512.h.
struct Bytes {
  uint8_t v[64];
};
using Partial = I;
struct Pairs {
  F even, odd;
};
using Columns = uint32_t;
constexpr int kByteOffset = 128;

HASTEN_INLINE Bytes load_bytes(const uint8_t* p) {
  Bytes r;
  memcpy(r.v, p, 64);
  return r;
}
HASTEN_INLINE Bytes low_nibbles(const uint8_t* p) {
  Bytes r;
  for (int i = 0; i < 64; i++) r.v[i] = p[i] & 15;
  return r;
}
HASTEN_INLINE Bytes high_nibbles(const uint8_t* p) {
  Bytes r;
  for (int i = 0; i < 64; i++) r.v[i] = p[i] >> 4;
  return r;
}
HASTEN_INLINE Columns columns(const uint8_t* p) {
  uint32_t a;
  memcpy(&a, p, 4);
  return a;
}
HASTEN_INLINE I dot4(I acc, const Bytes& w, Columns a) {
  int8_t b[4];
  memcpy(b, &a, 4);
  HASTEN_LANES(I, acc.v[i] + w.v[4 * i] * b[0] + w.v[4 * i + 1] * b[1] + w.v[4 * i + 2] * b[2] + w.v[4 * i + 3] * b[3]);
}
HASTEN_INLINE Partial open(I acc) { return acc; }
HASTEN_INLINE Partial dot4_small(Partial acc, const Bytes& w, Columns a) { return dot4(acc, w, a); }
HASTEN_INLINE I close(I, Partial part) { return part; }

HASTEN_INLINE Pairs load_pairs(const uint8_t* p) {
  uint32_t u[16];
  memcpy(u, p, 64);
  Pairs r;
  for (int i = 0; i < 16; i++) {
    r.even.v[i] = bits_to_float(u[i] << 16);
    r.odd.v[i] = bits_to_float(u[i] & 0xffff0000);
  }
  return r;
}
HASTEN_INLINE F dot2(F acc, const Pairs& w, Columns a) {
  return fma(w.odd, set1(bits_to_float(a & 0xffff0000)), fma(w.even, set1(bits_to_float(a << 16)), acc));
}

HASTEN_INLINE I dot4_u8s8(I acc, const uint8_t* w, int32_t a) { return dot4(acc, load_bytes(w), (Columns)a); }
HASTEN_INLINE F dot2_bf16(F acc, const uint16_t* w, uint32_t a) { return dot2(acc, load_pairs((const uint8_t*)w), a); }

constexpr int kTileRows = 2;  // more make a compiler work for minutes, for CPUs that hardly exist
constexpr int float_blocks(int) { return 1; }

#include "simd_math.h"

}  // namespace
}  // namespace hasten
