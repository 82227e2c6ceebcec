// Python's view of the operations between the products, and of attention. kernels/cpu/layers.py and attention.py are the
// typed side; what a batch brings (slots, positions, blocks) is checked here. The GIL is released while kernels run.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <tuple>
#include <vector>

#include "attention_plan.h"
#include "jobs.h"
#include "team.h"

namespace nb = nanobind;

namespace {

using Acts = std::vector<std::tuple<int, uintptr_t>>;  // kind and address of each activation output

template <typename T = void>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void require(bool holds, const char* message) {
    if (!holds) throw std::out_of_range(message);
}

template <typename Job>
void set_acts(Job& job, const Acts& acts, int64_t width) {
    require(int(acts.size()) <= kMaxActs, "more activation outputs than an operation can have");
    job.num_acts = 0;
    for (const auto& [kind, data] : acts) {
        require(kind >= 0 && kind <= int(Act::q8_256), "no such kind of activations");
        job.acts[job.num_acts++] = {ActLayout::of(Act(kind), width), at<uint8_t>(data)};
    }
}

int64_t act_row_bytes(int kind, int64_t columns) { return ActLayout::of(Act(kind), columns).row_bytes; }

void norm(uintptr_t x, int64_t x_stride, uintptr_t residual, uintptr_t weight, uintptr_t bias, bool is_layer_norm,
          float weight_offset, float epsilon, int64_t tokens, int64_t width, uintptr_t out, int64_t out_stride, const Acts& acts) {
    NormJob job{at<float>(x), x_stride, at<float>(residual), at<float>(weight), at<float>(bias), is_layer_norm,
                weight_offset, epsilon, width, at<float>(out), out_stride, 0, {}};
    set_acts(job, acts, width);
    nb::gil_scoped_release release;
    const KernelTable& kernels = current_kernels();
    parallel_for(tokens, width, [&](int64_t begin, int64_t end) { kernels.norm(job, begin, end); });
}

void activate(uintptr_t gate_up, int64_t stride, int64_t tokens, int64_t width, int kind, bool is_gated, uintptr_t out,
              int64_t out_stride, const Acts& acts) {
    require(kind >= 0 && kind <= int(Activation::gelu_erf), "no such activation function");
    GatedJob job{at<float>(gate_up), stride, width, Activation(kind), is_gated, at<float>(out), out_stride, 0, {}};
    set_acts(job, acts, width);
    nb::gil_scoped_release release;
    const KernelTable& kernels = current_kernels();
    parallel_for(tokens * column_groups(width), kUnitColumns * 4,
                 [&](int64_t begin, int64_t end) { kernels.activate(job, begin, end); });
}

void convert(uintptr_t x, int64_t stride, int64_t tokens, int64_t width, const Acts& acts) {
    ConvertJob job{at<float>(x), stride, width, 0, {}};
    set_acts(job, acts, width);
    nb::gil_scoped_release release;
    const KernelTable& kernels = current_kernels();
    parallel_for(tokens * column_groups(width), kUnitColumns,
                 [&](int64_t begin, int64_t end) { kernels.convert(job, begin, end); });
}

void rope_kv(uintptr_t q, uintptr_t k, uintptr_t v, int64_t q_stride, int64_t k_stride, int64_t v_stride, int64_t n_heads,
             int64_t n_kv_heads, int64_t head_dim, int64_t half, uintptr_t table, int64_t table_rows, uintptr_t positions,
             uintptr_t slots, int64_t num_slots, uintptr_t k_cache, uintptr_t v_cache, int kv_type, int64_t tokens) {
    require(2 * half <= head_dim, "rope: more rotated elements than the head has");
    const auto *p = at<const int64_t>(positions), *s = at<const int64_t>(slots);
    if (half > 0)
        for (int64_t t = 0; t < tokens; ++t) require(p[t] >= 0 && p[t] < table_rows, "rope: position outside the table");
    if (k_cache)
        for (int64_t t = 0; t < tokens; ++t) require(s[t] >= 0 && s[t] < num_slots, "kv_write: slot outside the pool");
    const RopeKvJob job{at<float>(q), at<float>(k), at<const float>(v), q_stride, k_stride, v_stride, n_heads, n_kv_heads,
                        head_dim, half, at<const float>(table), p, s, at(k_cache), at(v_cache), Kv(kv_type)};
    nb::gil_scoped_release release;
    const KernelTable& kernels = current_kernels();
    parallel_for(tokens, (n_heads + 2 * n_kv_heads) * head_dim,
                 [&](int64_t begin, int64_t end) { kernels.rope_kv(job, begin, end); });
}

void softcap(uintptr_t x, int64_t count, float cap) { current_kernels().softcap(at<float>(x), count, cap); }
void add(uintptr_t x, uintptr_t y, int64_t count) { current_kernels().add(at<float>(x), at<const float>(y), count); }
void scale(uintptr_t x, int64_t count, float factor) { current_kernels().scale(at<float>(x), count, factor); }

void make_plan(AttentionPlan& plan, uintptr_t block_tables, int64_t tables_stride, uintptr_t query_start, uintptr_t context_lens,
               int64_t requests, int64_t tokens, int64_t num_blocks, int64_t block_size, int64_t n_heads, int64_t n_kv_heads,
               int64_t head_dim, int num_threads) {
    const AttentionTables tables{at<const int32_t>(block_tables), tables_stride, at<const int32_t>(query_start),
                                 at<const int32_t>(context_lens), block_size, n_heads, n_kv_heads, head_dim};
    plan.make(tables, requests, tokens, num_blocks, num_threads > 0 ? num_threads : team_size());
}

void run_plan(AttentionPlan& plan, uintptr_t q, int64_t q_stride, uintptr_t out, int64_t out_stride, uintptr_t k_cache,
              uintptr_t v_cache, int kv_type, float scale, float softcap, int64_t window) {
    const AttentionJob job{at<const float>(q), q_stride, at<float>(out), out_stride, at(k_cache), at(v_cache), Kv(kv_type),
                           scale, softcap, window};
    nb::gil_scoped_release release;
    const KernelTable& kernels = current_kernels();
    const int64_t count = plan.num_units();
    parallel_for(count, plan.work() / (count ? count : 1), [&](int64_t begin, int64_t end) { plan.run(kernels, job, begin, end); });
}

}  // namespace

void bind_layers(nb::module_& m) {
    m.def("act_row_bytes", act_row_bytes);
    m.def("kv_row_bytes", [](int kv_type, int64_t head_dim) { return kv_row_bytes(Kv(kv_type), head_dim); });
    m.def("norm", norm);
    m.def("activate", activate);
    m.def("convert", convert);
    m.def("rope_kv", rope_kv);
    m.def("softcap", softcap, nb::call_guard<nb::gil_scoped_release>());
    m.def("add", add, nb::call_guard<nb::gil_scoped_release>());
    m.def("scale", scale, nb::call_guard<nb::gil_scoped_release>());
    nb::class_<AttentionPlan>(m, "AttentionPlan")
        .def(nb::init<>())
        .def("make", make_plan)
        .def("run", run_plan)
        .def_prop_ro("num_units", &AttentionPlan::num_units);
}
