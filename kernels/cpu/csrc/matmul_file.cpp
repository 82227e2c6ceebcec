// Packed weights times float32 activations: rows are decoded piecewise into L1 and multiplied at once. The sum of each
// (token, row) is formed in the same order whatever the number of tokens, so a token's result does not depend on its batch.
#include "scratch.h"
#include "vec.h"

namespace SIROCCO_ISA {
namespace {

constexpr int kRows = 4;
constexpr int64_t kPiece = 1024;  // weights of a row decoded at a time: 4 rows fill half of L1

template <int Tokens>
inline void multiply(const float* w, int64_t w_stride, const float* x, int64_t x_stride, int64_t count, float* sums) {
    Vec acc[Tokens][kRows];
    for (int t = 0; t < Tokens; ++t)
        for (int r = 0; r < kRows; ++r) acc[t][r] = load(sums + (t * kRows + r) * kLanes);
    for (int64_t i = 0; i < count; i += kLanes) {
        Vec wv[kRows];
        for (int r = 0; r < kRows; ++r) wv[r] = load(w + r * w_stride + i);
        for (int t = 0; t < Tokens; ++t) {
            const Vec xv = load(x + t * x_stride + i);
            for (int r = 0; r < kRows; ++r) acc[t][r] += xv * wv[r];
        }
    }
    for (int t = 0; t < Tokens; ++t)
        for (int r = 0; r < kRows; ++r) store(sums + (t * kRows + r) * kLanes, acc[t][r]);
}

void multiply_all_file(const float* w, const float* x, const FileMatmulJob& job, int64_t count, float* sums) {
    constexpr int kTokens = kLanes == 16 ? 4 : 2;
    int64_t t = 0;
    for (; t + kTokens <= job.num_tokens; t += kTokens)
        multiply<kTokens>(w, kPiece, x + t * job.x_stride, job.x_stride, count, sums + t * kRows * kLanes);
    for (; t < job.num_tokens; ++t)
        multiply<1>(w, kPiece, x + t * job.x_stride, job.x_stride, count, sums + t * kRows * kLanes);
}

}  // namespace

void matmul_file(const FileMatmulJob& job, int64_t begin, int64_t end) {
    float* w = scratch(0, kRows * kPiece);
    const int64_t num_sums = job.num_tokens * kRows * kLanes;
    float* sums = scratch(1, num_sums);
    for (int64_t row = begin; row < end; row += kRows) {
        const int rows = int(end - row < kRows ? end - row : kRows);
        std::memset(sums, 0, size_t(num_sums) * 4);
        for (int64_t start = 0; start < job.in_features; start += kPiece) {
            const int64_t left = job.in_features - start;
            const int64_t count = left < kPiece ? left : kPiece, padded = round_up(count, kLanes);
            for (int r = 0; r < rows; ++r) {
                const uint8_t* blocks = job.weight + (row + r) * job.row_bytes + start / job.block_length * job.block_bytes;
                job.decode(blocks, w + r * kPiece, count);
                for (int64_t i = count; i < padded; ++i) w[r * kPiece + i] = 0.0f;
            }
            for (int r = rows; r < kRows; ++r) std::memset(w + r * kPiece, 0, size_t(padded) * 4);
            multiply_all_file(w, job.x + start, job, padded, sums);
        }
        with_type(job.out_type, [&](auto type) {
            using T = decltype(type);
            auto* out = static_cast<typename T::Store*>(job.out);
            for (int64_t t = 0; t < job.num_tokens; ++t) {
                const float* s = sums + t * kRows * kLanes;
                const Vec4 y = sum4(load(s), load(s + kLanes), load(s + 2 * kLanes), load(s + 3 * kLanes));
                for (int r = 0; r < rows; ++r) T::put(out + t * job.out_stride + row + r, y[r]);
            }
        });
    }
}

void to_f32(const void* from, Float type, float* to, int64_t count) {
    with_type(type, [&](auto tag) {
        using T = decltype(tag);
        widen<T>(static_cast<const typename T::Store*>(from), to, count, count);
    });
}

}  // namespace SIROCCO_ISA
