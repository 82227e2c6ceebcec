// Decoding, packing, activations, and all products.
#include <cmath>
#include <cstring>

#include "driver.h"
#include "packed_memory.h"

namespace {

constexpr int kNumTypes = 64;  // ids that a type might have

void decode(const KernelTable& kernels, const TypeLayout& type) {
    const Decode decoder = kernels.decoder(type.type_id);
    require(decoder != nullptr, "a type that can be kept has no decoder");
    for (const int64_t blocks : {0, 1, 3}) {
        Exact<uint8_t> data(blocks * type.block_bytes, 1);
        Exact<float> out(blocks * type.block_length, 4);
        decoder(data.fill_bits().data(), out.data(), out.count());
    }
}

// A matrix in memory of exact size, from random rows at odd addresses, which come back as they were.
struct Matrix {
    Matrix(const TypeLayout& type, int64_t rows, int64_t columns)
        : packed{&type, rows, columns, packed_blocks(type, columns), packed_tile_bytes(type, columns), nullptr},
          row_bytes(type.block_length == 2 ? columns * 2 : packed.blocks * type.block_bytes),
          memory(packed.tiles() * packed.tile_bytes),
          file(rows * row_bytes, 1) {
        file.fill_bits();
        for (int64_t t = 0; t < packed.tiles(); ++t) {
            const uint8_t* of_tile[kTileRows];
            for (int64_t r = 0; r < kTileRows; ++r) of_tile[r] = t * kTileRows + r < rows ? row(t * kTileRows + r) : nullptr;
            pack_tile(type, packed.blocks, of_tile, row_bytes, memory.data() + t * packed.tile_bytes);
        }
        packed.data = memory.data();
        Exact<uint8_t> back(row_bytes, 1);
        for (int64_t r = 0; r < rows; ++r) {
            unpack_row(type, packed.blocks, packed.tile(r / kTileRows), int(r % kTileRows), row_bytes, back.data());
            require(std::memcmp(back.data(), row(r), size_t(row_bytes)) == 0, "a packed row does not come back");
        }
        Exact<float> values(columns);
        packed_row(packed, rows - 1, values.data());
    }
    const uint8_t* row(int64_t r) { return file.data() + r * row_bytes; }

    PackedMatrix packed;
    int64_t row_bytes;
    Exact<uint8_t> memory, file;
};

void multiply(const KernelTable& kernels, Matrix& matrix, Act act, int64_t tokens, bool has_bias) {
    const PackedMatrix& w = matrix.packed;
    const ActLayout layout = ActLayout::of(act, w.columns);
    Exact<float> x(tokens * w.columns, 4), bias(w.rows, 4);
    Exact<uint8_t> rows(tokens * layout.row_bytes);
    x.fill_numbers();
    bias.fill_numbers();
    if (tokens > 2) x[w.columns] = NAN, x[2 * w.columns] = INFINITY;
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t begin = 0; begin < w.columns; begin += 512) {
            const int64_t end = begin + 512 < w.columns ? begin + 512 : w.columns;
            kernels.to_act(layout, x.data() + t * w.columns, rows.data() + t * layout.row_bytes, begin, end);
        }
    const int64_t stride = w.rows + 3;
    Exact<float> out((tokens - 1) * stride + w.rows, 4);
    const MatmulJob job{w, {layout, rows.data()}, has_bias ? bias.data() : nullptr, out.data(), stride};
    for (const int threads : {1, 3}) {
        const MatmulUnits units = matmul_units(job, tokens, threads);
        run_units(kernels.matmul, job, units, tokens, 0, units.count / 2);
        run_units(kernels.matmul, job, units, tokens, units.count / 2, units.count);
    }
}

// Products with rows as they lie in a file.
void multiply_file(const KernelTable& kernels, Matrix& matrix, Float out_type) {
    const PackedMatrix& w = matrix.packed;
    const TypeLayout& type = *w.layout;
    const int64_t length = type.block_length == 2 ? 1 : type.block_length, tokens = 3;
    const int64_t padded = (w.columns + 15) / 16 * 16;
    Exact<float> x(tokens * padded);
    Exact<uint32_t> out(tokens * w.rows);
    const FileMatmulJob job{kernels.decoder(type.type_id), matrix.file.data(), matrix.row_bytes, matrix.row_bytes / (w.columns / length),
                            length, x.fill_numbers().data(), tokens, w.columns, padded, out.data(), w.rows, out_type};
    kernels.matmul_file(job, 0, w.rows);
}

}  // namespace

void run_products(const KernelTable& kernels) {
    for (int id = 0; id < kNumTypes; ++id) {
        const TypeLayout* type = type_layout(id);
        if (!type) continue;
        decode(kernels, *type);
        bool has_bias = false;
        for (const int64_t rows : {1, 37}) {
            for (const int64_t blocks : {1, 3}) {
                // Rows of 16-bit numbers may end in half a word.
                Matrix matrix(*type, rows, type->block_length > 2 ? blocks * type->block_length : 67 * blocks);
                for (const int64_t tokens : {1, 2, 3, 7, 18}) {
                    multiply(kernels, matrix, type->act, tokens, has_bias = !has_bias);
                    if (tokens != 7) multiply(kernels, matrix, Act::f32, tokens, has_bias);
                }
                for (const Float out : {Float::f32, Float::f16, Float::bf16}) multiply_file(kernels, matrix, out);
            }
        }
    }
}
