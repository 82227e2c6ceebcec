// Products of 8-bit activations for AVX2. Unsigned weights meet signed activations in the instruction that adds two
// neighbouring products to 16 bits, and as many of these are added as 16 bits can hold. The operations in floating point
// and their order are those of matmul_kernel.h: both give equal bits.
#include "avx2_sums.h"
#include "scratch.h"

namespace SIROCCO_ISA {
namespace {

constexpr int kTokens = 4;              // whose sums the registers hold
constexpr int64_t kFewTokens = 8;       // up to so many, reading the weights is what takes time
constexpr int64_t kPieceColumns = 512;  // of a tile, unpacked at a time: they fit the first-level cache

// How many sums of two products, each at most 2 * 127 * (2^bits - 1), stay below 2^15 together.
constexpr int sums_in_16_bits(int bits) { return bits <= 4 ? 8 : bits == 5 ? 4 : bits == 6 ? 2 : 1; }

// Adds the products of a group of four columns to sums of 16 bits. weights(group, half): of 8 rows.
template <typename Q, int M, typename Weights>
SIROCCO_INLINE void add_group(Weights weights, int group, const uint8_t* const* x, int64_t column, __m256i (&pairs)[M][2]) {
    __m256i w[2], size[2];
    SIROCCO_UNROLL
    for (int h = 0; h < 2; ++h) {
        w[h] = __m256i(weights(group, h));
        // Unsigned, eight bits would not fit 16 even once: magnitudes do, their sign moves to x.
        if constexpr (Q::kBits == 8) size[h] = _mm256_abs_epi8(w[h]);
    }
    SIROCCO_UNROLL
    for (int m = 0; m < M; ++m) {
        const __m256i four = all_words(x[m] + column + 4 * group);
        SIROCCO_UNROLL
        for (int h = 0; h < 2; ++h) {
            __m256i two;
            if constexpr (Q::kBits == 8) two = _mm256_maddubs_epi16(size[h], _mm256_sign_epi8(four, w[h]));
            else two = _mm256_maddubs_epi16(w[h], four);
            pairs[m][h] = _mm256_add_epi16(pairs[m][h], two);
        }
    }
}

// Adds the integer dots of M tokens with a sub-block. Unrolled where a weight's place depends on its group; else a loop, of
// which compilers make more than of its unrolled form: that has too many live values.
template <typename Q, int M, bool Unroll, typename Weights>
SIROCCO_INLINE void add_dots(Weights weights, const uint8_t* const* x, int64_t column, __m256i (&dots)[M][2]) {
    constexpr int kGroups = Q::kSub / 4, kFit = sums_in_16_bits(Q::kBits) < kGroups ? sums_in_16_bits(Q::kBits) : kGroups;
    SIROCCO_UNROLL
    for (int first = 0; first < kGroups; first += kFit) {
        __m256i pairs[M][2] = {};
        if constexpr (Unroll) {
            SIROCCO_UNROLL
            for (int g = first; g < first + kFit; ++g) add_group<Q, M>(weights, g, x, column, pairs);
        } else {
#pragma GCC unroll 1
            for (int g = first; g < first + kFit; ++g) add_group<Q, M>(weights, g, x, column, pairs);
        }
        SIROCCO_UNROLL
        for (int m = 0; m < M; ++m) {
            SIROCCO_UNROLL
            for (int h = 0; h < 2; ++h)
                dots[m][h] = _mm256_add_epi32(dots[m][h], _mm256_madd_epi16(pairs[m][h], _mm256_set1_epi16(1)));
        }
    }
}

// One sub-block, the `sub`th of its row, of M tokens: its dots, scaled, are added to the sums of its block.
template <typename Q, int M, bool Unroll, typename Weights>
SIROCCO_INLINE void add_sub(const ActLayout& layout, int64_t sub, Weights weights, const Floats* const* scale,
                            const Floats* const* minimum, const uint8_t* const* x, Sum (&sums)[M]) {
    __m256i dots[M][2] = {};
    if constexpr (Q::kOffsetBits >= 0 && Q::kBits < 8) {
        SIROCCO_UNROLL
        for (int m = 0; m < M; ++m)
            dots[m][0] = dots[m][1] = _mm256_slli_epi32(all_words(x[m] + layout.minus + sub * 4), Q::kOffsetBits);
    }
    add_dots<Q, M, Unroll>(weights, x, sub * Q::kSub, dots);
    const int64_t sum_at = (Q::kSub == 32 ? layout.sum32 : layout.sum16) + sub * 4;
    SIROCCO_UNROLL
    for (int m = 0; m < M; ++m) {
        SIROCCO_UNROLL
        for (int h = 0; h < 2; ++h) {
            const Floats value = Floats(_mm256_cvtepi32_ps(dots[m][h]));
            Floats& sum = sums[m].half[h];
            sum = Q::kBlock == Q::kSub ? value * *scale[h] : fma(value, *scale[h], sum);
            if constexpr (Q::kHasMinimum) sum = fma(*minimum[h], all_floats(x[m] + sum_at), sum);
        }
    }
}

template <int M>
SIROCCO_INLINE void add_block(const ActLayout& layout, int64_t block, const Sum (&sums)[M], const uint8_t* const* x, Sum* total) {
    SIROCCO_UNROLL
    for (int m = 0; m < M; ++m) {
        const Floats scale = all_floats(x[m] + layout.scale + block * 4);
        SIROCCO_UNROLL
        for (int h = 0; h < 2; ++h) total[m].half[h] = fma(sums[m].half[h], scale, total[m].half[h]);
    }
}

// The weights of 8 rows as add_group takes them: those of Q8_0 signed.
template <typename Q>
SIROCCO_INLINE Words weights_of(const uint8_t* words, int sub, int group) {
    const Words w = Q::weights(words, sub, group);
    return Q::kBits == 8 ? w ^ 0x80808080u : w;
}

// A tile times M tokens, straight from the packed words.
template <typename Q, int M>
SIROCCO_INLINE void multiply_packed(const MatmulJob& job, int64_t tile, const uint8_t* const* x, Sum (&total)[M]) {
    constexpr int kSubs = Q::kBlock / Q::kSub;
    const ActLayout layout = job.x.layout;
    const uint8_t* packed = job.weight.tile(tile);
    for (int64_t b = 0; b < job.weight.blocks; ++b) {
        const uint8_t *words = block_words<Q>(packed, b), *line = block_scales<Q>(packed, b);
        Scales scales[2];
        for (int h = 0; h < 2; ++h) Q::scales(words + 32 * h, line + 16 * h, scales[h]);
        Sum sums[M] = {};
        SIROCCO_UNROLL
        for (int sub = 0; sub < kSubs; ++sub) {
            const Floats* scale[2] = {&scales[0].scale[sub], &scales[1].scale[sub]};
            const Floats* minimum[2] = {&scales[0].minimum[sub], &scales[1].minimum[sub]};
            const auto weights = [&](int g, int h) __attribute__((always_inline)) { return weights_of<Q>(words + 32 * h, sub, g); };
            add_sub<Q, M, Q::kBlock == 32>(layout, b * kSubs + sub, weights, scale, minimum, x, sums);
        }
        add_block<M>(layout, b, sums, x, total);
    }
}

// A piece of a tile with its weights as bytes and its scales as floats: work that many tokens share.
template <typename Q>
struct Unpacked {
    static constexpr int kSubs = Q::kBlock / Q::kSub, kGroups = Q::kSub / 4, kBlocks = int(kPieceColumns) / Q::kBlock;
    uint8_t weights[kBlocks * kSubs][kGroups][64];
    Floats scale[kBlocks * kSubs][2], minimum[kBlocks * kSubs][2];

    void unpack(const uint8_t* tile, int64_t first, int64_t blocks) {
        for (int64_t b = 0; b < blocks; ++b) {
            const uint8_t *words = block_words<Q>(tile, first + b), *line = block_scales<Q>(tile, first + b);
            for (int h = 0; h < 2; ++h) {
                Scales scales;
                Q::scales(words + 32 * h, line + 16 * h, scales);
                SIROCCO_UNROLL
                for (int sub = 0; sub < kSubs; ++sub) {
                    SIROCCO_UNROLL
                    for (int g = 0; g < kGroups; ++g) {
                        const Words w = weights_of<Q>(words + 32 * h, sub, g);
                        std::memcpy(weights[b * kSubs + sub][g] + 32 * h, &w, 32);
                    }
                    scale[b * kSubs + sub][h] = scales.scale[sub];
                    if constexpr (Q::kHasMinimum) minimum[b * kSubs + sub][h] = scales.minimum[sub];
                }
            }
        }
    }

    // Adds the piece's products with M tokens; first: the row's block that the piece begins with.
    template <int M>
    SIROCCO_INLINE void multiply(const ActLayout& layout, int64_t first, int64_t blocks, const uint8_t* const* x, Sum* total) const {
        for (int64_t b = 0; b < blocks; ++b) {
            Sum sums[M] = {};
#pragma GCC unroll 1
            for (int64_t s = b * kSubs; s < (b + 1) * kSubs; ++s) {
                const Floats* scales[2] = {&scale[s][0], &scale[s][1]};
                const Floats* minimums[2] = {&minimum[s][0], &minimum[s][1]};
                const auto bytes = [&](int g, int h) __attribute__((always_inline)) { return load_words(weights[s][g] + 32 * h); };
                add_sub<Q, M, false>(layout, first * kSubs + s, bytes, scales, minimums, x, sums);
            }
            add_block<M>(layout, first + b, sums, x, total);
        }
    }
};

template <typename Q>
void multiply_few(const MatmulJob& job, int64_t tile, int64_t token_begin, int64_t token_end) {
    each_group<kTokens>(job, token_begin, token_end, [&](auto count, int64_t token, const uint8_t* const* x) {
        constexpr int M = decltype(count)::value;
        Sum total[M] = {};
        multiply_packed<Q, M>(job, tile, x, total);
        for (int m = 0; m < M; ++m) store_sum(job, tile, token + m, total[m]);
    });
}

// Piece by piece, between which the sums of all tokens wait in memory.
template <typename Q>
void multiply_many(const MatmulJob& job, int64_t tile, int64_t token_begin, int64_t token_end, Unpacked<Q>& piece, Sum* waiting) {
    const ActLayout layout = job.x.layout;
    const int64_t blocks = job.weight.blocks;
    for (int64_t t = 0; t < token_end - token_begin; ++t) waiting[t] = {};
    for (int64_t first = 0; first < blocks; first += piece.kBlocks) {
        const int64_t count = blocks - first < piece.kBlocks ? blocks - first : piece.kBlocks;
        piece.unpack(job.weight.tile(tile), first, count);
        each_group<kTokens>(job, token_begin, token_end, [&](auto tokens, int64_t token, const uint8_t* const* x) {
            constexpr int M = decltype(tokens)::value;
            Sum total[M];
            for (int m = 0; m < M; ++m) total[m] = waiting[token - token_begin + m];
            piece.template multiply<M>(layout, first, count, x, total);
            for (int m = 0; m < M; ++m) waiting[token - token_begin + m] = total[m];
        });
    }
    for (int64_t token = token_begin; token < token_end; ++token) store_sum(job, tile, token, waiting[token - token_begin]);
}

template <typename Q>
void multiply_q8(const MatmulJob& job, int64_t tile_begin, int64_t tile_end, int64_t token_begin, int64_t token_end) {
    if (token_end - token_begin <= kFewTokens) {
        for (int64_t tile = tile_begin; tile < tile_end; ++tile) multiply_few<Q>(job, tile, token_begin, token_end);
        return;
    }
    Unpacked<Q> piece;
    auto* waiting = reinterpret_cast<Sum*>(scratch(0, (token_end - token_begin) * kTileRows));
    for (int64_t tile = tile_begin; tile < tile_end; ++tile)
        multiply_many<Q>(job, tile, token_begin, token_end, piece, waiting);
}

}  // namespace

MatmulKernel q8_kernel(int type_id) {
    switch (type_id) {
        case Q4_0::kType: return multiply_q8<Q4_0>;
        case Q4_1::kType: return multiply_q8<Q4_1>;
        case Q5_0::kType: return multiply_q8<Q5_0>;
        case Q5_1::kType: return multiply_q8<Q5_1>;
        case Q8_0::kType: return multiply_q8<Q8_0>;
        case Q2_K::kType: return multiply_q8<Q2_K>;
        case Q3_K::kType: return multiply_q8<Q3_K>;
        case Q4_K::kType: return multiply_q8<Q4_K>;
        case Q5_K::kType: return multiply_q8<Q5_K>;
        case Q6_K::kType: return multiply_q8<Q6_K>;
        default: return nullptr;
    }
}

}  // namespace SIROCCO_ISA
