// How dense words and activations become floats, and their products, for AVX2.
#pragma once
#include "avx2_sums.h"

namespace SIROCCO_ISA {

constexpr int kDenseTokens = 4;  // whose sums the registers hold, beside two or four registers of weights

// How words and activations become floats. length: weights of a word; step: bytes of the activations that meet a word.
template <int Type, Act Kind>
struct Dense {
    static constexpr int kLength = Type == 0 ? 1 : 2, kStep = kLength * (Kind == Act::bf16 ? 2 : 4);

    SIROCCO_INLINE static void weights(const uint8_t* words, Floats (&value)[kLength]) {
        const Words w = load_words(words);
        if constexpr (Type == 0) {
            value[0] = as_floats(w);
        } else if constexpr (Type == 1) {
            value[0] = low_halves(w);
            value[1] = high_halves(w);
        } else {
            value[0] = as_floats(w << 16);
            value[1] = as_floats(w & 0xffff0000u);
        }
    }
    SIROCCO_INLINE static void activations(const uint8_t* x, Floats (&value)[kLength]) {
        if constexpr (Kind == Act::bf16) {
            const Words pair = Words(all_words(x));
            value[0] = as_floats(pair << 16);
            value[1] = as_floats(pair & 0xffff0000u);
        } else {
            for (int i = 0; i < kLength; ++i) value[i] = all_floats(x + 4 * i);
        }
    }
};

// Adds the products of Tiles tiles, tile_bytes apart, with M tokens. One token takes several tiles at once: a sum waits
// four cycles for its last addition, and only other sums fill them.
template <typename D, int M, int Tiles>
SIROCCO_INLINE static void multiply_words(const uint8_t* words, int64_t tile_bytes, int64_t num_words, const uint8_t* const* x, Sum (&total)[Tiles][M]) {
    Floats sums[Tiles][M][2];
    for (int t = 0; t < Tiles; ++t)
        for (int m = 0; m < M; ++m)
            for (int h = 0; h < 2; ++h) sums[t][m][h] = total[t][m].half[h];
    for (int64_t i = 0; i < num_words; ++i) {
        SIROCCO_UNROLL
        for (int t = 0; t < Tiles; ++t) {
            Floats w[2][D::kLength];
            for (int h = 0; h < 2; ++h) D::weights(words + t * tile_bytes + i * 64 + 32 * h, w[h]);
            SIROCCO_UNROLL
            for (int m = 0; m < M; ++m) {
                Floats xv[D::kLength];
                D::activations(x[m] + i * D::kStep, xv);
                SIROCCO_UNROLL
                for (int k = 0; k < D::kLength; ++k)
                    for (int h = 0; h < 2; ++h) sums[t][m][h] = fma(w[h][k], xv[k], sums[t][m][h]);
            }
        }
    }
    for (int t = 0; t < Tiles; ++t)
        for (int m = 0; m < M; ++m)
            for (int h = 0; h < 2; ++h) total[t][m].half[h] = sums[t][m][h];
}

// Float32 activations with a type that is not. matmul_avx2_decoded.cpp
void multiply_decoded(const MatmulJob& job, int64_t tile_begin, int64_t tile_end, int64_t token_begin, int64_t token_end);

}  // namespace SIROCCO_ISA
