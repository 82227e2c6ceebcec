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

// How a product is cut for the threads: unit u covers `tiles` tiles from (u / token_parts) * tiles on, and `tokens` tokens
// from (u % token_parts) * tokens on.
struct MatmulUnits {
    int64_t tiles, tokens, token_parts, count;
};
MatmulUnits matmul_units(const MatmulJob& job, int64_t num_tokens, int num_threads);
