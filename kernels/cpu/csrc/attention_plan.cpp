#include "attention_plan.h"

#include <algorithm>
#include <stdexcept>

#include "jobs.h"

namespace {

// Rows (query, head of the group) that share a pass over the keys. Few rows are worth no transposed copy of the keys: they
// read the cache as it lies, for all KV heads together, since a token's heads are neighbours in memory.
constexpr int64_t kUnitRows = 128;

// Multiplications for which a unit of its own is worth while: some microseconds.
constexpr int64_t kSmallestUnit = 1 << 18;

int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

void require(bool holds, const char* message) {
    if (!holds) throw std::out_of_range(message);
}

}  // namespace

void AttentionPlan::check(int64_t num_requests, int64_t num_tokens, int64_t num_blocks) const {
    const AttentionTables& t = tables_;
    require(t.n_kv_heads > 0 && t.n_heads % t.n_kv_heads == 0 && t.head_dim > 0 && t.block_size > 0, "attention: sizes do not fit");
    require(t.query_start[0] == 0 && t.query_start[num_requests] == num_tokens, "attention: query_start does not span the tokens");
    for (int64_t r = 0; r < num_requests; ++r) {
        const int64_t count = t.query_start[r + 1] - t.query_start[r], context = t.context_lens[r];
        require(count >= 0 && context >= count, "attention: more query tokens than context");
        const int64_t blocks = ceil_div(context, t.block_size);
        require(blocks <= t.tables_stride, "attention: context longer than its block table");
        for (int64_t b = 0; b < blocks; ++b) {
            const int32_t id = t.block_tables[r * t.tables_stride + b];
            require(id >= 0 && id < num_blocks, "attention: block outside the pool");
        }
    }
}

// whole, which has all its segments, as one unit or as several of segments_each.
void AttentionPlan::add_units(AttentionUnit whole, int64_t segments_each) {
    const int32_t end = whole.segment_end;
    if (end <= segments_each) {
        units_.push_back(whole);
        return;
    }
    AttentionUnit unit = whole;
    unit.part = int32_t(parts_.size());
    parts_.push_back({whole, num_partials_, int32_t(ceil_div(end, segments_each))});
    const int64_t rows = int64_t(whole.count) * (whole.head_end - whole.head_begin) * (tables_.n_heads / tables_.n_kv_heads);
    num_partials_ += end * rows * partial_row(tables_.head_dim);
    for (int32_t s = 0; s < end; s += int32_t(segments_each)) {
        unit.segment_begin = s;
        unit.segment_end = std::min(end, s + int32_t(segments_each));
        units_.push_back(unit);
    }
}

// The query tokens [first, first + count) of a request; share: multiplications that a unit should have.
void AttentionPlan::cut_rows(int32_t request, int32_t first, int32_t count, int64_t share, bool is_streamed) {
    const AttentionTables& t = tables_;
    const int64_t queries = t.query_start[request + 1] - t.query_start[request];
    const int64_t keys = t.context_lens[request] - queries + first + count, segments = ceil_div(keys, kSegment);
    const int64_t segment_work = count * (t.n_heads / t.n_kv_heads) * std::min(keys, kSegment) * t.head_dim * 2;  // of one KV head
    int64_t heads = is_streamed ? std::clamp<int64_t>(share / segment_work, 1, t.n_kv_heads) : 1;
    heads = ceil_div(t.n_kv_heads, ceil_div(t.n_kv_heads, heads));
    const int64_t each = std::max<int64_t>(1, share / (segment_work * heads));
    // A last unit that is much smaller than the others is not worth a merge.
    const int64_t segments_each = 2 * segments <= 3 * each ? segments : each;
    for (int64_t h = 0; h < t.n_kv_heads; h += heads)
        add_units({request, first, count, int32_t(h), int32_t(std::min(h + heads, t.n_kv_heads)), 0, int32_t(segments), -1},
                  segments_each);
}

void AttentionPlan::make(const AttentionTables& tables, int64_t num_requests, int64_t num_tokens, int64_t num_blocks,
                         int num_threads) {
    tables_ = tables;
    check(num_requests, num_tokens, num_blocks);
    units_.clear();
    parts_.clear();
    num_partials_ = 0;
    work_ = 0;
    const int64_t group = tables.n_heads / tables.n_kv_heads, per_key = tables.n_heads * tables.head_dim * 2;
    for (int64_t r = 0; r < num_requests; ++r) {
        const int64_t count = tables.query_start[r + 1] - tables.query_start[r];
        work_ += count * (2 * tables.context_lens[r] - count + 1) / 2 * per_key;
    }
    const int64_t share = num_threads > 1 ? std::max(work_ / (8 * num_threads), kSmallestUnit) : INT64_MAX / 4;
    for (int32_t r = 0; r < num_requests; ++r) {
        const int32_t count = tables.query_start[r + 1] - tables.query_start[r];
        if (count * group <= kStreamRows) {
            if (count) cut_rows(r, 0, count, share, true);
            continue;
        }
        // Long and short tiles in turn, so that any run of units has about the same work.
        const int32_t tile = int32_t(std::max<int64_t>(1, kUnitRows / group)), tiles = int32_t(ceil_div(count, tile));
        for (int32_t i = 0; i < tiles; ++i) {
            const int32_t first = (i % 2 ? i / 2 : tiles - 1 - i / 2) * tile;
            cut_rows(r, first, std::min(tile, count - first), share, false);
        }
    }
    const int64_t num_parts = int64_t(parts_.size());
    if (pending_capacity_ < num_parts) {
        pending_capacity_ = num_parts * 2;
        pending_ = std::make_unique<std::atomic<int32_t>[]>(size_t(pending_capacity_));
    }
    for (int64_t p = 0; p < num_parts; ++p) pending_[p] = parts_[p].num_units;
    if (partials_capacity_ < num_partials_) {
        partials_capacity_ = num_partials_ + num_partials_ / 4;
        partials_.reset(new float[size_t(partials_capacity_)]);
    }
}

void AttentionPlan::run(const KernelTable& kernels, const AttentionJob& job, int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; ++u) {
        const AttentionUnit& unit = units_[size_t(u)];
        if (unit.part < 0) {
            kernels.attend(tables_, job, unit, nullptr);
            continue;
        }
        const Part& part = parts_[size_t(unit.part)];
        kernels.attend(tables_, job, unit, partials_.get() + part.partials);
        if (pending_[unit.part].fetch_sub(1, std::memory_order_acq_rel) == 1) {
            kernels.merge_segments(tables_, job, part.whole, partials_.get() + part.partials);
            pending_[unit.part].store(part.num_units, std::memory_order_relaxed);  // for the next layer
        }
    }
}
