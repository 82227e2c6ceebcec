#include "threads.h"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "scratch.h"

namespace {

// Operations, of which a core does some thousand in a microsecond. With less work than this, waking a thread and waiting
// for it costs more than it gives.
constexpr int64_t kWorthSharing = 1 << 21;
// Pieces are small, since the last one to end is waited for and its thread may have lost its core meanwhile.
constexpr int64_t kSmallestPiece = 1 << 17;

struct Work {
    const std::function<void(int64_t, int64_t)>* body;
    int64_t count, piece;
    std::atomic<int64_t> next{0};

    void drain() {
        for (int64_t begin; (begin = next.fetch_add(piece, std::memory_order_relaxed)) < count;)
            (*body)(begin, std::min(begin + piece, count));
    }
};

class Pool {
   public:
    explicit Pool(int helpers) {
        for (int i = 0; i < helpers; ++i) threads_.emplace_back([this] { serve(); });
    }

    ~Pool() {
        {
            std::lock_guard lock(mutex_);
            is_closing_ = true;
        }
        wake_.notify_all();
        for (auto& thread : threads_) thread.join();
    }

    void run(Work& work) {
        {
            std::lock_guard lock(mutex_);
            work_ = &work;
            ++generation_;
        }
        wake_.notify_all();
        work.drain();
        std::unique_lock lock(mutex_);
        work_ = nullptr;  // a helper that has not begun yet has nothing left to do
        done_.wait(lock, [this] { return num_active_ == 0; });
    }

   private:
    void serve() {
        uint64_t seen = 0;
        std::unique_lock lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return is_closing_ || (work_ && generation_ != seen); });
            if (is_closing_) return;
            seen = generation_;
            Work* work = work_;
            ++num_active_;
            lock.unlock();
            work->drain();
            lock.lock();
            if (--num_active_ == 0) done_.notify_one();
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_, done_;
    Work* work_ = nullptr;
    uint64_t generation_ = 0;
    int num_active_ = 0;
    bool is_closing_ = false;
    std::vector<std::thread> threads_;
};

// The pool is made at its first use and again in a forked child, which inherits the object but not its threads.
std::mutex* pool_mutex = new std::mutex;
std::unique_ptr<Pool>* pool = new std::unique_ptr<Pool>;
int wanted_threads = 1;

void forget_pool() {
    pool_mutex = new std::mutex;
    pool = new std::unique_ptr<Pool>;
}

[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, forget_pool);

struct Buffer {
    float* data = nullptr;
    int64_t capacity = 0;
    ~Buffer() { std::free(data); }
};

thread_local Buffer buffers[4];

}  // namespace

float* scratch(int slot, int64_t count) {
    Buffer& buffer = buffers[slot];
    if (buffer.capacity < count) {
        std::free(buffer.data);
        buffer.capacity = (count + count / 4 + 63) / 16 * 16;
        buffer.data = static_cast<float*>(std::aligned_alloc(64, size_t(buffer.capacity) * sizeof(float)));
        if (!buffer.data) {
            std::fputs("sirocco kernels: out of memory\n", stderr);
            std::abort();
        }
    }
    return buffer.data;
}

void set_num_threads(int count) {
    std::lock_guard lock(*pool_mutex);
    wanted_threads = std::clamp(count, 1, 256);
    pool->reset();
}

int num_threads() { return wanted_threads; }

void parallel_for(int64_t count, int64_t cost, const std::function<void(int64_t, int64_t)>& body) {
    if (count <= 0) return;
    const int threads = wanted_threads;
    if (threads > 1 && count * cost >= kWorthSharing) {
        std::unique_lock lock(*pool_mutex, std::try_to_lock);
        if (lock) {
            if (!*pool) *pool = std::make_unique<Pool>(threads - 1);
            const int64_t share = (count + threads * 8 - 1) / (threads * 8);
            const int64_t smallest = kSmallestPiece / std::max<int64_t>(cost, 1) + 1;
            Work work{&body, count, (std::max(share, smallest) + 3) / 4 * 4};
            (*pool)->run(work);
            return;
        }
    }
    body(0, count);
}
