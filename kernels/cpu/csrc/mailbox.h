// Memory of two processes with the newest message each way: who looks at it in time needs no system call.
#pragma once
#include <sys/mman.h>
#include <sys/stat.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <system_error>

// One way. The writer counts its messages, and writes one only where the last one was taken.
struct Lane {
    enum Reader : uint32_t { kAbsent, kLooks, kSleeps };
    alignas(64) std::atomic<uint32_t> reader;
    alignas(64) std::atomic<uint32_t> count;
    uint32_t size;
    uint64_t after;
    char bytes[];
};
static_assert(std::atomic<uint32_t>::is_always_lock_free);

// One process's end. It trusts the other one with the contents alone.
class Mailbox {
   public:
    // Of the way that a message goes which does not go through here.
    const int descriptor;

    // memory: a file of two lanes, zero at first, which cannot shrink; is_first: not so at the other end.
    Mailbox(int memory, int descriptor, bool is_first) : descriptor(descriptor) {
        struct stat status;
        if (fstat(memory, &status)) fail("fstat");
        bytes_ = size_t(status.st_size);
        const size_t lane = bytes_ / 2 & ~size_t(63);
        if (lane <= sizeof(Lane)) throw std::length_error("too small for two lanes");
        capacity_ = lane - sizeof(Lane);
        memory_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
        if (memory_ == MAP_FAILED) fail("mmap");
        auto* lanes = static_cast<char*>(memory_);
        in_ = reinterpret_cast<Lane*>(lanes + (is_first ? 0 : lane));
        out_ = reinterpret_cast<Lane*>(lanes + (is_first ? lane : 0));
        set_asleep(false);
    }
    ~Mailbox() { munmap(memory_, bytes_); }
    Mailbox(const Mailbox&) = delete;
    Mailbox& operator=(const Mailbox&) = delete;

    bool has_reader() const { return out_->reader.load() != Lane::kAbsent; }

    // Returns whether the reader sleeps and has to be woken. after: how many messages of the other way precede it.
    bool post(const char* bytes, size_t size, uint64_t after) {
        if (size > capacity_) throw std::length_error("a message is too long for the mailbox");
        std::memcpy(out_->bytes, bytes, size);
        out_->size = uint32_t(size);
        out_->after = after;
        // Sequentially consistent, as what a reader does before it sleeps: one of the two sees the other's.
        out_->count.store(++posted_);
        return out_->reader.load() == Lane::kSleeps;
    }

    bool is_full() const { return in_->count.load() != taken_; }

    // Copies a message by copy(bytes, size), if there is one whose predecessors are among the first `after`.
    template <typename Copy>
    bool take(uint64_t after, Copy&& copy) {
        if (!is_full() || after < in_->after) return false;
        taken_ = in_->count.load();
        const size_t size = in_->size;
        if (size > capacity_) throw std::length_error("the mailbox is not filled as it should be");
        copy(static_cast<const char*>(in_->bytes), size);
        return true;
    }

    // Before this end sleeps, and then looks once more; and when it is awake again.
    void set_asleep(bool sleeps) { in_->reader.store(sleeps ? Lane::kSleeps : Lane::kLooks); }

   private:
    [[noreturn]] static void fail(const char* what) { throw std::system_error(errno, std::generic_category(), what); }

    void* memory_;
    size_t bytes_, capacity_;
    Lane *in_, *out_;
    uint32_t posted_ = 0, taken_ = 0;
};
