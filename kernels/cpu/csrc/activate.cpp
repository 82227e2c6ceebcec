// What happens to single elements: gated activations, conversion for products, softcap, sums, factors.
#include "layer_jobs.h"
#include "scratch.h"
#include "vec_math.h"

namespace SIROCCO_ISA {

void to_act(const ActLayout&, const float*, uint8_t*, int64_t, int64_t);

namespace {

// out[i] = f(vectors of x and y at i) over count elements; y may be null, then f's second argument is zero.
template <typename F>
inline void map(const float* x, const float* y, float* out, int64_t count, F f) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(out + i, f(load(x + i), y ? load(y + i) : Vec{}));
    if (i < count) store_some(out + i, f(load_some(x + i, count - i), y ? load_some(y + i, count - i) : Vec{}), count - i);
}

template <Vec (*Function)(Vec)>
inline void gate(const float* x, const float* up, float* out, int64_t count) {
    if (up) map(x, up, out, count, [](Vec a, Vec b) { return Function(a) * b; });
    else map(x, nullptr, out, count, [](Vec a, Vec) { return Function(a); });
}

void write_acts(const ActOut* acts, int num_acts, const float* row, int64_t token, int64_t begin, int64_t end) {
    for (int a = 0; a < num_acts; ++a)
        to_act(acts[a].layout, row, acts[a].data + token * acts[a].layout.row_bytes, begin, end);
}

}  // namespace

void activate(const GatedJob& job, int64_t unit_begin, int64_t unit_end) {
    const int64_t groups = column_groups(job.width);
    for (int64_t u = unit_begin; u < unit_end; ++u) {
        const int64_t token = u / groups, begin = u % groups * kUnitColumns;
        const int64_t end = begin + kUnitColumns < job.width ? begin + kUnitColumns : job.width;
        const float *x = job.gate_up + token * job.stride + begin, *up = job.is_gated ? x + job.width : nullptr;
        float* row = job.out ? job.out + token * job.out_stride : scratch(0, groups * kUnitColumns);
        switch (job.kind) {
            case Activation::silu: gate<silu>(x, up, row + begin, end - begin); break;
            case Activation::gelu_tanh: gate<gelu_tanh>(x, up, row + begin, end - begin); break;
            case Activation::gelu_erf: gate<gelu_erf>(x, up, row + begin, end - begin); break;
        }
        write_acts(job.acts, job.num_acts, row, token, begin, end);
    }
}

void convert(const ConvertJob& job, int64_t unit_begin, int64_t unit_end) {
    const int64_t groups = column_groups(job.width);
    for (int64_t u = unit_begin; u < unit_end; ++u) {
        const int64_t token = u / groups, begin = u % groups * kUnitColumns;
        const int64_t end = begin + kUnitColumns < job.width ? begin + kUnitColumns : job.width;
        write_acts(job.acts, job.num_acts, job.x + token * job.stride, token, begin, end);
    }
}

void softcap(float* x, int64_t count, float cap) {
    map(x, nullptr, x, count, [=](Vec v, Vec) { return splat(cap) * tanh(v / splat(cap)); });
}

void add(float* x, const float* y, int64_t count) {
    map(x, y, x, count, [](Vec a, Vec b) { return a + b; });
}

void scale(float* x, int64_t count, float factor) {
    map(x, nullptr, x, count, [=](Vec v, Vec) { return v * splat(factor); });
}

}  // namespace SIROCCO_ISA
