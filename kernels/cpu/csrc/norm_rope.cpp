// The small operations between the matrix products: RMS norm, rotary embedding, gated activation, KV write.
#include "scratch.h"
#include "vec.h"

namespace SIROCCO_ISA {

void norm(const NormJob& job, int64_t begin, int64_t end) {
    with_type(job.type, [&](auto tag) {
        using T = decltype(tag);
        using S = typename T::Store;
        const int64_t padded = round_up(job.width, kLanes);
        float* row = scratch(0, padded);
        for (int64_t t = begin; t < end; ++t) {
            const S* x = static_cast<const S*>(job.x) + t * job.width;
            S* out = static_cast<S*>(job.out) + t * job.width;
            if (job.residual) {
                S* residual = static_cast<S*>(job.residual) + t * job.width;
                for (int64_t i = 0; i < job.width; ++i) T::put(residual + i, T::get(residual + i) + T::get(x + i));
                x = residual;
            }
            widen<T>(x, row, job.width, padded);
            Vec squares{};
            for (int64_t i = 0; i < padded; i += kLanes) squares += load(row + i) * load(row + i);
            const float scale = 1.0f / __builtin_sqrtf(sum(squares) / float(job.width) + job.epsilon);
            for (int64_t i = 0; i < job.width; ++i) T::put(out + i, row[i] * scale * job.weight[i]);
        }
    });
}

void rope(const RopeJob& job, int64_t begin, int64_t end) {
    with_type(job.type, [&](auto tag) {
        using T = decltype(tag);
        using S = typename T::Store;
        const auto rotate = [&](S* head, const float* cosine) {
            const float* sine = cosine + job.half;
            S *first = head, *second = head + job.half;
            for (int64_t i = 0; i < job.half; ++i) {
                const float a = T::get(first + i), b = T::get(second + i);
                T::put(first + i, a * cosine[i] - b * sine[i]);
                T::put(second + i, b * cosine[i] + a * sine[i]);
            }
        };
        for (int64_t t = begin; t < end; ++t) {
            const float* row = job.table + job.positions[t] * 2 * job.half;
            S* q = static_cast<S*>(job.q) + t * job.q_stride;
            S* k = static_cast<S*>(job.k) + t * job.k_stride;
            for (int64_t h = 0; h < job.n_heads; ++h) rotate(q + h * job.head_dim, row);
            for (int64_t h = 0; h < job.n_kv_heads; ++h) rotate(k + h * job.head_dim, row);
        }
    });
}

void silu_mul(const SiluJob& job, int64_t begin, int64_t end) {
    with_type(job.type, [&](auto tag) {
        using T = decltype(tag);
        using S = typename T::Store;
        for (int64_t t = begin; t < end; ++t) {
            const S* gate = static_cast<const S*>(job.gate_up) + t * 2 * job.width;
            const S* up = gate + job.width;
            S* out = static_cast<S*>(job.out) + t * job.width;
            for (int64_t i = 0; i < job.width; i += kLanes) {
                const int64_t count = job.width - i < kLanes ? job.width - i : kLanes;
                float g[kLanes] = {}, u[kLanes] = {}, y[kLanes];
                widen<T>(gate + i, g, count, kLanes);
                widen<T>(up + i, u, count, kLanes);
                const Vec x = load(g);
                store(y, x / (splat(1.0f) + exp(-x)) * load(u));
                for (int64_t j = 0; j < count; ++j) T::put(out + i + j, y[j]);
            }
        }
    });
}

void exp_shifted(const float* x, float largest, float divisor, float* out, int64_t count) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(out + i, exp((load(x + i) - splat(largest)) / splat(divisor)));
    float tail[kLanes] = {};
    if (i < count) {
        std::memcpy(tail, x + i, size_t(count - i) * 4);
        store(tail, exp((load(tail) - splat(largest)) / splat(divisor)));
        std::memcpy(out + i, tail, size_t(count - i) * 4);
    }
}

void kv_write(const KvWriteJob& job, int64_t begin, int64_t end) {
    with_type(job.type, [&](auto from_tag) {
        with_type(job.kv_type, [&](auto to_tag) {
            using From = decltype(from_tag);
            using To = decltype(to_tag);
            const auto copy = [&](const void* from, int64_t stride, void* to, int64_t t) {
                const auto* source = static_cast<const typename From::Store*>(from) + t * stride;
                auto* target = static_cast<typename To::Store*>(to) + job.slots[t] * job.row;
                for (int64_t i = 0; i < job.row; ++i) To::put(target + i, From::get(source + i));
            };
            for (int64_t t = begin; t < end; ++t) {
                copy(job.k, job.k_stride, job.k_cache, t);
                copy(job.v, job.v_stride, job.v_cache, t);
            }
        });
    });
}

}  // namespace SIROCCO_ISA
