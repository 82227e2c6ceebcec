// Block types to float32. Built once per instruction set and without fused multiply-add: bit-exact in every build.
// Layouts: kernels/formats.py. Loops are written so that the compiler turns them into vector code.
#include "half.h"
#include "jobs.h"

namespace SIROCCO_ISA {
namespace {

void f32(const uint8_t* b, float* y, int64_t n) { std::memcpy(y, b, size_t(n) * 4); }

void f16(const uint8_t* b, float* y, int64_t n) {
    for (int64_t i = 0; i < n; ++i) y[i] = f16_to_f32(load_u16(b + 2 * i));
}

void bf16(const uint8_t* b, float* y, int64_t n) {
    for (int64_t i = 0; i < n; ++i) y[i] = bf16_to_f32(load_u16(b + 2 * i));
}

void q8_0(const uint8_t* b, float* y, int64_t n) {
    for (; n > 0; n -= 32, b += 34, y += 32) {
        const float d = f16_to_f32(load_u16(b));
        const int8_t* q = reinterpret_cast<const int8_t*>(b + 2);
        for (int i = 0; i < 32; ++i) y[i] = float(q[i]) * d;
    }
}

void q4_0(const uint8_t* b, float* y, int64_t n) {
    for (; n > 0; n -= 32, b += 18, y += 32) {
        const float d = f16_to_f32(load_u16(b));
        const uint8_t* q = b + 2;
        for (int i = 0; i < 16; ++i) y[i] = d * float(int(q[i] & 15) - 8);
        for (int i = 0; i < 16; ++i) y[i + 16] = d * float(int(q[i] >> 4) - 8);
    }
}

void q4_1(const uint8_t* b, float* y, int64_t n) {
    for (; n > 0; n -= 32, b += 20, y += 32) {
        const float d = f16_to_f32(load_u16(b)), m = f16_to_f32(load_u16(b + 2));
        const uint8_t* q = b + 4;
        for (int i = 0; i < 16; ++i) y[i] = d * float(q[i] & 15) + m;
        for (int i = 0; i < 16; ++i) y[i + 16] = d * float(q[i] >> 4) + m;
    }
}

inline uint32_t load_u32(const uint8_t* p) {
    uint32_t value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

void q5_0(const uint8_t* b, float* y, int64_t n) {
    for (; n > 0; n -= 32, b += 22, y += 32) {
        const float d = f16_to_f32(load_u16(b));
        const uint32_t high = load_u32(b + 2);
        const uint8_t* q = b + 6;
        for (int i = 0; i < 16; ++i) y[i] = d * float(int((q[i] & 15u) | (((high >> i) & 1u) << 4)) - 16);
        for (int i = 0; i < 16; ++i) y[i + 16] = d * float(int((q[i] >> 4) | (((high >> (i + 16)) & 1u) << 4)) - 16);
    }
}

void q5_1(const uint8_t* b, float* y, int64_t n) {
    for (; n > 0; n -= 32, b += 24, y += 32) {
        const float d = f16_to_f32(load_u16(b)), m = f16_to_f32(load_u16(b + 2));
        const uint32_t high = load_u32(b + 4);
        const uint8_t* q = b + 8;
        for (int i = 0; i < 16; ++i) y[i] = d * float(int((q[i] & 15u) | (((high >> i) & 1u) << 4))) + m;
        for (int i = 0; i < 16; ++i) y[i + 16] = d * float(int((q[i] >> 4) | (((high >> (i + 16)) & 1u) << 4))) + m;
    }
}

void q2_k(const uint8_t* b, float* y, int64_t n) {
    for (; n > 0; n -= 256, b += 84, y += 256) {
        const float d = f16_to_f32(load_u16(b + 80)), dmin = f16_to_f32(load_u16(b + 82));
        for (int sub = 0; sub < 16; ++sub) {  // 16 weights each
            const float scale = d * float(b[sub] & 15), minimum = dmin * float(b[sub] >> 4);
            const uint8_t* q = b + 16 + 32 * (sub / 8) + 16 * (sub & 1);
            const int shift = sub & 6;
            for (int i = 0; i < 16; ++i) y[16 * sub + i] = scale * float((q[i] >> shift) & 3) - minimum;
        }
    }
}

void q3_k(const uint8_t* b, float* y, int64_t n) {
    for (; n > 0; n -= 256, b += 110, y += 256) {
        const uint8_t *mask = b, *low = b + 32, *packed = b + 96;
        const float d = f16_to_f32(load_u16(b + 108));
        for (int sub = 0; sub < 16; ++sub) {
            const int low4 = (packed[sub & 7] >> (4 * (sub / 8))) & 15;
            const int high2 = (packed[8 + (sub & 3)] >> (2 * (sub / 4))) & 3;
            const float scale = d * float((low4 | (high2 << 4)) - 32);
            const uint8_t* q = low + 32 * (sub / 8) + 16 * (sub & 1);
            const uint8_t* m = mask + 16 * (sub & 1);
            const int shift = sub & 6, bit = sub / 2;
            for (int i = 0; i < 16; ++i) {
                const int minus = ((m[i] >> bit) & 1) ? 0 : 4;
                y[16 * sub + i] = scale * float(int((q[i] >> shift) & 3) - minus);
            }
        }
    }
}

struct ScaleMin {
    int scale, minimum;
};

// 6-bit scale and minimum of one of the 8 sub-blocks of Q4_K and Q5_K.
inline ScaleMin scale_min(const uint8_t* s, int sub) {
    if (sub < 4) return {s[sub] & 63, s[sub + 4] & 63};
    const int top = sub - 4;
    return {(s[8 + top] & 15) | ((s[top] >> 2) & 48), (s[8 + top] >> 4) | ((s[4 + top] >> 2) & 48)};
}

void q4_k(const uint8_t* b, float* y, int64_t n) {
    for (; n > 0; n -= 256, b += 144, y += 256) {
        const float d = f16_to_f32(load_u16(b)), dmin = f16_to_f32(load_u16(b + 2));
        for (int sub = 0; sub < 8; ++sub) {  // 32 weights each
            const ScaleMin s = scale_min(b + 4, sub);
            const float scale = d * float(s.scale), minimum = dmin * float(s.minimum);
            const uint8_t* q = b + 16 + 32 * (sub / 2);
            const int shift = 4 * (sub & 1);
            for (int i = 0; i < 32; ++i) y[32 * sub + i] = scale * float((q[i] >> shift) & 15) - minimum;
        }
    }
}

void q5_k(const uint8_t* b, float* y, int64_t n) {
    for (; n > 0; n -= 256, b += 176, y += 256) {
        const float d = f16_to_f32(load_u16(b)), dmin = f16_to_f32(load_u16(b + 2));
        const uint8_t* high = b + 16;
        for (int sub = 0; sub < 8; ++sub) {
            const ScaleMin s = scale_min(b + 4, sub);
            const float scale = d * float(s.scale), minimum = dmin * float(s.minimum);
            const uint8_t* q = b + 48 + 32 * (sub / 2);
            const int shift = 4 * (sub & 1);
            for (int i = 0; i < 32; ++i) {
                const int value = ((q[i] >> shift) & 15) | (((high[i] >> sub) & 1) << 4);
                y[32 * sub + i] = scale * float(value) - minimum;
            }
        }
    }
}

void q6_k(const uint8_t* b, float* y, int64_t n) {
    for (; n > 0; n -= 256, b += 210, y += 256) {
        const int8_t* scales = reinterpret_cast<const int8_t*>(b + 192);
        const float d = f16_to_f32(load_u16(b + 208));
        for (int sub = 0; sub < 16; ++sub) {
            const int part = sub & 7;  // within a half of 128 weights: low nibbles of 64 bytes, then high ones
            const uint8_t* low = b + 64 * (sub / 8) + 16 * (part & 3);
            const uint8_t* high = b + 128 + 32 * (sub / 8) + 16 * (part & 1);
            const int low_shift = 4 * (part / 4), high_shift = 2 * (part / 2);
            const float scale = d * float(scales[sub]);
            for (int i = 0; i < 16; ++i) {
                const int value = ((low[i] >> low_shift) & 15) | (((high[i] >> high_shift) & 3) << 4);
                y[16 * sub + i] = scale * float(value - 32);
            }
        }
    }
}

}  // namespace

Decode iq_decoder(int type_id);  // decode_iq.cpp

extern Decode decoder(int type_id);
Decode decoder(int type_id) {
    switch (type_id) {
        case 0: return f32;
        case 1: return f16;
        case 2: return q4_0;
        case 3: return q4_1;
        case 6: return q5_0;
        case 7: return q5_1;
        case 8: return q8_0;
        case 10: return q2_k;
        case 11: return q3_k;
        case 12: return q4_k;
        case 13: return q5_k;
        case 14: return q6_k;
        case 30: return bf16;
        default: return iq_decoder(type_id);
    }
}

}  // namespace SIROCCO_ISA
