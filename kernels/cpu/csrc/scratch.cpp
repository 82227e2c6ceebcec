#include "scratch.h"

#include <cstdio>
#include <cstdlib>

namespace {

struct Buffer {
    float* data = nullptr;
    int64_t capacity = 0;
    ~Buffer() { std::free(data); }
};

thread_local Buffer buffers[4];

}  // namespace

float* scratch(int slot, int64_t count) {
    Buffer& buffer = buffers[slot];
    if (buffer.capacity < count) {
        std::free(buffer.data);
        buffer.capacity = (count + count / 4 + 63) / 16 * 16;
        buffer.data = static_cast<float*>(std::aligned_alloc(64, size_t(buffer.capacity) * sizeof(float)));
        if (!buffer.data) {
            std::fputs("sirocco kernels: out of memory\n", stderr);
            std::abort();
        }
    }
    return buffer.data;
}
