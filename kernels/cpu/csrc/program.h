// A model's step as a flat list of native operations over buffers. It is put together once, from Python
// (bindings_program.cpp), and then each step is one call in which the whole team goes through the list together.
#pragma once
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "attention_plan.h"
#include "jobs.h"
#include "step_memory.h"
#include "team.h"

// Where a group of layers has the step's tokens and contexts.
struct GroupInput {
    const int64_t* slots;         // [num_tokens]
    const int32_t* block_tables;  // [num_requests, tables_stride]
    int64_t tables_stride;
};

// The tokens of one step and the requests they belong to; see serve_app/batch.py. All arrays must live during the run.
struct StepInput {
    int64_t num_tokens, num_requests, num_wanted;
    const int64_t *token_ids, *positions;       // [num_tokens]
    const int64_t* wanted;                      // [num_wanted]: tokens whose logits are wanted
    const int32_t *query_start, *context_lens;  // [num_requests + 1], [num_requests]
    std::vector<GroupInput> groups;
};

// Cosines and sines by position; may be exchanged for a longer one between steps.
struct RopeTable {
    const float* data;
    int64_t num_rows;
};

// What the ops of one run see.
struct Step {
    const StepInput& in;
    const KernelTable& kernels;
    const StepMemory& memory;
    const std::vector<RopeTable>& tables;
    std::vector<AttentionPlan>& plans;

    int64_t rows(Rows kind) const { return kind == Rows::tokens ? in.num_tokens : in.num_wanted; }
    float* floats(int buffer) const { return buffer < 0 ? nullptr : reinterpret_cast<float*>(memory.at(buffer)); }
};

// One operation over all rows of its kind. Every member of the team calls run, which ends with a barrier.
class Op {
   public:
    explicit Op(Rows rows) : rows(rows) {}
    virtual ~Op() = default;
    virtual void run(const Step& step, Worker& worker) const = 0;

    const Rows rows;
};

class Program {
   public:
    // For a KV pool of num_blocks blocks of block_size slots.
    Program(int64_t num_blocks, int64_t block_size) : num_blocks_(num_blocks), block_size_(block_size) {}

    // -- putting it together; op_at() is the number of the op that add() gets next
    StepMemory& memory() { return memory_; }
    int64_t op_at() const { return int64_t(ops_.size()); }
    void add(std::unique_ptr<Op> op) { ops_.push_back(std::move(op)); }
    int num_tables() const { return int(tables_.size()); }
    int add_table(RopeTable table);
    void set_table(int index, RopeTable table) { tables_.at(size_t(index)) = table; }
    // The plan for attention of this shape, the same for all layers of a group that have it.
    int plan_for(int group, int64_t n_heads, int64_t n_kv_heads, int64_t head_dim);
    // Some op uses this group's slots.
    void use_group(int group) { num_groups_ = group < num_groups_ ? num_groups_ : group + 1; }
    void limit_vocabulary(int64_t num_ids) { vocabulary_ = num_ids < vocabulary_ ? num_ids : vocabulary_; }
    // Ends the building; the result buffer, with a row for each wanted token, keeps its place to the end.
    void finish(int result);
    bool is_finished() const { return result_ >= 0; }

    // Runs a step; throws std::out_of_range before anything is written where an index leaves its range. A second caller
    // waits.
    void run(const StepInput& in);

    // The last step's result, valid until the next run.
    float* result() const { return reinterpret_cast<float*>(memory_.at(result_)); }
    int64_t result_width() const { return memory_.row_bytes(result_) / 4; }

   private:
    struct PlanShape {
        int group;
        int64_t n_heads, n_kv_heads, head_dim;
    };
    void check(const StepInput& in) const;
    void plan(const StepInput& in);

    const int64_t num_blocks_, block_size_;
    StepMemory memory_;
    std::vector<std::unique_ptr<Op>> ops_;
    std::vector<RopeTable> tables_;
    std::vector<PlanShape> shapes_;
    std::vector<AttentionPlan> plans_;
    int64_t vocabulary_ = INT64_MAX;
    int result_ = -1, num_groups_ = 1;
    std::mutex mutex_;
};
