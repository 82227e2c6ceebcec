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

static inline Vec splat(float value) {
#if defined(__AVX512F__)
    return Vec(_mm512_set1_ps(value));
#elif defined(__AVX2__)
    return Vec(_mm256_set1_ps(value));
#else
    return Vec{value, value, value, value};
#endif
}

static inline Vec load(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

static inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

// count lanes, the others zero; and count lanes out of a vector.
static inline Vec load_some(const float* p, int64_t count) {
#if defined(__AVX512F__)
    return Vec(_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1u), p));
#else
    Vec v{};
    std::memcpy(&v, p, size_t(count) * 4);
    return v;
#endif
}

static inline void store_some(float* p, Vec v, int64_t count) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1u), __m512(v));
#else
    std::memcpy(p, &v, size_t(count) * 4);
#endif
}

// a * b + c, rounded once where the instruction set can. Sources that promise equal bits on different paths use this and
// are compiled without contraction, so that no path is fused that another leaves apart.
static inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
    return Vec(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
#elif defined(__FMA__) && defined(__AVX2__)
    return Vec(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
#else
    return a * b + c;
#endif
}

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

struct F32 {
    using Store = float;
    static inline float get(const Store* p) { return *p; }
    static inline void put(Store* p, float v) { *p = v; }
    static inline Vec load(const Store* p) { return SIROCCO_ISA::load(p); }
    static inline void store(Store* p, Vec v) { SIROCCO_ISA::store(p, v); }
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
    static inline void store(Store* p, Vec v) {
        VecBits bits;
        std::memcpy(&bits, &v, sizeof bits);
        const VecBits is_nan = VecBits(v != v);
        const VecBits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        const VecHalf half = __builtin_convertvector((is_nan & ((bits >> 16) | 0x40u)) | (~is_nan & rounded), VecHalf);
        std::memcpy(p, &half, sizeof half);
    }
};

struct F16 {
    using Store = uint16_t;
    static inline float get(const Store* p) { return f16_to_f32(*p); }
    static inline void put(Store* p, float v) { *p = f32_to_f16(v); }
    static inline Vec load(const Store* p) {
#if defined(__AVX512F__)
        return Vec(_mm512_maskz_cvtph_ps(__mmask16(-1), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__) && defined(__AVX2__)
        return Vec(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
        Vec v;
        for (int i = 0; i < kLanes; ++i) v[i] = f16_to_f32(p[i]);
        return v;
#endif
    }
    static inline void store(Store* p, Vec v) {
#if defined(__AVX512F__)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(__m512(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__) && defined(__AVX2__)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(__m256(v), _MM_FROUND_TO_NEAREST_INT));
#else
        for (int i = 0; i < kLanes; ++i) p[i] = f32_to_f16(v[i]);
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
