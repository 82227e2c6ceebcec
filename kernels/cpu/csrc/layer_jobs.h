// The operations between the matrix products of a layer. All compute in float32; strides count floats. Ranges may be cut
// anywhere: no result depends on the cut.
#pragma once
#include <cstdint>

#include "act.h"
#include "kv.h"

// A further destination of an op: its result in the form that a product reads, row t at data + t * layout.row_bytes.
struct ActOut {
    ActLayout layout;
    uint8_t* data;
};

constexpr int kMaxActs = 2;

// y = (x - mean) / deviation * (weight + weight_offset) + bias, or without the mean: RMS norm.
struct NormJob {
    const float* x;  // null: the residual is normalised as it is
    int64_t x_stride;
    float* residual;                   // null, or [tokens, width]: becomes residual + x, which is normalised
    const float *weight, *bias;        // [width]; null: all ones, no bias
    bool is_layer_norm;
    float weight_offset, epsilon;      // offset: 1 for Gemma, whose weights are kept as differences from 1
    int64_t width;
    float* out;  // may be null; may be x where the strides agree
    int64_t out_stride;
    int num_acts;
    ActOut acts[kMaxActs];
};

enum class Activation : int { silu = 0, gelu_tanh = 1, gelu_erf = 2 };

// gate_up rows hold `width` gates, then as many factors; without a gate only the former. out = f(gate) [* up].
struct GatedJob {
    const float* gate_up;
    int64_t stride, width;
    Activation kind;
    bool is_gated;
    float* out;  // may be null
    int64_t out_stride;
    int num_acts;
    ActOut acts[kMaxActs];
};

// float32 rows to activations.
struct ConvertJob {
    const float* x;
    int64_t stride, width;
    int num_acts;
    ActOut acts[kMaxActs];
};

// Gated and convert jobs are cut in units: group u % n of kUnitColumns columns of token u / n, where n = column_groups(width).
constexpr int64_t kUnitColumns = 256;
static inline int64_t column_groups(int64_t width) { return (width + kUnitColumns - 1) / kUnitColumns; }

// Rotates the first 2 * half elements of every head of q and k in place, first half against second half (0: no rotation),
// then appends k and v to their slots. q may be null; with k_cache null nothing is appended.
struct RopeKvJob {
    float *q, *k;
    const float* v;
    int64_t q_stride, k_stride, v_stride;
    int64_t n_heads, n_kv_heads, head_dim, half;
    const float* table;  // rows: half cosines, then half sines
    const int64_t *positions, *slots;
    void *k_cache, *v_cache;
    Kv kv_type;
};
