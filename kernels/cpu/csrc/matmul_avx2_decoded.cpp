// Float32 activations with types that are not float32, for AVX2: pieces of a tile are decoded into float32 words, 16 rows
// side by side, which all tokens share. The values are those of the decoders, bit for bit.
#include "avx2_dense.h"
#include "jobs.h"
#include "scratch.h"

namespace SIROCCO_ISA {

Decode decoder(int type_id);

namespace {

constexpr int kPieceColumns = 256;  // whole blocks of every type; as floats they fill half of the first-level cache
using Piece = float[kPieceColumns][kTileRows];

// Decodes columns [first, first + count) of a tile, whole blocks, as columns 0, 1, … of a piece.
using Fill = void (*)(const PackedMatrix& w, int64_t tile, int64_t first, int64_t count, Piece& out);

template <typename D>
void fill_halves(const PackedMatrix& w, int64_t tile, int64_t first, int64_t count, Piece& out) {
    const uint8_t* words = w.tile(tile) + first / 2 * 64;
    for (int64_t i = 0; i < count / 2; ++i)
        for (int h = 0; h < 2; ++h) {
            Floats value[2];
            D::weights(words + i * 64 + 32 * h, value);
            for (int k = 0; k < 2; ++k) std::memcpy(&out[2 * i + k][8 * h], &value[k], sizeof value[k]);
        }
}

template <typename Q>
void fill_blocks(const PackedMatrix& w, int64_t tile, int64_t first, int64_t count, Piece& out) {
    for (int64_t column = 0; column < count; column += Q::kBlock) {
        const int64_t b = (first + column) / Q::kBlock;
        for (int h = 0; h < 2; ++h) {
            const uint8_t* words = block_words<Q>(w.tile(tile), b) + 32 * h;
            Scales scales;
            float_scales<Q>(words, block_scales<Q>(w.tile(tile), b) + 16 * h, scales);
#pragma GCC unroll 1
            for (int sub = 0; sub < Q::kBlock / Q::kSub; ++sub) {
#pragma GCC unroll 1
                for (int g = 0; g < Q::kSub / 4; ++g) {
                    const Words bytes = Q::weights(InMemory{words}, sub, g);
                    SIROCCO_UNROLL
                    for (int i = 0; i < 4; ++i) {
                        Ints number = Ints((bytes >> (8 * i)) & 0xffu);
                        if constexpr (Q::kOffsetBits >= 0) number -= 1 << Q::kOffsetBits;
                        Floats value = scales.scale[sub] * __builtin_convertvector(number, Floats);
                        if constexpr (Q::kHasMinimum) value += scales.minimum[sub];
                        std::memcpy(&out[column + sub * Q::kSub + 4 * g + i][8 * h], &value, sizeof value);
                    }
                }
            }
        }
    }
}

// Four words of each of four rows become four rows of each of four words. Strides in bytes.
SIROCCO_INLINE void transpose4(const uint8_t* from, int64_t from_stride, uint8_t* to, int64_t to_stride) {
    __m128 a[4];
    for (int i = 0; i < 4; ++i) a[i] = _mm_loadu_ps(reinterpret_cast<const float*>(from + i * from_stride));
    _MM_TRANSPOSE4_PS(a[0], a[1], a[2], a[3]);
    for (int i = 0; i < 4; ++i) _mm_storeu_ps(reinterpret_cast<float*>(to + i * to_stride), a[i]);
}

constexpr int64_t kMostBytes = 292;  // of the blocks that a row has in a piece, over all types without own kernels

// One block of a tile's 16 rows in file order, kMostBytes apart. These types have their words in the file's order, and a
// scale at the begin or the end.
void unpack_block(const TypeLayout& type, const uint8_t* tile, int64_t b, uint8_t* rows) {
    const uint8_t* words = tile + type.words_at(b);
    uint8_t* out = rows + (type.scale_offset == 0 ? type.scale_bytes : 0);
    int w = 0;
    for (; w + 4 <= type.words; w += 4)
        for (int r = 0; r < kTileRows; r += 4) transpose4(words + w * 64 + r * 4, 64, out + r * kMostBytes + w * 4, kMostBytes);
    for (; w < type.words; ++w)
        for (int r = 0; r < kTileRows; ++r) std::memcpy(out + r * kMostBytes + w * 4, words + w * 64 + r * 4, 4);
    if (!type.scale_bytes) return;
    const uint8_t* scales = tile + type.scales_at(b);
    for (int r = 0; r < kTileRows; ++r)
        for (int i = 0; i < type.scale_bytes; ++i) rows[r * kMostBytes + type.scale_offset + i] = scales[r * type.scale_bytes + i];
}

// Any other type: its blocks in file order go through its decoder.
void fill_rows(const PackedMatrix& w, int64_t tile, int64_t first, int64_t count, Piece& out) {
    const TypeLayout& type = *w.layout;
    uint8_t rows[kTileRows * kMostBytes];
    float values[kTileRows][kPieceColumns];
    for (int64_t i = 0; i < count / type.block_length; ++i)
        unpack_block(type, w.tile(tile), first / type.block_length + i, rows + i * type.block_bytes);
    const Decode decode = decoder(type.type_id);
    for (int r = 0; r < kTileRows; ++r) decode(rows + r * kMostBytes, values[r], count);
    for (int64_t column = 0; column < count; column += 4)
        for (int r = 0; r < kTileRows; r += 4)
            transpose4(reinterpret_cast<const uint8_t*>(&values[r][column]), sizeof values[r],
                       reinterpret_cast<uint8_t*>(&out[column][r]), sizeof out[column]);
}

Fill find_fill(int type_id) {
    switch (type_id) {
        case 1: return fill_halves<Dense<1, Act::f32>>;
        case 30: return fill_halves<Dense<30, Act::f32>>;
        case Q4_0::kType: return fill_blocks<Q4_0>;
        case Q4_1::kType: return fill_blocks<Q4_1>;
        case Q5_0::kType: return fill_blocks<Q5_0>;
        case Q5_1::kType: return fill_blocks<Q5_1>;
        case Q8_0::kType: return fill_blocks<Q8_0>;
        case Q2_K::kType: return fill_blocks<Q2_K>;
        case Q3_K::kType: return fill_blocks<Q3_K>;
        case Q4_K::kType: return fill_blocks<Q4_K>;
        case Q5_K::kType: return fill_blocks<Q5_K>;
        case Q6_K::kType: return fill_blocks<Q6_K>;
        default: return fill_rows;
    }
}

}  // namespace

void multiply_decoded(const MatmulJob& job, int64_t tile_begin, int64_t tile_end, int64_t token_begin, int64_t token_end) {
    const PackedMatrix& w = job.weight;
    const int64_t columns = w.blocks * w.layout->block_length, num_tokens = token_end - token_begin;
    const Fill fill = find_fill(w.layout->type_id);
    alignas(64) Piece piece;
    auto* waiting = reinterpret_cast<Sum*>(scratch(0, num_tokens * kTileRows));
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
        for (int64_t t = 0; t < num_tokens; ++t) waiting[t] = {};
        for (int64_t first = 0; first < columns; first += kPieceColumns) {
            const int64_t count = columns - first < kPieceColumns ? columns - first : kPieceColumns;
            fill(w, tile, first, count, piece);
            each_group<kDenseTokens>(job, token_begin, token_end, [&](auto tokens, int64_t token, const uint8_t* const* x) {
                constexpr int M = decltype(tokens)::value;
                const uint8_t* at[M];
                for (int m = 0; m < M; ++m) at[m] = x[m] + first * 4;
                Sum total[1][M];
                for (int m = 0; m < M; ++m) total[0][m] = waiting[token - token_begin + m];
                multiply_words<Dense<0, Act::f32>, M, 1>(reinterpret_cast<const uint8_t*>(piece), 0, count, at, total);
                for (int m = 0; m < M; ++m) waiting[token - token_begin + m] = total[0][m];
            });
        }
        for (int64_t token = token_begin; token < token_end; ++token) store_sum(job, tile, token, waiting[token - token_begin]);
    }
}

}  // namespace SIROCCO_ISA
