// One persistent pool of threads for all kernels of the process.
#pragma once
#include <cstdint>
#include <functional>

void set_num_threads(int count);
int num_threads();

// Calls body(begin, end) over pieces of [0, count), each item costing about `cost` operations, on the caller and the
// pool. Runs all on the caller when there is one thread, too little work to share, or the pool is busy with another
// caller. Pieces begin at multiples of 4. body must not throw.
void parallel_for(int64_t count, int64_t cost, const std::function<void(int64_t, int64_t)>& body);
