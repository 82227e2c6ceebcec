// What a block of each type means, on 16 rows at once: its weights as unsigned bytes, four neighbours to a word, and the
// float32 scales and minimums of its sub-blocks. weight = scale * (byte - offset) + minimum.
// Layout of the words: packed.h. Layout of the blocks: kernels/formats.py.
#pragma once
#include "half.h"
#include "packed.h"
#if defined(__SSE2__)
#include <immintrin.h>
#endif

// Left to itself the compiler calls these in the innermost loops, with vectors passed through memory.
#define SIROCCO_INLINE __attribute__((always_inline)) inline

namespace SIROCCO_ISA {

// A lane for each row of a tile. In a build for AVX2, whose registers are half as wide, for 8 rows: the same functions
// serve the other 8 with pointers half a vector further on.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int kRowLanes = 8;
#else
constexpr int kRowLanes = 16;
#endif
typedef uint32_t Words __attribute__((vector_size(kRowLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kRowLanes * 4)));
typedef float Floats __attribute__((vector_size(kRowLanes * 4)));

SIROCCO_INLINE static Words load_words(const uint8_t* p) {
    Words v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

SIROCCO_INLINE static Floats as_floats(Words bits) {
    Floats v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
}

SIROCCO_INLINE static Floats to_floats(Words small) { return __builtin_convertvector(Ints(small), Floats); }

// The float16 in neighbouring half words.
SIROCCO_INLINE static Floats load_halves(const uint8_t* p) {
#if defined(__AVX512F__)
    return Floats(_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__) && defined(__F16C__)
    return Floats(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
    Floats v;
    for (int r = 0; r < 16; ++r) v[r] = f16_to_f32(load_u16(p + 2 * r));
    return v;
#endif
}

// The float16 in the lower half of each word.
SIROCCO_INLINE static Floats low_halves(Words w) {
#if defined(__AVX512F__)
    return Floats(_mm512_maskz_cvtph_ps(0xffff, _mm512_maskz_cvtepi32_epi16(0xffff, __m512i(w))));
#elif defined(__AVX2__) && defined(__F16C__)
    const __m256i low = _mm256_and_si256(__m256i(w), _mm256_set1_epi32(0xffff));
    const __m256i halves = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 8);
    return Floats(_mm256_cvtph_ps(_mm256_castsi256_si128(halves)));
#else
    Floats v;
    for (int r = 0; r < 16; ++r) v[r] = f16_to_f32(uint16_t(w[r]));
    return v;
#endif
}

SIROCCO_INLINE static Floats high_halves(Words w) { return low_halves(w >> 16); }

SIROCCO_INLINE static Words nibbles(Words w, int shift) { return (w >> shift) & 0x0f0f0f0fu; }

// The bits of w from bit `from` on, moved to bit `to`, where `mask` keeps them: one shift, and the mask goes into the
// same instruction as the OR that follows.
SIROCCO_INLINE static Words moved(Words w, int from, int to, uint32_t mask) {
    return (from == to ? w : from > to ? w >> (from - to) : w << (to - from)) & mask;
}

// Word i of a block, of all rows: the types below say which words weights are in, and where from is the caller's choice.
struct InMemory {
    const uint8_t* words;
    SIROCCO_INLINE Words operator()(int i) const { return load_words(words + i * 64); }
};

// Scales and minimums of up to 16 sub-blocks, or of the one block of a type that has no sub-blocks.
struct Scales {
    Floats scale[16], minimum[16];
};

// Each type: kBlock weights of kBits bits a block in kBlock / kSub sub-blocks; weights(word, sub, g) gives weights 4g to
// 4g + 3 of a sub-block; kOffsetBits: log2 of the offset, -1 without one. kShared: so many neighbouring sub-blocks have all
// their weights in the same words, which are kSharedWords from shared_words(sub) on; 0 where that is not so.
struct Q4_0 {
    static constexpr int kType = 2, kBits = 4, kBlock = 32, kSub = 32, kWords = 4, kScales = 32, kOffsetBits = 3;
    static constexpr int kShared = 1, kSharedWords = 4;
    static constexpr int shared_words(int) { return 0; }
    static constexpr bool kHasMinimum = false;
    template <typename Word>
    SIROCCO_INLINE static Words weights(const Word& word, int, int g) { return nibbles(word(g & 3), g < 4 ? 0 : 4); }
    SIROCCO_INLINE static void scales(const uint8_t*, const uint8_t* line, Scales& s) { s.scale[0] = load_halves(line); }
};

struct Q4_1 {
    static constexpr int kType = 3, kBits = 4, kBlock = 32, kSub = 32, kWords = 5, kScales = 0, kOffsetBits = -1;
    static constexpr int kShared = 1, kSharedWords = 4;
    static constexpr int shared_words(int) { return 1; }
    static constexpr bool kHasMinimum = true;
    template <typename Word>
    SIROCCO_INLINE static Words weights(const Word& word, int, int g) {
        return nibbles(word(1 + (g & 3)), g < 4 ? 0 : 4);
    }
    SIROCCO_INLINE static void scales(const uint8_t* words, const uint8_t*, Scales& s) {
        const Words w = load_words(words);
        s.scale[0] = low_halves(w);
        s.minimum[0] = high_halves(w);
    }
};

// The high bits of Q5_0 and Q5_1 were spread while packing: bit g of byte b belongs to weight 4g + b.
SIROCCO_INLINE static Words fifth_bits(Words high, int g) { return moved(high, g, 4, 0x10101010u); }

struct Q5_0 {
    static constexpr int kType = 6, kBits = 5, kBlock = 32, kSub = 32, kWords = 5, kScales = 32, kOffsetBits = 4;
    static constexpr int kShared = 1, kSharedWords = 5;
    static constexpr int shared_words(int) { return 0; }
    static constexpr bool kHasMinimum = false;
    template <typename Word>
    SIROCCO_INLINE static Words weights(const Word& word, int, int g) {
        return nibbles(word(1 + (g & 3)), g < 4 ? 0 : 4) | fifth_bits(word(0), g);
    }
    SIROCCO_INLINE static void scales(const uint8_t*, const uint8_t* line, Scales& s) { s.scale[0] = load_halves(line); }
};

struct Q5_1 {
    static constexpr int kType = 7, kBits = 5, kBlock = 32, kSub = 32, kWords = 6, kScales = 0, kOffsetBits = -1;
    static constexpr int kShared = 1, kSharedWords = 5;
    static constexpr int shared_words(int) { return 1; }
    static constexpr bool kHasMinimum = true;
    template <typename Word>
    SIROCCO_INLINE static Words weights(const Word& word, int, int g) {
        return nibbles(word(2 + (g & 3)), g < 4 ? 0 : 4) | fifth_bits(word(1), g);
    }
    SIROCCO_INLINE static void scales(const uint8_t* words, const uint8_t* line, Scales& s) { Q4_1::scales(words, line, s); }
};

struct Q8_0 {
    static constexpr int kType = 8, kBits = 8, kBlock = 32, kSub = 32, kWords = 8, kScales = 32, kOffsetBits = 7, kShared = 0;
    static constexpr bool kHasMinimum = false;
    template <typename Word>
    SIROCCO_INLINE static Words weights(const Word& word, int, int g) { return word(g); }
    SIROCCO_INLINE static void scales(const uint8_t*, const uint8_t* line, Scales& s) { s.scale[0] = load_halves(line); }
};

// Blocks of 256 have integer scales. scale: of each sub-block. pairs: what the sums of the activations are
// multiplied with, as pairs of 16 bits for the sub-blocks 4i and 4i + 2, then 4i + 1 and 4i + 3: the minimums, or again the
// scales where an offset is taken from all weights. factor, minimum: the units of scales and minimums.
struct BlockScales {
    Ints scale[16];
    Words pairs[8];
    Floats factor, minimum;
};

typedef int16_t Shorts __attribute__((vector_size(kRowLanes * 4)));
typedef int8_t Bytes __attribute__((vector_size(kRowLanes * 4)));

// The scales of sub-blocks 4i to 4i + 3 from the bytes of a word, which may be negative.
SIROCCO_INLINE static void set_scales(BlockScales& s, int i, Words bytes) {
    for (int k = 0; k < 4; ++k) s.scale[4 * i + k] = Ints(bytes << (24 - 8 * k)) >> 24;
}

// The same for their pairs.
SIROCCO_INLINE static void set_pairs(BlockScales& s, int i, Words bytes) {
    s.pairs[2 * i] = Words((Shorts(bytes) << 8) >> 8);
    s.pairs[2 * i + 1] = Words(Shorts(bytes) >> 8);
}

// The scales and minimums of a block of any type as float32, multiplied out.
template <typename Q>
SIROCCO_INLINE static void float_scales(const uint8_t* words, const uint8_t* line, Scales& out) {
    if constexpr (Q::kBlock < 256) {
        Q::scales(words, line, out);
    } else {
        BlockScales s;
        Q::scales(words, line, s);
        for (int sub = 0; sub < Q::kBlock / Q::kSub; ++sub) {
            out.scale[sub] = s.factor * __builtin_convertvector(s.scale[sub], Floats);
            if constexpr (!Q::kHasMinimum) continue;
            const Words pair = s.pairs[sub / 4 * 2 + (sub & 1)];
            out.minimum[sub] = s.minimum * __builtin_convertvector(Ints(sub & 2 ? pair : pair << 16) >> 16, Floats);
        }
    }
}

struct Q2_K {
    static constexpr int kType = 10, kBits = 2, kBlock = 256, kSub = 16, kWords = 21, kScales = 0, kOffsetBits = -1, kShared = 0;
    static constexpr bool kHasMinimum = true;
    template <typename Word>
    SIROCCO_INLINE static Words weights(const Word& word, int sub, int g) {
        const Words w = word(4 + 8 * (sub / 8) + 4 * (sub & 1) + g);
        return (w >> (sub & 6)) & 0x03030303u;
    }
    SIROCCO_INLINE static void scales(const uint8_t* words, const uint8_t*, BlockScales& s) {
        const Words d = load_words(words + 20 * 64);
        s.factor = low_halves(d), s.minimum = -high_halves(d);
        for (int i = 0; i < 4; ++i) {
            const Words w = load_words(words + i * 64);
            set_scales(s, i, nibbles(w, 0));
            set_pairs(s, i, nibbles(w, 4));
        }
    }
};

struct Q3_K {
    static constexpr int kType = 11, kBits = 3, kBlock = 256, kSub = 16, kWords = 27, kScales = 32, kOffsetBits = 2, kShared = 0;
    static constexpr bool kHasMinimum = false;
    template <typename Word>
    SIROCCO_INLINE static Words weights(const Word& word, int sub, int g) {
        const Words low = word(sub / 8 ? 19 + 4 * (sub & 1) + g : 3 + 8 * (sub & 1) + 2 * g);
        const Words high = word(4 + 8 * (sub & 1) + 2 * g);
        return ((low >> (sub & 6)) & 0x03030303u) | moved(high, sub / 2, 2, 0x04040404u);
    }
    SIROCCO_INLINE static void scales(const uint8_t* words, const uint8_t* line, BlockScales& s) {
        s.factor = load_halves(line);
        const Words high = load_words(words + 2 * 64);
        for (int i = 0; i < 4; ++i) {
            const Words six = nibbles(load_words(words + (i & 1) * 64), 4 * (i / 2)) | moved(high, 2 * i, 4, 0x30303030u);
            const auto bytes = Words(Bytes(six) - int8_t(32));
            set_scales(s, i, bytes);
            set_pairs(s, i, bytes);
        }
    }
};

// The 6-bit scales and minimums of Q4_K and Q5_K, eight of each in words 1 to 3 after the two float16 in word 0.
SIROCCO_INLINE static void six_bit_scales(const uint8_t* words, BlockScales& s) {
    const Words d = load_words(words), a = load_words(words + 64), b = load_words(words + 128), c = load_words(words + 192);
    s.factor = low_halves(d), s.minimum = -high_halves(d);
    set_scales(s, 0, a & 0x3f3f3f3fu);
    set_scales(s, 1, nibbles(c, 0) | moved(a, 6, 4, 0x30303030u));
    set_pairs(s, 0, b & 0x3f3f3f3fu);
    set_pairs(s, 1, nibbles(c, 4) | moved(b, 6, 4, 0x30303030u));
}

struct Q4_K {
    static constexpr int kType = 12, kBits = 4, kBlock = 256, kSub = 32, kWords = 36, kScales = 0, kOffsetBits = -1;
    static constexpr int kShared = 2, kSharedWords = 8;
    static constexpr int shared_words(int sub) { return 4 + 8 * (sub / 2); }
    static constexpr bool kHasMinimum = true;
    template <typename Word>
    SIROCCO_INLINE static Words weights(const Word& word, int sub, int g) {
        return nibbles(word(shared_words(sub) + g), 4 * (sub & 1));
    }
    SIROCCO_INLINE static void scales(const uint8_t* words, const uint8_t*, BlockScales& s) { six_bit_scales(words, s); }
};

struct Q5_K {
    static constexpr int kType = 13, kBits = 5, kBlock = 256, kSub = 32, kWords = 44, kScales = 0, kOffsetBits = -1, kShared = 0;
    static constexpr bool kHasMinimum = true;
    template <typename Word>
    SIROCCO_INLINE static Words weights(const Word& word, int sub, int g) {
        const Words high = word(4 + g);
        return nibbles(word(12 + 8 * (sub / 2) + g), 4 * (sub & 1)) | moved(high, sub, 4, 0x10101010u);
    }
    SIROCCO_INLINE static void scales(const uint8_t* words, const uint8_t*, BlockScales& s) { six_bit_scales(words, s); }
};

// While packing, the 16 weights of a sub-block were put into three words: weights 0 to 11 in the lower six bits of their
// bytes, and of weights 12 to 15 two bits in the upper two of each word.
struct Q6_K {
    static constexpr int kType = 14, kBits = 6, kBlock = 256, kSub = 16, kWords = 52, kScales = 32, kOffsetBits = 5;
    static constexpr int kShared = 1, kSharedWords = 3;
    static constexpr int shared_words(int sub) { return 4 + 3 * sub; }
    static constexpr bool kHasMinimum = false;
    template <typename Word>
    SIROCCO_INLINE static Words weights(const Word& word, int sub, int g) {
        const int first = shared_words(sub);
        if (g < 3) return word(first + g) & 0x3f3f3f3fu;
        return moved(word(first), 6, 0, 0x03030303u) | moved(word(first + 1), 4, 0, 0x0c0c0c0cu) | moved(word(first + 2), 2, 0, 0x30303030u);
    }
    SIROCCO_INLINE static void scales(const uint8_t* words, const uint8_t* line, BlockScales& s) {
        s.factor = load_halves(line);
        for (int i = 0; i < 4; ++i) {
            const Words bytes = load_words(words + i * 64);
            set_scales(s, i, bytes);
            set_pairs(s, i, bytes);
        }
    }
};

// Where block b of a tile has its words and (kScales) its 16 scales: TypeLayout's rule with the type known.
template <typename Q>
SIROCCO_INLINE static const uint8_t* block_words(const uint8_t* tile, int64_t b) {
    return tile + b * Q::kWords * 64 + (Q::kScales ? (b / 2 + 1) * 64 : 0);
}

template <typename Q>
SIROCCO_INLINE static const uint8_t* block_scales(const uint8_t* tile, int64_t b) {
    return tile + (b / 2) * (1 + 2 * Q::kWords) * 64 + (b & 1) * Q::kScales;
}

}  // namespace SIROCCO_ISA
