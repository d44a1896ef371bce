// simd.h over AVX2, FMA and F16C: two registers a vector.
#pragma once

#include <immintrin.h>

#include "simd.h"

namespace hasten {
namespace {

struct F {
  __m256 lo, hi;
};
struct I {
  __m256i lo, hi;
};

HASTEN_INLINE F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
HASTEN_INLINE void store(float* p, F a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
HASTEN_INLINE I first_lanes(int n) {  // all ones in lanes below n
  const __m256i count = _mm256_set1_epi32(n);
  return {_mm256_cmpgt_epi32(count, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)),
          _mm256_cmpgt_epi32(count, _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15))};
}
HASTEN_INLINE F load_n(const float* p, int n) {
  const I mask = first_lanes(n);
  return {_mm256_maskload_ps(p, mask.lo), _mm256_maskload_ps(p + 8, mask.hi)};
}
HASTEN_INLINE void store_n(float* p, F a, int n) {
  const I mask = first_lanes(n);
  _mm256_maskstore_ps(p, mask.lo, a.lo);
  _mm256_maskstore_ps(p + 8, mask.hi, a.hi);
}
HASTEN_INLINE F set1(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
HASTEN_INLINE F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
HASTEN_INLINE F add(F a, F b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
HASTEN_INLINE F sub(F a, F b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
HASTEN_INLINE F mul(F a, F b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
HASTEN_INLINE F div(F a, F b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
HASTEN_INLINE F min(F a, F b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
HASTEN_INLINE F max(F a, F b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
HASTEN_INLINE F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
HASTEN_INLINE F fnma(F a, F b, F c) { return {_mm256_fnmadd_ps(a.lo, b.lo, c.lo), _mm256_fnmadd_ps(a.hi, b.hi, c.hi)}; }
HASTEN_INLINE F sqrt(F a) { return {_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)}; }
HASTEN_INLINE F neg(F a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_xor_ps(a.lo, sign), _mm256_xor_ps(a.hi, sign)};
}
HASTEN_INLINE F abs(F a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
HASTEN_INLINE F copysign(F a, F s) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  const F b = abs(a);
  return {_mm256_or_ps(b.lo, _mm256_and_ps(sign, s.lo)), _mm256_or_ps(b.hi, _mm256_and_ps(sign, s.hi))};
}
HASTEN_INLINE F round(F a) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, mode), _mm256_round_ps(a.hi, mode)};
}
HASTEN_INLINE F select_lt(F a, F b, F yes, F no) {
  return {_mm256_blendv_ps(no.lo, yes.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
          _mm256_blendv_ps(no.hi, yes.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
}
HASTEN_INLINE __m256 scale_half(__m256 a, __m256 n) {  // in two factors, so that results below the normal range are right
  const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1), bias = _mm256_set1_epi32(127);
  const __m256i rest = _mm256_sub_epi32(whole, half);
  a = _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23)));
  return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23)));
}
HASTEN_INLINE F scale_by_power_of_two(F a, F n) { return {scale_half(a.lo, n.lo), scale_half(a.hi, n.hi)}; }

HASTEN_INLINE float reduce_add(F a) {
  const __m256 b = _mm256_add_ps(a.lo, a.hi);
  const __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
  const __m128 d = _mm_add_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
}
HASTEN_INLINE float reduce_max(F a) {
  const __m256 b = _mm256_max_ps(a.lo, a.hi);
  const __m128 c = _mm_max_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
  const __m128 d = _mm_max_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_max_ss(d, _mm_movehdup_ps(d)));
}

HASTEN_INLINE __m256 bf16_half(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
HASTEN_INLINE F load_bf16(const uint16_t* p) { return {bf16_half(p), bf16_half(p + 8)}; }
HASTEN_INLINE __m256i to_bf16_half(__m256 a) {  // in the low 16 bits of each lane
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc0), nan);
}
HASTEN_INLINE void store_bf16(uint16_t* p, F a) {
  const __m256i mixed = _mm256_packus_epi32(to_bf16_half(a.lo), to_bf16_half(a.hi));
  _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(mixed, 0xd8));
}
HASTEN_INLINE F load_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
HASTEN_INLINE F load_i8(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8))))};
}

HASTEN_INLINE I izero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
HASTEN_INLINE I iset1(int32_t a) { return {_mm256_set1_epi32(a), _mm256_set1_epi32(a)}; }
HASTEN_INLINE I iload(const int32_t* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 8))};
}
HASTEN_INLINE void istore(int32_t* p, I a) {
  _mm256_storeu_si256((__m256i*)p, a.lo);
  _mm256_storeu_si256((__m256i*)(p + 8), a.hi);
}
HASTEN_INLINE void store_i8(int8_t* p, I a) {
  const __m256i low = _mm256_set1_epi32(255);
  const __m256i words = _mm256_packus_epi32(_mm256_and_si256(a.lo, low), _mm256_and_si256(a.hi, low));
  const __m256i ordered = _mm256_permute4x64_epi64(words, 0xd8);
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1)));
}
HASTEN_INLINE I iload_u8(const uint8_t* p) {
  return {_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)),
          _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)))};
}
HASTEN_INLINE I iadd(I a, I b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
HASTEN_INLINE I imul(I a, I b) { return {_mm256_mullo_epi32(a.lo, b.lo), _mm256_mullo_epi32(a.hi, b.hi)}; }
HASTEN_INLINE int32_t ireduce_add(I a) {
  const __m256i b = _mm256_add_epi32(a.lo, a.hi);
  __m128i c = _mm_add_epi32(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1));
  c = _mm_add_epi32(c, _mm_shuffle_epi32(c, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(c, _mm_shuffle_epi32(c, 0xb1)));
}
HASTEN_INLINE F select_lt(I a, I b, F yes, F no) {
  return {_mm256_blendv_ps(no.lo, yes.lo, _mm256_castsi256_ps(_mm256_cmpgt_epi32(b.lo, a.lo))),
          _mm256_blendv_ps(no.hi, yes.hi, _mm256_castsi256_ps(_mm256_cmpgt_epi32(b.hi, a.hi)))};
}
HASTEN_INLINE F to_float(I a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
HASTEN_INLINE I to_int(F a) {  // the rounding mode is the default one, to nearest even
  return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)};
}

// What the products are made of; see simd_avx512.h. Without VNNI the multiplication of bytes saturates at 16 bits, and
// only |w| <= 128 times |a| <= 127 stays exact: int8 weights lose their offset again and pass their signs to a.
struct Bytes {
  __m256i lo, hi;        // signed
};
using Partial = I;       // 16-bit sums: 8 vectors of 2 * 15 * 127 each stay below 2^15
struct Pairs {
  F even, odd;
};
using Columns = __m256i;
constexpr int kByteOffset = 0;

HASTEN_INLINE Bytes load_bytes(const uint8_t* p) {
  const __m256i offset = _mm256_set1_epi8((char)128);
  return {_mm256_xor_si256(_mm256_loadu_si256((const __m256i*)p), offset),
          _mm256_xor_si256(_mm256_loadu_si256((const __m256i*)(p + 32)), offset)};
}
HASTEN_INLINE Bytes low_nibbles(const uint8_t* p) {
  const __m256i low = _mm256_set1_epi8(15);
  return {_mm256_and_si256(_mm256_loadu_si256((const __m256i*)p), low),
          _mm256_and_si256(_mm256_loadu_si256((const __m256i*)(p + 32)), low)};
}
HASTEN_INLINE Bytes high_nibbles(const uint8_t* p) {
  const __m256i low = _mm256_set1_epi8(15);
  return {_mm256_and_si256(_mm256_srli_epi16(_mm256_loadu_si256((const __m256i*)p), 4), low),
          _mm256_and_si256(_mm256_srli_epi16(_mm256_loadu_si256((const __m256i*)(p + 32)), 4), low)};
}
HASTEN_INLINE Columns columns(const uint8_t* p) {
  int32_t a;
  __builtin_memcpy(&a, p, 4);
  return _mm256_set1_epi32(a);
}
HASTEN_INLINE __m256i dot4_half(__m256i acc, __m256i w, __m256i a) {
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(a, w));
  return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
HASTEN_INLINE I dot4(I acc, Bytes w, Columns a) { return {dot4_half(acc.lo, w.lo, a), dot4_half(acc.hi, w.hi, a)}; }
HASTEN_INLINE Partial open(I) { return izero(); }
HASTEN_INLINE Partial dot4_small(Partial acc, Bytes w, Columns a) {
  return {_mm256_add_epi16(acc.lo, _mm256_maddubs_epi16(w.lo, a)), _mm256_add_epi16(acc.hi, _mm256_maddubs_epi16(w.hi, a))};
}
HASTEN_INLINE I close(I acc, Partial part) {
  const __m256i one = _mm256_set1_epi16(1);
  return {_mm256_add_epi32(acc.lo, _mm256_madd_epi16(part.lo, one)), _mm256_add_epi32(acc.hi, _mm256_madd_epi16(part.hi, one))};
}

HASTEN_INLINE F high_halves(__m256i lo, __m256i hi) {
  const __m256i mask = _mm256_set1_epi32((int)0xffff0000);
  return {_mm256_castsi256_ps(_mm256_and_si256(lo, mask)), _mm256_castsi256_ps(_mm256_and_si256(hi, mask))};
}
HASTEN_INLINE Pairs load_pairs(const uint8_t* p) {
  const __m256i lo = _mm256_loadu_si256((const __m256i*)p), hi = _mm256_loadu_si256((const __m256i*)(p + 32));
  return {high_halves(_mm256_slli_epi32(lo, 16), _mm256_slli_epi32(hi, 16)), high_halves(lo, hi)};
}
HASTEN_INLINE F dot2(F acc, Pairs w, Columns a) {
  const __m256i even = _mm256_slli_epi32(a, 16);
  return fma(w.odd, high_halves(a, a), fma(w.even, high_halves(even, even), acc));
}

HASTEN_INLINE I dot4_u8s8(I acc, const uint8_t* w, int32_t a) {
  const int32_t sum = (int8_t)a + (int8_t)(a >> 8) + (int8_t)(a >> 16) + (int8_t)(a >> 24);
  return dot4(iadd(acc, iset1(128 * sum)), load_bytes(w), _mm256_set1_epi32(a));
}
HASTEN_INLINE F dot2_bf16(F acc, const uint16_t* w, uint32_t a) {
  return dot2(acc, load_pairs((const uint8_t*)w), _mm256_set1_epi32((int)a));
}

constexpr int kTileRows = 4;
constexpr int float_blocks(int rows) { return rows <= 2 ? 2 : 1; }

#include "simd_math.h"

}  // namespace
}  // namespace hasten
