// The solver's passes over groups (hqq.h). A lane is a group's weight; sums are formed in a fixed order of 16 partial sums,
// whatever the instruction set.
#include <algorithm>
#include <cmath>

#include "encode_search.h"
#include "hqq.h"

namespace SIROCCO_ISA {
namespace {

constexpr int kParts = 16;

// sums[i] of value(k), k = i, i + 16, …, then halves upon halves.
template <typename Value>
inline float sum_of_group(Value value) {
    alignas(64) float parts[kParts];
    for (int i = 0; i < kParts; i += kLanes) {
        Vec sum = value(i);
        for (int k = i + kParts; k < kHqqGroup; k += kParts) sum += value(k);
        store(parts + i, sum);
    }
    for (int width = kParts / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) parts[i] += parts[i + width];
    return parts[0];
}

inline Vec code_of(Vec x, Vec inverse, Vec zero, float top) { return clamped(nearest(clamped(x * inverse + zero, -1.0f, top + 1.0f)), 0.0f, top); }

}  // namespace

void hqq_start(const float* x, int top, float* inverse, float* zeros, int64_t groups) {
    for (int64_t g = 0; g < groups; ++g, x += kHqqGroup) {
        float least = x[0], most = x[0];
        for (int i = 1; i < kHqqGroup; ++i) least = smaller(x[i], least), most = larger(x[i], most);
        const float span = most - least;
        // Steps below 1 / 20000 are of no use, as upstream has it; a flat group takes a step of one.
        inverse[g] = span <= 1e-4f ? 1.0f : smaller(float(top) / span, 2e4f);
        zeros[g] = -least * inverse[g];
    }
}

double hqq_step(const HqqPass& pass, const float* x, const float* inverse, float* zeros, int64_t groups) {
    const float top = float(pass.top), per_beta = 1.0f / pass.beta;
    double error = 0.0;
    for (int64_t g = 0; g < groups; ++g, x += kHqqGroup) {
        const Vec by = splat(inverse[g]), zero = splat(zeros[g]);
        alignas(64) float missing[kHqqGroup], lost[kHqqGroup];
        bool is_far = false;
        for (int i = 0; i < kHqqGroup; i += kLanes) {
            const Vec w = load(x + i), q = code_of(w, by, zero, top), rest = w - (q - zero) / by;
            store(missing + i, q - w * by);
            store(lost + i, rest);
            is_far |= any(absolute(rest) > splat(pass.threshold));
        }
        error += double(sum_of_group([&](int i) { return absolute(load(lost + i)); }));
        if (is_far)
            for (int i = 0; i < kHqqGroup; ++i) {
                const float e = lost[i], size = std::fabs(e);
                if (size <= pass.threshold) continue;
                const float kept = size - per_beta * float(std::pow(double(size), -0.3));
                if (kept > 0.0f) missing[i] += (e < 0.0f ? -kept : kept) * inverse[g];
            }
        zeros[g] = sum_of_group([&](int i) { return load(missing + i); }) / float(kHqqGroup);
    }
    return error;
}

void hqq_store(const float* x, const float* inverse, const float* zeros, int bits, int64_t groups, uint8_t* out) {
    const float top = float((1 << bits) - 1);
    for (int64_t g = 0; g < groups; ++g, x += kHqqGroup) {
        alignas(64) float codes[kHqqGroup];
        for (int i = 0; i < kHqqGroup; i += kLanes) store(codes + i, code_of(load(x + i), splat(inverse[g]), splat(zeros[g]), top));
        const float step = 1.0f / inverse[g];
        std::memcpy(out, &step, 4);
        std::memcpy(out + 4, zeros + g, 4);
        out += 8;
        if (bits == 8) {
            for (int i = 0; i < kHqqGroup; ++i) out[i] = uint8_t(codes[i]);
            out += kHqqGroup;
        } else {
            for (int i = 0; i < 32; ++i) out[i] = uint8_t(int(codes[i]) | int(codes[i + 32]) << 4);
            out += 32;
        }
    }
}

}  // namespace SIROCCO_ISA
