// The attention of one unit: scores, softmax and weighted sums within segments, and the merge of segments.
#include "attention.h"

#include "attention_dots.h"
#include "kv_types.h"
#include "scratch.h"
#include "vec_math.h"

namespace SIROCCO_ISA {
namespace {

constexpr float kNone = -__builtin_inff();
constexpr int kTile = 64;          // keys that are widened at once
constexpr int kKeyStep = 8, kMaxKeyStep = 16, kValueStep = 16;  // keys of a pass over the cache as it lies, all heads in turn
constexpr int kAhead = 16;         // keys between those in use and those being fetched
constexpr int64_t kOffsets = kSegment + kAhead + kValueStep;
constexpr int kWidth = kLanes == 16 ? 4 : 2;  // vectors of a value row in a pass

// A row is one (query, head of the group). What it sees of a segment: keys [begin, end), relative to its first.
struct Span {
    int32_t begin, end;
};

// The unit's data as the loops below need them; everything lies in the thread's scratch.
struct View {
    const AttentionTables& tables;
    const AttentionJob& job;
    const AttentionUnit& unit;
    int64_t dim, padded, group, rows;  // rows: of one KV head
    int64_t head_bytes, token_bytes;
    int64_t first_visible;  // keys that the unit's first query sees
    int64_t result_row;     // floats from one row of results to the next
    float* queries;         // [heads][rows][padded], scaled
    float* scores;          // [heads][rows][kSegment]
    Span* spans;            // [rows]
    int64_t* offsets;       // [kOffsets]: bytes from the cache's start to a token
    float* wide;            // kTile widened rows

    int64_t heads() const { return unit.head_end - unit.head_begin; }
    float* query(int64_t h) const { return queries + h * rows * padded; }
    float* score(int64_t h) const { return scores + h * rows * kSegment; }
};

// A row of results: padded sums, then at the end of the row the largest score and the total of the exponentials.
inline float* largest_of(float* row, int64_t result_row) { return row + result_row - 16; }

inline void find_spans(const View& v, int64_t segment) {
    const int64_t base = segment * kSegment;
    for (int64_t i = 0; i < v.rows; ++i) {
        const int64_t end = v.first_visible + i / v.group - base;
        const int64_t begin = v.job.window > 0 ? end - v.job.window : 0;
        v.spans[i].end = int32_t(end < 0 ? 0 : end < kSegment ? end : kSegment);
        v.spans[i].begin = int32_t(begin < 0 ? 0 : begin < v.spans[i].end ? begin : v.spans[i].end);
    }
}

inline void find_offsets(const View& v, int64_t segment, int64_t count) {
    const AttentionTables& t = v.tables;
    const int32_t* table = t.block_tables + v.unit.request * t.tables_stride;
    int64_t block = segment * kSegment / t.block_size, slot = segment * kSegment % t.block_size;
    for (int64_t j = 0; j < count; ++j) {
        v.offsets[j] = (table[block] * t.block_size + slot) * v.token_bytes;
        if (++slot == t.block_size) {
            slot = 0;
            ++block;
        }
    }
}

// Scores to exponentials, in place, zero outside of the span; the largest score and the total to result[0] and [1].
inline void softmax(float* scores, Span span, float softcap, float* result) {
    const int first = span.begin / kLanes * kLanes;
    Vec largest = splat(kNone);
    for (int j = first; j < span.end; j += kLanes) {
        Vec s = load(scores + j);
        if (softcap > 0.0f) s = splat(softcap) * tanh(s / splat(softcap));
        if (j < span.begin || j + kLanes > span.end)
            for (int i = 0; i < kLanes; ++i)
                if (j + i < span.begin || j + i >= span.end) s[i] = kNone;
        store(scores + j, s);
        largest = s > largest ? s : largest;
    }
    float top = kNone;
    for (int i = 0; i < kLanes; ++i) top = largest[i] > top ? largest[i] : top;
    const Vec shift = splat(top == kNone ? 0.0f : top);
    Vec total{};
    for (int j = first; j < span.end; j += kLanes) {
        const Vec e = exp(load(scores + j) - shift);
        store(scores + j, e);
        total += e;
    }
    result[0] = top;
    result[1] = sum(total);
}

// Where weigh reads values: widened rows, or the cache as it lies.
struct WideValues {
    const float* rows;
    int64_t stride;
    Vec operator()(int j, int64_t d) const { return load(rows + j * stride + d); }
};

template <typename T>
struct CachedValues {
    const uint8_t* cache;
    const int64_t* offsets;
    int64_t dim;
    Vec operator()(int j, int64_t d) const { return T::load(cache + offsets[j], d, dim); }
};

// sums[r][d] += p[r][j] * value(j, d) for keys [begin, end) in their order, R rows and W vectors from d on.
template <int R, int W, typename Value>
__attribute__((noinline)) void weigh(float* sums, int64_t row, const float* p, int begin, int end, int64_t d, Value value) {
    Vec acc[R][W];
    for (int r = 0; r < R; ++r)
        for (int w = 0; w < W; ++w) acc[r][w] = load(sums + r * row + d + w * kLanes);
    for (int j = begin; j < end; ++j) {
        Vec x[W];
        for (int w = 0; w < W; ++w) x[w] = value(j, d + w * kLanes);
        for (int r = 0; r < R; ++r) {
            const Vec weight = splat(p[r * kSegment + j]);
            for (int w = 0; w < W; ++w) acc[r][w] = fma(weight, x[w], acc[r][w]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int w = 0; w < W; ++w) store(sums + r * row + d + w * kLanes, acc[r][w]);
}

template <int R, typename Value>
inline void weigh_all(float* sums, int64_t row, const float* p, int begin, int end, int64_t padded, Value value) {
    if (begin >= end) return;
    int64_t d = 0;
    for (; d + kWidth * kLanes <= padded; d += kWidth * kLanes) weigh<R, kWidth>(sums, row, p, begin, end, d, value);
    for (; d < padded; d += kLanes) weigh<R, 1>(sums, row, p, begin, end, d, value);
}

// Rows [0, R) over the keys [begin, end): together what all see, and alone what only some see, so that no row meets the
// value of a key which it must not see (it may be NaN).
template <int R, typename Value>
inline void weigh_rows(float* sums, int64_t row, const float* p, const Span* spans, int begin, int end, int64_t padded, Value value) {
    int from[R], to[R], common = begin, common_end = end;
    for (int r = 0; r < R; ++r) {
        from[r] = spans[r].begin > begin ? spans[r].begin : begin;
        to[r] = spans[r].end < end ? spans[r].end : end;
        common = from[r] > common ? from[r] : common;
        common_end = to[r] < common_end ? to[r] : common_end;
    }
    if (common >= common_end) common = common_end = end;
    for (int r = 0; r < R; ++r)
        weigh_all<1>(sums + r * row, row, p + r * kSegment, from[r], common < to[r] ? common : to[r], padded, value);
    weigh_all<R>(sums, row, p, common, common_end, padded, value);
    for (int r = 0; r < R; ++r)
        weigh_all<1>(sums + r * row, row, p + r * kSegment, common_end > from[r] ? common_end : from[r], to[r], padded, value);
}

// body(first row, integral constant of how many): in fours, then the rest.
template <typename Body>
inline void in_blocks(int64_t rows, Body body) {
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4) body(i, std::integral_constant<int, 4>{});
    if (i + 2 <= rows) {
        body(i, std::integral_constant<int, 2>{});
        i += 2;
    }
    if (i < rows) body(i, std::integral_constant<int, 1>{});
}

// Fetches the rows of keys [begin, end) of the unit's heads into the second cache: the first is too small for what is in
// use and what comes. Inlined by force, since a function that only prefetches counts as pure and its calls are dropped.
__attribute__((always_inline)) inline void prefetch(const View& v, const void* cache, int64_t begin, int64_t end,
                                                           int64_t part, int64_t parts) {
    const auto* base = static_cast<const uint8_t*>(cache) + v.unit.head_begin * v.head_bytes;
    const int64_t bytes = v.heads() * v.head_bytes;
    // A part of the keys with each head, since many requests at once make the loads in use wait.
    for (int64_t j = begin + (end - begin) * part / parts; j < begin + (end - begin) * (part + 1) / parts; ++j)
        for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(base + v.offsets[j] + i, 0, 2);
}

// A segment for few rows: the cache as it lies, all heads of a few tokens at a time. known: keys whose offsets are known,
// beyond the segment.
template <typename T>
void stream_segment(const View& v, int64_t count, int64_t known, float* results) {
    const auto cache = [&](const void* p) { return static_cast<const uint8_t*>(p) + v.unit.head_begin * v.head_bytes; };
    const uint8_t *k = cache(v.job.k_cache), *values = cache(v.job.v_cache);
    const int64_t dim = v.dim, heads = v.heads();
    const auto smaller = [](int64_t a, int64_t b) { return a < b ? a : b; };
    int64_t lowest = count;
    for (int64_t i = 0; i < v.rows; ++i) lowest = smaller(lowest, v.spans[i].begin);
    const int64_t begin = lowest / kValueStep * kValueStep;
    const int64_t step = v.rows == 1 ? kMaxKeyStep : kKeyStep;  // a single row sums up more keys at once
    for (int64_t j = begin; j < count; j += step) {
        const int64_t end = smaller(j + step, count), ahead = j + kAhead;
        for (int64_t h = 0; h < heads; ++h) {
            if (ahead < count) prefetch(v, v.job.k_cache, ahead, smaller(ahead + step, count), h, heads);
            else prefetch(v, v.job.v_cache, begin + ahead - count, smaller(begin + ahead - count + step, count), h, heads);
            const uint8_t* keys[kMaxKeyStep];
            for (int64_t i = j; i < end; ++i) keys[i - j] = k + v.offsets[i] + h * v.head_bytes;
            in_blocks(v.rows, [&](int64_t row, auto size) {
                dots<T, size>(v.query(h) + row * dim, keys, int(end - j), dim, v.score(h) + row * kSegment + j, kSegment);
            });
        }
    }
    for (int64_t h = 0; h < heads; ++h)
        for (int64_t i = 0; i < v.rows; ++i) {
            float* result = results + (h * v.rows + i) * v.result_row;
            softmax(v.score(h) + i * kSegment, v.spans[i], v.job.softcap, largest_of(result, v.result_row));
        }
    for (int64_t j = begin; j < count; j += kValueStep) {
        const int64_t end = smaller(j + kValueStep, count), ahead = j + kAhead;
        for (int64_t h = 0; h < heads; ++h) {
            if (ahead < count) prefetch(v, v.job.v_cache, ahead, smaller(ahead + kValueStep, count), h, heads);
            else prefetch(v, v.job.k_cache, ahead, smaller(ahead + kValueStep, known), h, heads);
            const CachedValues<T> value{values + h * v.head_bytes, v.offsets, dim};
            in_blocks(v.rows, [&](int64_t row, auto size) {
                weigh_rows<size>(results + (h * v.rows + row) * v.result_row, v.result_row, v.score(h) + row * kSegment,
                                 v.spans + row, int(j), int(end), dim, value);
            });
        }
    }
}

// kTile keys from `begin` on, transposed: wide[key / kLanes][d][key % kLanes]. Keys beyond count repeat the last.
template <typename T>
void widen_keys(const View& v, const uint8_t* cache, int64_t begin, int64_t count) {
    for (int64_t j = 0; j < kTile && begin + j < count; j += kLanes) {
        const uint8_t* keys[kLanes];
        for (int i = 0; i < kLanes; ++i) {
            const int64_t key = begin + j + i < count ? begin + j + i : count - 1;
            keys[i] = cache + v.offsets[key];
        }
        float* out = v.wide + j * v.padded;
        int64_t d = 0;
        for (; d + kLanes <= v.dim; d += kLanes) {
            Vec block[kLanes];
            for (int i = 0; i < kLanes; ++i) block[i] = T::load(keys[i], d, v.dim);
            transpose(block);
            for (int i = 0; i < kLanes; ++i) store(out + (d + i) * kLanes, block[i]);
        }
        for (; d < v.padded; ++d)
            for (int i = 0; i < kLanes; ++i) out[d * kLanes + i] = d < v.dim ? T::get(keys[i], d, v.dim) : 0.0f;
    }
}

template <typename T>
void widen_values(const View& v, const uint8_t* cache, int64_t begin, int64_t count) {
    for (int64_t j = 0; j < kTile && begin + j < count; ++j) {
        const uint8_t* row = cache + v.offsets[begin + j];
        float* out = v.wide + j * v.padded;
        int64_t d = 0;
        for (; d + kLanes <= v.dim; d += kLanes) store(out + d, T::load(row, d, v.dim));
        for (; d < v.padded; ++d) out[d] = d < v.dim ? T::get(row, d, v.dim) : 0.0f;
    }
}

// A segment for many rows of one KV head: keys and values are widened once for all of them.
template <typename T>
void tile_segment(const View& v, int64_t h, int64_t count, float* results) {
    const int64_t at = (v.unit.head_begin + h) * v.head_bytes, padded = v.padded;
    const auto *k = static_cast<const uint8_t*>(v.job.k_cache) + at, *values = static_cast<const uint8_t*>(v.job.v_cache) + at;
    float *query = v.query(h), *score = v.score(h);
    int64_t lowest = count;
    for (int64_t i = 0; i < v.rows; ++i) lowest = v.spans[i].begin < lowest ? v.spans[i].begin : lowest;
    for (int64_t begin = lowest / kTile * kTile; begin < count; begin += kTile) {
        widen_keys<T>(v, k, begin, count);
        in_blocks(v.rows, [&](int64_t row, auto size) {
            // Later rows see later keys: the first begins and the last ends what the block needs.
            const int64_t from = v.spans[row].begin / kLanes * kLanes, to = v.spans[row + size - 1].end;
            const auto dots_of = padded == 64 ? dots_across<size, 64 / kLanes>
                                 : padded == 128 ? dots_across<size, 128 / kLanes> : dots_across<size, 0>;
            for (int64_t j = from > begin ? from : begin; j < to && j < begin + kTile; j += kLanes)
                dots_of(query + row * padded, padded, v.wide + (j - begin) * padded, score + row * kSegment + j, kSegment);
        });
    }
    for (int64_t i = 0; i < v.rows; ++i)
        softmax(score + i * kSegment, v.spans[i], v.job.softcap, largest_of(results + i * v.result_row, v.result_row));
    for (int64_t begin = lowest / kTile * kTile; begin < count; begin += kTile) {
        widen_values<T>(v, values, begin, count);
        const WideValues value{v.wide - begin * padded, padded};
        const int64_t end = begin + kTile < count ? begin + kTile : count;
        in_blocks(v.rows, [&](int64_t row, auto size) {
            weigh_rows<size>(results + row * v.result_row, v.result_row, score + row * kSegment, v.spans + row, int(begin),
                             int(end), padded, value);
        });
    }
}

// total becomes the merge of itself and a later segment.
void merge(float* total, const float* segment, int64_t padded, int64_t result_row) {
    float* t = largest_of(total, result_row);
    const float* s = segment + result_row - 16;
    if (s[1] == 0.0f) return;  // saw nothing
    if (t[1] == 0.0f) {
        std::memcpy(total, segment, size_t(result_row) * 4);
        return;
    }
    const float top = s[0] > t[0] ? s[0] : t[0];
    const Vec keep = splat(exp(splat(t[0] - top))[0]), add = splat(exp(splat(s[0] - top))[0]);
    for (int64_t d = 0; d < padded; d += kLanes) store(total + d, fma(load(segment + d), add, load(total + d) * keep));
    t[1] = fma(splat(s[1]), add, splat(t[1]) * keep)[0];
    t[0] = top;
}

// Row `index` of the unit's results (its heads, its rows) to where it belongs in the output.
void put_out(const AttentionTables& tables, const AttentionJob& job, const AttentionUnit& unit, int64_t index, const float* result,
             int64_t result_row) {
    const int64_t group = tables.n_heads / tables.n_kv_heads, rows = unit.count * group, dim = tables.head_dim;
    const int64_t row = index % rows, head = (unit.head_begin + index / rows) * group + row % group;
    const int64_t token = tables.query_start[unit.request] + unit.first + row / group;
    float* out = job.out + token * job.out_stride + head * dim;
    const float inverse = 1.0f / result[result_row - 15];
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) store(out + d, load(result + d) * splat(inverse));
    for (; d < dim; ++d) out[d] = result[d] * inverse;
}

template <typename T>
void attend_as(const AttentionTables& tables, const AttentionJob& job, const AttentionUnit& unit, float* partials) {
    const int64_t dim = tables.head_dim, padded = round_up(dim, kLanes), group = tables.n_heads / tables.n_kv_heads;
    const int64_t rows = unit.count * group, heads = unit.head_end - unit.head_begin, all = rows * heads;
    const int64_t result_row = partial_row(dim), head_bytes = kv_row_bytes(job.kv_type, dim);
    const bool is_streamed = rows <= kStreamRows && padded == dim;
    float* space = scratch(0, all * (padded + kSegment) + 2 * rows + 16 + 2 * kOffsets + kTile * padded);
    View v{tables, job, unit, dim, padded, group, rows, head_bytes, tables.n_kv_heads * head_bytes, 0, result_row,
           space, space + all * padded, nullptr, nullptr, nullptr};
    v.wide = v.scores + all * kSegment;
    v.offsets = reinterpret_cast<int64_t*>(v.wide + kTile * padded);
    v.spans = reinterpret_cast<Span*>(v.offsets + kOffsets);

    const int32_t* start = tables.query_start + unit.request;
    v.first_visible = tables.context_lens[unit.request] - (start[1] - start[0]) + unit.first + 1;
    for (int64_t i = 0; i < all; ++i) {
        const int64_t head = (unit.head_begin + i / rows) * group + i % rows % group;
        const float* q = job.q + (start[0] + unit.first + i % rows / group) * job.q_stride + head * dim;
        float* query = v.queries + i * padded;
        for (int64_t d = 0; d < dim; ++d) query[d] = q[d] * job.scale;
        for (int64_t d = dim; d < padded; ++d) query[d] = 0.0f;
    }

    float* results = scratch(1, 2 * all * result_row);
    float* totals = results + all * result_row;
    if (!partials) std::memset(totals, 0, size_t(all * result_row) * 4);
    for (int64_t s = unit.segment_begin; s < unit.segment_end; ++s) {
        if (partials) results = partials + s * all * result_row;
        std::memset(results, 0, size_t(all * result_row) * 4);
        find_spans(v, s);
        const int64_t count = v.spans[rows - 1].end;  // the last row sees the furthest
        if (v.spans[rows - 1].begin >= count && v.spans[0].begin >= v.spans[0].end) continue;
        const int64_t left = v.first_visible + unit.count - 1 - s * kSegment;  // keys from the segment's first to the last of all
        const int64_t known = count < kSegment ? count : left < kOffsets ? left : kOffsets;
        find_offsets(v, s, known);
        if (is_streamed) {
            stream_segment<T>(v, count, known, results);
        } else {
            for (int64_t h = 0; h < heads; ++h) tile_segment<T>(v, h, count, results + h * rows * result_row);
        }
        if (partials) continue;
        for (int64_t i = 0; i < all; ++i) merge(totals + i * result_row, results + i * result_row, padded, result_row);
    }
    if (partials) return;
    for (int64_t i = 0; i < all; ++i) put_out(tables, job, unit, i, totals + i * result_row, result_row);
}

}  // namespace

void attend(const AttentionTables& tables, const AttentionJob& job, const AttentionUnit& unit, float* partials) {
    with_kv(job.kv_type, [&](auto kv) { attend_as<decltype(kv)>(tables, job, unit, partials); });
}

void merge_segments(const AttentionTables& tables, const AttentionJob& job, const AttentionUnit& whole, float* partials) {
    const int64_t padded = round_up(tables.head_dim, kLanes), result_row = partial_row(tables.head_dim);
    const int64_t all = whole.count * (tables.n_heads / tables.n_kv_heads) * (whole.head_end - whole.head_begin);
    for (int64_t i = 0; i < all; ++i) {
        float* total = partials + i * result_row;
        for (int64_t s = 1; s < whole.segment_end; ++s) merge(total, partials + (s * all + i) * result_row, padded, result_row);
        put_out(tables, job, whole, i, total, result_row);
    }
}

}  // namespace SIROCCO_ISA
