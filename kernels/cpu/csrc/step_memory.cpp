#include "step_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <new>
#include <numeric>

namespace {

constexpr int64_t kHugePage = 2 << 20;

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

uint8_t* allocate(int64_t num_bytes) {
    const bool is_large = num_bytes >= kHugePage;
    void* data = std::aligned_alloc(is_large ? kHugePage : 64, size_t(num_bytes));
    if (!data) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    if (is_large) madvise(data, size_t(num_bytes), MADV_HUGEPAGE);
#endif
    return static_cast<uint8_t*>(data);
}

}  // namespace

StepMemory::~StepMemory() {
    for (Memory& m : memory_) std::free(m.data);
}

int StepMemory::add(Rows rows, int64_t row_bytes) {
    buffers_.push_back({rows, row_bytes, -1, -1, 0});
    return count() - 1;
}

void StepMemory::touch(int buffer, int64_t op) {
    Buffer& b = buffers_[buffer];
    if (b.first < 0) b.first = op;
    b.last = op;
}

bool StepMemory::is_apart(const Buffer& a, const Buffer& b) const {
    return a.rows != b.rows || a.last < b.first || b.last < a.first;
}

void StepMemory::place() {
    // The largest first, each as low as those that it meets allow.
    std::vector<int> order(buffers_.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return buffers_[a].row_bytes > buffers_[b].row_bytes; });
    std::vector<Buffer*> placed;  // by offset
    for (const int index : order) {
        Buffer& buffer = buffers_[index];
        const int64_t size = round_up(buffer.row_bytes, 64);
        buffer.offset = 0;
        for (const Buffer* other : placed) {
            if (is_apart(buffer, *other) || other->offset + round_up(other->row_bytes, 64) <= buffer.offset) continue;
            if (other->offset >= buffer.offset + size) break;
            buffer.offset = other->offset + round_up(other->row_bytes, 64);
        }
        placed.insert(std::upper_bound(placed.begin(), placed.end(), &buffer,
                                       [](const Buffer* a, const Buffer* b) { return a->offset < b->offset; }),
                      &buffer);
        int64_t& total = memory_[int(buffer.rows)].bytes_per_row;
        total = std::max(total, buffer.offset + size);
    }
}

void StepMemory::fit(int64_t num_tokens, int64_t num_wanted) {
    const int64_t num_rows[kRowKinds] = {num_tokens, num_wanted};
    for (int kind = 0; kind < kRowKinds; ++kind) {
        Memory& m = memory_[kind];
        m.num_rows = num_rows[kind];
        const int64_t wanted = m.bytes_per_row * m.num_rows;
        if (wanted <= m.num_bytes) continue;
        const int64_t roomy = wanted + wanted / 8, rounded = round_up(roomy, roomy >= kHugePage ? kHugePage : 4096);
        std::free(m.data);
        m = {nullptr, 0, m.num_rows, m.bytes_per_row};
        m.data = allocate(rounded);
        m.num_bytes = rounded;
    }
}
