// Half-quadratic quantisation of groups of 64 weights (Badri and Shaji, "Half-Quadratic Quantization of Large Machine
// Learning Models", 2023).
#pragma once
#include "quantize.h"

constexpr int kHqqGroup = 64;

// One pass over groups: codes = round(w / step + zero) within [0, top]; zero moves to where it explains the codes best,
// given that errors of more than `threshold` are shrunk by |error|^-0.3 / beta. Adds up the magnitudes of the errors.
struct HqqPass {
    int top;
    float beta, threshold;
};

// All rows of a matrix; the solver ends after 20 passes, or as soon as the mean error of the whole matrix stops falling.
Refusal hqq_rows(int bits, const SourceRows& source, uint8_t* out);
