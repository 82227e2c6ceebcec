// What this machine can do at most, for benchmarks: bytes read per second, and products of the dot instructions.
#include "probe.h"

#include <sys/mman.h>

#include <barrier>
#include <chrono>
#include <new>
#include <thread>

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#ifdef SIROCCO_X86
#include <immintrin.h>
#endif

namespace nb = nanobind;

namespace {

double now_s() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Runs body(thread) on `threads` threads `passes` times; the seconds of each pass, from the first start to the last end.
template <typename F>
std::vector<double> timed_passes(int threads, int passes, F body) {
    std::vector<double> marks;
    std::barrier gate(threads, [&marks]() noexcept { marks.push_back(now_s()); });
    marks.reserve(size_t(passes) + 1);
    const auto run = [&](int thread) {
        for (int pass = 0; pass < passes; ++pass) {
            gate.arrive_and_wait();
            body(thread);
        }
        gate.arrive_and_wait();
    };
    std::vector<std::thread> others;
    for (int thread = 1; thread < threads; ++thread) others.emplace_back(run, thread);
    run(0);
    for (std::thread& other : others) other.join();
    std::vector<double> seconds;
    for (size_t i = 0; i + 1 < marks.size(); ++i) seconds.push_back(marks[i + 1] - marks[i]);
    return seconds;
}

// Keeps the compiler from dropping what a loop computed.
volatile uint64_t sink;

uint64_t sum_plain(const uint8_t* data, int64_t bytes) {
    uint64_t sums[8] = {};
    const auto* words = reinterpret_cast<const uint64_t*>(data);
    for (int64_t i = 0; i + 8 <= bytes / 8; i += 8)
        for (int k = 0; k < 8; ++k) sums[k] += words[i + k];
    return sums[0] + sums[1] + sums[2] + sums[3] + sums[4] + sums[5] + sums[6] + sums[7];
}

#ifdef SIROCCO_X86
__attribute__((target("avx2"))) uint64_t sum_avx2(const uint8_t* data, int64_t bytes) {
    __m256i sums[4] = {};
    for (int64_t i = 0; i + 128 <= bytes; i += 128)
        for (int k = 0; k < 4; ++k)
            sums[k] = _mm256_add_epi64(sums[k], _mm256_load_si256(reinterpret_cast<const __m256i*>(data + i + 32 * k)));
    const __m256i sum = _mm256_add_epi64(_mm256_add_epi64(sums[0], sums[1]), _mm256_add_epi64(sums[2], sums[3]));
    return uint64_t(_mm256_extract_epi64(sum, 0)) + uint64_t(_mm256_extract_epi64(sum, 1)) +
           uint64_t(_mm256_extract_epi64(sum, 2)) + uint64_t(_mm256_extract_epi64(sum, 3));
}

__attribute__((target("avx512f"))) uint64_t sum_avx512(const uint8_t* data, int64_t bytes) {
    __m512i sums[4] = {};
    for (int64_t i = 0; i + 256 <= bytes; i += 256)
        for (int k = 0; k < 4; ++k) sums[k] = _mm512_add_epi64(sums[k], _mm512_load_si512(data + i + 64 * k));
    alignas(64) uint64_t parts[8];
    _mm512_store_si512(parts, _mm512_add_epi64(_mm512_add_epi64(sums[0], sums[1]), _mm512_add_epi64(sums[2], sums[3])));
    uint64_t sum = 0;
    for (const uint64_t part : parts) sum += part;
    return sum;
}

constexpr int kChains = 12;  // independent sums: more than latency times instructions a cycle

__attribute__((target("avx512f,avx512vnni"))) void dot_int8_avx512(int64_t rounds) {
    __m512i sums[kChains] = {};
    const __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(-2);
    for (int64_t i = 0; i < rounds; ++i)
        for (int k = 0; k < kChains; ++k) {
            sums[k] = _mm512_dpbusd_epi32(sums[k], a, b);
            asm volatile("" : "+v"(sums[k]));
        }
}

__attribute__((target("avx2"))) void dot_int8_avx2(int64_t rounds) {
    __m256i sums[kChains] = {};
    __m256i a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(-2);
    const __m256i ones = _mm256_set1_epi16(1);
    for (int64_t i = 0; i < rounds; ++i)
        for (int k = 0; k < kChains; ++k) {
            asm volatile("" : "+x"(a), "+x"(b));
            sums[k] = _mm256_add_epi32(sums[k], _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), ones));
            asm volatile("" : "+x"(sums[k]));
        }
}

__attribute__((target("avx512f,avx512bf16"))) void dot_bf16_avx512(int64_t rounds) {
    __m512 sums[kChains] = {};
    const __m512bh a = (__m512bh)_mm512_set1_epi16(0x3f80), b = (__m512bh)_mm512_set1_epi16(0x3c00);
    for (int64_t i = 0; i < rounds; ++i)
        for (int k = 0; k < kChains; ++k) {
            sums[k] = _mm512_dpbf16_ps(sums[k], a, b);
            asm volatile("" : "+v"(sums[k]));
        }
}

__attribute__((target("avx512f"))) void dot_f32_avx512(int64_t rounds) {
    __m512 sums[kChains] = {};
    const __m512 a = _mm512_set1_ps(1.0f), b = _mm512_set1_ps(0.5f);
    for (int64_t i = 0; i < rounds; ++i)
        for (int k = 0; k < kChains; ++k) {
            sums[k] = _mm512_fmadd_ps(a, b, sums[k]);
            asm volatile("" : "+v"(sums[k]));
        }
}

__attribute__((target("avx2,fma"))) void dot_f32_avx2(int64_t rounds) {
    __m256 sums[kChains] = {};
    const __m256 a = _mm256_set1_ps(1.0f), b = _mm256_set1_ps(0.5f);
    for (int64_t i = 0; i < rounds; ++i)
        for (int k = 0; k < kChains; ++k) {
            sums[k] = _mm256_fmadd_ps(a, b, sums[k]);
            asm volatile("" : "+x"(sums[k]));
        }
}
#endif

constexpr int64_t kHuge = int64_t(2) << 20;

SumBytes choose_sum() {
#ifdef SIROCCO_X86
    if (__builtin_cpu_supports("avx512f")) return sum_avx512;
    if (__builtin_cpu_supports("avx2")) return sum_avx2;
#endif
    return sum_plain;
}

struct DotLoop {
    void (*run)(int64_t rounds);
    int64_t products;  // of one round
};

DotLoop choose_dot(const std::string& kind) {
#ifdef SIROCCO_X86
    const bool avx512 = __builtin_cpu_supports("avx512f"), avx2 = __builtin_cpu_supports("avx2");
    if (kind == "int8") {
        if (avx512 && __builtin_cpu_supports("avx512vnni")) return {dot_int8_avx512, 64 * kChains};
        if (avx2) return {dot_int8_avx2, 32 * kChains};
    }
    if (kind == "bf16" && avx512 && __builtin_cpu_supports("avx512bf16")) return {dot_bf16_avx512, 32 * kChains};
    if (kind == "f32") {
        if (avx512) return {dot_f32_avx512, 16 * kChains};
        if (avx2 && __builtin_cpu_supports("fma")) return {dot_f32_avx2, 8 * kChains};
    }
#endif
    if (kind != "int8" && kind != "bf16" && kind != "f32") throw nb::value_error("the dot products are int8, bf16 or f32");
    return {nullptr, 0};
}

}  // namespace

ReadProbe::ReadProbe(int64_t bytes, int threads, bool huge_pages) : threads_(threads), sum_(choose_sum()) {
    if (bytes < kHuge || threads < 1) throw nb::value_error("ReadProbe: at least 2 MiB and a thread");
    share_ = bytes / threads / kHuge * kHuge;
    if (share_ == 0) throw nb::value_error("ReadProbe: at least 2 MiB a thread");
    mapped_bytes_ = size_t(share_ * threads + kHuge);
    mapped_ = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped_ == MAP_FAILED) throw std::bad_alloc();
    madvise(mapped_, mapped_bytes_, huge_pages ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    data_ = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(mapped_) + kHuge - 1) / kHuge * kHuge);
    timed_passes(threads, 1, [&](int thread) { std::fill_n(data_ + thread * share_, share_, uint8_t(thread + 1)); });
}

ReadProbe::~ReadProbe() { munmap(mapped_, mapped_bytes_); }

std::vector<double> ReadProbe::rates(int passes) const {
    if (passes < 1) throw nb::value_error("ReadProbe: at least one pass");
    std::vector<double> rates;
    for (const double s : timed_passes(threads_, passes, [&](int thread) { sink = sum_(data_ + thread * share_, share_); }))
        rates.push_back(double(share_ * threads_) / s);
    return rates;
}

std::vector<double> probe_dot(const std::string& kind, int threads, int passes) {
    constexpr int64_t kRounds = 4'000'000;
    if (threads < 1 || passes < 1) throw nb::value_error("probe_dot: at least a thread and a pass");
    const DotLoop loop = choose_dot(kind);
    if (loop.run == nullptr) return {};
    std::vector<double> rates;
    for (const double s : timed_passes(threads, passes, [&](int) { loop.run(kRounds); }))
        rates.push_back(double(kRounds) * double(loop.products) * threads / s);
    return rates;
}

void bind_probe(nb::module_& m) {
    nb::class_<ReadProbe>(m, "ReadProbe")
        .def(nb::init<int64_t, int, bool>(), nb::arg("bytes"), nb::arg("threads"), nb::arg("huge_pages") = true)
        .def("rates", &ReadProbe::rates, nb::arg("passes"), nb::call_guard<nb::gil_scoped_release>());
    m.def("probe_dot", probe_dot, nb::call_guard<nb::gil_scoped_release>());
}
