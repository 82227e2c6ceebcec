#include "packed.h"

#include <array>
#include <cstring>

namespace {

constexpr TypeLayout kLayouts[] = {
    // id, length, bytes, words, scale bytes, scale offset, activations
    {0, 1, 4, 1, 0, 0, Act::f32},         // F32
    {1, 2, 4, 1, 0, 0, Act::f32},         // F16: two weights to a word
    {30, 2, 4, 1, 0, 0, Act::bf16},       // BF16
    {2, 32, 18, 4, 2, 0, Act::q8_32},     // Q4_0
    {3, 32, 20, 5, 0, 0, Act::q8_32},     // Q4_1
    {6, 32, 22, 5, 2, 0, Act::q8_32},     // Q5_0
    {7, 32, 24, 6, 0, 0, Act::q8_32},     // Q5_1
    {8, 32, 34, 8, 2, 0, Act::q8_32},     // Q8_0
    {10, 256, 84, 21, 0, 0, Act::q8_256},   // Q2_K
    {11, 256, 110, 27, 2, 108, Act::q8_256},  // Q3_K
    {12, 256, 144, 36, 0, 0, Act::q8_256},    // Q4_K
    {13, 256, 176, 44, 0, 0, Act::q8_256},    // Q5_K
    {14, 256, 210, 52, 2, 208, Act::q8_256},  // Q6_K
    // Decoded tile by tile.
    {16, 256, 66, 16, 2, 0, Act::f32},    // IQ2_XXS
    {17, 256, 74, 18, 2, 0, Act::f32},    // IQ2_XS
    {18, 256, 98, 24, 2, 0, Act::f32},    // IQ3_XXS
    {19, 256, 50, 12, 2, 0, Act::f32},    // IQ1_S
    {20, 32, 18, 4, 2, 0, Act::f32},      // IQ4_NL
    {21, 256, 110, 27, 2, 0, Act::f32},   // IQ3_S
    {22, 256, 82, 20, 2, 0, Act::f32},    // IQ2_S
    {23, 256, 136, 34, 0, 0, Act::f32},   // IQ4_XS
    {29, 256, 56, 14, 0, 0, Act::f32},    // IQ1_M
    {34, 256, 54, 13, 2, 52, Act::f32},   // TQ1_0
    {35, 256, 66, 16, 2, 64, Act::f32},   // TQ2_0
    {39, 32, 17, 4, 1, 0, Act::f32},      // MXFP4
    {40, 64, 36, 9, 0, 0, Act::f32},      // NVFP4
    {9, 32, 36, 9, 0, 0, Act::f32},       // Q8_1
    {15, 256, 292, 73, 0, 0, Act::f32},   // Q8_K
    {1000, 128, 132, 33, 0, 0, Act::f32}, // FP8
    {1001, 64, 40, 10, 0, 0, Act::f32},   // HQQ4
    {1002, 64, 72, 18, 0, 0, Act::f32},   // HQQ8
};

// Which word of a block is the 32 high bits of Q5_0 and Q5_1, -1 for other types.
int high_bits_word(int type_id) { return type_id == 6 ? 0 : type_id == 7 ? 1 : -1; }

// Bit 4g + b, the high bit of weight 4g + b, goes to bit g of byte b: then one shift brings the bits of four
// neighbouring weights to the four bytes of a word.
constexpr auto kSpread = [] {
    std::array<uint32_t, 256> table{};
    for (uint32_t bits = 0; bits < 256; ++bits)
        for (int i = 0; i < 8; ++i) table[bits] |= ((bits >> i) & 1u) << (8 * (i % 4) + i / 4);
    return table;
}();

constexpr auto kGather = [] {
    std::array<uint32_t, 256> table{};
    for (uint32_t bits = 0; bits < 256; ++bits)
        for (int i = 0; i < 8; ++i) table[bits] |= ((bits >> i) & 1u) << (4 * i);
    return table;
}();

uint32_t spread(uint32_t bits) {
    uint32_t out = 0;
    for (int i = 0; i < 4; ++i) out |= kSpread[bits >> (8 * i) & 255] << (2 * i);
    return out;
}

uint32_t gather(uint32_t bits) {
    uint32_t out = 0;
    for (int i = 0; i < 4; ++i) out |= kGather[bits >> (8 * i) & 255] << i;
    return out;
}

constexpr uint32_t kBias = 0x80808080u;  // Q8_0 weights are kept unsigned, 128 higher
constexpr int kQ8_0 = 8, kQ3_K = 11, kQ6_K = 14;

// Word w of a block begins at this byte: words skip the scale where it comes first (else they come last).
int64_t word_offset(const TypeLayout& layout, int w) {
    const int64_t at = int64_t(w) * 4;
    return layout.scale_bytes && layout.scale_offset <= at ? at + layout.scale_bytes : at;
}

// `count` words from word `from` of a block on go to places `to`, to + step, …
struct Run {
    int from, count, to, step;
};

// Scales first, then words in the order in which a block reads them for the first time: low and high bits in turn.
constexpr Run kQ3KRuns[] = {{24, 3, 0, 1}, {8, 4, 3, 2}, {0, 4, 4, 2}, {12, 4, 11, 2}, {4, 4, 12, 2}, {16, 8, 19, 1}};

template <typename Body>
void for_runs(const TypeLayout& layout, Body body) {
    if (layout.type_id != kQ3_K) return body(Run{0, layout.words, 0, 1});
    for (const Run& run : kQ3KRuns) body(run);
}

constexpr int kRun = 64;  // words of a row that are packed at a time

// Stands for rows that are not there: as long as any block, and as a run.
constexpr uint8_t kZeros[kRun * 4] = {};

using Words4 = uint32_t __attribute__((vector_size(16)));

Words4 load4(const uint8_t* at) {
    Words4 v;
    std::memcpy(&v, at, sizeof v);
    return v;
}

// Q6_K, a word of one row or the words of several: 52 words in file order to and from the order that kernels read.
constexpr int kQ6KWords = 52, kQ6KHigh = 32, kQ6KScales = 48;

// Where the low four bits of weights 4g to 4g + 3 of a sub-block are in the file, and how far up; where their high two.
struct SixBits {
    int low, low_shift, high, high_shift;
    SixBits(int sub, int g) {
        const int half = sub / 8, part = sub % 8 / 2, quarter = sub & 1;
        low = half * 16 + (part & 1) * 8 + quarter * 4 + g, low_shift = part / 2 * 4;
        high = kQ6KHigh + half * 8 + quarter * 4 + g, high_shift = part * 2;
    }
};

template <typename W>
void order_q6k(const W* file, W* out) {
    for (int i = 0; i < 4; ++i) out[i] = file[kQ6KScales + i];
    for (int sub = 0; sub < 16; ++sub) {
        W q[4];
        for (int g = 0; g < 4; ++g) {
            const SixBits at(sub, g);
            q[g] = ((file[at.low] >> at.low_shift) & 0x0f0f0f0fu) | (((file[at.high] >> at.high_shift) & 0x03030303u) << 4);
        }
        for (int g = 0; g < 3; ++g) out[4 + 3 * sub + g] = q[g] | (((q[3] >> (2 * g)) & 0x03030303u) << 6);
    }
}

template <typename W>
void restore_q6k(const W* packed, W* file) {
    for (int i = 0; i < kQ6KScales; ++i) file[i] = W{};
    for (int i = 0; i < 4; ++i) file[kQ6KScales + i] = packed[i];
    for (int sub = 0; sub < 16; ++sub) {
        const W* three = packed + 4 + 3 * sub;
        W last{};
        for (int g = 0; g < 3; ++g) last |= ((three[g] >> 6) & 0x03030303u) << (2 * g);
        for (int g = 0; g < 4; ++g) {
            const SixBits at(sub, g);
            const W q = g < 3 ? three[g] : last;
            file[at.low] |= (q & 0x0f0f0f0fu) << at.low_shift;
            file[at.high] |= ((q >> 4) & 0x03030303u) << at.high_shift;
        }
    }
}

// The block of one row, without its scale.
void unpack_q6k(const uint8_t* words, int row, uint8_t* out) {
    uint32_t packed[kQ6KWords], file[kQ6KWords];
    for (int w = 0; w < kQ6KWords; ++w) std::memcpy(packed + w, words + w * 64 + row * 4, 4);
    restore_q6k(packed, file);
    std::memcpy(out, file, sizeof file);
}

// Words of four rows to their places: `step` bytes from word to word, 4 from row to row.
void interleave4(const uint8_t* const* from, int words, uint32_t turned, uint8_t* out, int step) {
    int w = 0;
    for (; w + 4 <= words; w += 4) {
        const Words4 a = load4(from[0] + w * 4), b = load4(from[1] + w * 4), c = load4(from[2] + w * 4), d = load4(from[3] + w * 4);
        const Words4 ab = __builtin_shuffle(a, b, Words4{0, 4, 1, 5}), ab2 = __builtin_shuffle(a, b, Words4{2, 6, 3, 7});
        const Words4 cd = __builtin_shuffle(c, d, Words4{0, 4, 1, 5}), cd2 = __builtin_shuffle(c, d, Words4{2, 6, 3, 7});
        const Words4 columns[4] = {__builtin_shuffle(ab, cd, Words4{0, 1, 4, 5}), __builtin_shuffle(ab, cd, Words4{2, 3, 6, 7}),
                                   __builtin_shuffle(ab2, cd2, Words4{0, 1, 4, 5}), __builtin_shuffle(ab2, cd2, Words4{2, 3, 6, 7})};
        for (int i = 0; i < 4; ++i) {
            const Words4 column = columns[i] ^ turned;
            std::memcpy(out + (w + i) * step, &column, sizeof column);
        }
    }
    for (; w < words; ++w)
        for (int r = 0; r < 4; ++r) {
            uint32_t word;
            std::memcpy(&word, from[r] + w * 4, 4);
            word ^= turned;
            std::memcpy(out + w * step + r * 4, &word, 4);
        }
}

// Rows of nothing but words.
void pack_words(int64_t words, const uint8_t* const* rows, int64_t row_bytes, uint8_t* tile) {
    const int64_t whole = row_bytes / 4;
    for (int64_t first = 0; first < whole; first += kRun) {
        const int count = int(whole - first < kRun ? whole - first : kRun);
        for (int r = 0; r < kTileRows; r += 4) {
            const uint8_t* from[4];
            for (int i = 0; i < 4; ++i) from[i] = rows[r + i] ? rows[r + i] + first * 4 : kZeros;
            interleave4(from, count, 0, tile + first * 64 + r * 4, 64);
        }
    }
    if (words == whole) return;
    // A 16-bit row of odd length ends in half a word.
    std::memset(tile + whole * 64, 0, 64);
    for (int r = 0; r < kTileRows; ++r)
        if (rows[r]) std::memcpy(tile + whole * 64 + r * 4, rows[r] + whole * 4, size_t(row_bytes - whole * 4));
}

}  // namespace

const TypeLayout* type_layout(int type_id) {
    for (const TypeLayout& layout : kLayouts)
        if (layout.type_id == type_id) return &layout;
    return nullptr;
}

int64_t packed_blocks(const TypeLayout& layout, int64_t columns) {
    return (columns + layout.block_length - 1) / layout.block_length;
}

int64_t packed_tile_bytes(const TypeLayout& layout, int64_t columns) {
    const int64_t blocks = packed_blocks(layout, columns), bytes = blocks * layout.words * 64;
    if (layout.scale_bytes == 0) return bytes;
    return bytes + (blocks + layout.blocks_per_line() - 1) / layout.blocks_per_line() * 64;
}

void pack_tile(const TypeLayout& layout, int64_t blocks, const uint8_t* const* rows, int64_t row_bytes, uint8_t* tile) {
    const int scale_bytes = layout.scale_bytes, high = high_bits_word(layout.type_id);
    const int64_t first_word = word_offset(layout, 0);
    const uint32_t turned = layout.type_id == kQ8_0 ? kBias : 0;
    if (scale_bytes == 0 && high < 0) return pack_words(blocks * layout.words, rows, row_bytes, tile);
    for (int64_t b = 0; b < blocks; ++b) {
        uint8_t* out = tile + layout.words_at(b);
        uint8_t* scales = scale_bytes ? tile + layout.scales_at(b) : nullptr;
        for (int r = 0; r < kTileRows; r += 4) {
            const uint8_t* from[4];
            for (int i = 0; i < 4; ++i) {
                const uint8_t* block = rows[r + i] ? rows[r + i] + b * layout.block_bytes : kZeros;
                from[i] = block + first_word;
                if (scales) std::memcpy(scales + (r + i) * scale_bytes, block + layout.scale_offset, size_t(scale_bytes));
            }
            if (layout.type_id == kQ6_K) {
                Words4 file[kQ6KWords], ordered[kQ6KWords];
                interleave4(from, kQ6KWords, 0, reinterpret_cast<uint8_t*>(file), 16);
                order_q6k(file, ordered);
                for (int w = 0; w < kQ6KWords; ++w) std::memcpy(out + w * 64 + r * 4, &ordered[w], 16);
                continue;
            }
            for_runs(layout, [&](const Run& run) {
                const uint8_t* words[4];
                for (int i = 0; i < 4; ++i) words[i] = from[i] + run.from * 4;
                interleave4(words, run.count, turned, out + run.to * 64 + r * 4, run.step * 64);
            });
            if (high < 0) continue;
            for (int i = 0; i < 4; ++i) {
                uint32_t word;
                std::memcpy(&word, from[i] + high * 4, 4);
                word = spread(word);
                std::memcpy(out + high * 64 + (r + i) * 4, &word, 4);
            }
        }
    }
    // The rest of the last line of scales.
    if (scale_bytes)
        for (int64_t b = blocks; b % layout.blocks_per_line(); ++b)
            std::memset(tile + layout.scales_at(b), 0, size_t(kTileRows * scale_bytes));
}

void unpack_row(const TypeLayout& layout, int64_t blocks, const uint8_t* tile, int row, int64_t row_bytes, uint8_t* out) {
    const int high = high_bits_word(layout.type_id);
    for (int64_t b = 0; b < blocks; ++b) {
        const uint8_t* words = tile + layout.words_at(b);
        const int64_t block = b * layout.block_bytes;
        const bool is_whole = block + layout.block_bytes <= row_bytes;
        if (layout.type_id == kQ6_K) unpack_q6k(words, row, out + block);
        else for_runs(layout, [&](const Run& run) {
            for (int i = 0; i < run.count; ++i) {
                const int w = run.from + i;
                uint32_t word;
                std::memcpy(&word, words + (run.to + i * run.step) * 64 + row * 4, 4);
                if (w == high) word = gather(word);
                if (layout.type_id == kQ8_0) word ^= kBias;
                const int64_t at = block + word_offset(layout, w);
                std::memcpy(out + at, &word, is_whole ? 4 : size_t(row_bytes - at));
            }
        });
        if (layout.scale_bytes)
            std::memcpy(out + block + layout.scale_offset, tile + layout.scales_at(b) + row * layout.scale_bytes, size_t(layout.scale_bytes));
    }
}
