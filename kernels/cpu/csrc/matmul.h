// Products of activations with packed matrices.
#pragma once
#include <cstdint>

#include "act.h"
#include "packed.h"

// out[t * out_stride + row] = bias[row] + sum over columns of x[t] * weight[row].
struct MatmulJob {
    PackedMatrix weight;
    ActRows x;
    const float* bias;  // [rows] or null
    float* out;
    int64_t out_stride;  // in floats
};

// How a product is cut for the threads: unit u is tile group u % tile_groups of token part u / tile_groups, so that a run
// of units reads the same activations. A group has `tiles` tiles, a part `tokens` tokens; the last ones may be smaller.
struct MatmulUnits {
    int64_t tiles, tokens, tile_groups, count;
};
MatmulUnits matmul_units(const MatmulJob& job, int64_t num_tokens, int num_threads);

// Computes the units [begin, end) with a kernel of one instruction set.
using MatmulKernel = void (*)(const MatmulJob&, int64_t tile_begin, int64_t tile_end, int64_t token_begin, int64_t token_end);
void run_units(MatmulKernel kernel, const MatmulJob& job, const MatmulUnits& units, int64_t num_tokens, int64_t begin, int64_t end);
