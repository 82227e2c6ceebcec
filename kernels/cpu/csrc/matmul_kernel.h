// The products of one tile of rows with a few tokens, written for any instruction set: what differs is dot4 and the
// dense kernels' loads. Each (token, row) sum is formed by the same operations in the same order whatever the number of
// tokens, so a token's result does not depend on its neighbours.
#pragma once
#include "block_types.h"
#include "matmul.h"

namespace SIROCCO_ISA {

#if defined(__AVX512VNNI__)
constexpr int kTokens = 8;  // that the registers hold sums for
#define SIROCCO_UNROLL _Pragma("GCC unroll 16")

// sum + the four products of unsigned bytes w with the four signed bytes at x.
SIROCCO_INLINE static Ints dot4(Ints sum, Words w, const uint8_t* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    return Ints(_mm512_dpbusd_epi32(__m512i(sum), __m512i(w), _mm512_set1_epi32(four)));
}
// sum + the two products of 16-bit numbers in w with those at x.
SIROCCO_INLINE static Ints dot2(Ints sum, Words w, const uint8_t* x) {
    int32_t two;
    std::memcpy(&two, x, 4);
    return Ints(_mm512_dpwssd_epi32(__m512i(sum), __m512i(w), _mm512_set1_epi32(two)));
}
SIROCCO_INLINE static Floats fma(Floats a, Floats b, Floats c) { return Floats(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c))); }
#else
constexpr int kTokens = 1;
#define SIROCCO_UNROLL

SIROCCO_INLINE static Ints dot4(Ints sum, Words w, const uint8_t* x) {
    for (int i = 0; i < 4; ++i) sum += Ints((w >> (8 * i)) & 0xffu) * int32_t(int8_t(x[i]));
    return sum;
}
SIROCCO_INLINE static Ints dot2(Ints sum, Words w, const uint8_t* x) {
    int16_t two[2];
    std::memcpy(two, x, 4);
    return sum + (Ints(w << 16) >> 16) * int32_t(two[0]) + (Ints(w) >> 16) * int32_t(two[1]);
}
SIROCCO_INLINE static Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }
#endif

SIROCCO_INLINE static float load_float(const uint8_t* p) {
    float v;
    std::memcpy(&v, p, 4);
    return v;
}

SIROCCO_INLINE static int32_t load_int(const uint8_t* p) {
    int32_t v;
    std::memcpy(&v, p, 4);
    return v;
}

SIROCCO_INLINE static Floats all(float v) { return Floats{} + v; }

// With one or two tokens, hardware asks for the weights in time. With more it falls behind, and the kernels ask by
// themselves: for the second-level cache, since asking for the first would wait for its few buffers. Every line must be
// asked for: one that is not, in a kilobyte, costs the time of a whole memory access and halves the speed.
constexpr int64_t kAhead = 8 << 10;  // bytes

// Whether M tokens need it; measured.
template <int M>
constexpr bool kAsks = M >= 3;

// Asks for part `part` of `parts` of the lines from p + kAhead on.
SIROCCO_INLINE static void ask_ahead(const uint8_t* p, int lines, int part, int parts) {
    SIROCCO_UNROLL
    for (int i = lines * part / parts; i < lines * (part + 1) / parts; ++i) __builtin_prefetch(p + kAhead + i * 64, 0, 2);
}

#if defined(__AVX512F__)
// Makes the compiler have all of the words in registers at once. Left to itself it reads them again where they are used.
SIROCCO_INLINE static void pin(Words (&w)[3]) { asm volatile("" : "+v"(w[0]), "+v"(w[1]), "+v"(w[2])); }
SIROCCO_INLINE static void pin(Words (&w)[4]) { asm volatile("" : "+v"(w[0]), "+v"(w[1]), "+v"(w[2]), "+v"(w[3])); }
SIROCCO_INLINE static void pin(Words (&w)[5]) { asm volatile("" : "+v"(w[0]), "+v"(w[1]), "+v"(w[2]), "+v"(w[3]), "+v"(w[4])); }
SIROCCO_INLINE static void pin(Words (&w)[8]) {
    asm volatile("" : "+v"(w[0]), "+v"(w[1]), "+v"(w[2]), "+v"(w[3]), "+v"(w[4]), "+v"(w[5]), "+v"(w[6]), "+v"(w[7]));
}
#else
template <int N>
SIROCCO_INLINE static void pin(Words (&)[N]) {}
#endif

// Reads words that several weights share, once: a line that the kernel comes back to disturbs the hardware that reads
// ahead, which costs up to a third of the speed.
template <typename Q>
SIROCCO_INLINE static void load_shared(const uint8_t* words, int sub, Words (&kept)[Q::kSharedWords]) {
    SIROCCO_UNROLL
    for (int i = 0; i < Q::kSharedWords; ++i) kept[i] = load_words(words + (Q::shared_words(sub) + i) * 64);
    pin(kept);
}

// Whether M tokens leave registers for that, and need it.
template <typename Q, int M>
constexpr bool kKeeps = kTokens > 1 && (Q::kShared == 1 || (Q::kShared > 1 && M > 2));

// The products of sub-block `sub` of a block with M tokens, added to dots. column: the sub-block's first.
template <typename Q, int M, typename Word>
SIROCCO_INLINE static void add_dots(const Word& word, int sub, const uint8_t* const* x, int64_t column, Ints (&dots)[M]) {
    // Tokens are the inner loop: each sum waits for its last product while the others take their turns.
    SIROCCO_UNROLL
    for (int g = 0; g < Q::kSub / 4; ++g) {
        const Words w = Q::weights(word, sub, g);
        SIROCCO_UNROLL
        for (int m = 0; m < M; ++m) dots[m] = dot4(dots[m], w, x[m] + column + 4 * g);
    }
}

// Blocks of 32: one scale each.
template <typename Q, int M>
SIROCCO_INLINE static void multiply_q8_32(const MatmulJob& job, const uint8_t* tile, const uint8_t* const* x, Floats* acc) {
    const ActLayout& layout = job.x.layout;
    const int64_t scale_at = layout.scale, sum_at = layout.sum32, minus_at = layout.minus;
    for (int64_t b = 0; b < job.weight.blocks; ++b) {
        const uint8_t *words = block_words<Q>(tile, b), *line = block_scales<Q>(tile, b);
        if constexpr (kAsks<M> && Q::kScales) ask_ahead(line, 1, 0, 1);
        if constexpr (kAsks<M>) ask_ahead(words, Q::kWords, 0, 1);
        Scales scales;
        Q::scales(words, line, scales);
        Ints dots[M];
        SIROCCO_UNROLL
        for (int m = 0; m < M; ++m) {
            dots[m] = Ints{};
            if constexpr (Q::kOffsetBits >= 0) dots[m] = (Ints{} + load_int(x[m] + minus_at + b * 4)) << Q::kOffsetBits;
        }
        if constexpr (kKeeps<Q, M>) {
            Words kept[Q::kSharedWords];
            load_shared<Q>(words, 0, kept);
            const auto word = [&](int i) __attribute__((always_inline)) { return kept[i - Q::shared_words(0)]; };
            add_dots<Q, M>(word, 0, x, b * Q::kBlock, dots);
        } else {
            add_dots<Q, M>(InMemory{words}, 0, x, b * Q::kBlock, dots);
        }
        SIROCCO_UNROLL
        for (int m = 0; m < M; ++m) {
            Floats sum = __builtin_convertvector(dots[m], Floats) * scales.scale[0];
            if constexpr (Q::kHasMinimum) sum = fma(scales.minimum[0], all(load_float(x[m] + sum_at + b * 4)), sum);
            acc[m] = fma(sum, all(load_float(x[m] + scale_at + b * 4)), acc[m]);
        }
    }
}

// Blocks of 256: dots times integer scales are summed up before the units of the block and of the activations come in.
template <typename Q, int M>
SIROCCO_INLINE static void multiply_q8_256(const MatmulJob& job, const uint8_t* tile, const uint8_t* const* x, Floats* acc) {
    constexpr int kSubs = Q::kBlock / Q::kSub, kTogether = kKeeps<Q, M> ? Q::kShared : 1;
    const ActLayout& layout = job.x.layout;
    const int64_t scale_at = layout.scale, sums_at = Q::kSub == 32 ? layout.sum32 : layout.sum16;
    for (int64_t b = 0; b < job.weight.blocks; ++b) {
        const uint8_t *words = block_words<Q>(tile, b), *line = block_scales<Q>(tile, b);
        if constexpr (kAsks<M> && Q::kScales) ask_ahead(line, 1, 0, 1);
        BlockScales scales;
        Q::scales(words, line, scales);
        Floats sums[M];
        for (int m = 0; m < M; ++m) sums[m] = Floats{};
        const auto add = [&](const auto& word, int sub) __attribute__((always_inline)) {
            Ints dots[M];
            for (int m = 0; m < M; ++m) dots[m] = Ints{};
            add_dots<Q, M>(word, sub, x, b * Q::kBlock + sub * Q::kSub, dots);
            SIROCCO_UNROLL
            for (int m = 0; m < M; ++m) sums[m] = fma(__builtin_convertvector(dots[m], Floats), __builtin_convertvector(scales.scale[sub], Floats), sums[m]);
        };
        SIROCCO_UNROLL
        for (int sub = 0; sub < kSubs; sub += kTogether) {
            if constexpr (kAsks<M>) ask_ahead(words, Q::kWords, sub / kTogether, kSubs / kTogether);
            if constexpr (kKeeps<Q, M>) {
                Words kept[Q::kSharedWords];
                load_shared<Q>(words, sub, kept);
                const auto word = [&](int i) __attribute__((always_inline)) { return kept[i - Q::shared_words(sub)]; };
                SIROCCO_UNROLL
                for (int i = 0; i < kTogether; ++i) add(word, sub + i);
            } else {
                add(InMemory{words}, sub);
            }
        }
        SIROCCO_UNROLL
        for (int m = 0; m < M; ++m) {
            Ints side{};
            SIROCCO_UNROLL
            for (int i = 0; i < kSubs / 2; ++i) side = dot2(side, scales.pairs[i], x[m] + sums_at + (b * kSubs + 2 * i) * 2);
            const Floats from_sums = __builtin_convertvector(side, Floats), scale = all(load_float(x[m] + scale_at + b * 4));
            if constexpr (Q::kOffsetBits >= 0) sums[m] = sums[m] - from_sums * float(1 << Q::kOffsetBits);
            acc[m] = fma(sums[m], scales.factor * scale, acc[m]);
            if constexpr (Q::kHasMinimum) acc[m] = fma(from_sums, scales.minimum * scale, acc[m]);
        }
    }
}

template <typename Q, int M>
SIROCCO_INLINE static void multiply_q8(const MatmulJob& job, const uint8_t* tile, const uint8_t* const* x, Floats* acc) {
    if constexpr (Q::kBlock == 256) multiply_q8_256<Q, M>(job, tile, x, acc);
    else multiply_q8_32<Q, M>(job, tile, x, acc);
}

// The same weights as exact float32, times float32 activations.
template <typename Q, int M>
SIROCCO_INLINE static void multiply_exact(const MatmulJob& job, const uint8_t* tile, const uint8_t* const* x, Floats* acc) {
    constexpr int kSubs = Q::kBlock / Q::kSub, kGroups = Q::kSub / 4;
    for (int64_t b = 0; b < job.weight.blocks; ++b) {
        const uint8_t* words = block_words<Q>(tile, b);
        Scales scales;
        float_scales<Q>(words, block_scales<Q>(tile, b), scales);
        for (int sub = 0; sub < kSubs; ++sub) {
            for (int g = 0; g < kGroups; ++g) {
                const Words w = Q::weights(InMemory{words}, sub, g);
                const int64_t at = (b * Q::kBlock + sub * Q::kSub + 4 * g) * 4;
        SIROCCO_UNROLL
                for (int i = 0; i < 4; ++i) {
                    Ints number = Ints((w >> (8 * i)) & 0xffu);
                    if constexpr (Q::kOffsetBits >= 0) number -= 1 << Q::kOffsetBits;
                    Floats value = scales.scale[sub] * __builtin_convertvector(number, Floats);
                    if constexpr (Q::kHasMinimum) value = value + scales.minimum[sub];
        SIROCCO_UNROLL
                    for (int m = 0; m < M; ++m) acc[m] = fma(value, all(load_float(x[m] + at + 4 * i)), acc[m]);
                }
            }
        }
    }
}

// Words of one float32 or of two 16-bit floats, times float32 activations.
template <int Type, int M>
SIROCCO_INLINE static void multiply_dense(const MatmulJob& job, const uint8_t* words, const uint8_t* const* x, Floats* acc) {
    for (int64_t b = 0; b < job.weight.blocks; ++b, words += 64) {
        const Words w = load_words(words);
        if constexpr (Type == 0) {
        SIROCCO_UNROLL
            for (int m = 0; m < M; ++m) acc[m] = fma(as_floats(w), all(load_float(x[m] + b * 4)), acc[m]);
        } else {
            const Floats first = Type == 1 ? low_halves(w) : as_floats(w << 16);
            const Floats second = Type == 1 ? high_halves(w) : as_floats(w & 0xffff0000u);
        SIROCCO_UNROLL
            for (int m = 0; m < M; ++m) {
                acc[m] = fma(first, all(load_float(x[m] + b * 8)), acc[m]);
                acc[m] = fma(second, all(load_float(x[m] + b * 8 + 4)), acc[m]);
            }
        }
    }
}

// bfloat16 weights and activations, each widened.
template <int M>
SIROCCO_INLINE static void multiply_bf16(const MatmulJob& job, const uint8_t* words, const uint8_t* const* x, Floats* acc) {
    for (int64_t b = 0; b < job.weight.blocks; ++b, words += 64) {
        const Words w = load_words(words);
        const Floats first = as_floats(w << 16), second = as_floats(w & 0xffff0000u);
        SIROCCO_UNROLL
        for (int m = 0; m < M; ++m) {
            acc[m] = fma(first, all(bf16_to_f32(load_u16(x[m] + b * 4))), acc[m]);
            acc[m] = fma(second, all(bf16_to_f32(load_u16(x[m] + b * 4 + 2))), acc[m]);
        }
    }
}

// Sixteen sums of each token to their places.
template <int M>
SIROCCO_INLINE static void store_sums(const MatmulJob& job, int64_t tile, int64_t token, const Floats* acc) {
    const int64_t row = tile * kTileRows, rows = job.weight.rows - row;
    for (int m = 0; m < M; ++m) {
        float* out = job.out + (token + m) * job.out_stride + row;
        Floats y = acc[m];
        if (rows >= kTileRows) {
            if (job.bias) {
                Floats bias;
                std::memcpy(&bias, job.bias + row, sizeof bias);
                y += bias;
            }
            std::memcpy(out, &y, sizeof y);
        } else {
            for (int64_t r = 0; r < rows; ++r) out[r] = job.bias ? y[r] + job.bias[row + r] : y[r];
        }
    }
}

// One tile, M tokens. Body: void(const uint8_t* tile, const uint8_t* const* x, Floats* acc).
template <int M, typename Body>
SIROCCO_INLINE static void multiply_tile(const MatmulJob& job, int64_t tile, int64_t token, Body body) {
    const uint8_t* x[M];
    Floats acc[M];
    for (int m = 0; m < M; ++m) {
        x[m] = job.x.row(token + m);
        acc[m] = Floats{};
    }
    body(job.weight.tile(tile), x, acc);
    store_sums<M>(job, tile, token, acc);
}

// The last tokens, fewer than a group.
template <template <int> typename Kernel, int M>
SIROCCO_INLINE static void multiply_rest(const MatmulJob& job, int64_t tile, int64_t token, int64_t count) {
    if constexpr (M > 0) {
        if (count == M) return Kernel<M>::run(job, tile, token);
        multiply_rest<Kernel, M - 1>(job, tile, token, count);
    }
}

// All tokens of a range in groups that fit the registers; a tile's weights stay in the cache while groups go by.
template <template <int> typename Kernel>
static void multiply_all(const MatmulJob& job, int64_t tile_begin, int64_t tile_end, int64_t token_begin, int64_t token_end) {
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
        int64_t token = token_begin;
        for (; token + kTokens <= token_end; token += kTokens) Kernel<kTokens>::run(job, tile, token);
        multiply_rest<Kernel, kTokens - 1>(job, tile, token, token_end - token);
    }
}

template <typename Q>
struct Packed {
    template <int M>
    struct Q8 {
        static void run(const MatmulJob& job, int64_t tile, int64_t token) {
            multiply_tile<M>(job, tile, token, [&](auto words, auto x, auto acc) { multiply_q8<Q, M>(job, words, x, acc); });
        }
    };
    template <int M>
    struct Exact {
        static void run(const MatmulJob& job, int64_t tile, int64_t token) {
            multiply_tile<M>(job, tile, token, [&](auto words, auto x, auto acc) { multiply_exact<Q, M>(job, words, x, acc); });
        }
    };
};

template <int Type>
struct Dense {
    template <int M>
    struct Exact {
        static void run(const MatmulJob& job, int64_t tile, int64_t token) {
            multiply_tile<M>(job, tile, token, [&](auto words, auto x, auto acc) { multiply_dense<Type, M>(job, words, x, acc); });
        }
    };
};

struct Bf16Pairs {
    template <int M>
    struct Kernel {
        static void run(const MatmulJob& job, int64_t tile, int64_t token) {
            multiply_tile<M>(job, tile, token, [&](auto words, auto x, auto acc) { multiply_bf16<M>(job, words, x, acc); });
        }
    };
};

}  // namespace SIROCCO_ISA
