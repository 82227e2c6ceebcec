// Passes over a row of logits or weights, for the draw.
#include "sampling.h"
#include "vec_math.h"

namespace SIROCCO_ISA {
namespace {

typedef float HalfVec __attribute__((vector_size(kLanes * 2)));
typedef double WideVec __attribute__((vector_size(kLanes * 4)));  // half as many lanes

// Adds a vector's lanes to wider sums.
inline void add_wide(WideVec (&sums)[2], Vec v) {
    HalfVec halves[2];
    std::memcpy(halves, &v, sizeof v);
    for (int i = 0; i < 2; ++i) sums[i] += __builtin_convertvector(halves[i], WideVec);
}

inline double total_of(const WideVec (&sums)[2]) {
    double lanes[kLanes], total = 0;
    std::memcpy(lanes, sums, sizeof lanes);
    for (double lane : lanes) total += lane;
    return total;
}

inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }  // b where a is NaN

inline float largest_lane(Vec v) {
    float best = -__builtin_inff();
    for (int i = 0; i < kLanes; ++i) best = v[i] > best ? v[i] : best;
    return best;
}

// The lanes of a where condition holds, as bits.
inline uint32_t lanes_where(VecInt condition) {
#if defined(__AVX512F__)
    return _mm512_movepi32_mask(__m512i(condition));
#elif defined(__AVX2__)
    return uint32_t(_mm256_movemask_ps(__m256(condition)));
#else
    uint32_t bits = 0;
    for (int i = 0; i < kLanes; ++i) bits |= uint32_t(condition[i] != 0) << i;
    return bits;
#endif
}

inline Vec load_or_none(const float* p, int64_t count) {
    if (count >= kLanes) return load(p);
    Vec v = splat(-__builtin_inff());
    std::memcpy(&v, p, size_t(count) * 4);
    return v;
}

}  // namespace

float largest_of(const float* x, int64_t count) {
    Vec best[4];
    for (Vec& b : best) b = splat(-__builtin_inff());
    int64_t i = 0;
    for (; i + 4 * kLanes <= count; i += 4 * kLanes)
        for (int p = 0; p < 4; ++p) best[p] = larger(load(x + i + p * kLanes), best[p]);
    for (; i < count; i += kLanes) best[0] = larger(load_or_none(x + i, count - i), best[0]);
    return largest_lane(larger(larger(best[0], best[1]), larger(best[2], best[3])));
}

int64_t first_equal(const float* x, int64_t count, float value) {
    for (int64_t i = 0; i < count; i += kLanes) {
        const int64_t left = count - i;
        uint32_t bits = lanes_where(load_or_none(x + i, left) == splat(value));
        if (left < kLanes) bits &= (1u << left) - 1;
        if (bits) return i + __builtin_ctz(bits);
    }
    return -1;
}

void exp_weights(const float* x, float largest, float divisor, float* out, int64_t count, double* sums) {
    const Vec shift = splat(largest), factor = splat(1.0f / divisor);
    for (int64_t begin = 0; begin < count; begin += kSumBlock) {
        const int64_t end = begin + kSumBlock < count ? begin + kSumBlock : count;
        WideVec wide[2] = {};
        for (int64_t i = begin; i < end; i += kLanes) {
            const Vec e = exp((load_or_none(x + i, end - i) - shift) * factor);
            // Neither NaN nor what rounding makes of the largest one leaves [0, 1].
            const Vec weight = e > splat(1.0f) ? splat(1.0f) : e >= Vec{} ? e : Vec{};
            if (end - i >= kLanes) store(out + i, weight);
            else store_some(out + i, weight, end - i);
            add_wide(wide, weight);
        }
        sums[begin / kSumBlock] = total_of(wide);
    }
}

void chunk_maxima(const float* x, int64_t count, float* out) {
    for (int64_t begin = 0; begin < count; begin += kChunk)
        out[begin / kChunk] = largest_of(x + begin, begin + kChunk < count ? kChunk : count - begin);
}

double mass_above(const float* x, int64_t count, float threshold) {
    WideVec wide[2] = {};
    for (int64_t i = 0; i < count; i += kLanes) {
        const Vec v = load_or_none(x + i, count - i);
        add_wide(wide, v >= splat(threshold) ? v : Vec{});
    }
    return total_of(wide);
}

int64_t collect(const float* x, int64_t first_id, int64_t count, float threshold, float* values, int32_t* ids) {
    int64_t found = 0, i = 0;
#if defined(__AVX512F__)
    const __m512i step = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (; i + kLanes <= count; i += kLanes) {
        const __m512 v = _mm512_loadu_ps(x + i);
        const __mmask16 mask = _mm512_cmp_ps_mask(v, _mm512_set1_ps(threshold), _CMP_GE_OQ);
        const __m512i numbers = _mm512_add_epi32(step, _mm512_set1_epi32(int32_t(first_id + i)));
        // Whole vectors into room that is there in any case: a compressing store to memory is slow.
        _mm512_storeu_ps(values + found, _mm512_maskz_compress_ps(mask, v));
        _mm512_storeu_si512(ids + found, _mm512_maskz_compress_epi32(mask, numbers));
        found += __builtin_popcount(mask);
    }
#endif
    for (; i < count; ++i) {
        values[found] = x[i];
        ids[found] = int32_t(first_id + i);
        found += x[i] >= threshold;
    }
    return found;
}

}  // namespace SIROCCO_ISA
