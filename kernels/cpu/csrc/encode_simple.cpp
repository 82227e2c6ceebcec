// Encoders of the types with one scale a block. Without an importance of the columns the scale is the one that the
// extreme value asks for; with it, the search of encode_search.h finds one. Bit for bit what ggml writes.
#include "encode.h"
#include "jobs.h"

namespace SIROCCO_ISA {
namespace {

constexpr int kBlock = 32;

float largest_magnitude(const float* x, int n) {
    Vec most{};
    for (int i = 0; i < n; i += kLanes) most = larger(absolute(load(x + i)), most);
    float values[kLanes], out = 0.0f;
    store(values, most);
    for (int i = 0; i < kLanes; ++i) out = larger(values[i], out);
    return out;
}

// The value of largest magnitude, the first of several.
float extreme_value(const float* x) {
    const float magnitude = largest_magnitude(x, kBlock);
    for (int i = 0; i < kBlock; ++i)
        if (absolute(x[i]) == magnitude) return magnitude == 0.0f ? 0.0f : x[i];
    return 0.0f;
}

// Least and largest; of zeros of both signs the first.
void range_of(const float* x, float& least, float& most) {
    Vec low = load(x), high = low;
    for (int i = kLanes; i < kBlock; i += kLanes) {
        low = smaller(load(x + i), low);
        high = larger(load(x + i), high);
    }
    float lows[kLanes], highs[kLanes];
    store(lows, low);
    store(highs, high);
    least = lows[0], most = highs[0];
    for (int i = 1; i < kLanes; ++i) least = smaller(lows[i], least), most = larger(highs[i], most);
    const auto first_zero = [x] {
        for (int i = 0; i < kBlock; ++i)
            if (x[i] == 0.0f) return x[i];
        return 0.0f;
    };
    if (least == 0.0f) least = first_zero();
    if (most == 0.0f) most = first_zero();
}

// 1 / d, or 0 for 0. Where d is so small that this overflows, no product with it means anything: `codes` become zero.
bool inverse_of(float d, float& inverse) {
    inverse = d != 0.0f ? 1.0f / d : 0.0f;
    return inverse - inverse == 0.0f;
}

// codes[i] = the whole part of (x[i] - low) * inverse + half, at most top.
void round_up_codes(const float* x, float low, float inverse, float half, int top, uint8_t* codes) {
    for (int i = 0; i < kBlock; ++i) {
        const int q = int((x[i] - low) * inverse + half);
        codes[i] = uint8_t(q < top ? q : top);
    }
}

void put_codes(const uint8_t* codes, uint8_t* high, uint8_t* low) {
    for (int i = 0; i < 16; ++i) low[i] = uint8_t((codes[i] & 15) | (codes[i + 16] & 15) << 4);
    if (!high) return;
    uint32_t bits = 0;
    for (int i = 0; i < kBlock; ++i) bits |= uint32_t(codes[i] >> 4 & 1) << i;
    std::memcpy(high, &bits, 4);
}

// Q4_0, Q5_0: d * (q - 2^(bits - 1))
template <int bits>
void symmetric(const float* x, uint8_t* out, bool* is_too_large) {
    constexpr int half = 1 << (bits - 1);
    uint8_t codes[kBlock] = {};
    const float d = extreme_value(x) / float(-half);
    float inverse;
    if (inverse_of(d, inverse)) round_up_codes(x, 0.0f, inverse, float(half) + 0.5f, 2 * half - 1, codes);
    put_half(out, d, *is_too_large);
    put_codes(codes, bits == 5 ? out + 2 : nullptr, out + (bits == 5 ? 6 : 2));
}

// Q4_1, Q5_1: d * q + m
template <int bits>
void affine(const float* x, uint8_t* out, bool* is_too_large) {
    constexpr int top = (1 << bits) - 1;
    uint8_t codes[kBlock] = {};
    float least, most, inverse;
    range_of(x, least, most);
    const float d = (most - least) / float(top);
    // A span that no float holds has no codes either; its scale is refused below.
    if (std::isfinite(d) && inverse_of(d, inverse)) round_up_codes(x, least, inverse, 0.5f, top, codes);
    put_half(out, d, *is_too_large);
    put_half(out + 2, least, *is_too_large);
    put_codes(codes, bits == 5 ? out + 4 : nullptr, out + (bits == 5 ? 8 : 4));
}

// Whole numbers nearest to x * inverse, halves away from zero.
void eight_bits(const float* x, float inverse, int8_t* codes) {
    for (int i = 0; i < kBlock; ++i) {
        const float v = x[i] * inverse;
        const int whole = int(v);
        const float rest = v - float(whole);
        codes[i] = int8_t(whole + (rest >= 0.5f) - (rest <= -0.5f));
    }
}

float scale_of_eight_bits(const float* x, int8_t* codes) {
    const float d = largest_magnitude(x, kBlock) / 127.0f;
    float inverse;
    if (inverse_of(d, inverse)) eight_bits(x, inverse, codes);
    else std::memset(codes, 0, kBlock);
    return d;
}

void q8_0(const float* x, uint8_t* out, bool* is_too_large) {
    put_half(out, scale_of_eight_bits(x, reinterpret_cast<int8_t*>(out + 2)), *is_too_large);
}

// d, then d times the sum of the codes.
void q8_1(const float* x, uint8_t* out, bool* is_too_large) {
    int8_t* codes = reinterpret_cast<int8_t*>(out + 4);
    const float d = scale_of_eight_bits(x, codes);
    int sum = 0;
    for (int i = 0; i < kBlock; ++i) sum += codes[i];
    put_half(out, d, *is_too_large);
    put_half(out + 2, float(sum) * d, *is_too_large);
}

// The exponent, two below that of the largest magnitude, so that it becomes 4 to 8; then the nearest of the doubled E2M1
// numbers 0, 1, 2, 3, 4, 6, 8, 12, and of two equally near ones the smaller.
void mxfp4(const float* x, uint8_t* out, bool*) {
    const float magnitude = largest_magnitude(x, kBlock);
    const int exponent = magnitude > 0.0f ? int(std::floor(std::log2(magnitude))) - 2 + 127 : 0;
    out[0] = uint8_t(exponent < 0 ? 0 : exponent);  // magnitudes that small come out as zeros
    const uint32_t bits = out[0] < 2 ? 0x00200000u << out[0] : uint32_t(out[0] - 1) << 23;
    const float d = float_from_bits(bits);
    static constexpr float levels[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
    float best[kBlock];
    int32_t codes[kBlock] = {};
    for (int i = 0; i < kBlock; ++i) best[i] = absolute(levels[0] * d - x[i]);
    for (int level = 1; level < 16; ++level)
        for (int i = 0; i < kBlock; ++i) {
            const float lost = absolute(levels[level] * d - x[i]);
            codes[i] = lost < best[i] ? level : codes[i];
            best[i] = lost < best[i] ? lost : best[i];
        }
    for (int i = 0; i < 16; ++i) out[1 + i] = uint8_t(codes[i] | codes[i + 16] << 4);
}

template <int block_bytes, void (*Encode)(const float*, uint8_t*, bool*)>
void all(const EncodeJob& job, bool* is_too_large) {
    const int64_t count = job.rows * (job.columns / kBlock);
    for (int64_t b = 0; b < count; ++b) Encode(job.x + b * kBlock, job.out + b * block_bytes, is_too_large);
}

// With an importance: a loss counts importance * sqrt(x^2 + the row's mean square).
template <int bits, bool has_minimum>
void weighted(const EncodeJob& job, bool* is_too_large) {
    constexpr int half = 1 << (bits - 1), top = 2 * half - 1, head = has_minimum ? 4 : 2;
    constexpr int block_bytes = head + (bits == 5 ? 4 : 0) + 16;
    const int64_t blocks = job.columns / kBlock;
    for (int64_t row = 0; row < job.rows; ++row) {
        const float* x = job.x + row * job.columns;
        const Vec mean = splat(sum_of_squares(x, job.columns) / float(job.columns));
        for (int64_t first = 0; first < blocks; first += kLanes) {
            const int valid = blocks - first < kLanes ? int(blocks - first) : kLanes;
            alignas(64) float values[kLanes * kBlock], counts[kLanes * kBlock];
            for (int lane = 0; lane < kLanes; ++lane) {
                const int64_t block = first + (lane < valid ? lane : valid - 1);
                std::memcpy(values + lane * kBlock, x + block * kBlock, kBlock * 4);
                std::memcpy(counts + lane * kBlock, job.importance + block * kBlock, kBlock * 4);
            }
            Vec v[kBlock], w[kBlock];
            side_by_side<kBlock>(values, kBlock, v);
            side_by_side<kBlock>(counts, kBlock, w);
            for (int i = 0; i < kBlock; ++i) w[i] = w[i] * root(mean + v[i] * v[i]);
            VecInt codes[kBlock];
            Vec scale, minimum{};
            if constexpr (has_minimum) {
                const Affine<Vec> best = search_affine<kBlock, false>(v, w, top, {-0.9f, 0.05f, 36});
                scale = best.scale, minimum = best.minimum;
                for (int i = 0; i < kBlock; ++i)
                    codes[i] = smaller(larger(nearest_int(best.inverse * (v[i] - best.base)), VecInt{}), VecInt{} + top);
            } else {
                const Symmetric<Vec> best = search_symmetric<kBlock>(v, w, half);
                scale = best.scale;
                for (int i = 0; i < kBlock; ++i) {
                    const Vec q = clamped(nearest(best.inverse * v[i]), float(-half), float(half - 1));
                    codes[i] = best.is_zero ? VecInt{} : __builtin_convertvector(q, VecInt) + half;
                }
            }
            for (int lane = 0; lane < valid; ++lane) {
                uint8_t* out = job.out + (row * blocks + first + lane) * block_bytes;
                uint8_t bytes[kBlock];
                for (int i = 0; i < kBlock; ++i) bytes[i] = uint8_t(codes[i][lane]);
                put_half(out, scale[lane], *is_too_large);
                if (has_minimum) put_half(out + 2, -minimum[lane], *is_too_large);
                put_codes(bytes, bits == 5 ? out + head : nullptr, out + head + (bits == 5 ? 4 : 0));
            }
        }
    }
}

template <int block_bytes, void (*Encode)(const float*, uint8_t*, bool*), void (*Weighted)(const EncodeJob&, bool*)>
void either(const EncodeJob& job, bool* is_too_large) {
    if (job.importance) Weighted(job, is_too_large);
    else all<block_bytes, Encode>(job, is_too_large);
}

}  // namespace

Encode encoder_k(int type_id);  // encode_k.cpp
Encode encoder_own(int type_id);  // encode_own.cpp

extern Encode encoder(int type_id);
Encode encoder(int type_id) {
    switch (type_id) {
        case 2: return either<18, symmetric<4>, weighted<4, false>>;
        case 3: return either<20, affine<4>, weighted<4, true>>;
        case 6: return either<22, symmetric<5>, weighted<5, false>>;
        case 7: return either<24, affine<5>, weighted<5, true>>;
        case 8: return all<34, q8_0>;
        case 9: return all<36, q8_1>;
        case 39: return all<17, mxfp4>;
        default: {
            const Encode own = encoder_own(type_id);
            return own ? own : encoder_k(type_id);
        }
    }
}

}  // namespace SIROCCO_ISA
