// Activations in the form that a matrix product reads. A row per token; all parts of a row are 64-byte aligned.
#pragma once
#include <cstdint>

#include "packed.h"

// Where the parts of a row lie, in bytes from its start. columns are padded with zeros to a multiple of 256 (64 for f32
// and bf16), so that kernels need no tails.
//   f32:    float values[padded]
//   bf16:   uint16 values[padded], two to a word as in a packed matrix
//   q8_32:  int8 q[padded], then float scale[padded / 32], float sum32[padded / 32], int32 minus[padded / 32]
//   q8_256: int8 q[padded], then float scale[padded / 256], int16 sum16[padded / 16], int16 sum32[padded / 32]
// value = q * scale. sum16, sum32: of the q of 16 or 32 columns; minus: the same with its sign turned. Of any four sums of
// 16 bits the second and the third have changed places: as pairs they meet bytes 0 and 2, then 1 and 3 of a word.
struct ActLayout {
    Act kind;
    int64_t columns, padded;
    int64_t scale, sum16, sum32, minus;  // byte offsets
    int64_t row_bytes;

    static ActLayout of(Act kind, int64_t columns) {
        const auto up = [](int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; };
        ActLayout a{kind, columns, up(columns, kind == Act::q8_32 || kind == Act::q8_256 ? 256 : 64), 0, 0, 0, 0, 0};
        // A cache line more: rows whose distance is a power of two would share few cache sets.
        if (kind == Act::f32) a.row_bytes = a.padded * 4 + 64;
        else if (kind == Act::bf16) a.row_bytes = a.padded * 2 + 64;
        else {
            const bool is_small = kind == Act::q8_32;
            const int64_t n32 = a.padded / 32, n16 = a.padded / 16;
            a.scale = a.padded;
            a.sum16 = a.scale + up((is_small ? n32 : a.padded / 256) * 4, 64);
            a.sum32 = a.sum16 + (is_small ? 0 : up(n16 * 2, 64));
            a.minus = a.sum32 + up(n32 * (is_small ? 4 : 2), 64);
            a.row_bytes = a.minus + (is_small ? up(n32 * 4, 64) : 0);
        }
        return a;
    }
};

// Rows of activations: row t at data + t * layout.row_bytes.
struct ActRows {
    ActLayout layout;
    const uint8_t* data;
    const uint8_t* row(int64_t t) const { return data + t * layout.row_bytes; }
};
