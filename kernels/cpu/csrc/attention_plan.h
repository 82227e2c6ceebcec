// Cuts the attention of a step into units for the threads, once for all its layers.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "attention.h"

struct KernelTable;

class AttentionPlan {
   public:
    // Cuts the step; throws std::out_of_range where the tables do not fit each other or leave the pool of num_blocks.
    // Keeps the tables' addresses. May be called again for the next step.
    void make(const AttentionTables& tables, int64_t num_requests, int64_t num_tokens, int64_t num_blocks, int num_threads);

    int64_t num_units() const { return int64_t(units_.size()); }
    int64_t work() const { return work_; }  // multiplications of all units together

    // Runs units of one layer, from any thread. Every unit must run once before the next layer begins.
    void run(const KernelTable& kernels, const AttentionJob& job, int64_t begin, int64_t end);

   private:
    struct Part {
        AttentionUnit whole;  // all its segments
        int64_t partials;     // where they begin
        int32_t num_units;
    };
    void check(int64_t num_requests, int64_t num_tokens, int64_t num_blocks) const;
    void cut_rows(int32_t request, int32_t first, int32_t count, int64_t share, bool is_streamed);
    void add_units(AttentionUnit whole, int64_t segments_each);

    AttentionTables tables_{};
    std::vector<AttentionUnit> units_;
    std::vector<Part> parts_;
    std::unique_ptr<std::atomic<int32_t>[]> pending_;  // units of a part that are not done
    int64_t pending_capacity_ = 0, work_ = 0, num_partials_ = 0;
    std::unique_ptr<float[]> partials_;
    int64_t partials_capacity_ = 0;
};
