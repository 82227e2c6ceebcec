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

// Waits a few tens of microseconds for what mostly comes at once: sleeping and being woken costs more than that.
template <typename Holds>
bool spin_until(Holds holds) {
    for (int i = 0; i < 1000; ++i) {
        if (holds()) return true;
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
    return holds();
}

// Helpers that follow one caller through its loops. All atomics are sequentially consistent: a helper counts itself as
// active before it looks for work, the caller takes the work away before it looks at the count, so that either the
// helper finds nothing or the caller waits for it.
class Pool {
   public:
    explicit Pool(int helpers) {
        for (int i = 0; i < helpers; ++i) threads_.emplace_back([this] { serve(); });
    }

    ~Pool() {
        {
            std::lock_guard lock(mutex_);
            is_closing_ = true;
            ++generation_;
        }
        wake_.notify_all();
        for (auto& thread : threads_) thread.join();
    }

    void run(Work& work) {
        work_ = &work;
        ++generation_;
        if (num_asleep_ > 0) {
            std::lock_guard lock(mutex_);
            wake_.notify_all();
        }
        work.drain();
        work_ = nullptr;
        if (spin_until([this] { return num_active_ == 0; })) return;
        std::unique_lock lock(mutex_);
        is_waiting_ = true;
        done_.wait(lock, [this] { return num_active_ == 0; });
        is_waiting_ = false;
    }

   private:
    void serve() {
        uint64_t seen = 0;
        for (;;) {
            if (!spin_until([&] { return generation_ != seen; })) {
                std::unique_lock lock(mutex_);
                ++num_asleep_;
                wake_.wait(lock, [&] { return generation_ != seen; });
                --num_asleep_;
            }
            if (is_closing_) return;
            seen = generation_;
            ++num_active_;
            if (Work* work = work_) work->drain();
            if (--num_active_ == 0 && is_waiting_) {
                std::lock_guard lock(mutex_);
                done_.notify_one();
            }
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_, done_;
    std::atomic<Work*> work_{nullptr};
    std::atomic<uint64_t> generation_{0};
    std::atomic<int> num_active_{0}, num_asleep_{0};
    std::atomic<bool> is_closing_{false}, is_waiting_{false};
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
