// Picks the kernel for a matrix's type and its activations. Built for each instruction set.
#include "jobs.h"
#include "matmul_kernel.h"
#include "scratch.h"

namespace SIROCCO_ISA {

Decode decoder(int type_id);
#if defined(SIROCCO_BF16_DOT)
MatmulKernel bf16_dot_kernel();  // null where the CPU has no bfloat16 products
#endif

namespace {

template <typename Q>
MatmulKernel packed_kernel(Act act) {
    return act == Act::f32 ? multiply_all<Packed<Q>::template Exact> : multiply_all<Packed<Q>::template Q8>;
}

MatmulKernel bf16_kernel() {
#if defined(SIROCCO_BF16_DOT)
    if (const MatmulKernel kernel = bf16_dot_kernel()) return kernel;
#endif
    return multiply_all<Bf16Pairs::Kernel>;
}

MatmulKernel find_kernel(int type_id, Act act) {
    if (type_id == 30 && act == Act::bf16) return bf16_kernel();
    switch (type_id) {
        case 0: return multiply_all<Dense<0>::Exact>;
        case 1: return multiply_all<Dense<1>::Exact>;
        case 30: return multiply_all<Dense<30>::Exact>;
        case Q4_0::kType: return packed_kernel<Q4_0>(act);
        case Q4_1::kType: return packed_kernel<Q4_1>(act);
        case Q5_0::kType: return packed_kernel<Q5_0>(act);
        case Q5_1::kType: return packed_kernel<Q5_1>(act);
        case Q8_0::kType: return packed_kernel<Q8_0>(act);
        case Q2_K::kType: return packed_kernel<Q2_K>(act);
        case Q3_K::kType: return packed_kernel<Q3_K>(act);
        case Q4_K::kType: return packed_kernel<Q4_K>(act);
        case Q5_K::kType: return packed_kernel<Q5_K>(act);
        case Q6_K::kType: return packed_kernel<Q6_K>(act);
        default: return nullptr;
    }
}

// Types without a kernel of their own: each tile is decoded into float32 words, 16 rows side by side, and multiplied so.
void multiply_decoded(const MatmulJob& job, int64_t tile_begin, int64_t tile_end, int64_t token_begin, int64_t token_end) {
    const PackedMatrix& w = job.weight;
    const int64_t columns = w.blocks * w.layout->block_length, row_bytes = w.blocks * w.layout->block_bytes;
    float* interleaved = scratch(0, columns * kTileRows);
    float* row_values = scratch(1, columns);
    auto* row = reinterpret_cast<uint8_t*>(scratch(2, row_bytes / 4 + 1));
    const Decode decode = decoder(w.layout->type_id);
    MatmulJob dense = job;
    dense.weight.layout = type_layout(0);
    dense.weight.blocks = columns;
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
        for (int r = 0; r < kTileRows; ++r) {
            if (tile * kTileRows + r < w.rows) {
                unpack_row(*w.layout, w.blocks, w.tile(tile), r, row_bytes, row);
                decode(row, row_values, columns);
                for (int64_t i = 0; i < columns; ++i) interleaved[i * kTileRows + r] = row_values[i];
            } else {
                for (int64_t i = 0; i < columns; ++i) interleaved[i * kTileRows + r] = 0.0f;
            }
        }
        dense.weight.data = reinterpret_cast<const uint8_t*>(interleaved) - tile * dense.weight.tile_bytes;
        multiply_all<Dense<0>::Exact>(dense, tile, tile + 1, token_begin, token_end);
    }
}

}  // namespace

void matmul(const MatmulJob& job, int64_t tile_begin, int64_t tile_end, int64_t token_begin, int64_t token_end) {
    const MatmulKernel kernel = find_kernel(job.weight.layout->type_id, job.x.layout.kind);
    (kernel ? kernel : multiply_decoded)(job, tile_begin, tile_end, token_begin, token_end);
}

}  // namespace SIROCCO_ISA
