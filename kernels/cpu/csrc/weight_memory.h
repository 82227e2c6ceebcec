// Memory for weights in huge pages: matrices share large mappings, so that hardly a part of one lies in small pages,
// where translations are missed and the hardware's prefetching ends every 4 KiB.
#pragma once
#include <cstdint>
#include <memory>

// Zeroed bytes that begin on a cache line. They live as long as a copy of the pointer; the mapping behind them goes with the
// last of its pieces, so that replacing one matrix of a model frees its memory only where it has a mapping of its own.
// Throws std::bad_alloc.
std::shared_ptr<uint8_t> weight_memory(int64_t bytes);
