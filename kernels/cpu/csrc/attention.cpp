// Paged causal attention with an online softmax: keys are visited in tiles of kTile tokens, so that the sums of a query
// are formed in the same order however its prompt was cut into chunks.
#include "scratch.h"
#include "vec.h"

namespace SIROCCO_ISA {
namespace {

constexpr int kTile = 32;

// The state of one (query token, head) while keys go by.
struct Row {
    float largest, total;
};

// scores[j] = q · k[j] for count keys; count is rounded up to four, where keys are repeated.
inline void dots(const float* q, const float* const* k, int count, int64_t padded, float* scores) {
    for (int j = 0; j < count; j += 4) {
        const float* key[4];
        for (int i = 0; i < 4; ++i) key[i] = k[j + i < count ? j + i : j];
        Vec acc[4] = {};
        for (int64_t d = 0; d < padded; d += kLanes) {
            const Vec qv = load(q + d);
            for (int i = 0; i < 4; ++i) acc[i] += qv * load(key[i] + d);
        }
        const Vec4 four = sum4(acc[0], acc[1], acc[2], acc[3]);
        std::memcpy(scores + j, &four, sizeof four);
    }
}

// acc[d] = acc[d] * shrink + sum over j of p[j] * v[j][d], for Width vectors at once.
template <int Width>
inline void accumulate(float* acc, const float* const* v, const float* p, int count, float shrink, int64_t d) {
    Vec sums[Width];
    for (int w = 0; w < Width; ++w) sums[w] = load(acc + d + w * kLanes) * splat(shrink);
    for (int j = 0; j < count; ++j)
        for (int w = 0; w < Width; ++w) sums[w] += splat(p[j]) * load(v[j] + d + w * kLanes);
    for (int w = 0; w < Width; ++w) store(acc + d + w * kLanes, sums[w]);
}

void visit_tile(Row& row, const float* q, float* acc, const float* const* k, const float* const* v, int count, int64_t padded) {
    alignas(64) float p[kTile];
    float largest = row.largest;
    dots(q, k, count, padded, p);
    for (int j = 0; j < count; ++j) largest = p[j] > largest ? p[j] : largest;
    for (int j = count; j < kTile; ++j) p[j] = -__builtin_inff();
    Vec total{};
    for (int j = 0; j < kTile; j += kLanes) {
        const Vec e = exp(load(p + j) - splat(largest));
        store(p + j, e);
        total += e;
    }
    const float shrink = exp(splat(row.largest - largest))[0];
    row = {largest, row.total * shrink + sum(total)};
    int64_t d = 0;
    for (; d + 4 * kLanes <= padded; d += 4 * kLanes) accumulate<4>(acc, v, p, count, shrink, d);
    for (; d + 2 * kLanes <= padded; d += 2 * kLanes) accumulate<2>(acc, v, p, count, shrink, d);
    for (; d < padded; d += kLanes) accumulate<1>(acc, v, p, count, shrink, d);
}

template <typename Q, typename Kv>
void attend(const AttentionJob& job, const AttentionItem& item) {
    using QStore = typename Q::Store;
    using KvStore = typename Kv::Store;
    const int64_t dim = job.head_dim, padded = round_up(dim, kLanes), group = job.n_heads / job.n_kv_heads;
    const int64_t num_rows = item.count * group;
    float* queries = scratch(0, num_rows * padded);
    float* acc = scratch(1, num_rows * padded);
    float* widened = scratch(2, 2 * kTile * padded);
    Row* rows = reinterpret_cast<Row*>(scratch(3, num_rows * 2));

    const int32_t* start = job.query_start + item.request;
    const int64_t first_token = start[0] + item.first;
    const int64_t first_visible = job.context_lens[item.request] - (start[1] - start[0]) + item.first + 1;
    for (int64_t i = 0; i < num_rows; ++i) {
        const int64_t head = item.kv_head * group + i % group;
        const QStore* q = static_cast<const QStore*>(job.q) + (first_token + i / group) * job.q_stride + head * dim;
        widen<Q>(q, queries + i * padded, dim, padded);
        for (int64_t d = 0; d < dim; ++d) queries[i * padded + d] *= job.scale;
        rows[i] = {-__builtin_inff(), 0.0f};
    }
    std::memset(acc, 0, size_t(num_rows * padded) * 4);

    const int32_t* table = job.block_tables + item.request * job.tables_stride;
    const auto* k_cache = static_cast<const KvStore*>(job.k_cache);
    const auto* v_cache = static_cast<const KvStore*>(job.v_cache);
    const auto place = [&](int64_t token) {
        const int64_t slot = int64_t(table[token / job.block_size]) * job.block_size + token % job.block_size;
        return (slot * job.n_kv_heads + item.kv_head) * dim;
    };
    const bool direct = sizeof(KvStore) == 4 && padded == dim;
    const int64_t context = first_visible + item.count - 1;
    for (int64_t begin = 0; begin < context; begin += kTile) {
        const int in_tile = int(context - begin < kTile ? context - begin : kTile);
        const float *k[kTile], *v[kTile];
        for (int j = 0; j < in_tile; ++j) {
            const int64_t at = place(begin + j);
            // The next tile, before it is needed: a head's rows lie apart, which the hardware does not foresee.
            if (begin + j + kTile < context) {
                const int64_t ahead = place(begin + j + kTile);
                for (int64_t d = 0; d < dim; d += 64 / int64_t(sizeof(KvStore))) {
                    __builtin_prefetch(k_cache + ahead + d);
                    __builtin_prefetch(v_cache + ahead + d);
                }
            }
            if (direct) {
                k[j] = reinterpret_cast<const float*>(k_cache + at);
                v[j] = reinterpret_cast<const float*>(v_cache + at);
            } else {
                float* wide = widened + 2 * j * padded;
                widen<Kv>(k_cache + at, wide, dim, padded);
                widen<Kv>(v_cache + at, wide + padded, dim, padded);
                k[j] = wide;
                v[j] = wide + padded;
            }
        }
        for (int64_t i = 0; i < num_rows; ++i) {
            const int64_t visible = first_visible + i / group - begin;
            if (visible <= 0) continue;
            const int count = int(visible < in_tile ? visible : in_tile);
            visit_tile(rows[i], queries + i * padded, acc + i * padded, k, v, count, padded);
        }
    }
    for (int64_t i = 0; i < num_rows; ++i) {
        const int64_t head = item.kv_head * group + i % group;
        QStore* out = static_cast<QStore*>(job.out) + ((first_token + i / group) * job.n_heads + head) * dim;
        const float inverse = 1.0f / rows[i].total;
        for (int64_t d = 0; d < dim; ++d) Q::put(out + d, acc[i * padded + d] * inverse);
    }
}

}  // namespace

void attention(const AttentionJob& job, const AttentionItem* items, int64_t begin, int64_t end) {
    with_type(job.type, [&](auto q_tag) {
        with_type(job.kv_type, [&](auto kv_tag) {
            for (int64_t i = begin; i < end; ++i) attend<decltype(q_tag), decltype(kv_tag)>(job, items[i]);
        });
    });
}

}  // namespace SIROCCO_ISA
