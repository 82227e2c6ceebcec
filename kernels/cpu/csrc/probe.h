// What this machine can do at most; used by benchmarks only.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace nanobind {
class module_;
}

// Bytes per second of each pass in which `threads` threads together read memory of `bytes` bytes, each a part of its own.
std::vector<double> probe_read(int64_t bytes, int threads, int passes, bool huge_pages);

// Products per second of each pass of the widest dot instruction on registers; kind: int8, bf16 or f32. Empty where this
// CPU has no such instruction.
std::vector<double> probe_dot(const std::string& kind, int threads, int passes);

void bind_probe(nanobind::module_& m);
