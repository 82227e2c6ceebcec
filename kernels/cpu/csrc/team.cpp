#include "team.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "rest.h"

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

using Clock = std::chrono::steady_clock;

constexpr int kMostMembers = 256;
// Operations, of which a core does some thousand in a microsecond. With less work than this, waking a thread and waiting
// for it costs more than it gives.
constexpr int64_t kWorthSharing = 1 << 21;
constexpr int64_t kSmallestPiece = 1 << 17;

std::atomic<int64_t> barrier_spin_ns{kBarrierSpinNs}, idle_spin_ns{kIdleSpinNs};
thread_local bool is_member = false;  // of the run that this thread is in

// A 32-bit count that threads wait on to change. All operations are sequentially consistent: a waiter counts itself
// before the kernel compares the value, a changer changes the value before it looks for waiters. So either the waiter
// finds the new value and does not sleep, or the changer finds the waiter and wakes it.
class Signal {
   public:
    uint32_t value() const { return value_.load(); }

    void change() {
        ++value_;
        if (num_asleep_.load() > 0) wake_all();
    }

    void wait_while(uint32_t seen, int64_t spin_ns) {
        if (value() != seen) return;
        if (spin_ns > 0 && changes_before(seen, Clock::now() + std::chrono::nanoseconds(spin_ns))) return;
        ++num_asleep_;
        while (value() == seen) sleep(seen);
        --num_asleep_;
    }

   private:
    bool changes_before(uint32_t seen, Clock::time_point end) const {
        while (Clock::now() < end)
            for (int i = 0; i < 32; ++i) {
                if (value_.load(std::memory_order_acquire) != seen) return true;
                rest();
            }
        return false;
    }

#if defined(__linux__)
    static_assert(sizeof(std::atomic<uint32_t>) == sizeof(uint32_t));
    void sleep(uint32_t seen) { syscall(SYS_futex, &value_, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0); }
    void wake_all() { syscall(SYS_futex, &value_, FUTEX_WAKE_PRIVATE, kMostMembers, nullptr, nullptr, 0); }
#else
    void sleep(uint32_t seen) { value_.wait(seen); }
    void wake_all() { value_.notify_all(); }
#endif

    alignas(64) std::atomic<uint32_t> value_{0};
    alignas(64) std::atomic<uint32_t> num_asleep_{0};
};

// Where a member's part stands: the share's round in the upper half, the next unit in the lower. A word of an earlier
// round means that nothing was taken yet, so a part can be taken from before its owner has come.
struct alignas(64) Part {
    std::atomic<uint64_t> word{0};
};

}  // namespace

class Team {
   public:
    explicit Team(int size) : parts_(size) {
        // Signals are for the threads of the host program.
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        try {
            for (int i = 1; i < size; ++i) threads_.emplace_back([this, i] { serve(i); });
        } catch (const std::system_error&) {
            // The system gives no more threads: those that there are do the work.
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }

    ~Team() {
        body_ = nullptr;
        start_.change();
        for (auto& thread : threads_) thread.join();
    }

    int size() const { return int(threads_.size()) + 1; }

    void run(const std::function<void(Worker&)>& body) {
        body_ = &body;
        // Nobody touches the parts between the last barrier of a run and the start of the next.
        for (Part& part : parts_) part.word.store(0, std::memory_order_relaxed);
        start_.change();
        work(0, body);
    }

    void barrier() {
        const uint32_t phase = phase_.value();  // stays until the caller has arrived
        if (num_arrived_.fetch_add(1) + 1 == uint32_t(size())) {
            num_arrived_.store(0);
            phase_.change();
        } else {
            phase_.wait_while(phase, barrier_spin_ns.load(std::memory_order_relaxed));
        }
    }

    bool take(int owner, uint32_t round, int64_t units, int64_t& begin, int64_t& end) {
        const int64_t members = size();
        const int64_t first = units * owner / members, last = units * (owner + 1) / members;
        std::atomic<uint64_t>& word = parts_[owner].word;
        uint64_t seen = word.load(std::memory_order_relaxed);
        for (;;) {
            begin = seen >> 32 == round ? int64_t(uint32_t(seen)) : first;
            if (begin >= last) return false;
            end = begin + std::max<int64_t>(1, (last - begin) / 4);
            if (word.compare_exchange_weak(seen, uint64_t(round) << 32 | uint64_t(end), std::memory_order_relaxed)) return true;
        }
    }

   private:
    void serve(int index) {
        pthread_setname_np(pthread_self(), "kernels");
        uint32_t seen = 0;
        for (;;) {
            start_.wait_while(seen, idle_spin_ns.load(std::memory_order_relaxed));
            ++seen;  // a run needs all members: start_ cannot be further than one
            if (!body_) return;
            work(index, *body_);
        }
    }

    void work(int index, const std::function<void(Worker&)>& body) {
        is_member = true;
        Worker worker(this, index, size());
        body(worker);
        barrier();
        is_member = false;
    }

    Signal start_, phase_;
    alignas(64) std::atomic<uint32_t> num_arrived_{0};
    const std::function<void(Worker&)>* body_ = nullptr;  // null at start_: the end
    std::vector<Part> parts_;
    std::vector<std::thread> threads_;
};

namespace {

struct Owner {
    std::mutex mutex;  // held during a run
    std::unique_ptr<Team> team;
    std::atomic<int> size{1};

    void run(const std::function<void(Worker&)>& body) {
        if (!team) team = std::make_unique<Team>(size);
        team->run(body);
    }
};

// Never destroyed: threads may still use it while the process ends. A forked child, whose copy may be locked by a thread
// that it does not have, begins anew.
Owner* owner = new Owner;

void begin_anew() {
    const int size = owner->size;
    owner = new Owner;
    owner->size = size;
    is_member = false;
}

[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, begin_anew);

void run_alone(const std::function<void(Worker&)>& body) {
    const bool was_member = std::exchange(is_member, true);
    Worker worker(nullptr, 0, 1);
    body(worker);
    is_member = was_member;
}

}  // namespace

void Worker::barrier() {
    if (count > 1) team_->barrier();
}

bool Worker::take(int owner, int64_t units, int64_t& begin, int64_t& end) {
    return team_->take(owner, round_, units, begin, end);
}

void set_team_size(int count) {
    std::lock_guard lock(owner->mutex);
    owner->size = std::clamp(count, 1, kMostMembers);
    owner->team.reset();
}

int team_size() { return owner->size; }

void set_team_spin(int64_t barrier_ns, int64_t idle_ns) {
    barrier_spin_ns = std::max<int64_t>(barrier_ns, 0);
    idle_spin_ns = std::max<int64_t>(idle_ns, 0);
}

// To this thread every run is one within a run.
void stay_out_of_team() { is_member = true; }

void run_team(const std::function<void(Worker&)>& body) {
    if (is_member) return run_alone(body);
    std::lock_guard lock(owner->mutex);
    if (owner->size == 1) return run_alone(body);
    owner->run(body);
}

void parallel_for(int64_t count, int64_t cost, const std::function<void(int64_t, int64_t)>& body) {
    if (count <= 0) return;
    cost = std::max<int64_t>(cost, 1);
    if (!is_member && owner->size > 1 && cost >= kWorthSharing / count) {
        std::unique_lock lock(owner->mutex, std::try_to_lock);
        if (lock) {
            const int64_t piece = kSmallestPiece / cost + 1, units = (count + piece - 1) / piece;
            owner->run([&](Worker& worker) {
                worker.share(units, [&](int64_t begin, int64_t end) { body(begin * piece, std::min(end * piece, count)); });
            });
            return;
        }
    }
    body(0, count);
}
