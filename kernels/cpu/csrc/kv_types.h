// Reading and writing of cache rows of one head, a vector at a time. d is a multiple of the lanes.
#pragma once
#include "kv.h"
#include "vec.h"

namespace SIROCCO_ISA {

template <typename T>
struct PlainKv {
    static inline Vec load(const uint8_t* row, int64_t d, int64_t) {
        return T::load(reinterpret_cast<const typename T::Store*>(row) + d);
    }
    static inline float get(const uint8_t* row, int64_t d, int64_t) { return T::get(reinterpret_cast<const typename T::Store*>(row) + d); }
    static inline void write(const float* x, uint8_t* row, int64_t dim) {
        auto* out = reinterpret_cast<typename T::Store*>(row);
        int64_t d = 0;
        for (; d + kLanes <= dim; d += kLanes) T::store(out + d, SIROCCO_ISA::load(x + d));
        for (; d < dim; ++d) T::put(out + d, x[d]);
    }
};

typedef int8_t VecBytes __attribute__((vector_size(kLanes)));

struct Q8Kv {
    static inline float scale(const uint8_t* row, int64_t d, int64_t dim) { return f16_to_f32(load_u16(row + dim + d / kKvBlock * 2)); }
    static inline Vec load(const uint8_t* row, int64_t d, int64_t dim) {
#if defined(__AVX512F__)
        const __m512i q = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + d)));
        return Vec(_mm512_cvtepi32_ps(q)) * splat(scale(row, d, dim));
#else
        VecBytes q;
        std::memcpy(&q, row + d, sizeof q);
        return __builtin_convertvector(__builtin_convertvector(q, VecInt), Vec) * splat(scale(row, d, dim));
#endif
    }
    static inline float get(const uint8_t* row, int64_t d, int64_t dim) { return float(int8_t(row[d])) * scale(row, d, dim); }

    // The scale is the largest magnitude / 127, rounded up to float16, so that no quotient passes 127: a value is off by
    // at most half a scale. A block with NaN or infinity becomes NaN.
    static inline void write(const float* x, uint8_t* row, int64_t dim) {
        for (int64_t begin = 0; begin < dim; begin += kKvBlock) {
            const int64_t count = dim - begin < kKvBlock ? dim - begin : kKvBlock;
            float block[kKvBlock] = {};
            std::memcpy(block, x + begin, size_t(count) * 4);
            float largest = 0.0f;
            bool is_broken = false;
            for (int64_t i = 0; i < kKvBlock; ++i) {
                const float a = float_from_bits(bits_of(block[i]) & 0x7fffffffu);
                is_broken |= !(a < __builtin_inff());
                largest = a > largest ? a : largest;
            }
            uint16_t half = f32_to_f16(largest / 127.0f);
            if (f16_to_f32(half) * 127.0f < largest) ++half;
            if (is_broken) half = 0x7e00;
            const float inverse = is_broken || half == 0 ? 0.0f : 1.0f / f16_to_f32(half);
            std::memcpy(row + dim + begin / kKvBlock * 2, &half, 2);
            for (int64_t i = 0; i < count; ++i) {
                const float q = is_broken ? 0.0f : block[i] * inverse;
                row[begin + i] = uint8_t(int8_t(int32_t((q + 0x1.8p23f) - 0x1.8p23f)));
            }
        }
    }
};

// Calls body(Reader{}) for the run-time cache type.
template <typename Body>
static inline void with_kv(Kv kv, Body body) {
    switch (kv) {
        case Kv::f32: return body(PlainKv<F32>{});
        case Kv::f16: return body(PlainKv<F16>{});
        case Kv::bf16: return body(PlainKv<Bf16>{});
        case Kv::q8: return body(Q8Kv{});
    }
}

}  // namespace SIROCCO_ISA
