// What a cache row of one head looks like.
#pragma once
#include <cstdint>

// q8: head_dim int8, then a float16 scale for each 32 of them.
enum class Kv : int { f32 = 0, f16 = 1, bf16 = 2, q8 = 3 };

constexpr int64_t kKvBlock = 32;

static inline int64_t kv_row_bytes(Kv kv, int64_t head_dim) {
    if (kv == Kv::f32) return head_dim * 4;
    if (kv == Kv::q8) return head_dim + (head_dim + kKvBlock - 1) / kKvBlock * 2;
    return head_dim * 2;
}
