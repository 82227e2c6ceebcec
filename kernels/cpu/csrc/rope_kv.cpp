// Rotary positions and the append of keys and values to the cache.
#include "kv_types.h"
#include "layer_jobs.h"

namespace SIROCCO_ISA {
namespace {

void rotate(float* head, int64_t half, const float* cosine) {
    const float* sine = cosine + half;
    int64_t i = 0;
    for (; i + kLanes <= half; i += kLanes) {
        const Vec a = load(head + i), b = load(head + half + i), c = load(cosine + i), s = load(sine + i);
        store(head + i, a * c - b * s);
        store(head + half + i, b * c + a * s);
    }
    for (; i < half; ++i) {
        const float a = head[i], b = head[half + i];
        head[i] = a * cosine[i] - b * sine[i];
        head[half + i] = b * cosine[i] + a * sine[i];
    }
}

}  // namespace

void rope_kv(const RopeKvJob& job, int64_t begin, int64_t end) {
    const int64_t row = kv_row_bytes(job.kv_type, job.head_dim), dim = job.head_dim;
    for (int64_t t = begin; t < end; ++t) {
        if (job.half > 0) {
            const float* table = job.table + job.positions[t] * 2 * job.half;
            for (int64_t h = 0; job.q && h < job.n_heads; ++h) rotate(job.q + t * job.q_stride + h * dim, job.half, table);
            for (int64_t h = 0; h < job.n_kv_heads; ++h) rotate(job.k + t * job.k_stride + h * dim, job.half, table);
        }
        if (!job.k_cache) continue;
        const int64_t at = job.slots[t] * job.n_kv_heads * row;
        with_kv(job.kv_type, [&](auto kv) {
            for (int64_t h = 0; h < job.n_kv_heads; ++h) {
                kv.write(job.k + t * job.k_stride + h * dim, static_cast<uint8_t*>(job.k_cache) + at + h * row, dim);
                kv.write(job.v + t * job.v_stride + h * dim, static_cast<uint8_t*>(job.v_cache) + at + h * row, dim);
            }
        });
    }
}

}  // namespace SIROCCO_ISA
