// simd.h over AVX-512 (F, BW, VL, DQ, VNNI; BF16 where compiled for it): one register a vector.
#pragma once

// GCC 12's own header leaves "undefined" vectors uninitialised on purpose and warns about it (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "simd.h"

namespace hasten {
namespace {

using F = __m512;
using I = __m512i;

HASTEN_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
HASTEN_INLINE void store(float* p, F a) { _mm512_storeu_ps(p, a); }
HASTEN_INLINE F load_n(const float* p, int n) { return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p); }
HASTEN_INLINE void store_n(float* p, F a, int n) { _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), a); }
HASTEN_INLINE F set1(float a) { return _mm512_set1_ps(a); }
HASTEN_INLINE F zero() { return _mm512_setzero_ps(); }
HASTEN_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
HASTEN_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
HASTEN_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
HASTEN_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
HASTEN_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
HASTEN_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
HASTEN_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
HASTEN_INLINE F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }
HASTEN_INLINE F sqrt(F a) { return _mm512_sqrt_ps(a); }
HASTEN_INLINE F neg(F a) { return _mm512_xor_ps(a, _mm512_set1_ps(-0.0f)); }
HASTEN_INLINE F abs(F a) { return _mm512_abs_ps(a); }
HASTEN_INLINE F copysign(F a, F sign) {
  return _mm512_or_ps(_mm512_abs_ps(a), _mm512_and_ps(sign, _mm512_set1_ps(-0.0f)));
}
HASTEN_INLINE F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
HASTEN_INLINE F select_lt(F a, F b, F yes, F no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}
HASTEN_INLINE F scale_by_power_of_two(F a, F n) { return _mm512_scalef_ps(a, n); }

HASTEN_INLINE float reduce_add(F a) {
  const __m256 b = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  const __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
  const __m128 d = _mm_add_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
}
HASTEN_INLINE float reduce_max(F a) { return _mm512_reduce_max_ps(a); }

HASTEN_INLINE F load_bf16(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
HASTEN_INLINE void store_bf16(uint16_t* p, F a) {
  const I bits = _mm512_castps_si512(a);
  const I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  I up = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  up = _mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(up));
}
HASTEN_INLINE F load_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
HASTEN_INLINE F load_i8(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}

HASTEN_INLINE I izero() { return _mm512_setzero_si512(); }
HASTEN_INLINE I iset1(int32_t a) { return _mm512_set1_epi32(a); }
HASTEN_INLINE I iload(const int32_t* p) { return _mm512_loadu_si512(p); }
HASTEN_INLINE void istore(int32_t* p, I a) { _mm512_storeu_si512(p, a); }
HASTEN_INLINE void store_i8(int8_t* p, I a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(a)); }
HASTEN_INLINE I iload_u8(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
HASTEN_INLINE I iadd(I a, I b) { return _mm512_add_epi32(a, b); }
HASTEN_INLINE I imul(I a, I b) { return _mm512_mullo_epi32(a, b); }
HASTEN_INLINE int32_t ireduce_add(I a) { return _mm512_reduce_add_epi32(a); }
HASTEN_INLINE F select_lt(I a, I b, F yes, F no) { return _mm512_mask_blend_ps(_mm512_cmplt_epi32_mask(a, b), no, yes); }
HASTEN_INLINE F to_float(I a) { return _mm512_cvtepi32_ps(a); }
HASTEN_INLINE I to_int(F a) { return _mm512_cvt_roundps_epi32(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

// What the products are made of. A weight vector holds 64 bytes: 4 columns of 16 rows at int8, 8 at int4, 2 at bf16.
using Bytes = __m512i;      // weights as dot4 takes them
using Partial = __m512i;    // dot4_small's sum over at most 32 columns, before it is folded into an I
using Pairs = __m512i;      // bf16 weights as dot2 takes them
using Columns = __m512i;    // one row's activations of those columns, in every lane
constexpr int kByteOffset = 128;  // load_bytes keeps the offset that matrix.h adds to int8 weights

HASTEN_INLINE Bytes load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
HASTEN_INLINE Bytes low_nibbles(const uint8_t* p) {
  return _mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(15));
}
HASTEN_INLINE Bytes high_nibbles(const uint8_t* p) {
  return _mm512_and_si512(_mm512_srli_epi16(_mm512_loadu_si512(p), 4), _mm512_set1_epi8(15));
}
HASTEN_INLINE Columns columns(const uint8_t* p) {
  int32_t a;
  __builtin_memcpy(&a, p, 4);
  return _mm512_set1_epi32(a);
}
HASTEN_INLINE I dot4(I acc, Bytes w, Columns a) { return _mm512_dpbusd_epi32(acc, w, a); }
HASTEN_INLINE Partial open(I acc) { return acc; }
HASTEN_INLINE Partial dot4_small(Partial acc, Bytes w, Columns a) { return _mm512_dpbusd_epi32(acc, w, a); }
HASTEN_INLINE I close(I, Partial part) { return part; }

#ifdef __AVX512BF16__
HASTEN_INLINE Pairs load_pairs(const uint8_t* p) { return _mm512_loadu_si512(p); }
HASTEN_INLINE F dot2(F acc, Pairs w, Columns a) { return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)a); }
#else
HASTEN_INLINE Pairs load_pairs(const uint8_t* p) { return _mm512_loadu_si512(p); }
HASTEN_INLINE F dot2(F acc, Pairs w, Columns a) {
  const I odd = _mm512_set1_epi32((int)0xffff0000);
  acc = fma(_mm512_castsi512_ps(_mm512_slli_epi32(w, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(a, 16)), acc);
  return fma(_mm512_castsi512_ps(_mm512_and_si512(w, odd)), _mm512_castsi512_ps(_mm512_and_si512(a, odd)), acc);
}
#endif

HASTEN_INLINE I dot4_u8s8(I acc, const uint8_t* w, int32_t a) { return dot4(acc, load_bytes(w), _mm512_set1_epi32(a)); }
HASTEN_INLINE F dot2_bf16(F acc, const uint16_t* w, uint32_t a) {
  return dot2(acc, load_pairs((const uint8_t*)w), _mm512_set1_epi32((int)a));
}

// Tiles of a product: rows of activations, and row blocks of weights at once for that many rows. 32 registers.
constexpr int kTileRows = 12;
constexpr int float_blocks(int rows) { return rows <= 4 ? 1 : 2; }

#include "simd_math.h"

}  // namespace
}  // namespace hasten
