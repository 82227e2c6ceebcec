// Temperature, top-k, top-p, min-p and the draw, without sorting the vocabulary: the filters give a bound below which
// nothing can be kept; what lies above it is spread over buckets by its leading bits, and only those buckets are sorted
// in which a filter or the draw falls.
#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "jobs.h"

namespace {

// A weight's bits, which grow with it, before the id turned over: descending order is by weight, then by id.
using Candidate = uint64_t;

uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

float weight_of(Candidate c) {
    const uint32_t bits = uint32_t(c >> 32);
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

int64_t id_of(Candidate c) { return int64_t(~uint32_t(c)); }

// 128 buckets for a factor of two down from 1, and one for all below 2^-24.
constexpr int kBucketShift = 16, kBuckets = 24 * 128 + 1;
constexpr size_t kFew = 256;  // candidates that are simply sorted

int bucket_of(float weight) { return std::min(int((bits_of(1.0f) - bits_of(weight)) >> kBucketShift), kBuckets - 1); }

// Candidates in descending order, of which only those parts are sorted that are looked at. Ranks count from the largest.
class Ranking {
   public:
    // The first `count` of both, which stay where they are until the next call.
    void take(const std::vector<float>& weights, const std::vector<int32_t>& ids, size_t count) {
        weights_ = weights.data();
        ids_ = ids.data();
        num_buckets_ = count <= kFew ? 1 : kBuckets;
        begin_.assign(size_t(num_buckets_) + 1, 0);
        mass_.assign(size_t(num_buckets_), 0.0);
        is_sorted_.assign(size_t(num_buckets_), 0);
        items_.resize(count);
        // Neighbours often share a bucket: in turn into two of each, so that one sum need not wait for the other.
        other_count_.assign(size_t(num_buckets_), 0);
        other_mass_.assign(size_t(num_buckets_), 0.0);
        for (size_t i = 0; i + 1 < count; i += 2) {
            const size_t b = size_t(bucket(weights[i])), c = size_t(bucket(weights[i + 1]));
            ++begin_[b + 1];
            mass_[b] += weights[i];
            ++other_count_[c];
            other_mass_[c] += weights[i + 1];
        }
        if (count % 2) {
            const size_t b = size_t(bucket(weights[count - 1]));
            ++begin_[b + 1];
            mass_[b] += weights[count - 1];
        }
        for (size_t b = 0; b < size_t(num_buckets_); ++b) {
            begin_[b + 1] += other_count_[b];
            mass_[b] += other_mass_[b];
        }
        for (size_t b = 0; b < size_t(num_buckets_); ++b) begin_[b + 1] += begin_[b];
    }

    size_t size() const { return items_.size(); }
    float largest() { return weight_of(sorted(bucket_at(0))[0]); }

    // The sum of the first `count`.
    double mass(size_t count) {
        double sum = 0;
        int b = 0;
        for (; b < num_buckets_ && begin_[size_t(b) + 1] <= count; ++b) sum += mass_[size_t(b)];
        if (b == num_buckets_ || begin_[size_t(b)] == count) return sum;
        const Candidate* items = sorted(b);
        for (size_t i = begin_[size_t(b)]; i < count; ++i) sum += weight_of(*items++);
        return sum;
    }

    // How many of the first `count` it takes until their sum reaches `limit` (with strictly: passes it); count if it does not.
    size_t reach(double limit, size_t count, bool strictly) {
        const auto is_there = [&](double sum) { return strictly ? sum > limit : sum >= limit; };
        double sum = 0;
        for (int b = 0; b < num_buckets_ && begin_[size_t(b)] < count; ++b) {
            if (!is_there(sum + mass_[size_t(b)])) {
                sum += mass_[size_t(b)];
                continue;
            }
            const Candidate* items = sorted(b);
            const size_t end = std::min(begin_[size_t(b) + 1], count);
            for (size_t i = begin_[size_t(b)]; i < end; ++i)
                if (is_there(sum += weight_of(*items++))) return i + 1;
        }
        return count;
    }

    // How many are at least `bound`.
    size_t at_least(double bound) {
        for (int b = 0; b < num_buckets_; ++b) {
            if (begin_[size_t(b)] == begin_[size_t(b) + 1]) continue;
            const Candidate* items = sorted_if_below(b, bound);
            if (!items) continue;
            for (size_t i = begin_[size_t(b)]; i < begin_[size_t(b) + 1]; ++i)
                if (weight_of(*items++) < bound) return i;
        }
        return size();
    }

    Candidate at(size_t rank) {
        const int b = bucket_at(rank);
        return sorted(b)[rank - begin_[size_t(b)]];
    }

   private:
    int bucket_at(size_t rank) const {
        return int(std::upper_bound(begin_.begin(), begin_.end(), rank) - begin_.begin()) - 1;
    }

    int bucket(float weight) const { return num_buckets_ == 1 ? 0 : bucket_of(weight); }

    // Few buckets are asked for, so that it pays to gather theirs alone.
    const Candidate* sorted(int b) {
        Candidate *first = items_.data() + begin_[size_t(b)], *last = items_.data() + begin_[size_t(b) + 1];
        if (is_sorted_[size_t(b)]) return first;
        is_sorted_[size_t(b)] = 1;
        Candidate* next = first;
        for (size_t i = 0; i < items_.size() && next < last; ++i)
            if (bucket(weights_[i]) == b) *next++ = uint64_t(bits_of(weights_[i])) << 32 | uint32_t(~uint32_t(ids_[i]));
        std::sort(first, last, std::greater<Candidate>());
        return first;
    }

    // Null where all of the bucket are at least `bound` for sure.
    const Candidate* sorted_if_below(int b, double bound) {
        if (num_buckets_ > 1 && b + 1 < kBuckets && b < bucket_of(float(std::min(bound, 1.0)))) return nullptr;
        return sorted(b);
    }

    const float* weights_ = nullptr;
    const int32_t* ids_ = nullptr;
    int num_buckets_ = 0;
    std::vector<size_t> begin_, other_count_;
    std::vector<double> mass_, other_mass_;
    std::vector<char> is_sorted_;
    std::vector<Candidate> items_;
};

struct Workspace {
    std::vector<float> weights, maxima, some, values;
    std::vector<double> sums;
    std::vector<int32_t> ids;
    Ranking ranking;
};

Workspace& workspace() {
    thread_local Workspace w;
    return w;
}

size_t blocks_of(int64_t count, int64_t size) { return size_t((count + size - 1) / size); }

// Notes the largest of each chunk of x.
void find_maxima(const KernelTable& kernels, Workspace& w, const float* x, int64_t count) {
    w.maxima.resize(blocks_of(count, kChunk));
    kernels.chunk_maxima(x, count, w.maxima.data());
}

// A bound that at least k values reach: the k-th largest of the chunks' maxima, as far as there are so many chunks.
float bound_of_top(Workspace& w, int64_t k) {
    if (k > int64_t(w.maxima.size())) return -std::numeric_limits<float>::infinity();
    w.some.assign(w.maxima.begin(), w.maxima.end());
    std::nth_element(w.some.begin(), w.some.begin() + (k - 1), w.some.end(), std::greater<float>());
    return w.some[size_t(k) - 1];
}

// All values of at least `bound`, of the chunks whose maxima reach it.
size_t collect(const KernelTable& kernels, Workspace& w, const float* x, int64_t count, float bound) {
    size_t found = 0;
    for (int64_t begin = 0; begin < count; begin += kChunk) {
        if (!(w.maxima[size_t(begin / kChunk)] >= bound)) continue;
        if (w.values.size() < found + kChunk) {
            w.values.resize(2 * found + kChunk);
            w.ids.resize(2 * found + kChunk);
        }
        found += size_t(kernels.collect(x + begin, begin, std::min(kChunk, count - begin), bound, w.values.data() + found,
                                        w.ids.data() + found));
    }
    return found;
}

// A bound above which lies all that top-p keeps.
float bound_of_mass(const KernelTable& kernels, const Workspace& w, int64_t vocab, double mass) {
    for (const float bound : {0x1p-6f, 0x1p-12f, 0x1p-20f}) {
        double above = 0;
        for (int64_t begin = 0; begin < vocab && above < mass; begin += kChunk)
            if (w.maxima[size_t(begin / kChunk)] >= bound)
                above += kernels.mass_above(w.weights.data() + begin, std::min(kChunk, vocab - begin), bound);
        if (above >= mass) return bound;
    }
    return 0.0f;
}

int64_t draw_filtered(const KernelTable& kernels, Workspace& w, const DrawParams& p, double total, int64_t vocab) {
    find_maxima(kernels, w, w.weights.data(), vocab);
    float bound = 0x1p-126f;  // all but zeros, which nothing draws
    if (p.top_k > 0) bound = std::max(bound, bound_of_top(w, std::min(p.top_k, vocab)));
    else if (p.top_p < 1) bound = std::max(bound, bound_of_mass(kernels, w, vocab, p.top_p * total * (1 + 1e-9)));
    // A little below min_p: the exact comparison is made on the candidates. top-p counts shares of what top-k left, which
    // needs all of that, whatever min-p drops later.
    if (p.min_p > 0 && !(p.top_k > 0 && p.top_p < 1)) bound = std::max(bound, float(std::min(p.min_p, 1.0) * 0.999));
    Ranking& ranking = w.ranking;
    ranking.take(w.values, w.ids, collect(kernels, w, w.weights.data(), vocab, bound));
    size_t kept = ranking.size();
    if (p.top_k > 0) kept = std::min(kept, size_t(p.top_k));
    if (p.top_p < 1) kept = std::min(kept, ranking.reach(p.top_p * (p.top_k > 0 ? ranking.mass(kept) : total), kept, false));
    if (p.min_p > 0) kept = std::min(kept, ranking.at_least(p.min_p * ranking.largest()));
    kept = std::max(kept, size_t(1));
    return id_of(ranking.at(ranking.reach(p.u * ranking.mass(kept), kept, true) - 1));
}

int64_t draw_unfiltered(const Workspace& w, const DrawParams& p, double total, int64_t vocab) {
    const double target = p.u * total;
    double passed = 0;
    size_t block = 0;
    while (block + 1 < w.sums.size() && passed + w.sums[block] <= target) passed += w.sums[block++];
    int64_t last = 0;
    for (int64_t i = int64_t(block) * kSumBlock; i < vocab; ++i) {
        if (w.weights[size_t(i)] == 0.0f) continue;
        last = i;
        if ((passed += w.weights[size_t(i)]) > target) return i;
    }
    return last;
}

double find_weights(const KernelTable& kernels, Workspace& w, const float* logits, int64_t vocab, float largest, float temperature) {
    w.weights.resize(size_t(vocab));
    w.sums.resize(blocks_of(vocab, kSumBlock));
    kernels.exp_weights(logits, largest, temperature, w.weights.data(), vocab, w.sums.data());
    double total = 0;
    for (double sum : w.sums) total += sum;
    return total;
}

}  // namespace

int64_t likeliest(const KernelTable& kernels, const float* logits, int64_t vocab) {
    const int64_t first = kernels.first_equal(logits, vocab, kernels.largest_of(logits, vocab));
    return first < 0 ? 0 : first;
}

int64_t draw_token(const KernelTable& kernels, const float* logits, int64_t vocab, const DrawParams& p) {
    if (p.temperature <= 0) return likeliest(kernels, logits, vocab);
    const float largest = kernels.largest_of(logits, vocab);
    if (!std::isfinite(largest)) return likeliest(kernels, logits, vocab);
    Workspace& w = workspace();
    const double total = find_weights(kernels, w, logits, vocab, largest, p.temperature);
    const bool is_filtered = p.top_k > 0 || p.top_p < 1 || p.min_p > 0;
    return is_filtered ? draw_filtered(kernels, w, p, total, vocab) : draw_unfiltered(w, p, total, vocab);
}

void logprobs(const KernelTable& kernels, const float* logits, int64_t vocab, int64_t id, int64_t k, float* chosen,
              int64_t* top_ids, float* top) {
    Workspace& w = workspace();
    const float largest = kernels.largest_of(logits, vocab);
    const double scale = largest + std::log(find_weights(kernels, w, logits, vocab, largest, 1.0f));
    *chosen = float(logits[id] - scale);
    if (k == 0) return;
    find_maxima(kernels, w, logits, vocab);
    const size_t found = collect(kernels, w, logits, vocab, bound_of_top(w, k));
    std::vector<std::pair<float, int32_t>> best(found);
    for (size_t i = 0; i < found; ++i) best[i] = {-w.values[i], w.ids[i]};
    const size_t some = std::min(found, size_t(k));
    std::partial_sort(best.begin(), best.begin() + int64_t(some), best.end());
    for (size_t i = 0; i < some; ++i) {
        top_ids[i] = best[i].second;
        top[i] = float(-best[i].first - scale);
    }
    // NaNs are no candidates: what is missing for them is said to be so.
    for (size_t i = some; i < size_t(k); ++i) {
        top_ids[i] = -1;
        top[i] = std::numeric_limits<float>::quiet_NaN();
    }
}
