// Vectors of float32 as wide as the instruction set of this build, and their loads from each float type.
#pragma once
#include "half.h"
#include "jobs.h"
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace SIROCCO_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecInt __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecBits __attribute__((vector_size(kLanes * 4)));
typedef uint16_t VecHalf __attribute__((vector_size(kLanes * 2)));

static inline Vec splat(float value) { return Vec{} + value; }

static inline Vec load(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

static inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

typedef float Vec4 __attribute__((vector_size(16)));

#if defined(__clang__) || __GNUC__ >= 12
#define SIROCCO_SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
typedef int32_t Vec4Int __attribute__((vector_size(16)));
#define SIROCCO_SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, Vec4Int{i, j, k, l})
#endif

// Adds the upper half to the lower one until four lanes are left.
static inline Vec4 fold(Vec v) {
    Vec4 parts[kLanes / 4];
    std::memcpy(parts, &v, sizeof v);
    for (int width = kLanes / 8; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) parts[i] += parts[i + width];
    return parts[0];
}

// The sums of four vectors' lanes: much cheaper together than one by one.
static inline Vec4 sum4(Vec a, Vec b, Vec c, Vec d) {
    const Vec4 p = fold(a), q = fold(b), r = fold(c), s = fold(d);
    const Vec4 pq = SIROCCO_SHUFFLE(p, q, 0, 4, 1, 5) + SIROCCO_SHUFFLE(p, q, 2, 6, 3, 7);
    const Vec4 rs = SIROCCO_SHUFFLE(r, s, 0, 4, 1, 5) + SIROCCO_SHUFFLE(r, s, 2, 6, 3, 7);
    return SIROCCO_SHUFFLE(pq, rs, 0, 1, 4, 5) + SIROCCO_SHUFFLE(pq, rs, 2, 3, 6, 7);
}

static inline float sum(Vec v) { return sum4(v, v, v, v)[0]; }

// e^x with a relative error below 3e-7; 0 below -87, e^88 above 88. x = n ln 2 + r with |r| <= ln 2 / 2, where ln 2 is
// split so that n times its upper part is exact; e^r is the exponential series up to r^7 (the rest is below 6e-9).
static inline Vec exp(Vec x) {
    const VecInt is_low = x < splat(-87.0f);
    x = x > splat(88.0f) ? splat(88.0f) : x;
    x = is_low ? splat(-87.0f) : x;
    const Vec to_whole = splat(0x1.8p23f);  // adding it leaves no bits for a fraction: rounds to a whole number
    const Vec n = (x * splat(0x1.715476p0f) + to_whole) - to_whole;
    const Vec r = (x - n * splat(0x1.62e4p-1f)) - n * splat(0x1.7f7d1cp-20f);
    Vec p = splat(1.0f / 720) + r * splat(1.0f / 5040);
    p = splat(1.0f / 120) + r * p;
    p = splat(1.0f / 24) + r * p;
    p = splat(1.0f / 6) + r * p;
    p = splat(0.5f) + r * p;
    p = splat(1.0f) + r * p;
    p = splat(1.0f) + r * p;
    const VecInt exponent = (__builtin_convertvector(n, VecInt) + 127) << 23;
    Vec power;
    std::memcpy(&power, &exponent, sizeof power);
    return is_low ? Vec{} : p * power;
}

struct F32 {
    using Store = float;
    static inline float get(const Store* p) { return *p; }
    static inline void put(Store* p, float v) { *p = v; }
    static inline Vec load(const Store* p) { return SIROCCO_ISA::load(p); }
};

struct Bf16 {
    using Store = uint16_t;
    static inline float get(const Store* p) { return bf16_to_f32(*p); }
    static inline void put(Store* p, float v) { *p = f32_to_bf16(v); }
    static inline Vec load(const Store* p) {
        VecHalf half;
        std::memcpy(&half, p, sizeof half);
        const VecBits bits = __builtin_convertvector(half, VecBits) << 16;
        Vec v;
        std::memcpy(&v, &bits, sizeof v);
        return v;
    }
};

struct F16 {
    using Store = uint16_t;
    static inline float get(const Store* p) { return f16_to_f32(*p); }
    static inline void put(Store* p, float v) { *p = f32_to_f16(v); }
    static inline Vec load(const Store* p) {
#if defined(__AVX512F__)
        return Vec(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__) && defined(__AVX2__)
        return Vec(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
        Vec v;
        for (int i = 0; i < kLanes; ++i) v[i] = f16_to_f32(p[i]);
        return v;
#endif
    }
};

// Calls body(TypeTag{}) for the run-time float type.
template <typename Body>
static inline void with_type(Float type, Body body) {
    switch (type) {
        case Float::f32: return body(F32{});
        case Float::f16: return body(F16{});
        case Float::bf16: return body(Bf16{});
    }
}

// count values to float32, then zeros up to padded.
template <typename T>
static inline void widen(const typename T::Store* from, float* to, int64_t count, int64_t padded) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(to + i, T::load(from + i));
    for (; i < count; ++i) to[i] = T::get(from + i);
    for (; i < padded; ++i) to[i] = 0.0f;
}

static inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

}  // namespace SIROCCO_ISA
