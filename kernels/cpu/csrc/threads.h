// One persistent pool of threads for all kernels of the process.
#pragma once
#include <cstdint>
#include <functional>

void set_num_threads(int count);
int num_threads();

// Calls body(begin, end) over pieces of [0, count) of at least min_piece, on the caller and the pool. Runs all on the
// caller when there is one thread, one piece, or the pool is busy with another caller. body must not throw.
void parallel_for(int64_t count, int64_t min_piece, const std::function<void(int64_t, int64_t)>& body);
