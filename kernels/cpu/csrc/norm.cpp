// RMS and layer norms, with the residual's addition before and the conversion for the next product after.
#include "layer_jobs.h"
#include "scratch.h"
#include "vec.h"

namespace SIROCCO_ISA {

void to_act(const ActLayout&, const float*, uint8_t*, int64_t, int64_t);

namespace {

// body(offset, lanes) over a row; lanes is kLanes but at its end.
template <typename Body>
inline void over(int64_t width, Body body) {
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) body(i, kLanes);
    if (i < width) body(i, int(width - i));
}

inline Vec get(const float* p, int lanes) { return lanes == kLanes ? load(p) : load_some(p, lanes); }

inline void put(float* p, Vec v, int lanes) {
    if (lanes == kLanes) store(p, v);
    else store_some(p, v, lanes);
}

// The sum of f(offset, lanes), in four parts so that the additions need not wait for each other.
template <typename F>
inline float sum_of(int64_t width, F f) {
    Vec parts[4] = {};
    int64_t i = 0;
    for (; i + 4 * kLanes <= width; i += 4 * kLanes)
        for (int p = 0; p < 4; ++p) parts[p] += f(i + p * kLanes, kLanes);
    for (int p = 0; i < width; i += kLanes, p = (p + 1) % 4) parts[p] += f(i, int(width - i < kLanes ? width - i : kLanes));
    return sum((parts[0] + parts[1]) + (parts[2] + parts[3]));
}

void norm_row(const NormJob& job, const float* x, float* out) {
    const int64_t width = job.width;
    float mean = 0.0f;
    if (job.is_layer_norm) mean = sum_of(width, [&](int64_t i, int n) { return get(x + i, n); }) / float(width);
    const auto centred = [&](int64_t i, int n) {
        Vec v = get(x + i, n) - splat(mean);
        if (n < kLanes)
            for (int l = n; l < kLanes; ++l) v[l] = 0.0f;
        return v;
    };
    const float squares = job.is_layer_norm ? sum_of(width, [&](int64_t i, int n) { const Vec v = centred(i, n); return v * v; })
                                            : sum_of(width, [&](int64_t i, int n) { const Vec v = get(x + i, n); return v * v; });
    const Vec scale = splat(1.0f / __builtin_sqrtf(squares / float(width) + job.epsilon)), offset = splat(job.weight_offset);
    over(width, [&](int64_t i, int n) {
        Vec v = (get(x + i, n) - splat(mean)) * scale;
        if (job.weight) v *= get(job.weight + i, n) + offset;
        if (job.bias) v += get(job.bias + i, n);
        put(out + i, v, n);
    });
}

}  // namespace

void norm(const NormJob& job, int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
        const float* x = job.x + (job.x ? t * job.x_stride : 0);
        if (job.residual) {
            float* residual = job.residual + t * job.width;
            if (job.x) over(job.width, [&](int64_t i, int n) { put(residual + i, get(residual + i, n) + get(x + i, n), n); });
            x = residual;
        }
        float* out = job.out ? job.out + t * job.out_stride : scratch(0, job.width);
        norm_row(job, x, out);
        for (int a = 0; a < job.num_acts; ++a)
            to_act(job.acts[a].layout, out, job.acts[a].data + t * job.acts[a].layout.row_bytes, 0, job.width);
    }
}

}  // namespace SIROCCO_ISA
