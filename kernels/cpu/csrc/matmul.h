// Products of activations with packed matrices.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

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

// Products of groups of tokens, each with a matrix of its own: the experts of a mixture. Their units form one list, so that
// threads share all groups at once, however unequal these are.
class GroupedMatmul {
   public:
    // Room for so many groups: add() then allocates nothing.
    void reserve(std::size_t groups);
    void clear();
    // The next group: num_tokens rows of job.x.
    void add(const MatmulJob& job, int64_t num_tokens, int num_threads);
    int64_t num_units() const { return ends_.empty() ? 0 : ends_.back(); }
    void run(MatmulKernel kernel, int64_t begin, int64_t end) const;

   private:
    struct Group {
        MatmulJob job;
        MatmulUnits units;
        int64_t num_tokens;
    };
    std::vector<Group> groups_;
    std::vector<int64_t> ends_;  // units up to the end of each group
};
