// What the driver hands to the instruction-set builds: plain structs of pointers and sizes. Strides count elements.
#pragma once
#include <cstdint>

enum class Float : int { f32 = 0, f16 = 1, bf16 = 2 };

// Decodes num_weights weights (whole blocks) into float32.
using Decode = void (*)(const uint8_t* blocks, float* out, int64_t num_weights);

// out[t, row] = sum over i of x[t, i] * decoded weight[row, i]. x is float32 with rows padded by zeros to x_stride.
struct MatmulJob {
    Decode decode;
    const uint8_t* weight;
    int64_t row_bytes, block_bytes, block_length;
    const float* x;
    int64_t num_tokens, in_features, x_stride;
    void* out;
    int64_t out_stride;
    Float out_type;
};

struct NormJob {
    const void* x;
    void* residual;  // null, or what x is added to: becomes the sum, which is then normalised
    const float* weight;
    void* out;
    int64_t width;
    float epsilon;
    Float type;
};

// Rotates the first 2 * half elements of every head in place. table rows: half cosines, then half sines.
struct RopeJob {
    void *q, *k;
    int64_t q_stride, k_stride, n_heads, n_kv_heads, head_dim, half;
    const float* table;
    const int64_t* positions;
    Float type;
};

struct SiluJob {
    const void* gate_up;  // [tokens, 2 * width]: gate, then up
    void* out;
    int64_t width;
    Float type;
};

struct KvWriteJob {
    const void *k, *v;
    int64_t k_stride, v_stride, row;  // row = n_kv_heads * head_dim elements
    void *k_cache, *v_cache;
    const int64_t* slots;
    Float type, kv_type;
};

struct AttentionJob {
    const void* q;
    int64_t q_stride;
    void* out;  // [tokens, n_heads * head_dim]
    const void *k_cache, *v_cache;
    const int32_t *block_tables, *query_start, *context_lens;
    int64_t tables_stride, block_size;
    int64_t n_heads, n_kv_heads, head_dim;
    int64_t tile;  // query tokens of one item
    float scale;
    Float type, kv_type;
};

// One piece of the attention: query tokens [first, first + count) of a request, for one KV head.
struct AttentionItem {
    int32_t request, first, count, kv_head;
};

// What one instruction-set build offers. Ranges are of rows (matmul), tokens, or items.
struct KernelTable {
    const char* name;
    Decode (*decoder)(int type_id);
    void (*matmul)(const MatmulJob&, int64_t begin, int64_t end);
    void (*norm)(const NormJob&, int64_t begin, int64_t end);
    void (*rope)(const RopeJob&, int64_t begin, int64_t end);
    void (*silu_mul)(const SiluJob&, int64_t begin, int64_t end);
    void (*kv_write)(const KvWriteJob&, int64_t begin, int64_t end);
    void (*attention)(const AttentionJob&, const AttentionItem* items, int64_t begin, int64_t end);
    void (*to_f32)(const void* from, Float type, float* to, int64_t count);
    // out[i] = e^((x[i] - largest) / divisor)
    void (*exp_shifted)(const float* x, float largest, float divisor, float* out, int64_t count);
};
