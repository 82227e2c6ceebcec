// Passes over a row of logits or weights.
#include "vec_math.h"

namespace SIROCCO_ISA {

void exp_shifted(const float* x, float largest, float divisor, float* out, int64_t count) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(out + i, exp((load(x + i) - splat(largest)) / splat(divisor)));
    if (i < count) store_some(out + i, exp((load_some(x + i, count - i) - splat(largest)) / splat(divisor)), count - i);
}

}  // namespace SIROCCO_ISA
