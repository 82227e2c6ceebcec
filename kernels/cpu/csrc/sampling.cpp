// Temperature, top-k, top-p, min-p and the draw, one row after the other, without sorting the vocabulary: weights are
// counted in buckets of their leading bits, and only the buckets that the filters can reach are collected and sorted.
#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace {

struct Candidate {
    float weight;
    int32_t id;
};

// Weights lie in [0, 1]. Their bits grow with them: exponent and 4 bits of mantissa make at most 127 * 16 + 1 buckets.
constexpr int kShift = 19, kBuckets = (127 << 4) + 1;

int bucket_of(float weight) {
    uint32_t bits;
    std::memcpy(&bits, &weight, sizeof bits);
    return int(bits >> kShift);
}

struct Scratch {
    std::vector<float> weights;
    std::vector<Candidate> candidates;
    std::vector<double> mass;
    std::vector<int64_t> count;
};

// The likeliest token; the first of equals, and 0 among NaNs only.
int64_t likeliest(const float* logits, int64_t vocab) {
    int64_t best = 0;
    for (int64_t i = 1; i < vocab; ++i)
        if (logits[i] > logits[best] || logits[best] != logits[best]) best = i;
    return best;
}

// The lowest bucket that the filters may keep something of.
int lowest_bucket(Scratch& s, const DrawParams& p, double total, int64_t vocab) {
    s.mass.assign(kBuckets, 0.0);
    s.count.assign(kBuckets, 0);
    for (int64_t i = 0; i < vocab; ++i) {
        const int b = bucket_of(s.weights[i]);
        s.mass[b] += s.weights[i];
        ++s.count[b];
    }
    // top-p counts shares of what top-k left: then all of that is needed, whatever the other filters drop later.
    const bool needs_all_k = p.top_k > 0 && p.top_p < 1;
    // A little below min_p: the exact comparison is made on the candidates.
    const int floor = p.min_p > 0 && !needs_all_k ? bucket_of(float(std::min(p.min_p, 1.0) * 0.999)) : 0;
    double mass = 0;
    int64_t count = 0;
    for (int b = kBuckets - 1; b > floor; --b) {
        mass += s.mass[b];
        count += s.count[b];
        const bool is_whole_p = p.top_k <= 0 && p.top_p < 1 && mass >= p.top_p * total * (1 + 1e-9);
        if ((p.top_k > 0 && count >= p.top_k) || is_whole_p) return b;
    }
    return floor;
}

int64_t draw_filtered(Scratch& s, const DrawParams& p, double total, int64_t vocab) {
    const int lowest = lowest_bucket(s, p, total, vocab);
    auto& c = s.candidates;
    c.clear();
    for (int64_t i = 0; i < vocab; ++i)
        if (bucket_of(s.weights[i]) >= lowest) c.push_back({s.weights[i], int32_t(i)});
    std::sort(c.begin(), c.end(), [](const Candidate& a, const Candidate& b) {
        return a.weight > b.weight || (a.weight == b.weight && a.id < b.id);
    });
    if (p.top_k > 0 && p.top_k < int64_t(c.size())) c.resize(size_t(p.top_k));
    double whole = total;
    if (p.top_k > 0) {
        whole = 0;
        for (const Candidate& x : c) whole += x.weight;
    }
    size_t kept = 0;
    double sum = 0;
    const double limit = p.top_p < 1 ? p.top_p * whole : INFINITY;
    while (kept < c.size() && (kept == 0 || (sum < limit && c[kept].weight >= p.min_p * c[0].weight)))
        sum += c[kept++].weight;
    const double target = p.u * sum;
    double passed = 0;
    size_t i = 0;
    while (i + 1 < kept && (passed += c[i].weight) <= target) ++i;
    return c[i].id;
}

int64_t draw_unfiltered(const Scratch& s, const DrawParams& p, double total, int64_t vocab) {
    const double target = p.u * total;
    double passed = 0;
    int64_t last = 0;
    for (int64_t i = 0; i < vocab; ++i) {
        if (s.weights[i] == 0.0f) continue;
        last = i;
        if ((passed += s.weights[i]) > target) return i;
    }
    return last;
}

}  // namespace

int64_t draw_token(const KernelTable& kernels, const float* logits, int64_t vocab, const DrawParams& p) {
    const int64_t best = likeliest(logits, vocab);
    const float largest = logits[best];
    if (p.temperature <= 0 || !std::isfinite(largest)) return best;
    thread_local Scratch s;
    s.weights.resize(size_t(vocab));
    kernels.exp_shifted(logits, largest, p.temperature, s.weights.data(), vocab);
    double total = 0;
    for (float& weight : s.weights) {
        // NaN logits, and what rounding makes of the largest one, must stay within the buckets.
        weight = weight > 0.0f ? std::min(weight, 1.0f) : 0.0f;
        total += weight;
    }
    const bool is_filtered = p.top_k > 0 || p.top_p < 1 || p.min_p > 0;
    return is_filtered ? draw_filtered(s, p, total, vocab) : draw_unfiltered(s, p, total, vocab);
}
