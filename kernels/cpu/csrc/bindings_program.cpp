// Python's side of programs. kernels/cpu/program.py owns what the addresses refer to; sizes that do not fit each other are
// refused here, indexes that a step brings in Program::run.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "experts.h"
#include "packed_memory.h"
#include "program.h"
#include "program_ops.h"

namespace nb = nanobind;

namespace {

using Acts = std::vector<std::pair<int, int>>;  // kind, buffer
using Ids = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Counts = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Tables = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

template <typename T = void>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void require(bool holds, const char* message) {
    if (!holds) throw std::invalid_argument(message);
}

// Builds the ops of a program; checks every buffer against the sizes that the op will use.
class Builder {
   public:
    Builder(int64_t num_blocks, int64_t block_size) : program_(num_blocks, block_size) {}

    int buffer(bool is_wanted, int64_t row_bytes) {
        require(row_bytes > 0 && row_bytes % 4 == 0, "a buffer's row must be a positive number of whole words");
        return memory().add(is_wanted ? Rows::wanted : Rows::tokens, row_bytes);
    }

    int table(uintptr_t data, int64_t num_rows) { return program_.add_table({at<float>(data), num_rows}); }
    void set_table(int index, uintptr_t data, int64_t num_rows) { program_.set_table(index, {at<float>(data), num_rows}); }

    void embed(const PackedMemory& weight, int out, float factor) {
        floats(out, Rows::tokens, weight.matrix().columns);
        program_.limit_vocabulary(weight.matrix().rows);
        program_.add(std::make_unique<EmbedOp>(weight.matrix(), out, factor));
    }

    void norm(int x, int residual, int out, int64_t width, uintptr_t weight, uintptr_t bias, bool is_layer_norm, float weight_offset,
              float epsilon, const Acts& acts) {
        require(x >= 0 || residual >= 0, "a norm needs an input");
        const Rows rows = kind_of(x >= 0 ? x : residual);
        for (const int buffer : {x, residual, out})
            if (buffer >= 0) floats(buffer, rows, width);
        NormJob job{};
        job.weight = at<float>(weight);
        job.bias = at<float>(bias);
        job.is_layer_norm = is_layer_norm;
        job.weight_offset = weight_offset;
        job.epsilon = epsilon;
        job.x_stride = job.out_stride = job.width = width;
        program_.add(std::make_unique<NormOp>(rows, job, x, residual, out, act_buffers(acts, rows, width)));
    }

    void head_norm(int x, int64_t row_width, int64_t first, int64_t count, int64_t head_dim, uintptr_t weight, float weight_offset,
                   float epsilon) {
        const Rows rows = kind_of(x);
        floats(x, rows, row_width);
        require(head_dim > 0 && first >= 0 && count > 0 && count <= row_width && first <= row_width &&
                    (first + count) * head_dim <= row_width,
                "heads outside of their rows");
        NormJob job{};
        job.weight = at<float>(weight);
        job.weight_offset = weight_offset;
        job.epsilon = epsilon;
        job.width = head_dim;
        job.x_stride = job.out_stride = row_width;
        program_.add(std::make_unique<HeadNormOp>(rows, job, x, first, count));
    }

    // segments: weight, kind of activations, their buffer, address of the bias or 0.
    void matmul(const std::vector<std::tuple<const PackedMemory*, int, int, uintptr_t>>& segments, int out) {
        require(!segments.empty() && segments.size() <= size_t(kMaxSegments), "too many products in one op");
        const Rows rows = kind_of(out);
        std::vector<MatmulSegment> made;
        int64_t width = 0;
        for (const auto& [weight, kind, buffer, bias] : segments) {
            const PackedMatrix& m = weight->matrix();
            takes(m, kind);
            made.push_back({m, act_buffers({{kind, buffer}}, rows, m.columns)[0], at<float>(bias), width});
            width += m.rows;
        }
        floats(out, rows, width);
        program_.add(std::make_unique<MatmulOp>(rows, std::move(made), out, width));
    }

    void activate(int x, int out, int64_t width, int kind, bool is_gated, const Acts& acts) {
        const Rows rows = kind_of(x);
        floats(x, rows, is_gated ? 2 * width : width);
        if (out >= 0) floats(out, rows, width);
        require(kind >= 0 && kind <= int(Activation::gelu_erf), "no such activation");
        GatedJob job{};
        job.stride = is_gated ? 2 * width : width;
        job.width = job.out_stride = width;
        job.kind = Activation(kind);
        job.is_gated = is_gated;
        program_.add(std::make_unique<GatedOp>(rows, job, x, out, act_buffers(acts, rows, width)));
    }

    void convert(int x, int64_t width, const Acts& acts) {
        const Rows rows = kind_of(x);
        floats(x, rows, width);
        program_.add(std::make_unique<ConvertOp>(rows, width, x, act_buffers(acts, rows, width)));
    }

    void rope_kv(int qkv, int64_t n_heads, int64_t n_kv_heads, int64_t head_dim, int64_t rotary_dim, int table, int group,
                 uintptr_t k_cache, uintptr_t v_cache, int kv_type) {
        check_heads(qkv, n_heads, n_kv_heads, head_dim, kv_type);
        require(group >= 0, "a negative group of layers");
        program_.use_group(group);
        require(rotary_dim >= 0 && rotary_dim <= head_dim && rotary_dim % 2 == 0, "more rotated elements than the head has");
        require(rotary_dim == 0 || (table >= 0 && table < program_.num_tables()), "a rotation needs a table");
        RopeKvJob job{};
        job.q_stride = job.k_stride = job.v_stride = (n_heads + 2 * n_kv_heads) * head_dim;
        job.n_heads = n_heads;
        job.n_kv_heads = n_kv_heads;
        job.head_dim = head_dim;
        job.half = rotary_dim / 2;
        job.k_cache = at(k_cache);
        job.v_cache = at(v_cache);
        job.kv_type = Kv(kv_type);
        program_.add(std::make_unique<RopeKvOp>(job, qkv, table, group));
    }

    void attention(int qkv, int out, int64_t n_heads, int64_t n_kv_heads, int64_t head_dim, int group, uintptr_t k_cache,
                   uintptr_t v_cache, int kv_type, float scale, float softcap, int64_t window) {
        check_heads(qkv, n_heads, n_kv_heads, head_dim, kv_type);
        floats(out, Rows::tokens, n_heads * head_dim);
        require(window >= 0 && softcap >= 0 && group >= 0, "a window, a cap and a group cannot be negative");
        AttentionJob job{};
        job.q_stride = (n_heads + 2 * n_kv_heads) * head_dim;
        job.out_stride = n_heads * head_dim;
        job.k_cache = at(k_cache);
        job.v_cache = at(v_cache);
        job.kv_type = Kv(kv_type);
        job.scale = scale;
        job.softcap = softcap;
        job.window = window;
        program_.add(std::make_unique<AttentionOp>(job, qkv, out, program_.plan_for(group, n_heads, n_kv_heads, head_dim)));
    }

    // x: kind of activations and their buffer. Matrices hold those of all experts, each filled up to whole tiles.
    void experts(std::pair<int, int> x, int logits, int out, const PackedMemory& gate, const PackedMemory& up, const PackedMemory& down,
                 int down_kind, int64_t num_experts, int64_t hidden, int64_t inner, int64_t top_k, int routing_kind, bool is_renormalised,
                 float jitter, int activation) {
        const Rows rows = kind_of(out);
        require(num_experts > 0 && top_k > 0 && top_k <= num_experts, "more experts a token than there are");
        require(routing_kind >= 0 && routing_kind <= int(RoutingKind::sparsemixer), "no such routing");
        require(RoutingKind(routing_kind) != RoutingKind::sparsemixer || top_k == 2, "sparsemixer takes two experts a token");
        require(activation >= 0 && activation <= int(Activation::gelu_erf), "no such activation");
        takes(gate.matrix(), x.first);
        takes(up.matrix(), x.first);
        takes(down.matrix(), down_kind);
        floats(logits, rows, num_experts);
        floats(out, rows, hidden);
        const Routing routing{RoutingKind(routing_kind), num_experts, top_k, is_renormalised, jitter};
        ExpertBuffers buffers{act_buffers({x}, rows, hidden)[0], logits, out, own_buffer(rows, top_k * 16), {}, -1, {}, -1};
        buffers.grouped = {buffers.x.layout, own_buffer(rows, top_k * buffers.x.layout.row_bytes)};
        buffers.gate_up = own_buffer(rows, top_k * 2 * inner * 4);
        const ActLayout inner_layout = ActLayout::of(Act(down_kind), inner);
        buffers.inner = {inner_layout, own_buffer(rows, top_k * inner_layout.row_bytes)};
        buffers.results = own_buffer(rows, top_k * hidden * 4);
        program_.add(std::make_unique<ExpertsOp>(rows, routing, Activation(activation), expert_matrices(gate, num_experts, inner, hidden),
                                                 expert_matrices(up, num_experts, inner, hidden),
                                                 expert_matrices(down, num_experts, hidden, inner), buffers));
    }

    void add_gated(int x, int other, int gate, int64_t width) {
        const Rows rows = kind_of(x);
        floats(x, rows, width);
        floats(other, rows, width);
        floats(gate, rows, 1);
        program_.add(std::make_unique<AddGatedOp>(rows, width, x, other, gate));
    }

    void gather(const std::vector<std::pair<int, int>>& pairs) {
        for (const auto& [from, to] : pairs) {
            touch(from, Rows::tokens);
            touch(to, Rows::wanted);
            require(memory().row_bytes(from) == memory().row_bytes(to), "a gather between buffers of different widths");
        }
        program_.add(std::make_unique<GatherOp>(pairs));
    }

    void softcap(int x, int64_t width, float cap) { element(ElementOp::softcap, x, -1, width, cap); }
    void scale(int x, int64_t width, float factor) { element(ElementOp::scale, x, -1, width, factor); }
    void add(int x, int other, int64_t width) {
        require(other >= 0, "a sum needs a second operand");
        element(ElementOp::add, x, other, width, 0.0f);
    }

    void finish(int result) {
        require(!program_.is_finished(), "the program is finished already");
        require(kind_of(result) == Rows::wanted, "the result must have wanted rows");
        program_.finish(result);
    }

    // token_ids, positions [T], wanted [L], query_start [R + 1], context_lens [R], and for each group of layers slots [T]
    // and block_tables [R, max_blocks] → the result [L, width], a view that the next run overwrites.
    nb::ndarray<nb::numpy, float, nb::ndim<2>> run(Ids token_ids, Ids positions, Ids wanted, Counts query_start, Counts context_lens,
                                                   const std::vector<std::pair<Ids, Tables>>& groups) {
        const size_t tokens = token_ids.shape(0), requests = context_lens.shape(0);
        bool fits = positions.shape(0) == tokens && query_start.shape(0) == requests + 1;
        StepInput in{int64_t(tokens), int64_t(requests),  int64_t(wanted.shape(0)), token_ids.data(), positions.data(),
                     wanted.data(),   query_start.data(), context_lens.data(),      {}};
        for (const auto& [slots, tables] : groups) {
            fits = fits && slots.shape(0) == tokens && tables.shape(0) == requests;
            in.groups.push_back({slots.data(), tables.data(), int64_t(tables.shape(1))});
        }
        require(fits, "the arrays of a step differ in length");
        {
            nb::gil_scoped_release release;
            program_.run(in);
        }
        const size_t shape[2] = {wanted.shape(0), size_t(program_.result_width())};
        return {program_.result(), 2, shape, nb::find(this)};
    }

    int64_t num_ops() const { return program_.op_at(); }
    std::pair<int64_t, int64_t> bytes_per_row() {
        return {memory().bytes_per_row(Rows::tokens), memory().bytes_per_row(Rows::wanted)};
    }

   private:
    StepMemory& memory() { return program_.memory(); }

    Rows kind_of(int buffer) {
        require(buffer >= 0 && buffer < memory().count(), "there is no such buffer");
        return memory().rows(buffer);
    }

    // The op that is added next uses the buffer.
    void touch(int buffer, Rows rows) {
        require(!program_.is_finished(), "the program is finished already");
        require(kind_of(buffer) == rows, "an op over buffers of different rows");
        memory().touch(buffer, program_.op_at());
    }

    void floats(int buffer, Rows rows, int64_t width) {
        touch(buffer, rows);
        require(width > 0 && memory().row_bytes(buffer) == width * 4, "a buffer is not as wide as the op needs");
    }

    std::vector<ActBuffer> act_buffers(const Acts& acts, Rows rows, int64_t width) {
        require(acts.size() <= size_t(kMaxActs), "too many forms of activations");
        std::vector<ActBuffer> made;
        for (const auto& [kind, buffer] : acts) {
            require(kind >= 0 && kind <= int(Act::q8_256), "no such form of activations");
            touch(buffer, rows);
            made.push_back({ActLayout::of(Act(kind), width), buffer});
            require(memory().row_bytes(buffer) == made.back().layout.row_bytes, "a buffer does not fit its activations");
        }
        return made;
    }

    // A buffer of the op that is added next alone.
    int own_buffer(Rows rows, int64_t row_bytes) {
        const int made = buffer(rows == Rows::wanted, row_bytes);
        touch(made, rows);
        return made;
    }

    // A matrix is multiplied with float32, or with the form of activations that its type is made for.
    static void takes(const PackedMatrix& m, int kind) {
        require(kind == int(Act::f32) || kind == int(m.layout->act), "a form of activations that the matrix is not made for");
    }

    static ExpertMatrices expert_matrices(const PackedMemory& all, int64_t num_experts, int64_t rows, int64_t columns) {
        const PackedMatrix& m = all.matrix();
        require(rows > 0 && m.rows == num_experts * ((rows + kTileRows - 1) / kTileRows * kTileRows) && m.columns == columns,
                "the experts' matrices do not fit each other");
        return {m, num_experts, rows};
    }

    void check_heads(int qkv, int64_t n_heads, int64_t n_kv_heads, int64_t head_dim, int kv_type) {
        require(n_heads > 0 && n_kv_heads > 0 && head_dim > 0 && n_heads % n_kv_heads == 0, "an impossible number of heads");
        require(kv_type >= 0 && kv_type <= int(Kv::q8), "no such type of a cache");
        floats(qkv, Rows::tokens, (n_heads + 2 * n_kv_heads) * head_dim);
    }

    void element(ElementOp::Kind kind, int x, int other, int64_t width, float factor) {
        const Rows rows = kind_of(x);
        floats(x, rows, width);
        if (other >= 0) floats(other, rows, width);
        program_.add(std::make_unique<ElementOp>(rows, kind, width, x, other, factor));
    }

    Program program_;
};

}  // namespace

void bind_program(nb::module_& m) {
    nb::class_<Builder>(m, "Program")
        .def(nb::init<int64_t, int64_t>())
        .def("buffer", &Builder::buffer)
        .def("table", &Builder::table)
        .def("set_table", &Builder::set_table)
        .def("embed", &Builder::embed, nb::keep_alive<1, 2>())
        .def("norm", &Builder::norm)
        .def("head_norm", &Builder::head_norm)
        .def("matmul", &Builder::matmul)
        .def("activate", &Builder::activate)
        .def("convert", &Builder::convert)
        .def("rope_kv", &Builder::rope_kv)
        .def("attention", &Builder::attention)
        .def("experts", &Builder::experts, nb::keep_alive<1, 5>(), nb::keep_alive<1, 6>(), nb::keep_alive<1, 7>())
        .def("add_gated", &Builder::add_gated)
        .def("gather", &Builder::gather)
        .def("softcap", &Builder::softcap)
        .def("scale", &Builder::scale)
        .def("add", &Builder::add)
        .def("finish", &Builder::finish)
        .def("run", &Builder::run, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(),
             nb::arg().noconvert(), nb::arg().noconvert())
        .def_prop_ro("num_ops", &Builder::num_ops)
        .def_prop_ro("bytes_per_row", &Builder::bytes_per_row);
}
