// The draw of one token.
#pragma once
#include <cstdint>

#include "jobs.h"

// temperature 0 takes the likeliest; top_k 0, top_p >= 1 and min_p 0 are off. u in [0, 1).
struct DrawParams {
    float temperature;
    int64_t top_k;
    double top_p, min_p, u;
};

// Without filters the distribution is cumulated in the order of ids, else from the likeliest token down.
int64_t draw_token(const KernelTable& kernels, const float* logits, int64_t vocab, const DrawParams& params);
