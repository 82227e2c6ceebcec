// Rows of any readable type into rows of another, piece by piece: nothing is ever expanded but a piece for each thread.
#pragma once
#include <cstdint>

#include "jobs.h"

// Rows as they lie in memory. decode: null for float32.
struct SourceRows {
    Decode decode;
    const uint8_t* data;
    int64_t row_bytes, rows, columns;

    // `count` rows from `first` on as float32, in the memory itself or in `buffer`, which has room for them.
    const float* values(int64_t first, int64_t count, float* buffer) const;
    // How many rows make a piece that stays in a core's cache.
    int64_t piece_rows() const;
};

// Why rows cannot be encoded, and the first of them. reason: 0 none, 1 a value that is not finite, 2 a scale that float16
// does not hold.
struct Refusal {
    int reason = 0;
    int64_t row = 0;
};

// True where all values are finite.
bool all_finite(const float* x, int64_t count);

Refusal quantize_rows(Encode encode, const SourceRows& source, const float* importance, uint8_t* out, int64_t out_row_bytes);
