#include "packed_memory.h"

#include <sys/mman.h>

#include <cstring>
#include <new>
#include <stdexcept>

#include "jobs.h"
#include "scratch.h"

namespace {

constexpr int64_t kHugePage = 2 << 20;

}  // namespace

PackedMemory::PackedMemory(int type_id, int64_t rows, int64_t columns) {
    const TypeLayout* layout = type_layout(type_id);
    if (!layout) throw std::invalid_argument("this type cannot be kept as a packed matrix");
    const bool is_whole = layout->block_length <= 2 || columns % layout->block_length == 0;
    if (rows < 0 || columns <= 0 || rows > (int64_t(1) << 40) || columns > (int64_t(1) << 40) || !is_whole)
        throw std::invalid_argument("a packed matrix cannot have this size");
    matrix_ = {layout, rows, columns, packed_blocks(*layout, columns), packed_tile_bytes(*layout, columns), nullptr};
    const int64_t bytes = num_bytes();
    // Large matrices begin on a huge page, so that walking through them misses no translation. Fresh pages are zero.
    const bool is_large = bytes >= 2 * kHugePage;
    mapped_bytes_ = bytes + (is_large ? kHugePage : 64);
    void* start = mmap(nullptr, size_t(mapped_bytes_), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED) throw std::bad_alloc();
    data_ = static_cast<uint8_t*>(start);
    if (is_large) {
        const int64_t skipped = (kHugePage - int64_t(reinterpret_cast<uintptr_t>(start) % kHugePage)) % kHugePage;
        const int64_t kept = (bytes + 4095) / 4096 * 4096;
        if (skipped) munmap(start, size_t(skipped));
        data_ += skipped;
        if (mapped_bytes_ > skipped + kept) munmap(data_ + kept, size_t(mapped_bytes_ - skipped - kept));
        mapped_bytes_ = kept;
#if defined(MADV_HUGEPAGE)
        madvise(data_, size_t(mapped_bytes_), MADV_HUGEPAGE);
#endif
    }
    matrix_.data = data_;
}

PackedMemory::~PackedMemory() { munmap(data_, size_t(mapped_bytes_)); }

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
