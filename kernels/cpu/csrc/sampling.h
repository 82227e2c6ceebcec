// From logits to tokens: the draw of one row, log-probabilities, and changes of single logits.
#pragma once
#include <cstdint>

struct KernelTable;

constexpr int64_t kSumBlock = 4096;  // weights that are summed up together
constexpr int64_t kChunk = 256;      // values of which the largest is noted

// temperature 0 takes the likeliest; top_k 0, top_p >= 1 and min_p 0 are off. u in [0, 1).
struct DrawParams {
    float temperature;
    int64_t top_k;
    double top_p, min_p, u;
};

// The likeliest token: the first of equals, no NaN, and 0 among NaNs only.
int64_t likeliest(const KernelTable& kernels, const float* logits, int64_t vocab);

// Without filters the distribution is cumulated in the order of ids, else from the likeliest token down.
int64_t draw_token(const KernelTable& kernels, const float* logits, int64_t vocab, const DrawParams& params);

// Log-probabilities of the token id and of the k likeliest tokens, best first, equals by their ids. k <= vocab.
void logprobs(const KernelTable& kernels, const float* logits, int64_t vocab, int64_t id, int64_t k, float* chosen,
              int64_t* top_ids, float* top);
