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

// The weights of 8 rows as add_group takes them: those of Q8_0 signed.
template <typename Q>
SIROCCO_INLINE Words weights_of(const uint8_t* words, int sub, int group) {
    const Words w = Q::weights(InMemory{words}, sub, group);
    return Q::kBits == 8 ? w ^ 0x80808080u : w;
}

// The scales of a block for 16 rows. Blocks of 32 have one scale and perhaps a minimum.
template <typename Q>
struct RowScales {
    Floats scale[2], minimum[2];

    SIROCCO_INLINE void load(const uint8_t* words, const uint8_t* line) {
        for (int h = 0; h < 2; ++h) {
            Scales scales;
            Q::scales(words + 32 * h, line + 16 * h, scales);
            scale[h] = scales.scale[0];
            if constexpr (Q::kHasMinimum) minimum[h] = scales.minimum[0];
        }
    }
};

template <typename Q>
    requires(Q::kBlock == 256)
struct RowScales<Q> {
    BlockScales half[2];

    SIROCCO_INLINE void load(const uint8_t* words, const uint8_t* line) {
        for (int h = 0; h < 2; ++h) Q::scales(words + 32 * h, line + 16 * h, half[h]);
    }
};

// A block of 32, the `block`th of its row, times M tokens. weights(group, half)
template <typename Q, int M, bool Unroll, typename Weights>
SIROCCO_INLINE void add_small_block(const ActLayout& layout, int64_t block, Weights weights, const RowScales<Q>& scales,
                                    const uint8_t* const* x, Sum* total) {
    __m256i dots[M][2] = {};
    if constexpr (Q::kOffsetBits >= 0 && Q::kBits < 8) {
        SIROCCO_UNROLL
        for (int m = 0; m < M; ++m)
            dots[m][0] = dots[m][1] = _mm256_slli_epi32(all_words(x[m] + layout.minus + block * 4), Q::kOffsetBits);
    }
    add_dots<Q, M, Unroll>(weights, x, block * Q::kBlock, dots);
    SIROCCO_UNROLL
    for (int m = 0; m < M; ++m) {
        const Floats act_scale = all_floats(x[m] + layout.scale + block * 4);
        SIROCCO_UNROLL
        for (int h = 0; h < 2; ++h) {
            Floats sum = Floats(_mm256_cvtepi32_ps(dots[m][h])) * scales.scale[h];
            if constexpr (Q::kHasMinimum) sum = fma(scales.minimum[h], all_floats(x[m] + layout.sum32 + block * 4), sum);
            total[m].half[h] = fma(sum, act_scale, total[m].half[h]);
        }
    }
}

// A sub-block of 256, the `sub`th of its row, the one with index `index` of its block: its dots, times its scale, are added to the sums of its block.
template <typename Q, int M, bool Unroll, typename Weights>
SIROCCO_INLINE void add_sub(int64_t sub, Weights weights, const RowScales<Q>& scales, int index, const uint8_t* const* x, Sum (&sums)[M]) {
    __m256i dots[M][2] = {};
    add_dots<Q, M, Unroll>(weights, x, sub * Q::kSub, dots);
    Floats scale[2];
    for (int h = 0; h < 2; ++h) scale[h] = __builtin_convertvector(scales.half[h].scale[index], Floats);
    SIROCCO_UNROLL
    for (int m = 0; m < M; ++m) {
        SIROCCO_UNROLL
        for (int h = 0; h < 2; ++h) sums[m].half[h] = fma(Floats(_mm256_cvtepi32_ps(dots[m][h])), scale[h], sums[m].half[h]);
    }
}

// What becomes of the sums of a block of 256 when all its sub-blocks are in them.
template <typename Q, int M>
SIROCCO_INLINE void add_sums(const ActLayout& layout, int64_t block, const RowScales<Q>& scales, const uint8_t* const* x,
                             const Sum (&sums)[M], Sum* total) {
    constexpr int kSubs = Q::kBlock / Q::kSub;
    const int64_t sums_at = (Q::kSub == 32 ? layout.sum32 : layout.sum16) + block * kSubs * 2;
    SIROCCO_UNROLL
    for (int m = 0; m < M; ++m) {
        const Floats act_scale = all_floats(x[m] + layout.scale + block * 4);
        SIROCCO_UNROLL
        for (int h = 0; h < 2; ++h) {
            const BlockScales& s = scales.half[h];
            __m256i side = _mm256_setzero_si256();
            SIROCCO_UNROLL
            for (int i = 0; i < kSubs / 2; ++i)
                side = _mm256_add_epi32(side, _mm256_madd_epi16(__m256i(s.pairs[i]), all_words(x[m] + sums_at + i * 4)));
            const Floats from_sums = Floats(_mm256_cvtepi32_ps(side));
            Floats sum = sums[m].half[h];
            if constexpr (Q::kOffsetBits >= 0) sum = sum - from_sums * float(1 << Q::kOffsetBits);
            Floats& out = total[m].half[h];
            out = fma(sum, s.factor * act_scale, out);
            if constexpr (Q::kHasMinimum) out = fma(from_sums, s.minimum * act_scale, out);
        }
    }
}

// The `block`th block of a row times M tokens. weights(sub, group, half)
template <typename Q, int M, bool Unroll, typename Weights>
SIROCCO_INLINE void add_block(const ActLayout& layout, int64_t block, Weights weights, const RowScales<Q>& scales,
                              const uint8_t* const* x, Sum* total) {
    if constexpr (Q::kBlock == 256) {
        constexpr int kSubs = Q::kBlock / Q::kSub;
        Sum sums[M] = {};
        const auto add = [&](int sub) __attribute__((always_inline)) {
            const auto of_sub = [&](int g, int h) __attribute__((always_inline)) { return weights(sub, g, h); };
            add_sub<Q, M, Unroll && Q::kSub == 16>(block * kSubs + sub, of_sub, scales, sub, x, sums);
        };
        if constexpr (Unroll) {
            SIROCCO_UNROLL
            for (int sub = 0; sub < kSubs; ++sub) add(sub);
        } else {
#pragma GCC unroll 1
            for (int sub = 0; sub < kSubs; ++sub) add(sub);
        }
        add_sums<Q, M>(layout, block, scales, x, sums, total);
    } else {
        const auto of_block = [&](int g, int h) __attribute__((always_inline)) { return weights(0, g, h); };
        add_small_block<Q, M, Unroll>(layout, block, of_block, scales, x, total);
    }
}

// A tile times M tokens, straight from the packed words.
template <typename Q, int M>
SIROCCO_INLINE void multiply_packed(const MatmulJob& job, int64_t tile, const uint8_t* const* x, Sum (&total)[M]) {
    const ActLayout layout = job.x.layout;
    const uint8_t* packed = job.weight.tile(tile);
    for (int64_t b = 0; b < job.weight.blocks; ++b) {
        const uint8_t* words = block_words<Q>(packed, b);
        RowScales<Q> scales;
        scales.load(words, block_scales<Q>(packed, b));
        const auto weights = [&](int sub, int g, int h) __attribute__((always_inline)) { return weights_of<Q>(words + 32 * h, sub, g); };
        add_block<Q, M, true>(layout, b, weights, scales, x, total);
    }
}

// A piece of a tile with its weights as bytes and its scales as they are used: work that many tokens share.
template <typename Q>
struct Unpacked {
    static constexpr int kSubs = Q::kBlock / Q::kSub, kGroups = Q::kSub / 4, kBlocks = int(kPieceColumns) / Q::kBlock;
    uint8_t weights[kBlocks][kSubs][kGroups][64];
    RowScales<Q> scales[kBlocks];

    void unpack(const uint8_t* tile, int64_t first, int64_t blocks) {
        for (int64_t b = 0; b < blocks; ++b) {
            const uint8_t* words = block_words<Q>(tile, first + b);
            scales[b].load(words, block_scales<Q>(tile, first + b));
            for (int h = 0; h < 2; ++h) {
                SIROCCO_UNROLL
                for (int sub = 0; sub < kSubs; ++sub) {
                    SIROCCO_UNROLL
                    for (int g = 0; g < kGroups; ++g) {
                        const Words w = weights_of<Q>(words + 32 * h, sub, g);
                        std::memcpy(weights[b][sub][g] + 32 * h, &w, 32);
                    }
                }
            }
        }
    }

    // Adds the piece's products with M tokens; first: the row's block that the piece begins with.
    template <int M>
    SIROCCO_INLINE void multiply(const ActLayout& layout, int64_t first, int64_t blocks, const uint8_t* const* x, Sum* total) const {
        for (int64_t b = 0; b < blocks; ++b) {
            const auto bytes = [&](int sub, int g, int h) __attribute__((always_inline)) { return load_words(weights[b][sub][g] + 32 * h); };
            add_block<Q, M, false>(layout, first + b, bytes, scales[b], x, total);
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
