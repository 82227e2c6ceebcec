#include "experts.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace {

constexpr int64_t kPiece = 512;  // columns of a unit of the last sum

// The place of an expert among the others: NaN before all numbers.
float rank(float logit) { return std::isnan(logit) ? std::numeric_limits<float>::infinity() : logit; }

// The top_k experts by falling logit.
void choose(const Routing& routing, const float* logits, int32_t* experts) {
    int64_t count = 0;
    for (int64_t e = 0; e < routing.num_experts; ++e) {
        const float value = rank(logits[e]);
        if (count == routing.top_k && !(value > rank(logits[experts[count - 1]]))) continue;
        int64_t place = count < routing.top_k ? count++ : count - 1;
        for (; place > 0 && value > rank(logits[experts[place - 1]]); --place) experts[place] = experts[place - 1];
        experts[place] = int32_t(e);
    }
}

// The probability of the expert with the given logit among those near it. without: an expert left out, or -1.
float near_share(const Routing& routing, const float* logits, float largest, int64_t without) {
    float sum = 0.0f;
    for (int64_t e = 0; e < routing.num_experts; ++e) {
        const float scale = std::max(std::fabs(logits[e]), largest);
        const bool is_far = (largest - logits[e]) / scale > 2.0f * routing.jitter;
        if (e != without && !is_far) sum += std::exp(logits[e] - largest);
    }
    return 1.0f / sum;
}

void softmax_factors(const Routing& routing, const float* logits, const int32_t* experts, float* factors) {
    const float largest = logits[experts[0]];
    float sum = 0.0f, taken = 0.0f;
    for (int64_t e = 0; e < routing.num_experts; ++e) sum += std::exp(logits[e] - largest);
    for (int64_t i = 0; i < routing.top_k; ++i) {
        factors[i] = std::exp(logits[experts[i]] - largest) / sum;
        taken += factors[i];
    }
    if (!routing.is_renormalised) return;
    for (int64_t i = 0; i < routing.top_k; ++i) factors[i] /= taken;
}

// The parts of the buffer of choices: arrays with an element for each pair.
struct Choices {
    int32_t* experts;  // of token t: [t * top_k, (t + 1) * top_k), ascending
    float* factors;
    int32_t* places;  // where among the grouped pairs each of these lies
    int32_t* tokens;  // of each grouped pair

    Choices(const Step& step, int buffer, int64_t num_pairs) {
        auto* words = reinterpret_cast<int32_t*>(step.memory.at(buffer));
        experts = words;
        factors = reinterpret_cast<float*>(words + num_pairs);
        places = words + 2 * num_pairs;
        tokens = words + 3 * num_pairs;
    }
};

}  // namespace

void route(const Routing& routing, const float* logits, int32_t* experts, float* factors) {
    choose(routing, logits, experts);
    if (routing.kind == RoutingKind::softmax) {
        softmax_factors(routing, logits, experts, factors);
    } else {
        factors[0] = near_share(routing, logits, logits[experts[0]], -1);
        factors[1] = near_share(routing, logits, logits[experts[1]], experts[0]);
    }
    for (int64_t i = 1; i < routing.top_k; ++i)
        for (int64_t j = i; j > 0 && experts[j] < experts[j - 1]; --j) {
            std::swap(experts[j], experts[j - 1]);
            std::swap(factors[j], factors[j - 1]);
        }
}

struct ExpertsOp::Plan {
    explicit Plan(int64_t num_experts) : starts(size_t(num_experts) + 1), ends(size_t(num_experts)) {
        // Nothing may be allocated within a run, where nothing may be thrown.
        gate_up.reserve(2 * size_t(num_experts));
        down.reserve(size_t(num_experts));
    }
    std::vector<int64_t> starts, ends;  // of each expert's pairs
    GroupedMatmul gate_up, down;
};

ExpertsOp::ExpertsOp(Rows rows, Routing routing, Activation activation, ExpertMatrices gate, ExpertMatrices up,
                     ExpertMatrices down, ExpertBuffers buffers)
    : Op(rows), routing_(routing), activation_(activation), gate_(gate), up_(up), down_(down), buffers_(buffers),
      plan_(std::make_unique<Plan>(routing.num_experts)) {}

ExpertsOp::~ExpertsOp() = default;

// Orders the pairs, and lists the products of each expert that has any.
void ExpertsOp::group(const Step& step, int num_threads) const {
    Plan& plan = *plan_;
    const int64_t top_k = routing_.top_k, num_pairs = step.rows(rows) * top_k, inner = gate_.rows, hidden = down_.rows;
    const Choices choices(step, buffers_.choices, num_pairs);
    std::fill(plan.starts.begin(), plan.starts.end(), 0);
    for (int64_t i = 0; i < num_pairs; ++i) ++plan.starts[size_t(choices.experts[i]) + 1];
    for (size_t e = 1; e < plan.starts.size(); ++e) plan.starts[e] += plan.starts[e - 1];
    std::copy(plan.starts.begin(), plan.starts.end() - 1, plan.ends.begin());
    for (int64_t i = 0; i < num_pairs; ++i) {
        const int64_t place = plan.ends[size_t(choices.experts[i])]++;
        choices.places[i] = int32_t(place);
        choices.tokens[place] = int32_t(i / top_k);
    }
    plan.gate_up.clear();
    plan.down.clear();
    const ActBuffer &x = buffers_.x, &grouped = buffers_.grouped, &acts = buffers_.inner;
    for (int64_t e = 0; e < routing_.num_experts; ++e) {
        const int64_t first = plan.starts[size_t(e)], count = plan.ends[size_t(e)] - first;
        if (count == 0) continue;
        // A single row is read where it lies; of several, neighbours were copied together.
        const uint8_t* input = count == 1 ? step.memory.at(x.buffer) + choices.tokens[first] * x.layout.row_bytes
                                          : step.memory.at(grouped.buffer) + first * grouped.layout.row_bytes;
        float* made = step.floats(buffers_.gate_up) + first * 2 * inner;
        plan.gate_up.add({gate_.of(e), {x.layout, input}, nullptr, made, 2 * inner}, count, num_threads);
        plan.gate_up.add({up_.of(e), {x.layout, input}, nullptr, made + inner, 2 * inner}, count, num_threads);
        const ActRows between{acts.layout, step.memory.at(acts.buffer) + first * acts.layout.row_bytes};
        plan.down.add({down_.of(e), between, nullptr, step.floats(buffers_.results) + first * hidden, hidden}, count, num_threads);
    }
}

void ExpertsOp::run(const Step& step, Worker& worker) const {
    const int64_t top_k = routing_.top_k, num_rows = step.rows(rows), num_pairs = num_rows * top_k;
    const int64_t inner = gate_.rows, hidden = down_.rows;
    const Choices choices(step, buffers_.choices, num_pairs);
    worker.share(num_rows, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t)
            route(routing_, step.floats(buffers_.logits) + t * routing_.num_experts, choices.experts + t * top_k, choices.factors + t * top_k);
    });
    worker.share(1, [&](int64_t, int64_t) { group(step, worker.count); });
    const Plan& plan = *plan_;
    if (num_rows > 1) {
        worker.share(num_pairs, [&](int64_t begin, int64_t end) {
            const int64_t bytes = buffers_.x.layout.row_bytes;
            const uint8_t* from = step.memory.at(buffers_.x.buffer);
            uint8_t* to = step.memory.at(buffers_.grouped.buffer);
            for (int64_t p = begin; p < end; ++p) std::memcpy(to + p * bytes, from + choices.tokens[p] * bytes, size_t(bytes));
        });
    }
    worker.share(plan.gate_up.num_units(), [&](int64_t begin, int64_t end) { plan.gate_up.run(step.kernels.matmul, begin, end); });
    GatedJob gated{};
    gated.gate_up = step.floats(buffers_.gate_up);
    gated.stride = 2 * inner;
    gated.width = gated.out_stride = inner;
    gated.kind = activation_;
    gated.is_gated = true;
    gated.num_acts = 1;
    gated.acts[0] = {buffers_.inner.layout, step.memory.at(buffers_.inner.buffer)};
    worker.share(num_pairs * column_groups(inner), [&](int64_t begin, int64_t end) { step.kernels.activate(gated, begin, end); });
    worker.share(plan.down.num_units(), [&](int64_t begin, int64_t end) { plan.down.run(step.kernels.matmul, begin, end); });
    const int64_t pieces = (hidden + kPiece - 1) / kPiece;
    worker.share(num_rows * pieces, [&](int64_t begin, int64_t end) {
        for (int64_t u = begin; u < end; ++u) {
            const int64_t t = u / pieces, first = u % pieces * kPiece, size = std::min(kPiece, hidden - first);
            float* sum = step.floats(buffers_.out) + t * hidden + first;
            std::fill(sum, sum + size, 0.0f);
            for (int64_t i = t * top_k; i < (t + 1) * top_k; ++i) {
                const float* result = step.floats(buffers_.results) + choices.places[i] * hidden + first;
                const float factor = choices.factors[i];
                for (int64_t c = 0; c < size; ++c) sum[c] += factor * result[c];
            }
        }
    });
}

void AddGatedOp::run(const Step& step, Worker& worker) const {
    worker.share(step.rows(rows), [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
            const float factor = 1.0f / (1.0f + std::exp(-step.floats(gate)[t]));
            float* to = step.floats(x) + t * width;
            const float* from = step.floats(other) + t * width;
            for (int64_t c = 0; c < width; ++c) to[c] += factor * from[c];
        }
    });
}
