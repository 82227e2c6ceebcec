// The one layout in which the native kernels keep every matrix: rows in tiles of 16, and in a tile the rows' blocks as
// 32-bit words, interleaved, so that one 64-byte vector holds the same word of 16 rows. A block whose size is no multiple
// of four has its scale (one or two bytes) taken out of it, into a line of 64 bytes that goes before the two (or four)
// blocks whose scales it holds. Kernels read a tile from its begin to its end, for memory is fast only where hardware
// foresees what comes: some types have their words in the order of use. Drawings and the exact rules: docs/kernels.md.
#pragma once
#include <cstdint>

// How the activations that meet a type are kept: float32, bfloat16, or 8-bit integers with a scale for 32 or 256 of them.
enum class Act : int { f32 = 0, bf16 = 1, q8_32 = 2, q8_256 = 3 };

constexpr int kTileRows = 16;

// One storable type. words: whole 32-bit words of a block, or of two weights for 16-bit types (block_length 2 here).
struct TypeLayout {
    int type_id;
    int block_length, block_bytes;
    int words;                    // interleaved words of a block
    int scale_bytes, scale_offset;  // the 0 to 2 bytes of a block that go to the line of scales, and where in the block they were
    Act act;                        // activations it is multiplied with, unless told to be exact


    // Blocks that share a line of scales.
    int64_t blocks_per_line() const { return 4 / scale_bytes; }
    // Where block b's words and its 16 scales lie in a tile.
    int64_t words_at(int64_t b) const { return b * words * 64 + (scale_bytes ? (b / blocks_per_line() + 1) * 64 : 0); }
    int64_t scales_at(int64_t b) const {
        const int64_t per = blocks_per_line();
        return b / per * (1 + per * words) * 64 + b % per * kTileRows * scale_bytes;
    }
};

// Null for types that the kernels cannot keep.
const TypeLayout* type_layout(int type_id);

// A packed matrix as the kernels see it. Rows are padded to whole tiles with zeros, columns to whole blocks.
struct PackedMatrix {
    const TypeLayout* layout;
    int64_t rows, columns, blocks;  // blocks of a row
    int64_t tile_bytes;
    const uint8_t* data;  // 64-byte aligned, tiles() * tile_bytes bytes

    int64_t tiles() const { return (rows + kTileRows - 1) / kTileRows; }
    const uint8_t* tile(int64_t t) const { return data + t * tile_bytes; }
};

// Blocks of a row of `columns` weights, and the bytes of a tile of such rows.
int64_t packed_blocks(const TypeLayout& layout, int64_t columns);
int64_t packed_tile_bytes(const TypeLayout& layout, int64_t columns);

// Tile t of a matrix from 16 rows in file order; null pointers stand for rows of zeros (beyond the last).
// row_bytes: readable bytes of a row (a 16-bit row of odd length has half a word less than the layout).
void pack_tile(const TypeLayout& layout, int64_t blocks, const uint8_t* const* rows, int64_t row_bytes, uint8_t* tile);

// The exact inverse for one row of a tile: writes row_bytes bytes in file order.
void unpack_row(const TypeLayout& layout, int64_t blocks, const uint8_t* tile, int row, int64_t row_bytes, uint8_t* out);
