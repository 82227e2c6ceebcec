// Runs kernels over memory of exact size, filled with random numbers: a read or write beyond an end, a misaligned access
// or an undefined operation ends the program with the sanitizer's report. Results are checked elsewhere, by pytest.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>

#include "jobs.h"

inline void require(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "sanitize_kernels: %s\n", what);
    std::abort();
}

inline uint32_t random_bits() {
    static uint32_t state = 12345;
    state ^= state << 13;
    state ^= state >> 17;
    return state ^= state << 5;
}

// count elements that end where the allocation ends, `shift` bytes beyond a multiple of 64.
template <typename T>
class Exact {
   public:
    explicit Exact(int64_t count, int64_t shift = 0) : count_(count) {
        void* start = nullptr;
        require(posix_memalign(&start, 64, size_t(count * int64_t(sizeof(T)) + shift)) == 0, "out of memory");
        start_ = static_cast<uint8_t*>(start);
        data_ = reinterpret_cast<T*>(start_ + shift);
    }
    ~Exact() { std::free(start_); }
    Exact(const Exact&) = delete;
    Exact& operator=(const Exact&) = delete;

    T* data() { return data_; }
    T& operator[](int64_t i) { return data_[i]; }
    int64_t count() const { return count_; }

    Exact& fill_bits() {
        auto* bytes = reinterpret_cast<uint8_t*>(data_);
        for (int64_t i = 0; i < count_ * int64_t(sizeof(T)); ++i) bytes[i] = uint8_t(random_bits() >> 11);
        return *this;
    }
    Exact& fill_numbers() {
        for (int64_t i = 0; i < count_; ++i) data_[i] = T(int32_t(random_bits() >> 12) - (1 << 19)) / T(1 << 18);
        return *this;
    }

   private:
    int64_t count_;
    uint8_t* start_;
    T* data_;
};

void run_products(const KernelTable& kernels);
void run_layers(const KernelTable& kernels);
void run_attention(const KernelTable& kernels);
void run_sampling(const KernelTable& kernels);
void run_teams();
void run_program();  // with the build in use
