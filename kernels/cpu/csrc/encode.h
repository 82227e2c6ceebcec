// What the encoders of one instruction-set build share: the job, sub-blocks side by side, and codes into bytes.
#pragma once
#include "encode_search.h"

namespace SIROCCO_ISA {

// Writes a float16, and notes down where it does not hold the value.
inline void put_half(uint8_t* at, float value, bool& is_too_large) {
    const uint16_t half = f32_to_f16(value);
    is_too_large |= (half & 0x7fff) >= 0x7c00;
    std::memcpy(at, &half, sizeof half);
}

// out[i] = value i of kLanes sub-blocks of n, `distance` apart.
template <int n>
inline void side_by_side(const float* x, int64_t distance, Vec* out) {
    alignas(64) float values[n * kLanes];
    for (int lane = 0; lane < kLanes; ++lane)
        for (int i = 0; i < n; ++i) values[i * kLanes + lane] = x[lane * distance + i];
    for (int i = 0; i < n; ++i) out[i] = load(values + i * kLanes);
}

// codes[i] = nearest((x[i] + shift) / scale), within [low, high], plus offset.
template <int n>
inline void divide(const float* x, float shift, float scale, int low, int high, int offset, uint8_t* codes) {
    const Vec by = splat(scale), plus = splat(shift);
    for (int i = 0; i < n; i += kLanes) {
        VecInt q = nearest_int((load(x + i) + plus) / by);
        for (int lane = 0; lane < kLanes; ++lane) {
            const int value = q[lane] < low ? low : q[lane] > high ? high : q[lane];
            codes[i + lane] = uint8_t(value + offset);
        }
    }
}

// The sum of squares of n numbers, in their order.
inline float sum_of_squares(const float* x, int64_t n) {
    float sum = 0.0f;
    for (int64_t i = 0; i < n; ++i) sum += x[i] * x[i];
    return sum;
}

}  // namespace SIROCCO_ISA
