// exp, tanh and erf over the vectors of a simd_*.h, which includes this at its end, inside its unnamed namespace. Every step
// is a correctly rounded operation (or an fma), so all instruction sets that have fma give the same bits.

// Range reduction to |r| <= ln(2) / 2 in two parts (Cody and Waite 1980), then a minimax polynomial (Cephes expf).
HASTEN_INLINE F exp(F x) {
  x = min(set1(89.0f), max(set1(-104.0f), x));  // beyond: inf and 0. A NaN stays, being the second operand.
  const F n = round(mul(x, set1(1.44269504088896341f)));
  F r = fnma(n, set1(0.693359375f), x);
  r = fnma(n, set1(-2.12194440e-4f), r);
  F p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = add(fma(p, mul(r, r), r), set1(1.0f));
  return scale_by_power_of_two(p, n);
}

// Cephes tanhf: a polynomial near 0, where 1 - 2 / (e^2x + 1) cancels.
HASTEN_INLINE F tanh(F x) {
  const F a = abs(x), z = mul(x, x);
  F p = set1(-5.70498872745e-3f);
  p = fma(p, z, set1(2.06390887954e-2f));
  p = fma(p, z, set1(-5.37397155531e-2f));
  p = fma(p, z, set1(1.33314422036e-1f));
  p = fma(p, z, set1(-3.33332819422e-1f));
  p = fma(mul(p, z), x, x);
  const F q = sub(set1(1.0f), div(set1(2.0f), add(exp(add(a, a)), set1(1.0f))));
  return select_lt(a, set1(0.625f), p, copysign(q, x));
}

// Cephes erff below 1; Abramowitz and Stegun 7.1.26 above, where its absolute error of 1.5e-7 is a relative one too.
HASTEN_INLINE F erf(F x) {
  const F a = abs(x), z = mul(x, x);
  F p = set1(7.853861353153693e-5f);
  p = fma(p, z, set1(-8.010193625184903e-4f));
  p = fma(p, z, set1(5.188327685732524e-3f));
  p = fma(p, z, set1(-2.685381193529856e-2f));
  p = fma(p, z, set1(1.128358514861418e-1f));
  p = fma(p, z, set1(-3.761262582423300e-1f));
  p = fma(p, z, set1(1.128379165726710f));
  p = mul(p, x);
  const F t = div(set1(1.0f), fma(a, set1(0.3275911f), set1(1.0f)));
  F q = set1(1.061405429f);
  q = fma(q, t, set1(-1.453152027f));
  q = fma(q, t, set1(1.421413741f));
  q = fma(q, t, set1(-0.284496736f));
  q = fma(q, t, set1(0.254829592f));
  q = fnma(mul(q, t), exp(neg(z)), set1(1.0f));
  return select_lt(a, set1(1.0f), p, copysign(q, x));
}
