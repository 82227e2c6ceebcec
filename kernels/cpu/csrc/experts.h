// A mixture of experts as one operation of a program: which experts a token takes, and the sum of their results.
#pragma once
#include <memory>
#include <vector>

#include "program_ops.h"

enum class RoutingKind : int { softmax = 0, sparsemixer = 1 };

// How `top_k` of num_experts logits become experts and factors.
//   softmax:     factors are probabilities over all experts, with is_renormalised divided by the sum of those taken.
//   sparsemixer: top_k is 2. The factor of each is its probability among the experts that lie within 2 * jitter of the
//                largest, relative to it; for the second the first is left out.
struct Routing {
    RoutingKind kind;
    int64_t num_experts, top_k;
    bool is_renormalised;
    float jitter;
};

// The experts [top_k] that a token takes, in ascending order, and their factors. Of equal logits the first expert's counts
// more, and NaN counts more than any number, so that there is always a choice.
void route(const Routing& routing, const float* logits, int32_t* experts, float* factors);

// A matrix for each expert, one below the other; each begins with a tile of its own.
struct ExpertMatrices {
    PackedMatrix all;
    int64_t num_experts, rows;  // rows: of one expert, without those that fill its last tile

    PackedMatrix of(int64_t expert) const {
        PackedMatrix m = all;
        m.rows = rows;
        m.data += expert * m.tiles() * m.tile_bytes;
        return m;
    }
};

// The buffers of an ExpertsOp; those below `out` are its own, with top_k rows for each token.
struct ExpertBuffers {
    ActBuffer x;
    int logits, out;
    int choices;          // 16 bytes a pair
    ActBuffer grouped;    // inputs, in the pairs' order
    int gate_up;          // [2 * inner] floats
    ActBuffer inner;
    int results;          // [hidden] floats
};

// out[t] = sum over the experts that token t takes of factor * down(f(gate(x)) * up(x)). Pairs of a token and an expert are
// ordered by expert, then token; each token's sum goes by ascending expert. No number depends on the other tokens.
struct ExpertsOp : Op {
    ExpertsOp(Rows rows, Routing routing, Activation activation, ExpertMatrices gate, ExpertMatrices up, ExpertMatrices down,
              ExpertBuffers buffers);
    ~ExpertsOp() override;
    void run(const Step&, Worker&) const override;

   private:
    struct Plan;  // which pairs there are, made anew in every run
    void group(const Step&, int num_threads) const;

    Routing routing_;
    Activation activation_;
    ExpertMatrices gate_, up_, down_;
    ExpertBuffers buffers_;
    std::unique_ptr<Plan> plan_;  // a program is run by one caller at a time
};

// x[t] += other[t] / (1 + e^-gate[t]), over rows of `width`; gate has one number a row.
struct AddGatedOp : Op {
    AddGatedOp(Rows rows, int64_t width, int x, int other, int gate) : Op(rows), width(width), x(x), other(other), gate(gate) {}
    void run(const Step&, Worker&) const override;
    int64_t width;
    int x, other, gate;
};
