// Python's view of packed matrices. Addresses and counts come from kernels/cpu/packed.py, which owns the tensors; what
// could read or write outside of them is checked here.
#include <nanobind/nanobind.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include "jobs.h"
#include "packed_memory.h"
#include "scratch.h"
#include "team.h"
#include "weight_memory.h"

namespace nb = nanobind;

namespace {

template <typename T = void>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void require(bool holds, const char* message) {
    if (!holds) throw std::out_of_range(message);
}

// Rows [first, first + count) from file order. order: which row of the file each of them is, or null.
void pack(PackedMemory& memory, int64_t first, int64_t count, uintptr_t blocks, int64_t blocks_rows, uintptr_t order) {
    const PackedMatrix& m = memory.matrix();
    require(first >= 0 && count >= 0 && first % kTileRows == 0 && first + count <= m.rows, "pack: rows outside the matrix");
    require((first + count) % kTileRows == 0 || first + count == m.rows, "pack: rows must fill whole tiles");
    require(order || count <= blocks_rows, "pack: more rows than there are");
    const int64_t row_bytes = memory.row_bytes();
    if (const auto* rows = at<const int64_t>(order))
        for (int64_t i = 0; i < count; ++i) require(rows[i] >= 0 && rows[i] < blocks_rows, "pack: row order outside the rows");
    nb::gil_scoped_release release;
    parallel_for((count + kTileRows - 1) / kTileRows, m.tile_bytes, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
            const uint8_t* rows[kTileRows];
            for (int r = 0; r < kTileRows; ++r) {
                const int64_t i = t * kTileRows + r;
                rows[r] = i < count ? at<const uint8_t>(blocks) + (order ? at<const int64_t>(order)[i] : i) * row_bytes : nullptr;
            }
            pack_tile(*m.layout, m.blocks, rows, row_bytes, memory.tile(first / kTileRows + t));
        }
    });
}

void unpack(const PackedMemory& memory, int64_t first, int64_t count, uintptr_t out) {
    const PackedMatrix& m = memory.matrix();
    require(first >= 0 && count >= 0 && first + count <= m.rows, "unpack: rows outside the matrix");
    const int64_t row_bytes = memory.row_bytes();
    nb::gil_scoped_release release;
    parallel_for(count, row_bytes, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
            unpack_row(*m.layout, m.blocks, m.tile((first + i) / kTileRows), int((first + i) % kTileRows), row_bytes,
                       at<uint8_t>(out) + i * row_bytes);
    });
}

// The rows ids[i] as float32 [count, columns].
void rows(const PackedMemory& memory, uintptr_t ids, int64_t count, uintptr_t out) {
    const PackedMatrix& m = memory.matrix();
    for (int64_t i = 0; i < count; ++i) require(at<int64_t>(ids)[i] >= 0 && at<int64_t>(ids)[i] < m.rows, "rows: id outside the matrix");
    nb::gil_scoped_release release;
    parallel_for(count, m.columns, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) packed_row(m, at<int64_t>(ids)[i], at<float>(out) + i * m.columns);
    });
}

void matmul(const PackedMemory& memory, uintptr_t x, int64_t tokens, bool is_exact, uintptr_t bias, uintptr_t out, int64_t out_stride) {
    const PackedMatrix& m = memory.matrix();
    require(out_stride >= m.rows, "matmul: rows of the result overlap");
    nb::gil_scoped_release release;
    const KernelTable& kernels = current_kernels();
    const ActLayout layout = ActLayout::of(is_exact ? Act::f32 : m.layout->act, m.columns);
    auto* acts = reinterpret_cast<uint8_t*>(scratch(3, tokens * layout.row_bytes / 4));
    parallel_for(tokens, m.columns * 4, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t)
            kernels.to_act(layout, at<const float>(x) + t * m.columns, acts + t * layout.row_bytes, 0, m.columns);
    });
    const MatmulJob job{m, {layout, acts}, at<const float>(bias), at<float>(out), out_stride};
    const MatmulUnits units = matmul_units(job, tokens, team_size());
    parallel_for(units.count, units.tiles * kTileRows * m.columns * units.tokens / 16,
                 [&](int64_t begin, int64_t end) { run_units(kernels.matmul, job, units, tokens, begin, end); });
}

// Pair p of group g, starts[g] <= p < starts[g + 1], is row who[p] of x times matrix g; who may be null: row p.
void grouped_matmul(const std::vector<const PackedMemory*>& matrices, uintptr_t x, int64_t tokens, uintptr_t who, int64_t pairs,
                    uintptr_t starts, bool is_exact, uintptr_t out, int64_t out_stride) {
    require(!matrices.empty(), "grouped matmul: no matrix");
    const PackedMatrix& first = matrices[0]->matrix();
    for (const PackedMemory* memory : matrices) {
        const PackedMatrix& m = memory->matrix();
        require(m.rows == first.rows && m.columns == first.columns && m.layout->act == first.layout->act, "grouped matmul: matrices of different sizes or activations");
    }
    const auto *start = at<const int64_t>(starts), *row = at<const int64_t>(who);
    const size_t groups = matrices.size();
    for (size_t g = 0; g < groups; ++g) require(start[g] <= start[g + 1], "grouped matmul: groups must not overlap");
    require(start[0] == 0 && start[groups] == pairs, "grouped matmul: groups must take all rows");
    for (int64_t p = 0; row && p < pairs; ++p) require(row[p] >= 0 && row[p] < tokens, "grouped matmul: row outside x");
    require(out_stride >= first.rows, "grouped matmul: rows of the result overlap");
    nb::gil_scoped_release release;
    const KernelTable& kernels = current_kernels();
    const ActLayout layout = ActLayout::of(is_exact ? Act::f32 : first.layout->act, first.columns);
    // A row that several groups take is converted once and copied: kernels read neighbouring rows.
    auto* acts = reinterpret_cast<uint8_t*>(scratch(3, (tokens + (row ? pairs : 0)) * layout.row_bytes / 4));
    parallel_for(tokens, first.columns * 4, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t)
            kernels.to_act(layout, at<const float>(x) + t * first.columns, acts + t * layout.row_bytes, 0, first.columns);
    });
    uint8_t* grouped = acts;
    if (row) {
        grouped += tokens * layout.row_bytes;
        parallel_for(pairs, layout.row_bytes / 16, [&](int64_t begin, int64_t end) {
            for (int64_t p = begin; p < end; ++p) std::memcpy(grouped + p * layout.row_bytes, acts + row[p] * layout.row_bytes, size_t(layout.row_bytes));
        });
    }
    GroupedMatmul work;
    for (size_t g = 0; g < groups; ++g) {
        const MatmulJob job{matrices[g]->matrix(), {layout, grouped + start[g] * layout.row_bytes}, nullptr, at<float>(out) + start[g] * out_stride, out_stride};
        work.add(job, start[g + 1] - start[g], team_size());
    }
    parallel_for(work.num_units(), first.tile_bytes * std::max<int64_t>(pairs / int64_t(groups), 1),
                 [&](int64_t begin, int64_t end) { work.run(kernels.matmul, begin, end); });
}

}  // namespace

void bind_packed(nb::module_& m) {
    nb::class_<PackedMemory>(m, "PackedMatrix")
        .def(nb::init<int, int64_t, int64_t>())
        .def_prop_ro("rows", [](const PackedMemory& p) { return p.matrix().rows; })
        .def_prop_ro("columns", [](const PackedMemory& p) { return p.matrix().columns; })
        .def_prop_ro("type_id", [](const PackedMemory& p) { return p.matrix().layout->type_id; })
        .def_prop_ro("act", [](const PackedMemory& p) { return int(p.matrix().layout->act); })
        .def_prop_ro("row_bytes", &PackedMemory::row_bytes)
        .def_prop_ro("num_bytes", &PackedMemory::num_bytes)
        .def("pack", pack)
        .def("part", [](const PackedMemory& whole, int64_t first, int64_t rows) { return std::make_unique<PackedMemory>(whole, first, rows); })
        .def("unpack", unpack)
        .def("gather", rows)
        .def("matmul", matmul);
    m.def("grouped_matmul", grouped_matmul);
    m.def("packed_bytes", packed_bytes);
    m.def("prepare_weight_memory", prepare_weight_memory);
    m.def("end_weight_preparation", end_weight_preparation);
}
