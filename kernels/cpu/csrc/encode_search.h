// Searches for the scales of sub-blocks: in which steps do n weights lose least, when the loss of each has a weight of
// its own? One search a lane: V is a vector whose lanes are different sub-blocks, or a float. Every lane adds up in the
// order of its sub-block's weights, so that the bits of a result depend neither on the number of lanes nor on the
// instruction set; no multiplication is fused with an addition (-ffp-contract=off).
#pragma once
#include <cmath>

#include "vec.h"

namespace SIROCCO_ISA {

// Below this a symmetric block counts as zeros.
constexpr float kZeroMagnitude = 1e-15f;

template <typename V>
inline V of(float value);
template <>
inline float of<float>(float value) { return value; }
template <>
inline Vec of<Vec>(float value) { return splat(value); }

inline bool any(bool mask) { return mask; }
inline bool any(VecInt mask) {
#if defined(__AVX512F__)
    return _mm512_movepi32_mask(__m512i(mask)) != 0;
#elif defined(__AVX2__)
    return _mm256_movemask_ps(__m256(mask)) != 0;
#else
    return (mask[0] | mask[1] | mask[2] | mask[3]) != 0;
#endif
}

inline float root(float x) { return std::sqrt(x); }
inline Vec root(Vec x) {
#if defined(__AVX512F__)
    return Vec(_mm512_maskz_sqrt_ps(__mmask16(-1), __m512(x)));
#elif defined(__AVX2__)
    return Vec(_mm256_sqrt_ps(__m256(x)));
#else
    for (int i = 0; i < kLanes; ++i) x[i] = std::sqrt(x[i]);
    return x;
#endif
}

template <typename V>
inline V absolute(V x) { return x < of<V>(0.0f) ? -x : x; }
template <typename V>
inline V smaller(V a, V b) { return a < b ? a : b; }
template <typename V>
inline V larger(V a, V b) { return a > b ? a : b; }

// The nearest whole number, halves to the even one, of |x| < 2^22: adding 1.5 * 2^23 leaves no bits for a fraction.
template <typename V>
inline V nearest(V x) { return (x + of<V>(12582912.0f)) - of<V>(12582912.0f); }

// The same for any x. What is out of range comes out as the low 23 bits of the sum, as in the format's own quantiser.
inline int nearest_int(float x) { return int(bits_of(x + 12582912.0f) & 0x007fffffu) - 0x00400000; }
inline VecInt nearest_int(Vec x) {
    const Vec sum = x + splat(12582912.0f);
    VecInt bits;
    std::memcpy(&bits, &sum, sizeof bits);
    return (bits & 0x007fffff) - 0x00400000;
}

inline float whole(int value) { return float(value); }
inline Vec whole(VecInt value) { return __builtin_convertvector(value, Vec); }

template <typename V>
inline V clamped(V x, float low, float high) { return smaller(larger(x, of<V>(low)), of<V>(high)); }

// x ~ scale * q - minimum, 0 <= q <= top. The codes that the search found are nearest_int(inverse * (x - base)), clamped.
template <typename V>
struct Affine {
    V scale, minimum, inverse, base;
};

// How a search goes: inverse scales (first + step * i + top) / (largest - minimum) for i = 0 … count.
struct Steps {
    float first, step;
    int count;
};

// Least squares for scale and minimum under the codes of each inverse scale; what loses least is kept. The loss is the
// weighted sum of squares, or of magnitudes where is_absolute. x and w: n values of each lane, w not negative.
template <int n, bool is_absolute, typename V>
inline Affine<V> search_affine(const V* x, const V* w, int top, Steps steps) {
    V least = x[0], most = x[0], sum_w = w[0], sum_x = w[0] * x[0];
    for (int i = 1; i < n; ++i) {
        least = smaller(x[i], least);
        most = larger(x[i], most);
        sum_w += w[i];
        sum_x += w[i] * x[i];
    }
    const V zero = of<V>(0.0f), one = of<V>(1.0f);
    least = least > zero ? zero : least;
    const auto is_flat = most == least;
    const float limit = float(top);
    const auto code = [limit](V inverse, V value, V base) { return clamped(whole(nearest_int(inverse * (value - base))), 0.0f, limit); };
    const auto lost = [](V error) { return is_absolute ? absolute(error) : error * error; };
    V inverse = of<V>(limit) / (is_flat ? one : most - least), scale = one / inverse, best = zero;
    for (int i = 0; i < n; ++i) best += w[i] * lost(scale * code(inverse, x[i], least) + least - x[i]);
    Affine<V> found = {scale, least, inverse, least};
    for (int step = 0; step <= steps.count; ++step) {
        // The minimum found last is where codes are counted from, and to where the span reaches.
        const V base = found.minimum;
        inverse = of<V>(steps.first + steps.step * float(step) + limit) / (most - base);
        V codes[n], sum_q = zero, sum_qq = zero, sum_qx = zero;
        for (int i = 0; i < n; ++i) {
            const V q = code(inverse, x[i], base), wq = w[i] * q;
            codes[i] = q;
            sum_q += wq;
            sum_qq += wq * q;
            sum_qx += wq * x[i];
        }
        const V spread = sum_w * sum_qq - sum_q * sum_q;
        const auto is_solvable = spread > zero;
        if (!any(is_solvable)) continue;
        const V divisor = is_solvable ? spread : one;
        V this_scale = (sum_w * sum_qx - sum_x * sum_q) / divisor;
        V this_minimum = (sum_qq * sum_x - sum_q * sum_qx) / divisor;
        const auto is_above = this_minimum > zero;
        this_scale = is_above ? sum_qx / sum_qq : this_scale;
        this_minimum = is_above ? zero : this_minimum;
        V loss = zero;
        for (int i = 0; i < n; ++i) loss += w[i] * lost(this_scale * codes[i] + this_minimum - x[i]);
        const auto is_better = is_solvable & (loss < best);
        best = is_better ? loss : best;
        found.scale = is_better ? this_scale : found.scale;
        found.minimum = is_better ? this_minimum : found.minimum;
        found.inverse = is_better ? inverse : found.inverse;
        found.base = is_better ? base : found.base;
    }
    return {is_flat ? zero : found.scale, is_flat ? -least : -found.minimum, is_flat ? zero : found.inverse, found.base};
}

// x ~ scale * q, -top <= q < top. The codes that the search found are nearest(inverse * x); is_zero: there is nothing
// but zeros, and codes are zero from -top on.
template <typename V>
struct Symmetric {
    V scale, inverse;
    decltype(V{} < V{}) is_zero;
};

// The value of largest magnitude, the first of several, and whether it is too small to count.
template <int n, typename V>
inline V largest_value(const V* x, decltype(V{} < V{})& is_zero) {
    V magnitude = of<V>(0.0f), value = magnitude;
    for (int i = 0; i < n; ++i) {
        const V a = absolute(x[i]);
        const auto is_larger = a > magnitude;
        magnitude = is_larger ? a : magnitude;
        value = is_larger ? x[i] : value;
    }
    is_zero = magnitude < of<V>(kZeroMagnitude);
    return is_zero ? of<V>(1.0f) : value;
}

// The least-squares scale under the codes of 19 inverse scales around -top / (value of largest magnitude): the one that
// explains most of the weighted squares is kept.
template <int n, typename V>
inline Symmetric<V> search_symmetric(const V* x, const V* w, int top) {
    Symmetric<V> found;
    const V value = largest_value<n>(x, found.is_zero), zero = of<V>(0.0f), one = of<V>(1.0f);
    const float low = float(-top), high = float(top - 1);
    V best = zero;
    for (int step = -10; step <= 9; ++step) {  // the first is the middle one, which wins where nothing is better
        if (step == 0) continue;
        const V inverse = step == -10 ? of<V>(low) / value : of<V>(-(float(top) + 0.1f * float(step))) / value;
        V sum_qx = zero, sum_qq = zero;
        for (int i = 0; i < n; ++i) {
            const V q = clamped(nearest(inverse * x[i]), low, high);
            sum_qx += w[i] * x[i] * q;
            sum_qq += w[i] * q * q;
        }
        if (step == -10) {
            found.scale = sum_qq != zero ? sum_qx / (sum_qq != zero ? sum_qq : one) : zero;
            best = found.scale * sum_qx;
            found.inverse = inverse;
            continue;
        }
        const auto is_better = (sum_qq > zero) & (sum_qx * sum_qx > best * sum_qq);
        if (!any(is_better)) continue;
        const V scale = sum_qx / (is_better ? sum_qq : one);
        found.scale = is_better ? scale : found.scale;
        best = is_better ? scale * sum_qx : best;
        found.inverse = is_better ? inverse : found.inverse;
    }
    found.scale = found.is_zero ? zero : found.scale;
    return found;
}

// Improves codes one by one, up to five times over all of them: each goes where, with the others as they are, the loss
// weighted with x^2 is least. codes: q + top, from 0 on, and 0 where there are only
// zeros. Returns the scales.
template <int n, typename V>
inline V refine_symmetric(const V* x, int top, V* codes) {
    decltype(V{} < V{}) is_zero;
    const V value = largest_value<n>(x, is_zero), zero = of<V>(0.0f), one = of<V>(1.0f);
    const float low = float(-top), high = float(top - 1);
    const V inverse = of<V>(low) / value;
    V sum_qx = zero, sum_qq = zero;
    for (int i = 0; i < n; ++i) {
        const V q = clamped(nearest(inverse * x[i]), low, high), w = x[i] * x[i];
        codes[i] = q;
        sum_qx += w * x[i] * q;
        sum_qq += w * q * q;
    }
    for (int round = 0; round < 5; ++round) {
        auto has_changed = one < zero;
        for (int i = 0; i < n; ++i) {
            const V w = x[i] * x[i], old = codes[i];
            V rest_qx = sum_qx - w * x[i] * old, rest_qq = sum_qq - w * old * old;
            const auto is_positive = rest_qx > zero;
            const V ratio = x[i] * rest_qq / (is_positive ? rest_qx : one);
            const V q = clamped(whole(nearest_int(ratio)), low, high);
            rest_qx += w * x[i] * q;
            rest_qq += w * q * q;
            const auto is_better = is_positive & (q != old) & (rest_qq > zero) & (rest_qx * rest_qx * sum_qq > sum_qx * sum_qx * rest_qq);
            codes[i] = is_better ? q : old;
            sum_qx = is_better ? rest_qx : sum_qx;
            sum_qq = is_better ? rest_qq : sum_qq;
            has_changed = has_changed | is_better;
        }
        if (!any(has_changed)) break;
    }
    for (int i = 0; i < n; ++i) codes[i] = is_zero ? zero : codes[i] + of<V>(float(top));
    const auto has_sum = (sum_qq > zero);
    const V scale = has_sum ? sum_qx / (has_sum ? sum_qq : one) : zero;
    return is_zero ? zero : scale;
}

}  // namespace SIROCCO_ISA
