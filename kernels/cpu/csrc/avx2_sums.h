// What the AVX2 products of all types share: a tile's 16 rows are two registers, tokens go by in groups whose sums fit
// the registers. Each (token, row) sum is formed by the same operations in the same order whatever the group.
#pragma once
#include <type_traits>

#include "block_types.h"
#include "matmul.h"

#define SIROCCO_UNROLL _Pragma("GCC unroll 16")

namespace SIROCCO_ISA {

// The sums of one token with the 16 rows of a tile.
struct Sum {
    Floats half[2];
};

SIROCCO_INLINE static Floats fma(Floats a, Floats b, Floats c) {
    return Floats(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
}

// The float, or the four bytes, at p in all lanes.
SIROCCO_INLINE static Floats all_floats(const uint8_t* p) {
    float v;
    std::memcpy(&v, p, 4);
    return Floats(_mm256_set1_ps(v));
}

SIROCCO_INLINE static __m256i all_words(const uint8_t* p) {
    int32_t v;
    std::memcpy(&v, p, 4);
    return _mm256_set1_epi32(v);
}

// A finished sum to its place in the result.
static inline void store_sum(const MatmulJob& job, int64_t tile, int64_t token, Sum sum) {
    const int64_t row = tile * kTileRows, rows = job.weight.rows - row;
    float* out = job.out + token * job.out_stride + row;
    if (rows >= kTileRows) {
        if (job.bias)
            for (int h = 0; h < 2; ++h) sum.half[h] += Floats(_mm256_loadu_ps(job.bias + row + 8 * h));
        std::memcpy(out, &sum, sizeof sum);
        return;
    }
    float values[kTileRows];
    std::memcpy(values, &sum, sizeof sum);
    for (int64_t r = 0; r < rows; ++r) out[r] = job.bias ? values[r] + job.bias[row + r] : values[r];
}

// Calls body(M as a constant, first token, x[M]) for the tokens of a range, at most Most at a time.
template <int Most, typename Body>
SIROCCO_INLINE static void each_group(const MatmulJob& job, int64_t begin, int64_t end, Body body) {
    for (; begin + Most <= end; begin += Most) {
        const uint8_t* x[Most];
        for (int m = 0; m < Most; ++m) x[m] = job.x.row(begin + m);
        body(std::integral_constant<int, Most>{}, begin, x);
    }
    if constexpr (Most > 1) each_group<Most - 1>(job, begin, end, body);
}

// The kernel of matrices of a type with 8-bit activations; null for other types. matmul_avx2.cpp
MatmulKernel q8_kernel(int type_id);

}  // namespace SIROCCO_ISA
