// What happens between the products, and the draw of a token.
#include <cmath>

#include "driver.h"
#include "sampling.h"

namespace {

constexpr int64_t kTokens = 3;

// Activations of every kind for rows of one width, two of them to a job.
struct Acts {
    Acts(Act first, Act second, int64_t width)
        : a(ActLayout::of(first, width)), b(ActLayout::of(second, width)), a_rows(kTokens * a.row_bytes), b_rows(kTokens * b.row_bytes) {}
    template <typename Job>
    void give(Job& job) {
        job.num_acts = 2;
        job.acts[0] = {a, a_rows.data()};
        job.acts[1] = {b, b_rows.data()};
    }
    ActLayout a, b;
    Exact<uint8_t> a_rows, b_rows;
};

void norms(const KernelTable& kernels, int64_t width) {
    const int64_t stride = width + 5;
    Exact<float> x((kTokens - 1) * stride + width, 4), out((kTokens - 1) * stride + width, 4), residual(kTokens * width, 4);
    Exact<float> weight(width, 4), bias(width, 4);
    x.fill_numbers(), residual.fill_numbers(), weight.fill_numbers(), bias.fill_numbers();
    Acts small(Act::q8_32, Act::f32, width), large(Act::q8_256, Act::bf16, width);
    for (const bool is_layer_norm : {false, true}) {
        NormJob job{x.data(), stride, nullptr, weight.data(), is_layer_norm ? bias.data() : nullptr, is_layer_norm, 1.0f, 1e-5f,
                    width, out.data(), stride, 0, {}};
        kernels.norm(job, 0, kTokens);
        small.give(job);
        job.residual = residual.data();
        kernels.norm(job, 0, kTokens);
        large.give(job);
        job.x = nullptr;
        job.out = nullptr;
        job.weight = nullptr;
        kernels.norm(job, 1, kTokens);
    }
}

void activations(const KernelTable& kernels, int64_t width) {
    const int64_t units = kTokens * column_groups(width);
    Acts small(Act::q8_32, Act::f32, width), large(Act::q8_256, Act::bf16, width);
    for (const bool is_gated : {false, true}) {
        const int64_t stride = (is_gated ? 2 : 1) * width + 3;
        Exact<float> x(kTokens * stride - 3, 4), out(kTokens * width, 4);
        x.fill_numbers();
        x[0] = INFINITY;
        for (const Activation kind : {Activation::silu, Activation::gelu_tanh, Activation::gelu_erf}) {
            GatedJob job{x.data(), stride, width, kind, is_gated, out.data(), width, 0, {}};
            kernels.activate(job, 0, units);
            small.give(job);
            kernels.activate(job, 1, units);
            large.give(job);
            job.out = nullptr;
            kernels.activate(job, 0, units);
        }
        ConvertJob job{x.data(), stride, width, 0, {}};
        small.give(job);
        kernels.convert(job, 0, units);
        large.give(job);
        kernels.convert(job, 0, units);
    }
}

void elements(const KernelTable& kernels, int64_t count) {
    Exact<float> x(count, 4), y(count, 4);
    Exact<uint16_t> halves(count, 2);
    x.fill_numbers(), y.fill_numbers(), halves.fill_bits();
    kernels.softcap(x.data(), count, 30.0f);
    kernels.add(x.data(), y.data(), count);
    kernels.scale(x.data(), count, 0.5f);
    Exact<double> sums((count + kSumBlock - 1) / kSumBlock, 8);
    kernels.exp_weights(x.data(), 2.0f, 0.7f, y.data(), count, sums.data());
    Exact<float> maxima((count + kChunk - 1) / kChunk, 4);
    kernels.chunk_maxima(x.data(), count, maxima.data());
    kernels.mass_above(y.data(), count, 0.1f);
    kernels.first_equal(x.data(), count, kernels.largest_of(x.data(), count));
    Exact<float> values(count, 4);
    Exact<int32_t> ids(count, 4);
    require(kernels.collect(x.data(), 0, count, 0.0f, values.data(), ids.data()) <= count, "more values than there are");
    kernels.to_f32(x.data(), Float::f32, y.data(), count);
    kernels.to_f32(halves.data(), Float::f16, y.data(), count);
    kernels.to_f32(halves.data(), Float::bf16, y.data(), count);
}

void rope(const KernelTable& kernels, Kv kv, int64_t head_dim, int64_t half) {
    constexpr int64_t kHeads = 6, kKvHeads = 2, kPositions = 9, kSlots = 8;
    const int64_t stride = (kHeads + 2 * kKvHeads) * head_dim, row = kv_row_bytes(kv, head_dim);
    Exact<float> qkv(kTokens * stride, 4), table(kPositions * (half ? 2 * half : 1), 4);
    Exact<uint8_t> k_cache(kSlots * kKvHeads * row), v_cache(kSlots * kKvHeads * row);
    Exact<int64_t> positions(kTokens), slots(kTokens);
    qkv.fill_numbers(), table.fill_numbers();
    for (int64_t t = 0; t < kTokens; ++t) {
        positions[t] = kPositions - 1 - t;
        slots[t] = kSlots - 1 - 2 * t;
    }
    float* k = qkv.data() + kHeads * head_dim;
    RopeKvJob job{qkv.data(), k, k + kKvHeads * head_dim, stride, stride, stride, kHeads, kKvHeads, head_dim, half, table.data(),
                  positions.data(), slots.data(), k_cache.data(), v_cache.data(), kv};
    kernels.rope_kv(job, 0, kTokens);
    job.q = nullptr;
    kernels.rope_kv(job, 1, kTokens);
    job.q = qkv.data();
    job.k_cache = job.v_cache = nullptr;
    kernels.rope_kv(job, 0, 1);
}

}  // namespace

void run_layers(const KernelTable& kernels) {
    for (const int64_t width : {1, 31, 64, 255, 300, 512, 777}) {
        norms(kernels, width);
        activations(kernels, width);
    }
    for (const int64_t count : {0, 1, 7, 16, 33, 100}) elements(kernels, count);
    for (const Kv kv : {Kv::f32, Kv::f16, Kv::bf16, Kv::q8})
        for (const int64_t head_dim : {2, 24, 40, 64, 80, 128})
            for (const int64_t half : {int64_t(0), head_dim / 4, head_dim / 2}) rope(kernels, kv, head_dim, half);
}

void run_sampling(const KernelTable& kernels) {
    for (const int64_t vocab : {1, 2, 17, 1000, 5003}) {
        Exact<float> logits(vocab, 4);
        logits.fill_numbers();
        for (const int64_t top_k : {int64_t(0), int64_t(1), int64_t(40), vocab, 2 * vocab})
            for (const double top_p : {1.0, 0.9, 0.0})
                for (const double min_p : {0.0, 0.1}) {
                    const int64_t id = draw_token(kernels, logits.data(), vocab, {0.8f, top_k, top_p, min_p, 0.999});
                    require(id >= 0 && id < vocab, "a token outside the vocabulary");
                }
        logits[vocab / 2] = NAN;
        logits[0] = -INFINITY;
        for (const double top_p : {1.0, 0.9}) {
            const int64_t id = draw_token(kernels, logits.data(), vocab, {1.0f, 0, top_p, 0.0, 0.5});
            require(id >= 0 && id < vocab, "a token outside the vocabulary");
        }
        require(likeliest(kernels, logits.data(), vocab) < vocab, "a likeliest token outside the vocabulary");
        for (const int64_t k : {int64_t(0), int64_t(1), vocab / 2, vocab}) {
            Exact<int64_t> ids(k, 8);
            Exact<float> top(k, 4), chosen(1, 4);
            logprobs(kernels, logits.data(), vocab, vocab - 1, k, chosen.data(), ids.data(), top.data());
            for (int64_t i = 0; i < k; ++i) require(ids[i] >= -1 && ids[i] < vocab, "a top token outside the vocabulary");
        }
    }
}
