// The block types beyond the simple and the K ones to float32: grids of points (IQ1, IQ2, IQ3), sixteen levels (IQ4, FP4)
// and base-3 digits (TQ). As bit-exact as decode.cpp: products are taken in the order of kernels/reference, except that a
// weight's sign is put on its integer, which changes no bit. Layouts: kernels/formats.py.
#include "half.h"
#include "iq_grids.h"
#include "jobs.h"
#if defined(__SSSE3__)
#include <immintrin.h>
#endif

namespace SIROCCO_ISA {
namespace {

// For every pattern of eight sign bits: bytes of 0, or -1 where the bit is set.
struct SignTable {
    int8_t bytes[256][8];
    constexpr SignTable() : bytes() {
        for (int pattern = 0; pattern < 256; ++pattern)
            for (int i = 0; i < 8; ++i) bytes[pattern][i] = int8_t((pattern >> i) & 1 ? -1 : 0);
    }
};
constexpr SignTable kSigns;

// Seven sign bits of eight: the last one makes the number of minus signs even.
inline uint32_t even_signs(uint32_t seven) {
    const uint32_t bits = seven & 127;
    return bits | uint32_t(__builtin_popcount(bits) & 1) << 7;
}

inline uint32_t load_u32(const uint8_t* p) {
    uint32_t value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

inline int nibble(const uint8_t* bytes, int i) { return (bytes[i / 2] >> (4 * (i & 1))) & 15; }

// The integers of 32 weights, put together group by group.
struct Signed32 {
    alignas(32) int8_t value[32];
    alignas(32) int8_t sign[32];  // 0 or -1

    void put8(int group, const int8_t* point, uint32_t signs) {
        std::memcpy(value + 8 * group, point, 8);
        std::memcpy(sign + 8 * group, kSigns.bytes[signs], 8);
    }
    // Weights first … first + count - 1 to y, all times scale.
    template <int Count>
    void write(int first, float scale, float* y) const {
        for (int i = 0; i < Count; ++i) y[i] = scale * float((value[first + i] ^ sign[first + i]) - sign[first + i]);
    }
};

void iq2_xxs(const uint8_t* b, float* y, int64_t n) {
    for (; n > 0; n -= 256, b += 66, y += 256) {
        const float d = f16_to_f32(load_u16(b));
        for (int part = 0; part < 8; ++part) {
            const uint8_t* q = b + 2 + 8 * part;
            const uint32_t word = load_u32(q + 4);
            Signed32 w;
            for (int g = 0; g < 4; ++g) w.put8(g, iq_grids.iq2_xxs[q[g]], even_signs(word >> (7 * g)));
            w.write<32>(0, d * (0.5f + float(word >> 28)) * 0.25f, y + 32 * part);
        }
    }
}

void iq2_xs(const uint8_t* b, float* y, int64_t n) {
    for (; n > 0; n -= 256, b += 74, y += 256) {
        const float d = f16_to_f32(load_u16(b));
        for (int part = 0; part < 8; ++part) {
            Signed32 w;
            for (int g = 0; g < 4; ++g) {
                const uint32_t word = load_u16(b + 2 + 8 * part + 2 * g);
                w.put8(g, iq_grids.iq2_xs[word & 511], even_signs(word >> 9));
            }
            const uint8_t scales = b[66 + part];
            w.write<16>(0, d * (0.5f + float(scales & 15)) * 0.25f, y + 32 * part);
            w.write<16>(16, d * (0.5f + float(scales >> 4)) * 0.25f, y + 32 * part + 16);
        }
    }
}

void iq2_s(const uint8_t* b, float* y, int64_t n) {
    for (; n > 0; n -= 256, b += 82, y += 256) {
        const float d = f16_to_f32(load_u16(b));
        for (int part = 0; part < 8; ++part) {
            const uint8_t *low = b + 2 + 4 * part, *signs = b + 34 + 4 * part;
            const uint32_t high = b[66 + part], scales = b[74 + part];
            Signed32 w;
            for (int g = 0; g < 4; ++g) w.put8(g, iq_grids.iq2_s[low[g] | ((high >> (2 * g)) & 3) << 8], signs[g]);
            w.write<16>(0, d * (0.5f + float(scales & 15)) * 0.25f, y + 32 * part);
            w.write<16>(16, d * (0.5f + float(scales >> 4)) * 0.25f, y + 32 * part + 16);
        }
    }
}

// Two points of four weights side by side.
inline void join(const int8_t* first, const int8_t* second, int8_t* point) {
    std::memcpy(point, first, 4);
    std::memcpy(point + 4, second, 4);
}

void iq3_xxs(const uint8_t* b, float* y, int64_t n) {
    for (; n > 0; n -= 256, b += 98, y += 256) {
        const float d = f16_to_f32(load_u16(b));
        for (int part = 0; part < 8; ++part) {
            const uint8_t* q = b + 2 + 8 * part;
            const uint32_t word = load_u32(b + 66 + 4 * part);
            Signed32 w;
            for (int g = 0; g < 4; ++g) {
                int8_t point[8];
                join(iq_grids.iq3_xxs[q[2 * g]], iq_grids.iq3_xxs[q[2 * g + 1]], point);
                w.put8(g, point, even_signs(word >> (7 * g)));
            }
            w.write<32>(0, d * (0.5f + float(word >> 28)) * 0.5f, y + 32 * part);
        }
    }
}

void iq3_s(const uint8_t* b, float* y, int64_t n) {
    for (; n > 0; n -= 256, b += 110, y += 256) {
        const float d = f16_to_f32(load_u16(b));
        for (int part = 0; part < 8; ++part) {
            const uint8_t *q = b + 2 + 8 * part, *signs = b + 74 + 4 * part;
            const uint32_t high = b[66 + part];
            Signed32 w;
            for (int g = 0; g < 4; ++g) {
                int8_t point[8];
                join(iq_grids.iq3_s[q[2 * g] | ((high >> (2 * g)) & 1) << 8],
                     iq_grids.iq3_s[q[2 * g + 1] | ((high >> (2 * g + 1)) & 1) << 8], point);
                w.put8(g, point, signs[g]);
            }
            w.write<32>(0, d * float(1 + 2 * nibble(b + 106, part)), y + 32 * part);
        }
    }
}

// Eight weights of an IQ1 type: every point is moved by an eighth, up or down.
inline void write_moved(const int8_t* point, bool is_down, float scale, float* y) {
    const float delta = is_down ? -0.125f : 0.125f;
    for (int i = 0; i < 8; ++i) y[i] = scale * (float(point[i]) + delta);
}

void iq1_s(const uint8_t* b, float* y, int64_t n) {
    for (; n > 0; n -= 256, b += 50, y += 256) {
        const float d = f16_to_f32(load_u16(b));
        for (int part = 0; part < 8; ++part) {
            const uint8_t* q = b + 2 + 4 * part;
            const uint32_t word = load_u16(b + 34 + 2 * part);
            const float scale = d * float(2 * ((word >> 12) & 7) + 1);
            for (int g = 0; g < 4; ++g)
                write_moved(iq_grids.iq1[q[g] | ((word >> (3 * g)) & 7) << 8], word >> 15, scale, y + 32 * part + 8 * g);
        }
    }
}

void iq1_m(const uint8_t* b, float* y, int64_t n) {
    for (; n > 0; n -= 256, b += 56, y += 256) {
        uint32_t words[4], d_bits = 0;
        for (int i = 0; i < 4; ++i) {
            words[i] = load_u16(b + 48 + 2 * i);
            d_bits |= (words[i] >> 12) << (4 * i);
        }
        const float d = f16_to_f32(uint16_t(d_bits));
        for (int group = 0; group < 32; ++group) {
            const uint32_t high = uint32_t(nibble(b + 32, group));
            const int sub = group / 2;  // 16 weights
            const float scale = d * float(2 * ((words[sub / 4] >> (3 * (sub & 3))) & 7) + 1);
            write_moved(iq_grids.iq1[b[group] | (high & 7) << 8], high >> 3, scale, y + 8 * group);
        }
    }
}

// Sixteen levels, chosen by the low nibbles of 16 bytes, then by the high ones: 32 weights.
inline void look_up(const int8_t* levels, const uint8_t* q, int8_t* value) {
#if defined(__SSSE3__)
    const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(levels));
    const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(q)), low = _mm_set1_epi8(15);
    const __m128i first = _mm_shuffle_epi8(table, _mm_and_si128(both, low));
    const __m128i second = _mm_shuffle_epi8(table, _mm_and_si128(_mm_srli_epi16(both, 4), low));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(value), first);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(value + 16), second);
#else
    for (int i = 0; i < 16; ++i) value[i] = levels[q[i] & 15];
    for (int i = 0; i < 16; ++i) value[i + 16] = levels[q[i] >> 4];
#endif
}

// The levels of IQ4_NL and IQ4_XS; E2M1 numbers by their four bits, times two.
constexpr int8_t kNonLinear[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
constexpr int8_t kFp4[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

inline void write_levels(const int8_t* levels, const uint8_t* q, float scale, float* y) {
    int8_t value[32];
    look_up(levels, q, value);
    for (int i = 0; i < 32; ++i) y[i] = scale * float(value[i]);
}

void iq4_nl(const uint8_t* b, float* y, int64_t n) {
    for (; n > 0; n -= 32, b += 18, y += 32) write_levels(kNonLinear, b + 2, f16_to_f32(load_u16(b)), y);
}

void iq4_xs(const uint8_t* b, float* y, int64_t n) {
    for (; n > 0; n -= 256, b += 136, y += 256) {
        const float d = f16_to_f32(load_u16(b));
        const int high = load_u16(b + 2);
        for (int part = 0; part < 8; ++part) {
            const int scale = nibble(b + 4, part) | ((high >> (2 * part)) & 3) << 4;
            write_levels(kNonLinear, b + 8 + 16 * part, d * float(scale - 32), y + 32 * part);
        }
    }
}

void mxfp4(const uint8_t* b, float* y, int64_t n) {
    for (; n > 0; n -= 32, b += 17, y += 32) {
        // 2^(e - 128); for e = 0 and 1 the float is subnormal.
        const uint32_t e = b[0];
        write_levels(kFp4, b + 1, float_from_bits(e < 2 ? 0x00200000u << e : (e - 1) << 23), y);
    }
}

// Half of an unsigned E4M3 number, bias 7, of which 0x7F is zero.
inline float half_e4m3(int code) {
    const int exponent = (code >> 3) & 15, mantissa = code & 7;
    if (code == 0x7f) return 0.0f;
    if (exponent == 0) return float(mantissa) * 0x1p-10f;
    return float(8 + mantissa) * float_from_bits(uint32_t(exponent + 116) << 23);  // times 2^(exponent - 11)
}

void nvfp4(const uint8_t* b, float* y, int64_t n) {
    for (; n > 0; n -= 64, b += 36, y += 64) {
        for (int sub = 0; sub < 4; sub += 2) {
            int8_t value[32];  // low nibbles of two sub-blocks of 8 bytes, then the high ones
            look_up(kFp4, b + 4 + 8 * sub, value);
            for (int s = 0; s < 2; ++s) {
                const float scale = half_e4m3(b[sub + s]);
                float* out = y + 16 * (sub + s);
                for (int i = 0; i < 8; ++i) out[i] = scale * float(value[8 * s + i]);
                for (int i = 0; i < 8; ++i) out[i + 8] = scale * float(value[16 + 8 * s + i]);
            }
        }
    }
}

// Digits of Count bytes: a byte is a fraction of 243 in 256ths; times a power of three, the whole part of three times the
// rest is the next digit.
template <int Count>
inline float* write_digits(const uint8_t* q, int num_digits, float d, float* y) {
    int power = 1;
    for (int digit = 0; digit < num_digits; ++digit, power *= 3, y += Count)
        for (int i = 0; i < Count; ++i) y[i] = d * float(((((q[i] * power) & 255) * 3) >> 8) - 1);
    return y;
}

void tq1_0(const uint8_t* b, float* y, int64_t n) {
    for (; n > 0; n -= 256, b += 54) {
        const float d = f16_to_f32(load_u16(b + 52));
        y = write_digits<32>(b, 5, d, y);
        y = write_digits<16>(b + 32, 5, d, y);
        y = write_digits<4>(b + 48, 4, d, y);
    }
}

void tq2_0(const uint8_t* b, float* y, int64_t n) {
    for (; n > 0; n -= 256, b += 66, y += 256) {
        const float d = f16_to_f32(load_u16(b + 64));
        for (int part = 0; part < 8; ++part) {
            const uint8_t* q = b + 32 * (part / 4);
            for (int i = 0; i < 32; ++i) y[32 * part + i] = d * float(((q[i] >> (2 * (part & 3))) & 3) - 1);
        }
    }
}

}  // namespace

Decode own_decoder(int type_id);  // decode_own.cpp

extern Decode iq_decoder(int type_id);
Decode iq_decoder(int type_id) {
    switch (type_id) {
        case 16: return iq2_xxs;
        case 17: return iq2_xs;
        case 18: return iq3_xxs;
        case 19: return iq1_s;
        case 20: return iq4_nl;
        case 21: return iq3_s;
        case 22: return iq2_s;
        case 23: return iq4_xs;
        case 29: return iq1_m;
        case 34: return tq1_0;
        case 35: return tq2_0;
        case 39: return mxfp4;
        case 40: return nvfp4;
        default: return own_decoder(type_id);
    }
}

}  // namespace SIROCCO_ISA
