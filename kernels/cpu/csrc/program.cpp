#include "program.h"

#include <algorithm>
#include <stdexcept>

namespace {

void require(bool holds, const char* message) {
    if (!holds) throw std::out_of_range(message);
}

}  // namespace

int Program::add_table(RopeTable table) {
    tables_.push_back(table);
    return int(tables_.size()) - 1;
}

int Program::plan_for(int group, int64_t n_heads, int64_t n_kv_heads, int64_t head_dim) {
    use_group(group);
    for (size_t i = 0; i < shapes_.size(); ++i) {
        const PlanShape& s = shapes_[i];
        if (s.group == group && s.n_heads == n_heads && s.n_kv_heads == n_kv_heads && s.head_dim == head_dim) return int(i);
    }
    shapes_.push_back({group, n_heads, n_kv_heads, head_dim});
    return int(shapes_.size()) - 1;
}

void Program::finish(int result) {
    memory_.touch(result, op_at());
    memory_.place();
    plans_ = std::vector<AttentionPlan>(shapes_.size());
    result_ = result;
}

void Program::check(const StepInput& in) const {
    require(in.num_tokens >= 0 && in.num_requests >= 0 && in.num_wanted >= 0, "a step of negative size");
    require(int64_t(in.groups.size()) >= num_groups_, "a group of layers without block tables");
    int64_t positions = INT64_MAX;
    for (const RopeTable& table : tables_) positions = std::min(positions, table.num_rows);
    for (int64_t t = 0; t < in.num_tokens; ++t) {
        require(in.token_ids[t] >= 0 && in.token_ids[t] < vocabulary_, "token id outside the vocabulary");
        require(in.positions[t] >= 0 && in.positions[t] < positions, "position outside the rotary table");
        for (const GroupInput& group : in.groups)
            require(group.slots[t] >= 0 && group.slots[t] < num_blocks_ * block_size_, "slot outside the pool");
    }
    for (int64_t i = 0; i < in.num_wanted; ++i) require(in.wanted[i] >= 0 && in.wanted[i] < in.num_tokens, "wanted token outside the step");
}

void Program::plan(const StepInput& in) {
    for (size_t i = 0; i < shapes_.size(); ++i) {
        const PlanShape& s = shapes_[i];
        const GroupInput& group = in.groups[size_t(s.group)];
        const AttentionTables tables{group.block_tables, group.tables_stride, in.query_start, in.context_lens,
                                     block_size_,        s.n_heads,           s.n_kv_heads,   s.head_dim};
        plans_[i].make(tables, in.num_requests, in.num_tokens, num_blocks_, team_size());
    }
}

void Program::run(const StepInput& in) {
    std::lock_guard lock(mutex_);
    require(is_finished(), "the program is not finished");
    check(in);
    plan(in);
    memory_.fit(in.num_tokens, in.num_wanted);
    const Step step{in, current_kernels(), memory_, tables_, plans_};
    run_team([&](Worker& worker) {
        for (const auto& op : ops_)
            if (step.rows(op->rows) > 0) op->run(step, worker);
    });
}
