#include "weight_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <mutex>
#include <new>

namespace {

constexpr int64_t kHugePage = 2 << 20, kLine = 64;
constexpr int64_t kShared = 32 << 20;  // a mapping that several matrices share

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// A mapping that begins on a huge page. Fresh pages are zero, and none is taken before it is touched.
class Mapping {
   public:
    explicit Mapping(int64_t bytes) : bytes_(round_up(bytes, kHugePage)) {
        const int64_t asked = bytes_ + kHugePage;
        void* start = mmap(nullptr, size_t(asked), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (start == MAP_FAILED) throw std::bad_alloc();
        auto* begin = static_cast<uint8_t*>(start);
        const int64_t skipped = round_up(int64_t(reinterpret_cast<uintptr_t>(start)), kHugePage) - int64_t(reinterpret_cast<uintptr_t>(start));
        if (skipped) munmap(begin, size_t(skipped));
        data_ = begin + skipped;
        if (skipped < kHugePage) munmap(data_ + bytes_, size_t(kHugePage - skipped));
#if defined(MADV_HUGEPAGE)
        madvise(data_, size_t(bytes_), MADV_HUGEPAGE);
#endif
    }
    ~Mapping() { munmap(data_, size_t(bytes_)); }
    Mapping(const Mapping&) = delete;
    Mapping& operator=(const Mapping&) = delete;

    int64_t free() const { return bytes_ - used_; }
    uint8_t* take(int64_t bytes) {
        uint8_t* piece = data_ + used_;
        used_ += bytes;
        return piece;
    }

   private:
    int64_t bytes_, used_ = 0;
    uint8_t* data_;
};

}  // namespace

std::shared_ptr<uint8_t> weight_memory(int64_t bytes) {
    static std::mutex mutex;
    static std::weak_ptr<Mapping> shared;  // the one with room; it goes with its matrices
    const int64_t size = round_up(std::max<int64_t>(bytes, 1), kLine);
    const std::lock_guard lock(mutex);
    std::shared_ptr<Mapping> mapping = shared.lock();
    if (!mapping || mapping->free() < size) {
        const int64_t left = mapping ? mapping->free() : 0;
        mapping = std::make_shared<Mapping>(size > kShared / 2 ? size : kShared);
        if (mapping->free() - size > left) shared = mapping;
    }
    return {mapping, mapping->take(size)};
}
