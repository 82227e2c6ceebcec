// Elementary functions of vectors. A lane's result does not depend on the other lanes or on how a compiler fuses.
#pragma once
#include "vec.h"

namespace SIROCCO_ISA {

// e^x with a relative error below 3e-7; 0 below -87, e^88 above 88. x = n ln 2 + r with |r| <= ln 2 / 2, where ln 2 is
// split so that n times its upper part is exact; e^r is the exponential series up to r^7 (the rest is below 6e-9).
static inline Vec exp(Vec x) {
    const VecInt is_low = x < splat(-87.0f);
    x = x > splat(88.0f) ? splat(88.0f) : x;
    x = is_low ? splat(-87.0f) : x;
    const Vec to_whole = splat(0x1.8p23f);  // adding it leaves no bits for a fraction: rounds to a whole number
    const Vec n = fma(x, splat(0x1.715476p0f), to_whole) - to_whole;
    const Vec r = fma(n, splat(-0x1.7f7d1cp-20f), fma(n, splat(-0x1.62e4p-1f), x));
    Vec p = fma(r, splat(1.0f / 5040), splat(1.0f / 720));
    p = fma(r, p, splat(1.0f / 120));
    p = fma(r, p, splat(1.0f / 24));
    p = fma(r, p, splat(1.0f / 6));
    p = fma(r, p, splat(0.5f));
    p = fma(r, p, splat(1.0f));
    p = fma(r, p, splat(1.0f));
#if defined(__AVX512F__)
    return Vec(_mm512_mask_scalef_ps(_mm512_setzero_ps(), __mmask16(~_mm512_movepi32_mask(__m512i(is_low))), __m512(p), __m512(n)));
#else
    const VecInt exponent = (__builtin_convertvector(n, VecInt) + 127) << 23;
    Vec power;
    std::memcpy(&power, &exponent, sizeof power);
    return is_low ? Vec{} : p * power;
#endif
}

static inline Vec magnitude(Vec x) { return x < Vec{} ? -x : x; }

// Relative error below 5e-7. Small arguments by a polynomial (fitted to tanh(x) / x), as 1 - 2 / (e^2x + 1) cancels there.
static inline Vec tanh(Vec x) {
    const Vec a = magnitude(x), square = x * x;
    Vec p = splat(-0x1.8f9226p-8f);
    p = fma(p, square, splat(0x1.580566p-6f));
    p = fma(p, square, splat(-0x1.b925a6p-5f));
    p = fma(p, square, splat(0x1.110e1ep-3f));
    p = fma(p, square, splat(-0x1.555552p-2f));
    const Vec small = fma(x * square, p, x);
    const Vec large = splat(1.0f) - splat(2.0f) / (exp(a + a) + splat(1.0f));
    return a < splat(0.625f) ? small : (x < Vec{} ? -large : large);
}

// x / (1 + e^-x).
static inline Vec silu(Vec x) { return x / (splat(1.0f) + exp(-x)); }

// x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))), where 1 + tanh(u) = 2 / (1 + e^-2u).
static inline Vec gelu_tanh(Vec x) {
    const Vec u = splat(0.7978845608f) * fma(splat(0.044715f) * x * x, x, x);
    return x / (splat(1.0f) + exp(splat(-2.0f) * u));
}

// x / 2 * erfc(-x / sqrt 2). erfc(z) for z >= 0 is e^-z^2 t P(t), t = 1 / (1 + 0.4 z): a form as in Abramowitz and Stegun
// 7.1.26, with a polynomial of our own fit whose relative error is below 1e-7.
static inline Vec gelu_erf(Vec x) {
    const Vec z = magnitude(x) * splat(0.7071067812f);
    const Vec t = splat(1.0f) / fma(z, splat(0.4f), splat(1.0f));
    Vec p = splat(0x1.49dbb0p-5f);
    p = fma(p, t, splat(-0x1.156df4p-3f));
    p = fma(p, t, splat(0x1.2e65b4p-4f));
    p = fma(p, t, splat(0x1.988eb6p-4f));
    p = fma(p, t, splat(0x1.24db0cp-4f));
    p = fma(p, t, splat(0x1.936384p-3f));
    p = fma(p, t, splat(0x1.9b8fa8p-3f));
    p = fma(p, t, splat(0x1.d006fep-3f));
    p = fma(p, t, splat(0x1.ce1528p-3f));
    const Vec half_tail = splat(0.5f) * t * p * exp(-z * z);  // erfc(|z|) / 2
    return x * (x < Vec{} ? half_tail : splat(1.0f) - half_tail);
}

}  // namespace SIROCCO_ISA
