// Products in floating point for AVX2, and the choice of the kernel. matmul.cpp does the same for the other builds.
#include "avx2_sums.h"
#include "jobs.h"
#include "scratch.h"

namespace SIROCCO_ISA {

Decode decoder(int type_id);

namespace {

constexpr int kTokens = 4;         // whose sums the registers hold, beside two or four registers of weights
constexpr int kPieceColumns = 256;  // of a tile, decoded at a time: they fill half of the first-level cache

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
SIROCCO_INLINE void multiply(const uint8_t* words, int64_t tile_bytes, int64_t num_words, const uint8_t* const* x, Sum (&total)[Tiles][M]) {
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

template <typename D, int Tiles>
SIROCCO_INLINE void multiply_tiles(const MatmulJob& job, int64_t tile, int64_t token_begin, int64_t token_end) {
    const PackedMatrix& w = job.weight;
    each_group<kTokens / Tiles>(job, token_begin, token_end, [&](auto count, int64_t token, const uint8_t* const* x) {
        constexpr int M = decltype(count)::value;
        Sum total[Tiles][M] = {};
        multiply<D, M, Tiles>(w.tile(tile), w.tile_bytes, w.blocks, x, total);
        for (int t = 0; t < Tiles; ++t)
            for (int m = 0; m < M; ++m) store_sum(job, tile + t, token + m, total[t][m]);
    });
}

template <typename D>
void multiply_dense(const MatmulJob& job, int64_t tile_begin, int64_t tile_end, int64_t token_begin, int64_t token_end) {
    const int64_t num_tokens = token_end - token_begin;
    int64_t tile = tile_begin;
    if (num_tokens == 1)
        for (; tile + 4 <= tile_end; tile += 4) multiply_tiles<D, 4>(job, tile, token_begin, token_end);
    if (num_tokens == 2)
        for (; tile + 2 <= tile_end; tile += 2) multiply_tiles<D, 2>(job, tile, token_begin, token_end);
    for (; tile < tile_end; ++tile) multiply_tiles<D, 1>(job, tile, token_begin, token_end);
}

// Eight floats of each of eight rows, row_stride apart, become eight floats of each of eight columns, 16 apart.
SIROCCO_INLINE void transpose(const float* rows, int64_t row_stride, float* columns) {
    __m256 a[8], b[8];
    for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(rows + i * row_stride);
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; ++j) {
            a[i + 2 * j] = _mm256_shuffle_ps(b[i + j], b[i + j + 2], 0x44);
            a[i + 2 * j + 1] = _mm256_shuffle_ps(b[i + j], b[i + j + 2], 0xee);
        }
    for (int i = 0; i < 4; ++i) {
        _mm256_storeu_ps(columns + i * kTileRows, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
        _mm256_storeu_ps(columns + (i + 4) * kTileRows, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
    }
}

// Float32 activations with a type that is not: pieces of a tile are decoded into float32 words, which all tokens share.
class DecodedTile {
   public:
    explicit DecodedTile(const PackedMatrix& w)
        : w_(w),
          row_bytes_(w.blocks * w.layout->block_bytes),
          decode_(decoder(w.layout->type_id)),
          rows_(reinterpret_cast<uint8_t*>(scratch(1, row_bytes_ * kTileRows / 4 + 1))) {}

    void take(int64_t tile) {
        for (int r = 0; r < kTileRows; ++r) unpack_row(*w_.layout, w_.blocks, w_.tile(tile), r, row_bytes_, rows_ + r * row_bytes_);
    }

    // Columns [first, first + count), whole blocks, to words(): 16 rows side by side, zeros up to a multiple of 8 columns.
    void decode(int64_t first, int64_t count) {
        const int64_t block = first / w_.layout->block_length * w_.layout->block_bytes;
        for (int r = 0; r < kTileRows; ++r) decode_(rows_ + r * row_bytes_ + block, values_[r], count);
        for (int64_t c = 0; c < count; c += 8)
            for (int h = 0; h < 2; ++h) transpose(&values_[8 * h][c], kPieceColumns, &interleaved_[c][8 * h]);
    }

    const uint8_t* words() const { return reinterpret_cast<const uint8_t*>(interleaved_); }

   private:
    const PackedMatrix& w_;
    int64_t row_bytes_;
    Decode decode_;
    uint8_t* rows_;
    alignas(64) float values_[kTileRows][kPieceColumns] = {};
    alignas(64) float interleaved_[kPieceColumns][kTileRows];
};

void multiply_decoded(const MatmulJob& job, int64_t tile_begin, int64_t tile_end, int64_t token_begin, int64_t token_end) {
    using F32 = Dense<0, Act::f32>;
    const int64_t columns = job.weight.blocks * job.weight.layout->block_length, num_tokens = token_end - token_begin;
    DecodedTile decoded(job.weight);
    auto* waiting = reinterpret_cast<Sum*>(scratch(0, num_tokens * kTileRows));
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
        decoded.take(tile);
        for (int64_t t = 0; t < num_tokens; ++t) waiting[t] = {};
        for (int64_t first = 0; first < columns; first += kPieceColumns) {
            const int64_t count = columns - first < kPieceColumns ? columns - first : kPieceColumns;
            decoded.decode(first, count);
            each_group<kTokens>(job, token_begin, token_end, [&](auto tokens, int64_t token, const uint8_t* const* x) {
                constexpr int M = decltype(tokens)::value;
                const uint8_t* at[M];
                for (int m = 0; m < M; ++m) at[m] = x[m] + first * 4;
                Sum total[1][M];
                for (int m = 0; m < M; ++m) total[0][m] = waiting[token - token_begin + m];
                multiply<F32, M, 1>(decoded.words(), 0, count, at, total);
                for (int m = 0; m < M; ++m) waiting[token - token_begin + m] = total[0][m];
            });
        }
        for (int64_t token = token_begin; token < token_end; ++token) store_sum(job, tile, token, waiting[token - token_begin]);
    }
}

MatmulKernel find_kernel(int type_id, Act kind, int64_t num_tokens) {
    if (kind == Act::bf16) return multiply_dense<Dense<30, Act::bf16>>;
    if (kind != Act::f32) return q8_kernel(type_id);
    if (type_id == 0) return multiply_dense<Dense<0, Act::f32>>;
    // Widened for each few tokens anew, 16-bit floats cost more than decoding them once.
    if (num_tokens <= 2 * kTokens && type_id == 1) return multiply_dense<Dense<1, Act::f32>>;
    if (num_tokens <= 2 * kTokens && type_id == 30) return multiply_dense<Dense<30, Act::f32>>;
    return multiply_decoded;
}

}  // namespace

void matmul(const MatmulJob& job, int64_t tile_begin, int64_t tile_end, int64_t token_begin, int64_t token_end) {
    const MatmulKernel kernel = find_kernel(job.weight.layout->type_id, job.x.layout.kind, token_end - token_begin);
    kernel(job, tile_begin, tile_end, token_begin, token_end);
}

}  // namespace SIROCCO_ISA
