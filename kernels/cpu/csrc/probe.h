// What this machine can do at most; used by benchmarks only.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace nanobind {
class module_;
}

using SumBytes = uint64_t (*)(const uint8_t*, int64_t);

// Memory of `bytes` bytes that `threads` threads read together, each a part of its own.
class ReadProbe {
public:
    ReadProbe(int64_t bytes, int threads, bool huge_pages);
    ~ReadProbe();
    ReadProbe(const ReadProbe&) = delete;
    ReadProbe& operator=(const ReadProbe&) = delete;

    // Bytes per second of each of so many passes, one right behind the other.
    std::vector<double> rates(int passes) const;

private:
    int threads_;
    SumBytes sum_;
    int64_t share_ = 0;  // bytes of a thread
    void* mapped_ = nullptr;
    size_t mapped_bytes_ = 0;
    uint8_t* data_ = nullptr;
};

// Products per second of each pass of the widest dot instruction on registers; kind: int8, bf16 or f32. Empty where this
// CPU has no such instruction.
std::vector<double> probe_dot(const std::string& kind, int threads, int passes);

void bind_probe(nanobind::module_& m);
