// float32 from and to float16 and bfloat16, one value at a time. Included by every instruction-set build: all static.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace SIROCCO_ISA {

static inline float float_from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline uint16_t load_u16(const uint8_t* p) {
    uint16_t value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

static inline float f16_to_f32(uint16_t h) {
#if defined(__F16C__)
    return _cvtsh_ss(h);
#else
    const uint32_t sign = uint32_t(h & 0x8000) << 16, magnitude = h & 0x7fff;
    if (magnitude >= 0x7c00)  // infinity, NaN
        return float_from_bits(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13) | ((magnitude & 0x3ffu) ? 0x400000u : 0u));
    if (magnitude >= 0x400) return float_from_bits(sign | ((magnitude << 13) + (112u << 23)));
    const float value = float(magnitude) * 0x1p-24f;  // subnormal
    return float_from_bits(sign | bits_of(value));
#endif
}

static inline uint16_t f32_to_f16(float value) {
#if defined(__F16C__)
    return uint16_t(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
#else
    const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffffu;
    const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
    if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
    if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // rounds to infinity
    if (magnitude < 0x38800000u) {                                  // subnormal: let the adder round
        const float shifted = float_from_bits(magnitude) + 0.5f;
        return uint16_t(sign | (bits_of(shifted) - 0x3f000000u));
    }
    return uint16_t(sign | ((magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13));
#endif
}

static inline float bf16_to_f32(uint16_t h) { return float_from_bits(uint32_t(h) << 16); }

static inline uint16_t f32_to_bf16(float value) {
    const uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40u);
    return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace SIROCCO_ISA
