#include "packed_memory.h"

#include <cstring>
#include <stdexcept>

#include "jobs.h"
#include "scratch.h"
#include "weight_memory.h"

namespace {

// Without data. Throws std::invalid_argument.
PackedMatrix shape_of(int type_id, int64_t rows, int64_t columns) {
    const TypeLayout* layout = type_layout(type_id);
    if (!layout) throw std::invalid_argument("this type cannot be kept as a packed matrix");
    const bool is_whole = layout->block_length <= 2 || columns % layout->block_length == 0;
    if (rows < 0 || columns <= 0 || rows > (int64_t(1) << 40) || columns > (int64_t(1) << 40) || !is_whole)
        throw std::invalid_argument("a packed matrix cannot have this size");
    return {layout, rows, columns, packed_blocks(*layout, columns), packed_tile_bytes(*layout, columns), nullptr};
}

}  // namespace

PackedMemory::PackedMemory(int type_id, int64_t rows, int64_t columns) : matrix_(shape_of(type_id, rows, columns)) {
    data_ = weight_memory(num_bytes());
    matrix_.data = data_.get();
}

PackedMemory::PackedMemory(const PackedMemory& whole, int64_t first, int64_t rows) : matrix_(whole.matrix_) {
    if (first < 0 || rows < 0 || first % kTileRows != 0 || first + rows > whole.matrix_.rows)
        throw std::invalid_argument("a part must begin with a tile of its matrix and end within it");
    matrix_.rows = rows;
    data_ = std::shared_ptr<uint8_t>(whole.data_, whole.data_.get() + first / kTileRows * matrix_.tile_bytes);
    matrix_.data = data_.get();
}

int64_t packed_bytes(int type_id, int64_t rows, int64_t columns) {
    const PackedMatrix shape = shape_of(type_id, rows, columns);
    return shape.tiles() * shape.tile_bytes;
}

int64_t PackedMemory::row_bytes() const {
    const TypeLayout& layout = *matrix_.layout;
    // Two weights of a 16-bit type share a word: the last one may be alone.
    return layout.block_length == 2 ? matrix_.columns * 2 : matrix_.blocks * layout.block_bytes;
}

void packed_row(const PackedMatrix& m, int64_t id, float* out) {
    const TypeLayout& layout = *m.layout;
    const int64_t blocks_bytes = m.blocks * layout.block_bytes, padded = m.blocks * layout.block_length;
    auto* row = reinterpret_cast<uint8_t*>(scratch(0, blocks_bytes / 4 + 1));
    unpack_row(layout, m.blocks, m.tile(id / kTileRows), int(id % kTileRows), blocks_bytes, row);
    float* values = padded == m.columns ? out : scratch(1, padded);
    current_kernels().decoder(layout.type_id)(row, values, padded);
    if (values != out) std::memcpy(out, values, size_t(m.columns) * 4);
}
