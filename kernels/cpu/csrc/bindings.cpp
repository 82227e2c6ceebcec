// The Python face of the native kernels. Tensors come as addresses and sizes (kernels/cpu/ops.py is the typed side);
// what could read or write outside of them is checked here. The GIL is released while kernels run.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "iq_grids.h"
#include "jobs.h"
#include "philox.h"
#include "sampling.h"
#include "scratch.h"
#include "team.h"

namespace nb = nanobind;

namespace generic {
extern const KernelTable table;
}
#if defined(SIROCCO_X86)
namespace avx2 {
extern const KernelTable table;
}
namespace avx512 {
extern const KernelTable table;
}
#endif

namespace {

std::vector<const KernelTable*> usable_tables() {  // best first
    std::vector<const KernelTable*> tables;
#if defined(SIROCCO_X86)
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        tables.push_back(&avx512::table);
    if (has_avx2) tables.push_back(&avx2::table);
#endif
    tables.push_back(&generic::table);
    return tables;
}

const KernelTable* kernels = usable_tables().front();

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const KernelTable* table : usable_tables()) names.emplace_back(table->name);
    return names;
}

void use_instruction_set(const std::string& name) {
    for (const KernelTable* table : usable_tables())
        if (name == table->name) {
            kernels = table;
            return;
        }
    throw std::invalid_argument("this CPU or build has no instruction set " + name);
}

template <typename T = void>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void require(bool holds, const char* message) {
    if (!holds) throw std::out_of_range(message);
}

void take_iq_grids() {
    const nb::object packed_points = nb::module_::import_("kernels.reference.iq_grids").attr("grid_bytes");
    for (const IqGridPlace& grid : iq_grid_places) {
        const nb::bytes points = nb::cast<nb::bytes>(packed_points(grid.name));
        if (points.size() != grid.bytes) throw std::length_error(std::string("the points of ") + grid.name + " do not fill its grid");
        std::memcpy(grid.points, points.data(), grid.bytes);
    }
}

bool can_decode(int type_id) { return kernels->decoder(type_id) != nullptr; }

void dequantize(int type_id, uintptr_t blocks, uintptr_t out, int64_t rows, int64_t row_bytes, int64_t columns) {
    const Decode decode = kernels->decoder(type_id);
    require(decode != nullptr, "dequantize: no native decoder for this type");
    nb::gil_scoped_release release;
    parallel_for(rows, columns, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) decode(at<uint8_t>(blocks) + r * row_bytes, at<float>(out) + r * columns, columns);
    });
}

void matmul(int type_id, uintptr_t weight, int64_t rows, int64_t row_bytes, int64_t block_bytes, int64_t block_length,
            uintptr_t x, int x_type, int64_t tokens, int64_t in_features, uintptr_t out, int out_type, int64_t out_stride) {
    const Decode decode = kernels->decoder(type_id);
    require(decode != nullptr, "matmul: no native decoder for this type");
    require(in_features == row_bytes / block_bytes * block_length, "matmul: x and weight differ in width");
    nb::gil_scoped_release release;
    const int64_t padded = (in_features + 15) / 16 * 16;
    const float* wide = at<float>(x);
    if (Float(x_type) != Float::f32 || padded != in_features) {
        float* buffer = scratch(2, tokens * padded);
        const int64_t width = Float(x_type) == Float::f32 ? 4 : 2;
        for (int64_t t = 0; t < tokens; ++t) {
            kernels->to_f32(at<char>(x) + t * in_features * width, Float(x_type), buffer + t * padded, in_features);
            std::fill(buffer + t * padded + in_features, buffer + (t + 1) * padded, 0.0f);
        }
        wide = buffer;
    }
    const MatmulJob job{decode, at<uint8_t>(weight), row_bytes, block_bytes, block_length, wide, tokens, in_features,
                        padded, at(out), out_stride, Float(out_type)};
    parallel_for(rows, in_features * (tokens + 1) / 4,
                 [&](int64_t begin, int64_t end) { kernels->matmul(job, begin, end); });
}

void rms_norm(uintptr_t x, uintptr_t residual, uintptr_t weight, uintptr_t out, int64_t tokens, int64_t width, float epsilon, int type) {
    nb::gil_scoped_release release;
    const NormJob job{at(x), at(residual), at<float>(weight), at(out), width, epsilon, Float(type)};
    parallel_for(tokens, width, [&](int64_t begin, int64_t end) { kernels->norm(job, begin, end); });
}

void rope(uintptr_t q, uintptr_t k, int64_t q_stride, int64_t k_stride, int64_t n_heads, int64_t n_kv_heads, int64_t head_dim,
          int64_t half, uintptr_t table, int64_t table_rows, uintptr_t positions, int64_t tokens, int type) {
    require(2 * half <= head_dim, "rope: more rotated elements than the head has");
    const int64_t* p = at<int64_t>(positions);
    for (int64_t t = 0; t < tokens; ++t) require(p[t] >= 0 && p[t] < table_rows, "rope: position outside the table");
    nb::gil_scoped_release release;
    const RopeJob job{at(q), at(k), q_stride, k_stride, n_heads, n_kv_heads, head_dim, half, at<float>(table), p, Float(type)};
    parallel_for(tokens, (n_heads + n_kv_heads) * head_dim,
                 [&](int64_t begin, int64_t end) { kernels->rope(job, begin, end); });
}

void silu_mul(uintptr_t gate_up, uintptr_t out, int64_t tokens, int64_t width, int type) {
    nb::gil_scoped_release release;
    const SiluJob job{at(gate_up), at(out), width, Float(type)};
    parallel_for(tokens, width * 2, [&](int64_t begin, int64_t end) { kernels->silu_mul(job, begin, end); });
}

void kv_write(uintptr_t k, uintptr_t v, int64_t k_stride, int64_t v_stride, int64_t row, uintptr_t k_cache, uintptr_t v_cache,
              uintptr_t slots, int64_t tokens, int64_t num_slots, int type, int kv_type) {
    const int64_t* s = at<int64_t>(slots);
    for (int64_t t = 0; t < tokens; ++t) require(s[t] >= 0 && s[t] < num_slots, "kv_write: slot outside the pool");
    nb::gil_scoped_release release;
    const KvWriteJob job{at(k), at(v), k_stride, v_stride, row, at(k_cache), at(v_cache), s, Float(type), Float(kv_type)};
    parallel_for(tokens, row * 2, [&](int64_t begin, int64_t end) { kernels->kv_write(job, begin, end); });
}

// A step's attention, planned once for all layers: the checked tables, cut into items of even size.
class AttentionPlan {
   public:
    AttentionPlan(uintptr_t block_tables, int64_t tables_stride, uintptr_t query_start, uintptr_t context_lens, int64_t requests,
                  int64_t tokens, int64_t num_blocks, int64_t block_size, int64_t n_heads, int64_t n_kv_heads, int64_t head_dim)
        : tokens_(tokens) {
        job_.block_tables = at<int32_t>(block_tables);
        job_.query_start = at<int32_t>(query_start);
        job_.context_lens = at<int32_t>(context_lens);
        job_.tables_stride = tables_stride;
        job_.block_size = block_size;
        job_.n_heads = n_heads;
        job_.n_kv_heads = n_kv_heads;
        job_.head_dim = head_dim;
        job_.scale = float(1.0 / std::sqrt(double(head_dim)));
        const int64_t group = n_heads / n_kv_heads;
        job_.tile = group >= 16 ? 1 : 16 / group;
        check(requests, num_blocks);
        cut(requests);
    }

    void run(uintptr_t q, int64_t q_stride, uintptr_t out, uintptr_t k_cache, uintptr_t v_cache, int type, int kv_type) const {
        nb::gil_scoped_release release;
        AttentionJob job = job_;
        job.q = at(q);
        job.q_stride = q_stride;
        job.out = at(out);
        job.k_cache = at(k_cache);
        job.v_cache = at(v_cache);
        job.type = Float(type);
        job.kv_type = Float(kv_type);
        const int64_t count = int64_t(items_.size());
        parallel_for(count, work_ / (count ? count : 1),
                     [&](int64_t begin, int64_t end) { kernels->attention(job, items_.data(), begin, end); });
    }

    int64_t num_items() const { return int64_t(items_.size()); }

   private:
    void check(int64_t requests, int64_t num_blocks) const {
        require(job_.query_start[0] == 0 && job_.query_start[requests] == tokens_, "attention: query_start does not span the tokens");
        for (int64_t r = 0; r < requests; ++r) {
            const int64_t count = job_.query_start[r + 1] - job_.query_start[r], context = job_.context_lens[r];
            require(count >= 0 && context >= count, "attention: more query tokens than context");
            const int64_t blocks = (context + job_.block_size - 1) / job_.block_size;
            require(blocks <= job_.tables_stride, "attention: context longer than its block table");
            for (int64_t b = 0; b < blocks; ++b) {
                const int32_t id = job_.block_tables[r * job_.tables_stride + b];
                require(id >= 0 && id < num_blocks, "attention: block outside the pool");
            }
        }
    }

    void cut(int64_t requests) {
        const int64_t heads_work = job_.n_heads / job_.n_kv_heads * job_.head_dim * 2;
        for (int64_t r = 0; r < requests; ++r) {
            const int64_t count = job_.query_start[r + 1] - job_.query_start[r];
            for (int64_t first = 0; first < count; first += job_.tile) {
                const int64_t size = count - first < job_.tile ? count - first : job_.tile;
                for (int64_t head = 0; head < job_.n_kv_heads; ++head)
                    items_.push_back({int32_t(r), int32_t(first), int32_t(size), int32_t(head)});
                work_ += size * job_.context_lens[r] * heads_work * job_.n_kv_heads;
            }
        }
    }

    AttentionJob job_{};
    int64_t tokens_, work_ = 0;
    std::vector<AttentionItem> items_;
};

// out[i] = the first 32 bits of Philox(key = seeds[i], counter = positions[i]) / 2^32.
void uniform(uintptr_t seeds, uintptr_t positions, uintptr_t out, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        const uint64_t seed = at<uint64_t>(seeds)[i], position = at<uint64_t>(positions)[i];
        const Philox bits = philox4x32_10({{uint32_t(position), uint32_t(position >> 32), 0, 0}}, uint32_t(seed), uint32_t(seed >> 32));
        at<double>(out)[i] = double(bits.x[0]) * 0x1p-32;
    }
}

void draw_tokens(uintptr_t logits, int64_t row_stride, int64_t rows, int64_t vocab, uintptr_t temperature, uintptr_t top_k,
                 uintptr_t top_p, uintptr_t min_p, uintptr_t u, uintptr_t out) {
    require(vocab > 0, "draw_tokens: no vocabulary");
    nb::gil_scoped_release release;
    parallel_for(rows, vocab * 16, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            const DrawParams p{at<float>(temperature)[r], at<int64_t>(top_k)[r], at<double>(top_p)[r], at<double>(min_p)[r],
                               at<double>(u)[r]};
            at<int64_t>(out)[r] = draw_token(*kernels, at<float>(logits) + r * row_stride, vocab, p);
        }
    });
}

}  // namespace

NB_MODULE(_native, m) {
    m.attr("ABI") = 1;
    take_iq_grids();
    m.def("instruction_sets", instruction_sets);
    m.def("instruction_set", [] { return std::string(kernels->name); });
    m.def("use_instruction_set", use_instruction_set);
    m.def("set_num_threads", set_team_size, nb::call_guard<nb::gil_scoped_release>());
    m.def("num_threads", team_size);
    m.def("set_spin", set_team_spin, nb::arg("barrier_ns") = kBarrierSpinNs, nb::arg("idle_ns") = kIdleSpinNs);
    m.def("can_decode", can_decode);
    m.def("dequantize", dequantize);
    m.def("matmul", matmul);
    m.def("rms_norm", rms_norm);
    m.def("rope", rope);
    m.def("silu_mul", silu_mul);
    m.def("kv_write", kv_write);
    m.def("uniform", uniform);
    m.def("draw_tokens", draw_tokens);
    nb::class_<AttentionPlan>(m, "AttentionPlan")
        .def(nb::init<uintptr_t, int64_t, uintptr_t, uintptr_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>())
        .def("run", &AttentionPlan::run)
        .def_prop_ro("num_items", &AttentionPlan::num_items);
}
