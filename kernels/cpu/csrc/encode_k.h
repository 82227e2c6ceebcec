// Encoders of the K types: super-blocks of 256 weights, whose sub-blocks' scales are quantised in their turn. The scales
// are searched for (encode_k_search.cpp); then they are quantised, and the codes made anew from what the scales have
// become (encode_k_pack.cpp). Bit for bit what ggml's quantisers write. Layouts: kernels/formats.py.
#pragma once
#include "encode.h"

namespace SIROCCO_ISA {

constexpr int kSuper = 256;

// Sub-blocks of n weights, as many super-blocks at once as fill the lanes.
template <int n>
struct Shape {
    static constexpr int subs = kSuper / n, supers = kLanes > subs ? kLanes / subs : 1;
};

// What is known of some super-blocks' sub-blocks after the search.
template <int n>
struct Found {
    static constexpr int count = Shape<n>::subs * Shape<n>::supers;
    alignas(64) float scale[count], minimum[count], inverse[count], base[count], weight[count];
    bool is_zero[count];
};

// The searches of Shape<n>::supers super-blocks. importance: of the same weights, or null. codes: those of Q3_K without
// importance, 0 … 7, [Found<16>::count][16].
void search_q2_k(const float* x, const float* importance, Found<16>& found);
void search_q3_k(const float* x, const float* importance, Found<16>& found, uint8_t* codes);
template <int bits>
void search_q45_k(const float* x, const float* importance, Found<32>& found);
void search_q6_k(const float* x, const float* importance, Found<16>& found);

// Scales x >= 0 of n sub-blocks, each with its weight, as step * q, 0 <= q <= top: the best of nine steps under the
// weighted loss, then up to five rounds of moving one code at a time. Returns the step.
template <int n>
float quantise_scales(const float* x, const float* w, int top, uint8_t* codes);

// The block of one super-block x, whose sub-blocks are number `first` and following ones of those found. is_weighted:
// there was an importance. Q3_K's codes_found: what the search made, null: there was an importance.
void pack_q2_k(const Found<16>& found, int first, const float* x, bool is_weighted, uint8_t* out, bool& is_too_large);
void pack_q3_k(const Found<16>& found, int first, const float* x, const uint8_t* codes_found, uint8_t* out, bool& is_too_large);
template <int bits>
void pack_q45_k(const Found<32>& found, int first, const float* x, bool is_weighted, uint8_t* out, bool& is_too_large);
void pack_q6_k(const Found<16>& found, int first, const float* x, uint8_t* out, bool& is_too_large);

}  // namespace SIROCCO_ISA
