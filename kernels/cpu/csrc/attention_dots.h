// Products of queries and keys in two shapes that give equal bits. Lane l of a vector accumulates d = l, l + kLanes, ...
// in this order; then the lanes are added in halves: lane l and lane l + kLanes / 2, and so on down to one.
#pragma once
#include <type_traits>
#include <utility>

#include "vec.h"

namespace SIROCCO_ISA {

#if defined(__clang__) || __GNUC__ >= 12
#define SIROCCO_PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SIROCCO_PICK(a, b, ...) __builtin_shuffle(a, b, VecInt{__VA_ARGS__})
#endif

template <int... I>
static inline Vec interleave_low(Vec a, Vec b, std::integer_sequence<int, I...>) {
    return SIROCCO_PICK(a, b, (I / 2 + I % 2 * kLanes)...);
}

template <int... I>
static inline Vec interleave_high(Vec a, Vec b, std::integer_sequence<int, I...>) {
    return SIROCCO_PICK(a, b, (kLanes / 2 + I / 2 + I % 2 * kLanes)...);
}

// Lane j of vector i to lane i of vector j: as often as kLanes can be halved, each half is shuffled into the other.
static inline void transpose(Vec (&v)[kLanes]) {
    constexpr auto lanes = std::make_integer_sequence<int, kLanes>{};
    for (int round = 1; round < kLanes; round *= 2) {
        Vec next[kLanes];
        for (int i = 0; i < kLanes / 2; ++i) {
            next[2 * i] = interleave_low(v[i], v[i + kLanes / 2], lanes);
            next[2 * i + 1] = interleave_high(v[i], v[i + kLanes / 2], lanes);
        }
        for (int i = 0; i < kLanes; ++i) v[i] = next[i];
    }
}

#if defined(__AVX512F__)
// The sums of 16 vectors: lane 4 i + j is that of v[4 j + i].
static inline Vec sum16(const Vec* v) {
    __m512 halves[8], quarters[4], pairs[2];
    for (int i = 0; i < 8; ++i) {
        const __m512 a = __m512(v[2 * i]), b = __m512(v[2 * i + 1]);
        halves[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    }
    for (int i = 0; i < 4; ++i) {
        const __m512 a = halves[2 * i], b = halves[2 * i + 1];
        quarters[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
    for (int i = 0; i < 2; ++i) {
        const __m512d a = _mm512_castps_pd(quarters[2 * i]), b = _mm512_castps_pd(quarters[2 * i + 1]);
        pairs[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    return Vec(_mm512_add_ps(_mm512_shuffle_ps(pairs[0], pairs[1], 0x88), _mm512_shuffle_ps(pairs[0], pairs[1], 0xdd)));
}
#endif

// scores[r][j] = q[r] · key j for R rows of dim floats (1, 2 or 4) and count cache rows. dim is a multiple of the lanes.
// Writes up to a multiple of four scores of a row.
template <typename T, int R>
static inline void dots(const float* q, const uint8_t* const* keys, int count, int64_t dim, float* scores, int64_t stride) {
#if defined(__AVX512F__)
    constexpr int kAtOnce = 16 / R, kQuads = 4 / R;  // R * kAtOnce sums, a quad of lanes holds four keys of a row
    for (int j = 0; j < count; j += kAtOnce) {
        Vec acc[16] = {};  // that of key k of row r is where sum16 takes lane r * kAtOnce + k from
        const auto index = [](int r, int k) { return k % 4 * 4 + r * kQuads + k / 4; };
        const uint8_t* key_rows[kAtOnce];
        for (int k = 0; k < kAtOnce; ++k) key_rows[k] = keys[j + k < count ? j + k : count - 1];
        for (int64_t d = 0; d < dim; d += kLanes)
            for (int k = 0; k < kAtOnce; ++k) {
                const Vec key = T::load(key_rows[k], d, dim);
                for (int r = 0; r < R; ++r) {
                    const Vec query = load(q + r * dim + d);
                    acc[index(r, k)] = fma(query, key, acc[index(r, k)]);
                }
            }
        const Vec sums = sum16(acc);
        float lanes[16];
        store(lanes, sums);
        const int some = count - j < kAtOnce ? count - j : kAtOnce;
        for (int r = 0; r < R; ++r) {
            if (some == kAtOnce) std::memcpy(scores + r * stride + j, lanes + r * kAtOnce, kAtOnce * 4);
            else std::memcpy(scores + r * stride + j, lanes + r * kAtOnce, size_t(some) * 4);
        }
    }
#else
    for (int j = 0; j < count; j += 4) {
        Vec acc[R][4] = {};
        const uint8_t* key_rows[4];
        for (int k = 0; k < 4; ++k) key_rows[k] = keys[j + k < count ? j + k : count - 1];
        for (int64_t d = 0; d < dim; d += kLanes)
            for (int k = 0; k < 4; ++k) {
                const Vec key = T::load(key_rows[k], d, dim);
                for (int r = 0; r < R; ++r) {
                    const Vec query = load(q + r * dim + d);
                    acc[r][k] = fma(query, key, acc[r][k]);
                }
            }
        for (int r = 0; r < R; ++r) {
            const Vec4 sums = sum4(acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
            std::memcpy(scores + r * stride + j, &sums, sizeof sums);
        }
    }
#endif
}

template <int R>
struct Sums {
    Vec v[R];
};

// The sum of the parts of lanes First, First + Step, ... for the keys across a vector: keys[d] holds d of kLanes keys.
// Chunks: padded / kLanes where that is known when compiling, else 0.
template <int R, int Chunks, int First, int Step>
__attribute__((always_inline)) static inline Sums<R> lane_sums(const float* q, int64_t padded, const float* keys) {
    Sums<R> sums;
    if constexpr (Step == kLanes) {
        const Vec first = load(keys + First * kLanes);
        for (int r = 0; r < R; ++r) sums.v[r] = splat(q[r * padded + First]) * first;
        const int64_t chunks = Chunks ? Chunks : padded / kLanes;
        for (int64_t c = 1; c < chunks; ++c) {
            const int64_t d = First + c * kLanes;
            const Vec key = load(keys + d * kLanes);
            for (int r = 0; r < R; ++r) sums.v[r] = fma(splat(q[r * padded + d]), key, sums.v[r]);
        }
    } else {
        sums = lane_sums<R, Chunks, First, 2 * Step>(q, padded, keys);
        const Sums<R> other = lane_sums<R, Chunks, First + Step, 2 * Step>(q, padded, keys);
        for (int r = 0; r < R; ++r) sums.v[r] += other.v[r];
    }
    return sums;
}

// scores[r][0 .. kLanes) for R rows of padded floats and as many keys, given across.
template <int R, int Chunks>
static inline void dots_across(const float* q, int64_t padded, const float* keys, float* scores, int64_t stride) {
    const Sums<R> sums = lane_sums<R, Chunks, 0, 1>(q, Chunks ? Chunks * kLanes : padded, keys);
    for (int r = 0; r < R; ++r) store(scores + r * stride, sums.v[r]);
}

}  // namespace SIROCCO_ISA
