// What scales and minima the sub-blocks of K types have: encode_search.h, sub-blocks side by side, each weight counted as
// its type has it; and how those scales are quantised by their own weights (ggml's names: make_qkx2/3_quants,
// make_qp_quants, make_qx_quants, make_q3_quants).
#include "encode_k.h"

namespace SIROCCO_ISA {
namespace {

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

// The mean of the squares of each super-block, times `times`.
template <int n>
void mean_squares(const float* x, float times, float* out) {
    for (int s = 0; s < Shape<n>::supers; ++s) out[s] = times * sum_of_squares(x + s * kSuper, kSuper) / float(kSuper);
}

constexpr Steps kWeightedSteps = {-0.9f, 0.05f, 36};

}  // namespace

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
template float quantise_scales<8>(const float*, const float*, int, uint8_t*);
template float quantise_scales<16>(const float*, const float*, int, uint8_t*);

template <int bits>
void search_q45_k(const float* x, const float* importance, Found<32>& found) {
    constexpr Steps steps = bits == 4 ? Steps{-1.0f, 0.1f, 20} : Steps{-0.5f, 0.1f, 15};
    constexpr int top = (1 << bits) - 1;
    float squares[Shape<32>::supers];
    if (importance) mean_squares<32>(x, 2.0f, squares);
    find_affine<32, false>(x, importance, importance ? squares : nullptr, importance ? Count::importance_rms : Count::rms_magnitude, top,
                           importance ? kWeightedSteps : steps, found);
}
template void search_q45_k<4>(const float*, const float*, Found<32>&);
template void search_q45_k<5>(const float*, const float*, Found<32>&);

void search_q2_k(const float* x, const float* importance, Found<16>& found) {
    if (!importance) return find_affine<16, true>(x, nullptr, nullptr, Count::magnitude, 3, {-0.5f, 0.1f, 15}, found);
    float squares[Shape<16>::supers];
    mean_squares<16>(x, 1.0f, squares);
    find_affine<16, false>(x, importance, squares, Count::importance_rms, 3, kWeightedSteps, found);
}

void search_q3_k(const float* x, const float* importance, Found<16>& found, uint8_t* codes) {
    if (importance) {
        float squares[Shape<16>::supers];
        mean_squares<16>(x, 2.0f, squares);
        return find_symmetric<16>(x, importance, squares, Count::importance_rms, 4, found);
    }
    for_lanes<16>(x, nullptr, nullptr, Count::square, found, [&](const Vec* values, const Vec*, int at) {
        Vec q[16];
        store(found.scale + at, refine_symmetric<16>(values, 4, q));
        for (int lane = 0; lane < kLanes; ++lane)
            for (int i = 0; i < 16; ++i) codes[(at + lane) * 16 + i] = uint8_t(q[i][lane]);
    });
}

void search_q6_k(const float* x, const float* importance, Found<16>& found) {
    find_symmetric<16>(x, importance, nullptr, importance ? Count::importance : Count::square, 32, found);
}

}  // namespace SIROCCO_ISA
