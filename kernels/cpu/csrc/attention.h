// Paged causal attention: tables of a step, what one layer adds, and the units of work.
//
// The context of a query is cut in segments of kSegment keys. Within a segment: scores, their maximum, exponentials, and
// the weighted sum of the values, key after key; then the segments' results are merged in their order. None of this
// depends on how queries and segments are distributed, so a token's result has the same bits in a chunk of any size and in
// a decode step, with any number of threads. Caches are [block, slot, KV head, row], rows as kv.h says.
#pragma once
#include <cstdint>

#include "kv.h"

constexpr int64_t kSegment = 256;
constexpr int64_t kStreamRows = 8;  // up to so many rows (query, head of a KV head) the keys are read as they lie

// A step's requests: token t of request r is row query_start[r] + t of q; its context is in the blocks of row r.
struct AttentionTables {
    const int32_t* block_tables;  // [requests, tables_stride]
    int64_t tables_stride;
    const int32_t *query_start, *context_lens;  // [requests + 1], [requests]
    int64_t block_size, n_heads, n_kv_heads, head_dim;
};

struct AttentionJob {
    const float* q;  // rows of n_heads * head_dim
    int64_t q_stride;
    float* out;
    int64_t out_stride;
    const void *k_cache, *v_cache;
    Kv kv_type;
    float scale, softcap;  // softcap 0: none
    int64_t window;        // keys that a query sees, itself included; 0: all
};

// `count` query tokens of a request from its token `first` on, KV heads [head_begin, head_end), segments [segment_begin,
// segment_end). Where one unit has all segments it writes the output, else its results go to the plan's partials: part
// is the group of units whose last one to end merges them.
struct AttentionUnit {
    int32_t request, first, count, head_begin, head_end, segment_begin, segment_end;
    int32_t part;  // or -1
};

// Floats of one row (query, head) in the partials: its sums, padded, then the largest score and the total.
static inline int64_t partial_row(int64_t head_dim) { return (head_dim + 15) / 16 * 16 + 16; }
