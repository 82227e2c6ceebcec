// The encoder of the project's own FP8 blocks: 128 weights as E4M3 numbers, times one float32 scale.
// Layout: kernels/formats.py. The number format: OCP 8-bit Floating Point Specification 1.0.
#include "encode.h"
#include "jobs.h"

namespace SIROCCO_ISA {
namespace {

constexpr int kFp8Block = 128;
constexpr float kLargestE4m3 = 448.0f;

// The nearest E4M3 number, ties to the even one; |value| is 448 at most, but for rounding.
inline uint8_t to_e4m3(float value) {
    const uint32_t bits = bits_of(value), sign = bits >> 24 & 0x80u, magnitude = bits & 0x7fffffffu;
    // Below 2^-6 numbers are 2^-9 apart.
    const uint32_t low = uint32_t(int32_t(nearest(float_from_bits(magnitude) * 512.0f)));
    const uint32_t rounded = magnitude + 0x7ffffu + (magnitude >> 20 & 1u);
    const uint32_t high = (rounded >> 20) - (120u << 3);
    const uint32_t code = magnitude < 0x3c800000u ? low : high < 0x7eu ? high : 0x7eu;
    return uint8_t(sign | code);
}

void fp8(const EncodeJob& job, bool*) {
    const int64_t count = job.rows * (job.columns / kFp8Block);
    for (int64_t b = 0; b < count; ++b) {
        const float* x = job.x + b * kFp8Block;
        uint8_t* out = job.out + b * (4 + kFp8Block);
        Vec most{};
        for (int i = 0; i < kFp8Block; i += kLanes) most = larger(absolute(load(x + i)), most);
        float largest = 0.0f;
        for (int i = 0; i < kLanes; ++i) largest = larger(most[i], largest);
        const float scale = largest / kLargestE4m3, divisor = scale == 0.0f ? 1.0f : scale;
        std::memcpy(out, &scale, 4);
        for (int i = 0; i < kFp8Block; ++i) out[4 + i] = to_e4m3(x[i] / divisor);
    }
}

}  // namespace

extern Encode encoder_own(int type_id);
Encode encoder_own(int type_id) { return type_id == 1000 ? fp8 : nullptr; }

}  // namespace SIROCCO_ISA
