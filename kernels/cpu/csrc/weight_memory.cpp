#include "weight_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <deque>
#include <mutex>
#include <new>
#include <thread>

namespace {

constexpr int64_t kHugePage = 2 << 20, kSmallPage = 4 << 10, kLine = 64;
constexpr int64_t kShared = 32 << 20;  // a mapping that several matrices share
constexpr int kPopulateWrite = 23;     // MADV_POPULATE_WRITE, which older headers do not name

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

    int64_t bytes() const { return bytes_; }
    int64_t free() const { return bytes_ - used_; }
    // Takes all pages now. Others may use the memory meanwhile.
    void populate() {
        if (madvise(data_, size_t(bytes_), kPopulateWrite) == 0) return;
        for (int64_t at = 0; at < bytes_; at += kSmallPage) __atomic_fetch_or(data_ + at, uint8_t(0), __ATOMIC_RELAXED);
    }
    uint8_t* take(int64_t bytes) {
        uint8_t* piece = data_ + used_;
        used_ += bytes;
        return piece;
    }

   private:
    int64_t bytes_, used_ = 0;
    uint8_t* data_;
};

int64_t size_of(int64_t bytes) { return round_up(std::max<int64_t>(bytes, 1), kLine); }

// Large matrices have a mapping of their own.
int64_t mapping_size(int64_t size) { return size > kShared / 2 ? size : kShared; }

// Mappings that a thread makes ready before they are asked for.
class Stock {
   public:
    ~Stock() { end(); }

    void begin(const std::vector<int64_t>& sizes) {
        end();
        int64_t room = 0;
        for (int64_t bytes : sizes) {
            const int64_t size = size_of(bytes), whole = mapping_size(size);
            if (whole == size) {
                wanted_.push_back(round_up(whole, kHugePage));
            } else {
                if (room < size) wanted_.push_back(room = whole);
                room -= size;
            }
        }
        thread_ = std::thread([this] { fill(); });
    }

    void end() {
        {
            const std::lock_guard lock(mutex_);
            wanted_.clear();
            ready_.clear();
        }
        if (thread_.joinable()) thread_.join();
    }

    // A mapping of this size: one of the stock, or a new one.
    std::shared_ptr<Mapping> take(int64_t bytes) {
        const int64_t size = round_up(bytes, kHugePage);
        const std::lock_guard lock(mutex_);
        const auto ready = std::find_if(ready_.begin(), ready_.end(), [&](const auto& mapping) { return mapping->bytes() == size; });
        if (ready != ready_.end()) {
            auto mapping = *ready;
            ready_.erase(ready);
            return mapping;
        }
        // Who asks is faster than the thread: it need not make this one any more.
        const auto wanted = std::find(wanted_.begin(), wanted_.end(), size);
        if (wanted != wanted_.end()) wanted_.erase(wanted);
        return std::make_shared<Mapping>(bytes);
    }

   private:
    void fill() {
        while (true) {
            std::shared_ptr<Mapping> mapping;
            {
                const std::lock_guard lock(mutex_);
                if (wanted_.empty()) return;
                try {
                    mapping = std::make_shared<Mapping>(wanted_.front());
                } catch (const std::bad_alloc&) {
                    wanted_.clear();  // who needs it will say so
                    return;
                }
                wanted_.pop_front();
                ready_.push_back(mapping);
            }
            mapping->populate();
        }
    }

    std::mutex mutex_;
    std::deque<int64_t> wanted_;  // bytes
    std::deque<std::shared_ptr<Mapping>> ready_;
    std::thread thread_;
};

Stock& stock() {
    static Stock instance;
    return instance;
}

std::mutex mutex;
std::weak_ptr<Mapping> shared;  // the one with room; it goes with its matrices

}  // namespace

void end_weight_preparation() {
    stock().end();
    const std::lock_guard lock(mutex);
    shared.reset();
}

void prepare_weight_memory(const std::vector<int64_t>& sizes) { stock().begin(sizes); }

std::shared_ptr<uint8_t> weight_memory(int64_t bytes) {
    const int64_t size = size_of(bytes);
    const std::lock_guard lock(mutex);
    std::shared_ptr<Mapping> mapping = shared.lock();
    if (!mapping || mapping->free() < size) {
        const int64_t left = mapping ? mapping->free() : 0;
        mapping = stock().take(mapping_size(size));
        if (mapping->free() - size > left) shared = mapping;
    }
    return {mapping, mapping->take(size)};
}
