// The buffers of a program: which of them live at the same time, where each lies, and the memory behind them.
#pragma once
#include <cstdint>
#include <vector>

// How many rows a buffer has in a step: one for each token, or one for each token whose logits are wanted.
enum class Rows : int { tokens = 0, wanted = 1 };
constexpr int kRowKinds = 2;

// Buffers that are never needed at the same time share their place. Places are counted in bytes a row, so that one plan
// serves steps of every size; they are multiples of 64 bytes.
class StepMemory {
   public:
    StepMemory() = default;
    ~StepMemory();
    StepMemory(const StepMemory&) = delete;
    StepMemory& operator=(const StepMemory&) = delete;

    int add(Rows rows, int64_t row_bytes);
    // Op number `op` reads or writes the buffer. A buffer lives from the first op that touches it to the last.
    void touch(int buffer, int64_t op);
    // Gives every buffer its place; to be called once, when all is added.
    void place();
    // Memory for a step of so many rows of each kind. Throws std::bad_alloc. Keeps what it has if that is enough.
    void fit(int64_t num_tokens, int64_t num_wanted);

    int count() const { return int(buffers_.size()); }
    Rows rows(int buffer) const { return buffers_[buffer].rows; }
    int64_t row_bytes(int buffer) const { return buffers_[buffer].row_bytes; }
    uint8_t* at(int buffer) const {
        const Buffer& b = buffers_[buffer];
        return memory_[int(b.rows)].data + b.offset * memory_[int(b.rows)].num_rows;
    }
    // Bytes that all places of a kind take together, for one row.
    int64_t bytes_per_row(Rows rows) const { return memory_[int(rows)].bytes_per_row; }

   private:
    struct Buffer {
        Rows rows;
        int64_t row_bytes;  // a multiple of 4
        int64_t first, last;
        int64_t offset;  // to be multiplied by the number of rows
    };
    struct Memory {
        uint8_t* data = nullptr;
        int64_t num_bytes = 0, num_rows = 0, bytes_per_row = 0;
    };
    bool is_apart(const Buffer& a, const Buffer& b) const;

    std::vector<Buffer> buffers_;
    Memory memory_[kRowKinds];
};
