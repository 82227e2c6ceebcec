#include "program_ops.h"

#include <algorithm>
#include <cstring>

#include "packed_memory.h"

namespace {

template <typename Job>
void fill_acts(const Step& step, const std::vector<ActBuffer>& acts, Job& job) {
    job.num_acts = int(acts.size());
    for (size_t i = 0; i < acts.size(); ++i) job.acts[i] = {acts[i].layout, step.memory.at(acts[i].buffer)};
}

}  // namespace

void EmbedOp::run(const Step& step, Worker& worker) const {
    worker.share(step.in.num_tokens, [&](int64_t begin, int64_t end) {
        float* rows = step.floats(out) + begin * weight.columns;
        for (int64_t t = begin; t < end; ++t) packed_row(weight, step.in.token_ids[t], rows + (t - begin) * weight.columns);
        if (factor != 1.0f) step.kernels.scale(rows, (end - begin) * weight.columns, factor);
    });
}

void NormOp::run(const Step& step, Worker& worker) const {
    NormJob j = job;
    j.x = step.floats(x);
    j.residual = step.floats(residual);
    j.out = step.floats(out);
    fill_acts(step, acts, j);
    worker.share(step.rows(rows), [&](int64_t begin, int64_t end) { step.kernels.norm(j, begin, end); });
}

void HeadNormOp::run(const Step& step, Worker& worker) const {
    worker.share(step.rows(rows) * count, [&](int64_t begin, int64_t end) {
        NormJob j = job;
        for (int64_t unit = begin; unit < end; ++unit) {
            j.out = step.floats(x) + (first + unit % count) * j.width;
            j.x = j.out;
            step.kernels.norm(j, unit / count, unit / count + 1);
        }
    });
}

void MatmulOp::run(const Step& step, Worker& worker) const {
    const int64_t num_rows = step.rows(rows);
    MatmulJob jobs[kMaxSegments];
    MatmulUnits units[kMaxSegments];
    int64_t total = 0;
    for (size_t i = 0; i < segments.size(); ++i) {
        const MatmulSegment& s = segments[i];
        jobs[i] = {s.weight, {s.x.layout, step.memory.at(s.x.buffer)}, s.bias, step.floats(out) + s.offset, out_stride};
        units[i] = matmul_units(jobs[i], num_rows, worker.count);
        total += units[i].count;
    }
    worker.share(total, [&](int64_t begin, int64_t end) {
        int64_t first = 0;  // unit of the segment within all
        for (size_t i = 0; i < segments.size(); first += units[i++].count) {
            const int64_t from = std::max(begin - first, int64_t(0)), to = std::min(end - first, units[i].count);
            if (from < to) run_units(step.kernels.matmul, jobs[i], units[i], num_rows, from, to);
        }
    });
}

void GatedOp::run(const Step& step, Worker& worker) const {
    GatedJob j = job;
    j.gate_up = step.floats(x);
    j.out = step.floats(out);
    fill_acts(step, acts, j);
    worker.share(step.rows(rows) * column_groups(j.width), [&](int64_t begin, int64_t end) { step.kernels.activate(j, begin, end); });
}

void ConvertOp::run(const Step& step, Worker& worker) const {
    ConvertJob j{step.floats(x), width, width, 0, {}};
    fill_acts(step, acts, j);
    worker.share(step.rows(rows) * column_groups(width), [&](int64_t begin, int64_t end) { step.kernels.convert(j, begin, end); });
}

void RopeKvOp::run(const Step& step, Worker& worker) const {
    RopeKvJob j = job;
    j.q = step.floats(qkv);
    j.k = j.q + j.n_heads * j.head_dim;
    j.v = j.k + j.n_kv_heads * j.head_dim;
    j.positions = step.in.positions;
    j.slots = step.in.groups[size_t(group)].slots;
    if (table >= 0) j.table = step.tables[size_t(table)].data;
    worker.share(step.in.num_tokens, [&](int64_t begin, int64_t end) { step.kernels.rope_kv(j, begin, end); });
}

void AttentionOp::run(const Step& step, Worker& worker) const {
    AttentionJob j = job;
    j.q = step.floats(qkv);
    j.out = step.floats(out);
    AttentionPlan& p = step.plans[size_t(plan)];
    worker.share(p.num_units(), [&](int64_t begin, int64_t end) { p.run(step.kernels, j, begin, end); });
}

void GatherOp::run(const Step& step, Worker& worker) const {
    worker.share(step.in.num_wanted, [&](int64_t begin, int64_t end) {
        for (const auto& [from, to] : pairs) {
            const int64_t bytes = step.memory.row_bytes(from);
            for (int64_t i = begin; i < end; ++i)
                std::memcpy(step.memory.at(to) + i * bytes, step.memory.at(from) + step.in.wanted[i] * bytes, size_t(bytes));
        }
    });
}

void ElementOp::run(const Step& step, Worker& worker) const {
    constexpr int64_t kPiece = 2048;
    const int64_t count = step.rows(rows) * width;
    float *values = step.floats(x), *others = step.floats(other);
    worker.share((count + kPiece - 1) / kPiece, [&](int64_t begin, int64_t end) {
        const int64_t from = begin * kPiece, size = std::min(end * kPiece, count) - from;
        if (kind == softcap) step.kernels.softcap(values + from, size, factor);
        else if (kind == scale) step.kernels.scale(values + from, size, factor);
        else step.kernels.add(values + from, others + from, size);
    });
}
