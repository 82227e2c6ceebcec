// Encoders of the K types: super-blocks of 256 weights, whose sub-blocks' scales are quantised in their turn. The scales
// are searched for with encode_search.h, sub-blocks side by side; then they are quantised, and the codes made anew from
// what the scales have become. Bit for bit what ggml's quantisers write (its names: make_qkx2/3_quants, make_qp_quants,
// make_qx_quants, make_q3_quants). Layouts: kernels/formats.py.
#include "encode.h"
#include "jobs.h"

namespace SIROCCO_ISA {
namespace {

constexpr int kSuper = 256;

// Sub-blocks of n weights, as many super-blocks at once as fill the lanes.
template <int n>
struct Shape {
    static constexpr int subs = kSuper / n, supers = kLanes > subs ? kLanes / subs : 1;
};

// How much a weight's loss counts.
enum class Count {
    magnitude,       // |x|
    rms_magnitude,   // |x| + the sub-block's root mean square
    square,          // x^2
    importance,      // the importance alone
    importance_rms,  // importance * sqrt(x^2 + `squares` times the super-block's mean square)
};

template <int n>
void weigh(Count count, const Vec* x, const Vec* importance, Vec mean_square, Vec* w) {
    Vec base{};
    if (count == Count::rms_magnitude) {
        for (int i = 0; i < n; ++i) base += x[i] * x[i];
        base = root(base / splat(float(n)));
    }
    for (int i = 0; i < n; ++i) switch (count) {
            case Count::magnitude: w[i] = absolute(x[i]); break;
            case Count::rms_magnitude: w[i] = base + absolute(x[i]); break;
            case Count::square: w[i] = x[i] * x[i]; break;
            case Count::importance: w[i] = importance[i]; break;
            case Count::importance_rms: w[i] = importance[i] * root(mean_square + x[i] * x[i]); break;
        }
}

// What is known of some super-blocks' sub-blocks after the search.
template <int n>
struct Found {
    static constexpr int count = Shape<n>::subs * Shape<n>::supers;
    alignas(64) float scale[count], minimum[count], inverse[count], base[count], weight[count];
    bool is_zero[count];
};

// Calls search(x, w, at) for the sub-blocks of Shape<n>::supers super-blocks, kLanes at a time, with their weights; at:
// the number of the first. importance: of the same weights, or null. mean_square: of each super-block, or null.
template <int n, typename Search>
void for_lanes(const float* x, const float* importance, const float* mean_square, Count count, Found<n>& found, Search search) {
    for (int at = 0; at < Found<n>::count; at += kLanes) {
        Vec values[n], importances[n], w[n], square{};
        side_by_side<n>(x + at * n, n, values);
        if (importance) side_by_side<n>(importance + at * n, n, importances);
        if (mean_square)
            for (int lane = 0; lane < kLanes; ++lane) square[lane] = mean_square[(at + lane) / Shape<n>::subs];
        weigh<n>(count, values, importances, square, w);
        Vec sum{};
        for (int i = 0; i < n; ++i) sum += w[i];
        store(found.weight + at, sum);
        search(values, w, at);
    }
}

template <int n, bool is_absolute>
void find_affine(const float* x, const float* importance, const float* mean_square, Count count, int top, Steps steps, Found<n>& found) {
    for_lanes<n>(x, importance, mean_square, count, found, [&](const Vec* values, const Vec* w, int at) {
        const Affine<Vec> best = search_affine<n, is_absolute>(values, w, top, steps);
        store(found.scale + at, best.scale);
        store(found.minimum + at, best.minimum);
        store(found.inverse + at, best.inverse);
        store(found.base + at, best.base);
    });
}

template <int n>
void find_symmetric(const float* x, const float* importance, const float* mean_square, Count count, int top, Found<n>& found) {
    for_lanes<n>(x, importance, mean_square, count, found, [&](const Vec* values, const Vec* w, int at) {
        const Symmetric<Vec> best = search_symmetric<n>(values, w, top);
        store(found.scale + at, best.scale);
        store(found.inverse + at, best.inverse);
        for (int lane = 0; lane < kLanes; ++lane) found.is_zero[at + lane] = best.is_zero[lane] != 0;
    });
}

// Scales x >= 0 of n sub-blocks, each with its weight, as step * q, 0 <= q <= top: the best of nine steps under the
// weighted loss, then up to five rounds of moving one code at a time. Returns the step.
template <int n>
float quantise_scales(const float* x, const float* w, int top, uint8_t* codes) {
    float most = 0.0f;
    for (int i = 0; i < n; ++i) most = most > x[i] ? most : x[i];
    for (int i = 0; i < n; ++i) codes[i] = 0;
    if (most < kZeroMagnitude) return 0.0f;
    float inverse = float(top) / most, best = 0.0f;
    for (int i = 0; i < n; ++i) {
        const float lost = x[i] - 1.0f / inverse * float(uint8_t(nearest_int(inverse * x[i])));
        best += w[i] * lost * lost;
    }
    for (int step = -4; step <= 4; ++step) {
        if (step == 0) continue;
        const float trial = (0.1f * float(step) + float(top)) / most, scale = 1.0f / trial;
        float loss = 0.0f;
        for (int i = 0; i < n; ++i) {
            const int q = nearest_int(trial * x[i]);
            const float lost = x[i] - scale * float(q < top ? q : top);
            loss += w[i] * lost * lost;
        }
        if (loss < best) best = loss, inverse = trial;
    }
    float sum_qx = 0.0f, sum_qq = 0.0f;
    for (int i = 0; i < n; ++i) {
        int q = nearest_int(inverse * x[i]);
        q = q < top ? q : top;
        codes[i] = uint8_t(q);
        sum_qx += w[i] * x[i] * float(q);
        sum_qq += w[i] * float(q) * float(q);
    }
    for (int round = 0; round < 5; ++round) {
        bool has_changed = false;
        for (int i = 0; i < n; ++i) {
            const float old = float(codes[i]);
            float rest_qx = sum_qx - w[i] * x[i] * old, rest_qq = sum_qq - w[i] * old * old;
            if (!(rest_qx > 0.0f && rest_qq > 0.0f)) continue;
            int q = nearest_int(x[i] * rest_qq / rest_qx);
            q = q < top ? q : top;
            if (q == codes[i]) continue;
            rest_qx += w[i] * x[i] * float(q);
            rest_qq += w[i] * float(q) * float(q);
            if (rest_qx * rest_qx * sum_qq > sum_qx * sum_qx * rest_qq) {
                codes[i] = uint8_t(q);
                sum_qx = rest_qx, sum_qq = rest_qq;
                has_changed = true;
            }
        }
        if (!has_changed) break;
    }
    return sum_qq > 0.0f ? sum_qx / sum_qq : 0.0f;
}

// The mean of the squares of each super-block, times `times`.
template <int n>
void mean_squares(const float* x, float times, float* out) {
    for (int s = 0; s < Shape<n>::supers; ++s) out[s] = times * sum_of_squares(x + s * kSuper, kSuper) / float(kSuper);
}

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

// ---- Q2_K: scales 16, qs 64, d, dmin
void finish_q2_k(const Found<16>& found, int first, const float* x, bool is_weighted, uint8_t* out, bool& is_too_large) {
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

template <int bits>
void finish_q45_k(const Found<32>& found, int first, const float* x, bool is_weighted, uint8_t* out, bool& is_too_large) {
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

// Squares and cubes of values that no float16 scale can hold may overflow: then a scale is no number.
template <int n>
bool all_numbers(const Found<n>& found, int first) {
    float sum = 0.0f;
    for (int i = 0; i < Shape<n>::subs; ++i) sum += found.scale[first + i] * 0.0f;
    return sum == 0.0f;
}

// ---- Q3_K: hmask 32, qs 64, scales 12, d
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

void finish_q3_k(const Found<16>& found, int first, const float* x, bool is_weighted, const uint8_t* codes_found, uint8_t* out,
                 bool& is_too_large) {
    const float* scale = found.scale + first;
    is_too_large |= !all_numbers<16>(found, first);
    uint8_t scales[16] = {};
    float d = 0.0f;
    if (is_weighted) {
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
    put_q3_k(found, first, x, scales, d, is_weighted ? nullptr : codes_found, out, is_too_large);
}

// ---- Q6_K: ql 128, qh 64, scales 16, d
void finish_q6_k(const Found<16>& found, int first, const float* x, uint8_t* out, bool& is_too_large) {
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

constexpr Steps kWeightedSteps = {-0.9f, 0.05f, 36};

template <int bits>
void q45_k(const float* x, const float* importance, uint8_t* out, bool* is_too_large, int valid) {
    constexpr Steps steps = bits == 4 ? Steps{-1.0f, 0.1f, 20} : Steps{-0.5f, 0.1f, 15};
    constexpr int top = (1 << bits) - 1;
    Found<32> found;
    float squares[Shape<32>::supers];
    if (importance) mean_squares<32>(x, 2.0f, squares);
    find_affine<32, false>(x, importance, importance ? squares : nullptr, importance ? Count::importance_rms : Count::rms_magnitude, top,
                           importance ? kWeightedSteps : steps, found);
    for (int s = 0; s < valid; ++s)
        finish_q45_k<bits>(found, 8 * s, x + kSuper * s, importance, out + s * (bits == 4 ? 144 : 176), *is_too_large);
}

void q2_k(const float* x, const float* importance, uint8_t* out, bool* is_too_large, int valid) {
    Found<16> found;
    float squares[Shape<16>::supers];
    if (importance) {
        mean_squares<16>(x, 1.0f, squares);
        find_affine<16, false>(x, importance, squares, Count::importance_rms, 3, kWeightedSteps, found);
    } else {
        find_affine<16, true>(x, nullptr, nullptr, Count::magnitude, 3, {-0.5f, 0.1f, 15}, found);
    }
    for (int s = 0; s < valid; ++s) finish_q2_k(found, 16 * s, x + kSuper * s, importance, out + 84 * s, *is_too_large);
}

void q3_k(const float* x, const float* importance, uint8_t* out, bool* is_too_large, int valid) {
    Found<16> found;
    alignas(64) uint8_t codes[Found<16>::count * 16];
    if (importance) {
        float squares[Shape<16>::supers];
        mean_squares<16>(x, 2.0f, squares);
        find_symmetric<16>(x, importance, squares, Count::importance_rms, 4, found);
    } else {
        for_lanes<16>(x, nullptr, nullptr, Count::square, found, [&](const Vec* values, const Vec*, int at) {
            Vec q[16];
            store(found.scale + at, refine_symmetric<16>(values, 4, q));
            for (int lane = 0; lane < kLanes; ++lane)
                for (int i = 0; i < 16; ++i) codes[(at + lane) * 16 + i] = uint8_t(q[i][lane]);
        });
    }
    for (int s = 0; s < valid; ++s)
        finish_q3_k(found, 16 * s, x + kSuper * s, importance, codes + kSuper * s, out + 110 * s, *is_too_large);
}

void q6_k(const float* x, const float* importance, uint8_t* out, bool* is_too_large, int valid) {
    Found<16> found;
    find_symmetric<16>(x, importance, nullptr, importance ? Count::importance : Count::square, 32, found);
    for (int s = 0; s < valid; ++s) finish_q6_k(found, 16 * s, x + kSuper * s, out + 210 * s, *is_too_large);
}

// Q8_K: d (float32), qs 256, sums of sixteen codes as int16.
void q8_k(const float* x, const float*, uint8_t* out, bool*, int) {
    std::memset(out, 0, 292);
    float magnitude = 0.0f, value = 0.0f;
    for (int i = 0; i < kSuper; ++i)
        if (absolute(x[i]) > magnitude) magnitude = absolute(x[i]), value = x[i];
    if (magnitude == 0.0f) return;
    const float inverse = -127.0f / value, d = 1.0f / inverse;
    std::memcpy(out, &d, 4);
    for (int sub = 0; sub < 16; ++sub) {
        int16_t sum = 0;
        for (int i = 0; i < 16; ++i) {
            const int q = nearest_int(inverse * x[16 * sub + i]);
            const int8_t code = int8_t(q < 127 ? q : 127);
            out[4 + 16 * sub + i] = uint8_t(code);
            sum = int16_t(sum + code);
        }
        std::memcpy(out + 260 + 2 * sub, &sum, 2);
    }
}

// All super-blocks of some rows, `supers` at a time. The last ones are filled up with copies of the last.
template <int supers, void (*Encode)(const float*, const float*, uint8_t*, bool*, int)>
void all(const EncodeJob& job, int block_bytes, bool* is_too_large) {
    const int64_t per_row = job.columns / kSuper, count = job.rows * per_row;
    for (int64_t b = 0; b < count; b += supers) {
        const int valid = count - b < supers ? int(count - b) : supers;
        const float *x = job.x + b * kSuper, *importance = nullptr;
        uint8_t* out = job.out + b * block_bytes;
        alignas(64) float copied[supers * kSuper], weights[supers * kSuper];
        if (valid < supers) {
            for (int s = 0; s < supers; ++s) std::memcpy(copied + s * kSuper, x + (s < valid ? s : valid - 1) * kSuper, kSuper * 4);
            x = copied;
        }
        if (job.importance) {
            for (int s = 0; s < supers; ++s) {
                const int64_t block = b + (s < valid ? s : valid - 1);
                std::memcpy(weights + s * kSuper, job.importance + block % per_row * kSuper, kSuper * 4);
            }
            importance = weights;
        }
        Encode(x, importance, out, is_too_large, valid);
    }
}

}  // namespace

extern Encode encoder_k(int type_id);
Encode encoder_k(int type_id) {
    constexpr int wide = Shape<32>::supers, narrow = Shape<16>::supers;
    switch (type_id) {
        case 10: return [](const EncodeJob& j, bool* f) { all<narrow, q2_k>(j, 84, f); };
        case 11: return [](const EncodeJob& j, bool* f) { all<narrow, q3_k>(j, 110, f); };
        case 12: return [](const EncodeJob& j, bool* f) { all<wide, q45_k<4>>(j, 144, f); };
        case 13: return [](const EncodeJob& j, bool* f) { all<wide, q45_k<5>>(j, 176, f); };
        case 14: return [](const EncodeJob& j, bool* f) { all<narrow, q6_k>(j, 210, f); };
        case 15: return [](const EncodeJob& j, bool* f) { all<1, q8_k>(j, 292, f); };
        default: return nullptr;
    }
}

}  // namespace SIROCCO_ISA
