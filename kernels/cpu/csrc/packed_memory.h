// A packed matrix that owns its memory.
#pragma once
#include <memory>

#include "packed.h"

class PackedMemory {
   public:
    // Zeroed; throws std::bad_alloc, or std::invalid_argument for a type or size that cannot be kept.
    PackedMemory(int type_id, int64_t rows, int64_t columns);
    // Rows [first, first + rows) of another one, whose memory both then hold; first is a multiple of 16. Throws
    // std::invalid_argument.
    PackedMemory(const PackedMemory& whole, int64_t first, int64_t rows);
    PackedMemory(const PackedMemory&) = delete;
    PackedMemory& operator=(const PackedMemory&) = delete;

    const PackedMatrix& matrix() const { return matrix_; }
    uint8_t* tile(int64_t t) { return data_.get() + t * matrix_.tile_bytes; }
    int64_t num_bytes() const { return matrix_.tiles() * matrix_.tile_bytes; }
    // Bytes of a row in file order.
    int64_t row_bytes() const;

   private:
    PackedMatrix matrix_{};
    std::shared_ptr<uint8_t> data_;
};

// Bytes of such a matrix. Throws std::invalid_argument.
int64_t packed_bytes(int type_id, int64_t rows, int64_t columns);

// Row `id` of a packed matrix as float32 [columns]; the type must have a decoder.
void packed_row(const PackedMatrix& matrix, int64_t id, float* out);
