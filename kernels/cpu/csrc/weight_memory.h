// Memory for weights in huge pages: matrices share large mappings, so that hardly a part of one lies in small pages,
// where translations are missed and the hardware's prefetching ends every 4 KiB.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

// Zeroed bytes that begin on a cache line. They live as long as a copy of the pointer; the mapping behind them goes with the
// last of its pieces, so that replacing one matrix of a model frees its memory only where it has a mapping of its own.
// Throws std::bad_alloc.
std::shared_ptr<uint8_t> weight_memory(int64_t bytes);

// Begins to make memory ready for matrices of these sizes, on a thread of its own and in this order: clearing pages takes the
// kernel a good part of a model's loading, and may happen while something else is waited for. weight_memory then hands out
// what is ready or being made ready.
void prepare_weight_memory(const std::vector<int64_t>& sizes);

// Ends that, and gives back what nobody has taken. Matrices of the next model do not share a mapping with those so far: either
// model's memory goes when it does.
void end_weight_preparation();
