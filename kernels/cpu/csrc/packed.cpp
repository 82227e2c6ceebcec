#include "packed.h"

#include <cstring>

namespace {

constexpr TypeLayout kLayouts[] = {
    // id, length, bytes, words, tail bytes, tail offset, activations
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
};

// Which word of a block is the 32 high bits of Q5_0 and Q5_1, -1 for other types.
int high_bits_word(int type_id) { return type_id == 6 ? 0 : type_id == 7 ? 1 : -1; }

// Bit 4g + b, the high bit of weight 4g + b, goes to bit g of byte b: then one shift brings the bits of four
// neighbouring weights to the four bytes of a word.
uint32_t spread(uint32_t bits) {
    uint32_t out = 0;
    for (int g = 0; g < 8; ++g) {
        const uint32_t four = bits >> (4 * g);
        out |= ((four & 1u) | (four & 2u) << 7 | (four & 4u) << 14 | (four & 8u) << 21) << g;
    }
    return out;
}

uint32_t gather(uint32_t bits) {
    uint32_t out = 0;
    for (int g = 0; g < 8; ++g) {
        const uint32_t four = bits >> g;
        out |= ((four & 1u) | (four >> 7 & 2u) | (four >> 14 & 4u) | (four >> 21 & 8u)) << (4 * g);
    }
    return out;
}

constexpr uint32_t kBias = 0x80808080u;  // Q8_0 weights are kept unsigned, 128 higher
constexpr int kQ8_0 = 8;

// Word w of a block begins at this byte: words skip the tail's bytes where those come first.
int64_t word_offset(const TypeLayout& layout, int w) {
    const int64_t at = int64_t(w) * 4;
    return layout.tail_bytes && layout.tail_offset <= at ? at + layout.tail_bytes : at;
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

int64_t packed_padding(const TypeLayout& layout, int64_t blocks) { return -(blocks * layout.block_bytes * kTileRows) & 63; }

int64_t packed_tile_bytes(const TypeLayout& layout, int64_t columns) {
    return (packed_blocks(layout, columns) * layout.block_bytes * kTileRows + 63) / 64 * 64;
}

void pack_tile(const TypeLayout& layout, int64_t blocks, const uint8_t* const* rows, int64_t row_bytes, uint8_t* tile) {
    // Missing rows are read from a block of zeros.
    static const uint8_t zeros[256] = {};
    const uint8_t* from[kTileRows];
    int64_t step[kTileRows];
    for (int r = 0; r < kTileRows; ++r) {
        from[r] = rows[r] ? rows[r] : zeros;
        step[r] = rows[r] ? layout.block_bytes : 0;
    }
    const int high = high_bits_word(layout.type_id);
    uint8_t *out = tile, *tail = tile + blocks * layout.words * 64;
    for (int64_t b = 0; b < blocks; ++b) {
        // A 16-bit row of odd length ends in half a word.
        const bool is_whole = (b + 1) * layout.block_bytes <= row_bytes;
        for (int w = 0; w < layout.words; ++w, out += 64) {
            const int64_t at = word_offset(layout, w);
            uint32_t words[kTileRows] = {};
            if (is_whole)
                for (int r = 0; r < kTileRows; ++r) std::memcpy(&words[r], from[r] + at, 4);
            else
                for (int r = 0; r < kTileRows; ++r) std::memcpy(&words[r], from[r] + at, 2);
            if (w == high)
                for (uint32_t& word : words) word = spread(word);
            if (layout.type_id == kQ8_0)
                for (uint32_t& word : words) word ^= kBias;
            std::memcpy(out, words, sizeof words);
        }
        for (int r = 0; r < kTileRows; ++r) {
            for (int i = 0; i < layout.tail_bytes; ++i) *tail++ = from[r][layout.tail_offset + i];
            from[r] += step[r];
        }
    }
    std::memset(tail, 0, size_t(packed_padding(layout, blocks)));
}

void unpack_row(const TypeLayout& layout, int64_t blocks, const uint8_t* tile, int row, int64_t row_bytes, uint8_t* out) {
    const int64_t words_bytes = blocks * layout.words * 64;
    const int high = high_bits_word(layout.type_id);
    for (int64_t b = 0; b < blocks; ++b) {
        const int64_t block = b * layout.block_bytes;
        const bool is_whole = block + layout.block_bytes <= row_bytes;
        for (int w = 0; w < layout.words; ++w) {
            uint32_t word;
            std::memcpy(&word, tile + (b * layout.words + w) * 64 + row * 4, 4);
            if (w == high) word = gather(word);
            if (layout.type_id == kQ8_0) word ^= kBias;
            const int64_t at = block + word_offset(layout, w);
            std::memcpy(out + at, &word, is_whole ? 4 : size_t(row_bytes - at));
        }
        const uint8_t* tail = tile + words_bytes + (b * kTileRows + row) * layout.tail_bytes;
        std::memcpy(out + block + layout.tail_offset, tail, size_t(layout.tail_bytes));
    }
}
