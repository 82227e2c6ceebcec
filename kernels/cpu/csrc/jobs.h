// What the driver hands to the instruction-set builds: plain structs of pointers and sizes. Strides count elements.
#pragma once
#include <cstdint>

#include "act.h"
#include "attention.h"
#include "layer_jobs.h"
#include "matmul.h"

enum class Float : int { f32 = 0, f16 = 1, bf16 = 2 };

// Decodes num_weights weights (whole blocks) into float32.
using Decode = void (*)(const uint8_t* blocks, float* out, int64_t num_weights);

// out[t, row] = sum over i of x[t, i] * decoded weight[row, i]. x is float32 with rows padded by zeros to x_stride.
struct FileMatmulJob {
    Decode decode;
    const uint8_t* weight;
    int64_t row_bytes, block_bytes, block_length;
    const float* x;
    int64_t num_tokens, in_features, x_stride;
    void* out;
    int64_t out_stride;
    Float out_type;
};

// Whole rows to encode: x float32 [rows, columns]; importance float32 [columns] or null: how much a column's errors count.
struct EncodeJob {
    const float* x;
    const float* importance;
    int64_t rows, columns;
    uint8_t* out;
};

// Sets is_too_large where a float16 scale does not hold what it must.
using Encode = void (*)(const EncodeJob&, bool* is_too_large);

// Half-quadratic quantisation, pass by pass: hqq.h.
struct HqqPass;

// What one instruction-set build offers. Ranges are of rows (matmul), tokens, or items.
struct KernelTable {
    const char* name;
    Decode (*decoder)(int type_id);
    void (*matmul_file)(const FileMatmulJob&, int64_t begin, int64_t end);
    Encode (*encoder)(int type_id);  // null for types that are only read
    // The first inverse of the step, and zero, of each group, from its range; a pass, which moves the zeros and returns the
    // sum of |x - decoded x| before that; and the bytes of groups: step, zero, codes.
    void (*hqq_start)(const float* x, int top, float* inverse, float* zeros, int64_t groups);
    double (*hqq_step)(const HqqPass&, const float* x, const float* inverse, float* zeros, int64_t groups);
    void (*hqq_store)(const float* x, const float* inverse, const float* zeros, int bits, int64_t groups, uint8_t* out);
    MatmulKernel matmul;
    // Columns [begin, end) of a row of float32 into activations; begin is a multiple of 256, end too or the row's end.
    void (*to_act)(const ActLayout&, const float* x, uint8_t* row, int64_t begin, int64_t end);
    void (*norm)(const NormJob&, int64_t token_begin, int64_t token_end);
    void (*activate)(const GatedJob&, int64_t unit_begin, int64_t unit_end);
    void (*convert)(const ConvertJob&, int64_t unit_begin, int64_t unit_end);
    void (*rope_kv)(const RopeKvJob&, int64_t token_begin, int64_t token_end);
    // In place, on count elements: cap * tanh(x / cap), x + y, x * factor.
    void (*softcap)(float* x, int64_t count, float cap);
    void (*add)(float* x, const float* y, int64_t count);
    void (*scale)(float* x, int64_t count, float factor);
    // One unit, to the output or (not null) to the partials of its part; and the merge of a part's segments.
    void (*attend)(const AttentionTables&, const AttentionJob&, const AttentionUnit&, float* partials);
    void (*merge_segments)(const AttentionTables&, const AttentionJob&, const AttentionUnit& whole, float* partials);
    void (*to_f32)(const void* from, Float type, float* to, int64_t count);
    // The largest that is not NaN (-infinity if there is none), and where the value is found first, or -1.
    float (*largest_of)(const float* x, int64_t count);
    int64_t (*first_equal)(const float* x, int64_t count, float value);
    // out[i] = e^((x[i] - largest) / divisor), within [0, 1], 0 for NaN; sums: of each kSumBlock of them.
    void (*exp_weights)(const float* x, float largest, float divisor, float* out, int64_t count, double* sums);
    void (*chunk_maxima)(const float* x, int64_t count, float* out);  // of each kChunk
    double (*mass_above)(const float* x, int64_t count, float threshold);  // the sum of what is at least the threshold
    // What is at least the threshold, and the ids, x[0] being first_id; how many. There is room for `count` of them, and
    // what lies beyond those found is overwritten.
    int64_t (*collect)(const float* x, int64_t first_id, int64_t count, float threshold, float* values, int32_t* ids);
};

// The build in use.
const KernelTable& current_kernels();
