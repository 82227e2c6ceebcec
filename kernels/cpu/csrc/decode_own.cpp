// Decoders of the types that weights are kept in here and in no GGUF file. Layouts: kernels/formats.py.
#include "half.h"
#include "jobs.h"

namespace SIROCCO_ISA {
namespace {

float load_f32(const uint8_t* p) {
    float value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

void q8_1(const uint8_t* b, float* y, int64_t n) {
    for (; n > 0; n -= 32, b += 36, y += 32) {
        const float d = f16_to_f32(load_u16(b));
        const int8_t* q = reinterpret_cast<const int8_t*>(b + 4);
        for (int i = 0; i < 32; ++i) y[i] = float(q[i]) * d;
    }
}

void q8_k(const uint8_t* b, float* y, int64_t n) {
    for (; n > 0; n -= 256, b += 292, y += 256) {
        const float d = load_f32(b);
        const int8_t* q = reinterpret_cast<const int8_t*>(b + 4);
        for (int i = 0; i < 256; ++i) y[i] = d * float(q[i]);
    }
}

// Exponent and mantissa go where float32 has them; times 2^120 the exponent's bias is float32's, subnormals included.
void fp8(const uint8_t* b, float* y, int64_t n) {
    for (; n > 0; n -= 128, b += 132, y += 128) {
        const float scale = load_f32(b);
        for (int i = 0; i < 128; ++i) {
            const uint32_t code = b[4 + i];
            const bool is_nan = (code & 0x7fu) == 0x7fu;
            const float value = is_nan ? __builtin_nanf("") : float_from_bits((code & 0x7fu) << 20) * 0x1p120f;
            y[i] = scale * float_from_bits(bits_of(value) | (code & 0x80u) << 24);
        }
    }
}

// (q - zero) * step; of HQQ4 the low nibbles are the first 32 weights.
void hqq4(const uint8_t* b, float* y, int64_t n) {
    for (; n > 0; n -= 64, b += 40, y += 64) {
        const float step = load_f32(b), zero = load_f32(b + 4);
        for (int i = 0; i < 32; ++i) y[i] = (float(b[8 + i] & 15) - zero) * step;
        for (int i = 0; i < 32; ++i) y[i + 32] = (float(b[8 + i] >> 4) - zero) * step;
    }
}

void hqq8(const uint8_t* b, float* y, int64_t n) {
    for (; n > 0; n -= 64, b += 72, y += 64) {
        const float step = load_f32(b), zero = load_f32(b + 4);
        for (int i = 0; i < 64; ++i) y[i] = (float(b[8 + i]) - zero) * step;
    }
}

}  // namespace

extern Decode own_decoder(int type_id);
Decode own_decoder(int type_id) {
    switch (type_id) {
        case 9: return q8_1;
        case 15: return q8_k;
        case 1000: return fp8;
        case 1001: return hqq4;
        case 1002: return hqq8;
        default: return nullptr;
    }
}

}  // namespace SIROCCO_ISA
