// Paged attention, the team, and a whole step as a program.
#include <atomic>
#include <memory>
#include <stdexcept>
#include <vector>

#include "attention_plan.h"
#include "driver.h"
#include "experts.h"
#include "packed_memory.h"
#include "program.h"
#include "program_ops.h"
#include "team.h"

namespace {

constexpr int64_t kBlockSize = 16;

// Requests of (context, query tokens), whose blocks are handed out backwards.
struct Requests {
    Requests(std::initializer_list<std::pair<int, int>> sizes) : start(int64_t(sizes.size()) + 1), contexts(int64_t(sizes.size())) {
        int64_t i = 0;
        start[0] = 0;
        for (const auto& [context, queries] : sizes) {
            contexts[i] = context;
            start[i + 1] = start[i] + queries;
            stride = std::max(stride, (context + kBlockSize - 1) / kBlockSize);
            num_blocks += (context + kBlockSize - 1) / kBlockSize;
            ++i;
        }
        tables = std::make_unique<Exact<int32_t>>(i * stride);
        int32_t next = int32_t(num_blocks);
        for (int64_t r = 0; r < i; ++r)
            for (int64_t b = 0; b < stride; ++b)
                (*tables)[r * stride + b] = b < (contexts[r] + kBlockSize - 1) / kBlockSize ? --next : -1;
    }
    int64_t count() const { return contexts.count(); }
    int64_t num_tokens() { return start[count()]; }

    Exact<int32_t> start, contexts;
    std::unique_ptr<Exact<int32_t>> tables;
    int64_t stride = 0, num_blocks = 0;
};

void attend(const KernelTable& kernels, Requests& requests, Kv kv, int64_t group, int64_t head_dim, int64_t window, float softcap) {
    const int64_t kv_heads = 2, heads = group * kv_heads, stride = (heads + 2 * kv_heads) * head_dim, tokens = requests.num_tokens();
    const int64_t cache_bytes = requests.num_blocks * kBlockSize * kv_heads * kv_row_bytes(kv, head_dim);
    Exact<float> q(tokens * stride - 2 * kv_heads * head_dim, 4), out(tokens * heads * head_dim, 4);
    Exact<uint8_t> k_cache(cache_bytes), v_cache(cache_bytes);
    q.fill_numbers(), k_cache.fill_bits(), v_cache.fill_bits();
    const AttentionTables tables{requests.tables->data(), requests.stride, requests.start.data(), requests.contexts.data(),
                                 kBlockSize, heads, kv_heads, head_dim};
    const AttentionJob job{q.data(), stride, out.data(), heads * head_dim, k_cache.data(), v_cache.data(), kv, 0.125f, softcap, window};
    AttentionPlan plan;
    for (const int threads : {1, 4}) {
        plan.make(tables, requests.count(), tokens, requests.num_blocks, threads);
        plan.run(kernels, job, 0, plan.num_units() / 2);
        plan.run(kernels, job, plan.num_units() / 2, plan.num_units());
    }
}

}  // namespace

void run_attention(const KernelTable& kernels) {
    Requests requests{{1, 1}, {40, 1}, {300, 1}, {33, 19}, {290, 35}, {530, 3}};
    for (const Kv kv : {Kv::f32, Kv::f16, Kv::bf16, Kv::q8})
        for (const int64_t head_dim : {8, 40, 64, 128})
            for (const int64_t group : {1, 3, 12}) {
                const int64_t window = group == 3 ? 37 : 0;
                attend(kernels, requests, kv, group, head_dim, window, group == 1 ? 20.0f : 0.0f);
            }
}

void run_teams() {
    for (const int size : {1, 2, 3, 5, 1}) {
        set_team_size(size);
        for (const int64_t units : {0, 1, 2, 7, 1000}) {
            Exact<int32_t> seen(units);
            for (int64_t i = 0; i < units; ++i) seen[i] = 0;
            const auto visit = [&](int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; ++i) ++seen[i];
            };
            std::atomic<int> members{0};
            run_team([&](Worker& worker) {
                ++members;
                worker.share(units, visit);
                worker.barrier();
                worker.share(units, visit);
            });
            parallel_for(units, 1 << 20, visit);
            for (int64_t i = 0; i < units; ++i) require(seen[i] == 3, "a unit of work was not done once");
            require(members == size, "a run without the whole team");
        }
    }
}

// One layer with every op, over a step of several requests.
void run_program() {
    constexpr int64_t kHidden = 96, kHeads = 4, kKvHeads = 2, kHeadDim = 24, kInner = 160, kVocabulary = 50, kPositions = 400;
    constexpr int64_t kQkv = (kHeads + 2 * kKvHeads) * kHeadDim;
    constexpr int kQ4_0 = 2, kQ8_0 = 8, kBf16 = 30;
    constexpr int64_t kExperts = 5, kTopK = 2, kExpertInner = 64, kFilled = 96;  // 96: of a hidden size of whole tiles
    const auto filled = [](int type, int64_t rows, int64_t columns) {
        auto memory = std::make_unique<PackedMemory>(type, rows, columns);
        for (int64_t i = 0; i < memory->num_bytes(); ++i) memory->tile(0)[i] = uint8_t(random_bits() & 0x2f);
        return memory;
    };
    const auto embedding = filled(kQ8_0, kVocabulary, kHidden), q = filled(kQ4_0, kHeads * kHeadDim, kHidden);
    const auto kv = filled(kBf16, 2 * kKvHeads * kHeadDim, kHidden), o = filled(kQ8_0, kHidden, kHeads * kHeadDim);
    const auto gate_up = filled(kQ4_0, 2 * kInner, kHidden), down = filled(kQ8_0, kHidden, kInner);
    const auto expert_gate = filled(kQ4_0, kExperts * kExpertInner, kHidden), expert_up = filled(kQ4_0, kExperts * kExpertInner, kHidden);
    const auto expert_down = filled(kQ8_0, kExperts * kFilled, kExpertInner), router = filled(kQ8_0, kExperts, kHidden);
    Exact<float> weight(kHidden), head_weight(kHeadDim), bias(kHidden), table(kPositions * kHeadDim);
    weight.fill_numbers(), head_weight.fill_numbers(), bias.fill_numbers(), table.fill_numbers();

    Requests requests{{1, 1}, {300, 1}, {41, 9}};
    Exact<uint8_t> k_cache(requests.num_blocks * kBlockSize * kKvHeads * kv_row_bytes(Kv::q8, kHeadDim));
    Exact<uint8_t> v_cache(k_cache.count());
    k_cache.fill_bits(), v_cache.fill_bits();

    Program program(requests.num_blocks, kBlockSize);
    const auto floats = [&](Rows rows, int64_t width) { return program.memory().add(rows, width * 4); };
    const auto act = [&](Act kind, Rows rows, int64_t width) {
        const ActLayout layout = ActLayout::of(kind, width);
        return ActBuffer{layout, program.memory().add(rows, layout.row_bytes)};
    };
    const auto add = [&](std::unique_ptr<Op> op, std::initializer_list<int> buffers) {
        for (const int buffer : buffers) program.memory().touch(buffer, program.op_at());
        program.add(std::move(op));
    };
    const int residual = floats(Rows::tokens, kHidden), qkv = floats(Rows::tokens, kQkv), mixed = floats(Rows::tokens, kHeads * kHeadDim);
    const int projected = floats(Rows::tokens, kHidden), inner = floats(Rows::tokens, 2 * kInner);
    const int last = floats(Rows::wanted, kHidden), logits = floats(Rows::wanted, kVocabulary);
    const ActBuffer x8 = act(Act::q8_32, Rows::tokens, kHidden), x16 = act(Act::bf16, Rows::tokens, kHidden);
    const ActBuffer mixed8 = act(Act::q8_32, Rows::tokens, kHeads * kHeadDim), inner8 = act(Act::q8_32, Rows::tokens, kInner);
    const ActBuffer last8 = act(Act::q8_32, Rows::wanted, kHidden);
    const int angles = program.add_table({table.data(), kPositions});
    program.limit_vocabulary(kVocabulary);

    NormJob norm{};
    norm.weight = weight.data();
    norm.epsilon = 1e-5f;
    norm.width = norm.x_stride = norm.out_stride = kHidden;
    NormJob head_norm = norm;
    head_norm.weight = head_weight.data();
    head_norm.width = kHeadDim;
    head_norm.x_stride = head_norm.out_stride = kQkv;
    RopeKvJob rope{};
    rope.q_stride = rope.k_stride = rope.v_stride = kQkv;
    rope.n_heads = kHeads, rope.n_kv_heads = kKvHeads, rope.head_dim = kHeadDim, rope.half = kHeadDim / 2;
    rope.k_cache = k_cache.data(), rope.v_cache = v_cache.data(), rope.kv_type = Kv::q8;
    AttentionJob attention{};
    attention.q_stride = kQkv, attention.out_stride = kHeads * kHeadDim;
    attention.k_cache = k_cache.data(), attention.v_cache = v_cache.data(), attention.kv_type = Kv::q8, attention.scale = 0.2f;
    GatedJob gated{};
    gated.stride = 2 * kInner, gated.width = gated.out_stride = kInner, gated.is_gated = true;

    add(std::make_unique<EmbedOp>(embedding->matrix(), residual, 2.0f), {residual});
    add(std::make_unique<NormOp>(Rows::tokens, norm, -1, residual, -1, std::vector{x8, x16}), {residual, x8.buffer, x16.buffer});
    const std::vector<MatmulSegment> segments{{q->matrix(), x8, nullptr, 0}, {kv->matrix(), x16, bias.data(), kHeads * kHeadDim}};
    add(std::make_unique<MatmulOp>(Rows::tokens, segments, qkv, kQkv), {x8.buffer, x16.buffer, qkv});
    add(std::make_unique<HeadNormOp>(Rows::tokens, head_norm, qkv, 0, kHeads), {qkv});
    add(std::make_unique<RopeKvOp>(rope, qkv, angles, 0), {qkv});
    add(std::make_unique<AttentionOp>(attention, qkv, mixed, program.plan_for(0, kHeads, kKvHeads, kHeadDim)), {qkv, mixed});
    add(std::make_unique<ConvertOp>(Rows::tokens, kHeads * kHeadDim, mixed, std::vector{mixed8}), {mixed, mixed8.buffer});
    const auto product = [&](const PackedMemory& w, ActBuffer from, Rows rows, int to) {
        const std::vector<MatmulSegment> one{{w.matrix(), from, nullptr, 0}};
        add(std::make_unique<MatmulOp>(rows, one, to, w.matrix().rows), {from.buffer, to});
    };
    product(*o, mixed8, Rows::tokens, projected);
    add(std::make_unique<NormOp>(Rows::tokens, norm, projected, residual, -1, std::vector{x8}), {projected, residual, x8.buffer});
    const int router_logits = floats(Rows::tokens, kExperts), share = floats(Rows::tokens, 1), mixture = floats(Rows::tokens, kHidden);
    product(*router, x8, Rows::tokens, router_logits);
    const ActLayout expert_acts = ActLayout::of(Act::q8_32, kExpertInner);
    for (const auto kind : {RoutingKind::softmax, RoutingKind::sparsemixer}) {
        const auto own = [&](int64_t bytes) { return program.memory().add(Rows::tokens, kTopK * bytes); };
        const ExpertBuffers buffers{x8, router_logits, mixture, own(16), {x8.layout, own(x8.layout.row_bytes)}, own(2 * kExpertInner * 4),
                                    {expert_acts, own(expert_acts.row_bytes)}, own(kHidden * 4)};
        const Routing routing{kind, kExperts, kTopK, true, 0.1f};
        add(std::make_unique<ExpertsOp>(Rows::tokens, routing, Activation::silu, ExpertMatrices{expert_gate->matrix(), kExperts, kExpertInner},
                                        ExpertMatrices{expert_up->matrix(), kExperts, kExpertInner},
                                        ExpertMatrices{expert_down->matrix(), kExperts, kHidden}, buffers),
            {x8.buffer, router_logits, mixture, buffers.choices, buffers.grouped.buffer, buffers.gate_up, buffers.inner.buffer, buffers.results});
    }
    const auto one = filled(kQ8_0, 1, kHidden);
    product(*one, x8, Rows::tokens, share);
    add(std::make_unique<AddGatedOp>(Rows::tokens, kHidden, residual, mixture, share), {residual, mixture, share});
    product(*gate_up, x8, Rows::tokens, inner);
    add(std::make_unique<GatedOp>(Rows::tokens, gated, inner, -1, std::vector{inner8}), {inner, inner8.buffer});
    product(*down, inner8, Rows::tokens, projected);
    add(std::make_unique<ElementOp>(Rows::tokens, ElementOp::add, kHidden, residual, projected, 0.0f), {residual, projected});
    add(std::make_unique<GatherOp>(std::vector<std::pair<int, int>>{{residual, last}}), {residual, last});
    add(std::make_unique<ElementOp>(Rows::wanted, ElementOp::scale, kHidden, last, -1, 0.5f), {last});
    add(std::make_unique<ConvertOp>(Rows::wanted, kHidden, last, std::vector{last8}), {last, last8.buffer});
    product(*embedding, last8, Rows::wanted, logits);
    add(std::make_unique<ElementOp>(Rows::wanted, ElementOp::softcap, kVocabulary, logits, -1, 30.0f), {logits});
    program.finish(logits);

    const int64_t tokens = requests.num_tokens();
    Exact<int64_t> ids(tokens), positions(tokens), slots(tokens), wanted(requests.count());
    int64_t t = 0;
    for (int64_t r = 0; r < requests.count(); ++r) {
        for (int64_t at = requests.contexts[r] - (requests.start[r + 1] - requests.start[r]); at < requests.contexts[r]; ++at, ++t) {
            ids[t] = random_bits() % kVocabulary;
            positions[t] = at;
            slots[t] = int64_t((*requests.tables)[r * requests.stride + at / kBlockSize]) * kBlockSize + at % kBlockSize;
        }
        wanted[r] = t - 1;
    }
    StepInput step{tokens, requests.count(), requests.count(), ids.data(), positions.data(), wanted.data(), requests.start.data(),
                   requests.contexts.data(), {{slots.data(), requests.tables->data(), requests.stride}}};
    for (const int size : {1, 3}) {
        set_team_size(size);
        program.run(step);
    }
    set_team_size(1);
    ids[0] = kVocabulary;
    bool is_refused = false;
    try {
        program.run(step);
    } catch (const std::out_of_range&) {
        is_refused = true;
    }
    require(is_refused, "a token outside the vocabulary was embedded");
}
