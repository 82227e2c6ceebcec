// Products in floating point for AVX2, and the choice of the kernel. matmul.cpp does the same for the other builds.
#include "avx2_dense.h"

namespace SIROCCO_ISA {
namespace {

template <typename D, int Tiles>
SIROCCO_INLINE void multiply_tiles(const MatmulJob& job, int64_t tile, int64_t token_begin, int64_t token_end) {
    const PackedMatrix& w = job.weight;
    each_group<kDenseTokens / Tiles>(job, token_begin, token_end, [&](auto count, int64_t token, const uint8_t* const* x) {
        constexpr int M = decltype(count)::value;
        Sum total[Tiles][M] = {};
        multiply_words<D, M, Tiles>(w.tile(tile), w.tile_bytes, w.blocks, x, total);
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

MatmulKernel find_kernel(int type_id, Act kind, int64_t num_tokens) {
    if (kind == Act::bf16) return multiply_dense<Dense<30, Act::bf16>>;
    if (kind != Act::f32) return q8_kernel(type_id);
    if (type_id == 0) return multiply_dense<Dense<0, Act::f32>>;
    // Widened for each few tokens anew, 16-bit floats cost more than decoding them once.
    if (num_tokens <= 2 * kDenseTokens && type_id == 1) return multiply_dense<Dense<1, Act::f32>>;
    if (num_tokens <= 2 * kDenseTokens && type_id == 30) return multiply_dense<Dense<30, Act::f32>>;
    return multiply_decoded;
}

}  // namespace

void matmul(const MatmulJob& job, int64_t tile_begin, int64_t tile_end, int64_t token_begin, int64_t token_end) {
    const MatmulKernel kernel = find_kernel(job.weight.layout->type_id, job.x.layout.kind, token_end - token_begin);
    kernel(job, tile_begin, tile_end, token_begin, token_end);
}

}  // namespace SIROCCO_ISA
