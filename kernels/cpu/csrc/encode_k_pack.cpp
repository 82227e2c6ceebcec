// Blocks of K types from what was found of their sub-blocks: the scales are quantised, the codes made anew from what they
// have become, and both are packed.
#include "encode_k.h"

namespace SIROCCO_ISA {
namespace {

// Codes of a sub-block whose quantised scale is not zero: nearest((x + minimum) / scale). Of one whose scale is, those
// that the search ended with.
template <int n>
void affine_codes(const Found<n>& found, int sub, const float* x, float scale, float minimum, int top, uint8_t* codes) {
    if (scale != 0.0f) return divide<n>(x, minimum, scale, 0, top, 0, codes);
    for (int i = 0; i < n; ++i) {
        const int q = nearest_int(found.inverse[sub] * (x[i] - found.base[sub]));
        codes[i] = uint8_t(q < 0 ? 0 : q > top ? top : q);
    }
}

template <int n>
void symmetric_codes(const Found<n>& found, int sub, const float* x, float scale, int top, uint8_t* codes) {
    if (scale != 0.0f) return divide<n>(x, 0.0f, scale, -top, top - 1, top, codes);
    for (int i = 0; i < n; ++i) {
        const int q = nearest_int(found.inverse[sub] * x[i]);
        codes[i] = found.is_zero[sub] ? uint8_t(0) : uint8_t((q < -top ? -top : q > top - 1 ? top - 1 : q) + top);
    }
}

// 64 bytes of four two-bit codes each, 32 apart.
void put_two_bits(const uint8_t* codes, uint8_t* out) {
    for (int half = 0; half < 2; ++half, codes += 128, out += 32)
        for (int i = 0; i < 32; ++i)
            out[i] = uint8_t((codes[i] & 3) | (codes[i + 32] & 3) << 2 | (codes[i + 64] & 3) << 4 | (codes[i + 96] & 3) << 6);
}

void put_six_bits(const uint8_t* scales, const uint8_t* minima, uint8_t* out) {
    for (int i = 0; i < 4; ++i) {
        out[i] = uint8_t(scales[i] | scales[i + 4] >> 4 << 6);
        out[i + 4] = uint8_t(minima[i] | minima[i + 4] >> 4 << 6);
        out[i + 8] = uint8_t((scales[i + 4] & 15) | (minima[i + 4] & 15) << 4);
    }
}

void put_nibbles(const uint8_t* codes, uint8_t* out) {
    for (int part = 0; part < 4; ++part, codes += 64, out += 32)
        for (int i = 0; i < 32; ++i) out[i] = uint8_t((codes[i] & 15) | (codes[i + 32] & 15) << 4);
}

// Squares and cubes of values that no float16 scale can hold may overflow: then a scale is no number.
template <int n>
bool all_numbers(const Found<n>& found, int first) {
    float sum = 0.0f;
    for (int i = 0; i < Shape<n>::subs; ++i) sum += found.scale[first + i] * 0.0f;
    return sum == 0.0f;
}

// What is packed once the scales are.
void put_q3_k(const Found<16>& found, int first, const float* x, const uint8_t* scales, float d, const uint8_t* codes_found,
              uint8_t* out, bool& is_too_large) {
    uint8_t codes[kSuper], *packed = out + 96;
    for (int i = 0; i < 8; ++i) packed[i] = uint8_t((scales[i] & 15) | (scales[i + 8] & 15) << 4);
    for (int i = 0; i < 4; ++i)
        packed[8 + i] = uint8_t((scales[i] >> 4 & 3) | (scales[i + 4] >> 4 & 3) << 2 | (scales[i + 8] >> 4 & 3) << 4 | (scales[i + 12] >> 4 & 3) << 6);
    put_half(out + 108, d, is_too_large);
    d = f16_to_f32(load_u16(out + 108));
    for (int i = 0; i < 16; ++i) {
        const float scale = d * float(int(scales[i]) - 32);
        if (scale == 0.0f && codes_found) std::memcpy(codes + 16 * i, codes_found + 16 * i, 16);
        else symmetric_codes<16>(found, first + i, x + 16 * i, scale, 4, codes + 16 * i);
    }
    for (int i = 0; i < 32; ++i) {
        int high = 0;
        for (int plane = 0; plane < 8; ++plane) high |= (codes[32 * plane + i] >> 2) << plane;
        out[i] = uint8_t(high);
    }
    put_two_bits(codes, out + 32);
}

}  // namespace

// ---- Q2_K: scales 16, qs 64, d, dmin
void pack_q2_k(const Found<16>& found, int first, const float* x, bool is_weighted, uint8_t* out, bool& is_too_large) {
    const float *scale = found.scale + first, *minimum = found.minimum + first;
    uint8_t codes[kSuper], scales[16], minima[16];
    float d, dmin;
    if (is_weighted) {
        d = quantise_scales<16>(scale, found.weight + first, 15, scales);
        dmin = quantise_scales<16>(minimum, found.weight + first, 15, minima);
    } else {
        float most_scale = 0.0f, most_minimum = 0.0f;
        for (int i = 0; i < 16; ++i) {
            most_scale = scale[i] > most_scale ? scale[i] : most_scale;
            most_minimum = minimum[i] > most_minimum ? minimum[i] : most_minimum;
        }
        const float by_scale = 15.0f / most_scale, by_minimum = 15.0f / most_minimum;
        for (int i = 0; i < 16; ++i) {
            scales[i] = most_scale > 0.0f ? uint8_t(nearest_int(by_scale * scale[i])) : uint8_t(0);
            minima[i] = most_minimum > 0.0f ? uint8_t(nearest_int(by_minimum * minimum[i])) : uint8_t(0);
        }
        d = most_scale > 0.0f ? most_scale / 15.0f : 0.0f;
        dmin = most_minimum > 0.0f ? most_minimum / 15.0f : 0.0f;
    }
    for (int i = 0; i < 16; ++i) out[i] = uint8_t(scales[i] | minima[i] << 4);
    put_half(out + 80, d, is_too_large);
    put_half(out + 82, dmin, is_too_large);
    d = f16_to_f32(load_u16(out + 80)), dmin = f16_to_f32(load_u16(out + 82));
    for (int i = 0; i < 16; ++i)
        affine_codes<16>(found, first + i, x + 16 * i, d * float(out[i] & 15), dmin * float(out[i] >> 4), 3, codes + 16 * i);
    put_two_bits(codes, out + 16);
}

// ---- Q4_K: d, dmin, scales 12, qs 128; Q5_K: d, dmin, scales 12, qh 32, qs 128
template <int bits>
void pack_q45_k(const Found<32>& found, int first, const float* x, bool is_weighted, uint8_t* out, bool& is_too_large) {
    constexpr int top = (1 << bits) - 1;
    const float *scale = found.scale + first, *minimum = found.minimum + first;
    uint8_t codes[kSuper], scales[8], minima[8];
    float d, dmin;
    if (is_weighted) {
        d = quantise_scales<8>(scale, found.weight + first, 63, scales);
        dmin = quantise_scales<8>(minimum, found.weight + first, 63, minima);
    } else {
        float most_scale = 0.0f, most_minimum = 0.0f;
        for (int i = 0; i < 8; ++i) {
            most_scale = scale[i] > most_scale ? scale[i] : most_scale;
            most_minimum = minimum[i] > most_minimum ? minimum[i] : most_minimum;
        }
        const float by_scale = most_scale > 0.0f ? 63.0f / most_scale : 0.0f;
        const float by_minimum = most_minimum > 0.0f ? 63.0f / most_minimum : 0.0f;
        for (int i = 0; i < 8; ++i) {
            scales[i] = uint8_t(nearest_int(by_scale * scale[i]));
            minima[i] = uint8_t(nearest_int(by_minimum * minimum[i]));
        }
        d = most_scale / 63.0f, dmin = most_minimum / 63.0f;
    }
    for (int i = 0; i < 8; ++i) {
        scales[i] = scales[i] < 63 ? scales[i] : uint8_t(63);
        minima[i] = minima[i] < 63 ? minima[i] : uint8_t(63);
    }
    put_half(out, d, is_too_large);
    put_half(out + 2, dmin, is_too_large);
    put_six_bits(scales, minima, out + 4);
    d = f16_to_f32(load_u16(out)), dmin = f16_to_f32(load_u16(out + 2));
    for (int i = 0; i < 8; ++i)
        affine_codes<32>(found, first + i, x + 32 * i, d * float(scales[i]), dmin * float(minima[i]), top, codes + 32 * i);
    if (bits == 5)
        for (int i = 0; i < 32; ++i) {
            int high = 0;
            for (int sub = 0; sub < 8; ++sub) high |= (codes[32 * sub + i] >> 4) << sub;
            out[16 + i] = uint8_t(high);
        }
    put_nibbles(codes, out + (bits == 5 ? 48 : 16));
}
template void pack_q45_k<4>(const Found<32>&, int, const float*, bool, uint8_t*, bool&);
template void pack_q45_k<5>(const Found<32>&, int, const float*, bool, uint8_t*, bool&);

// ---- Q3_K: hmask 32, qs 64, scales 12, d
void pack_q3_k(const Found<16>& found, int first, const float* x, const uint8_t* codes_found, uint8_t* out, bool& is_too_large) {
    const float* scale = found.scale + first;
    is_too_large |= !all_numbers<16>(found, first);
    uint8_t scales[16] = {};
    float d = 0.0f;
    if (!codes_found) {
        const Symmetric<float> best = search_symmetric<16>(scale, found.weight + first, 32);
        for (int i = 0; i < 16; ++i) {
            const float q = clamped(nearest(best.inverse * scale[i]), -32.0f, 31.0f);
            scales[i] = best.is_zero ? uint8_t(0) : uint8_t(int(q) + 32);
        }
        d = best.scale;
    } else {
        float magnitude = 0.0f, value = 0.0f;
        for (int i = 0; i < 16; ++i)
            if (absolute(scale[i]) > magnitude) magnitude = absolute(scale[i]), value = scale[i];
        if (value != 0.0f) {
            const float inverse = -32.0f / value;
            for (int i = 0; i < 16; ++i) {
                const int q = int8_t(nearest_int(inverse * scale[i]));
                scales[i] = uint8_t((q < -32 ? -32 : q > 31 ? 31 : q) + 32);
            }
            d = 1.0f / inverse;
        }
    }
    put_q3_k(found, first, x, scales, d, codes_found, out, is_too_large);
}

// ---- Q6_K: ql 128, qh 64, scales 16, d
void pack_q6_k(const Found<16>& found, int first, const float* x, uint8_t* out, bool& is_too_large) {
    const float* scale = found.scale + first;
    is_too_large |= !all_numbers<16>(found, first);
    float magnitude = 0.0f, value = 0.0f;
    for (int i = 0; i < 16; ++i)
        if (absolute(scale[i]) > magnitude) magnitude = absolute(scale[i]), value = scale[i];
    if (magnitude < kZeroMagnitude) {
        std::memset(out, 0, 210);
        return;
    }
    const float inverse = -128.0f / value;
    put_half(out + 208, 1.0f / inverse, is_too_large);
    const float d = f16_to_f32(load_u16(out + 208));
    uint8_t codes[kSuper];
    for (int i = 0; i < 16; ++i) {
        const int q = nearest_int(inverse * scale[i]);
        const int8_t s = int8_t(q < 127 ? q : 127);
        out[192 + i] = uint8_t(s);
        symmetric_codes<16>(found, first + i, x + 16 * i, d * float(s), 32, codes + 16 * i);
    }
    for (int half = 0; half < 2; ++half) {
        const uint8_t* q = codes + 128 * half;
        uint8_t *low = out + 64 * half, *high = out + 128 + 32 * half;
        for (int i = 0; i < 32; ++i) {
            low[i] = uint8_t((q[i] & 15) | (q[i + 64] & 15) << 4);
            low[i + 32] = uint8_t((q[i + 32] & 15) | (q[i + 96] & 15) << 4);
            high[i] = uint8_t(q[i] >> 4 | q[i + 32] >> 4 << 2 | q[i + 64] >> 4 << 4 | q[i + 96] >> 4 << 6);
        }
    }
}

}  // namespace SIROCCO_ISA
