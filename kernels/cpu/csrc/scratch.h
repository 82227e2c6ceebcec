// A growing float buffer per thread. Memory comes from malloc here, in one build only, never from a template of the
// standard library: those would be merged between the instruction-set builds.
#pragma once
#include <cstdint>

// At least count floats, 64-byte aligned, valid until this thread's next call with the same slot (0..3). Never null:
// out of memory ends the process, as there is nothing that a kernel could return.
float* scratch(int slot, int64_t count);
