// The Python face of the native kernels. Tensors come as addresses and sizes (kernels/cpu/ops.py is the typed side);
// what could read or write outside of them is checked here. The GIL is released while kernels run.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "iq_grids.h"
#include "kernel_choice.h"
#include "probe.h"
#include "scratch.h"
#include "team.h"

namespace nb = nanobind;

namespace {

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const KernelTable* table : usable_kernels()) names.emplace_back(table->name);
    return names;
}

void use_instruction_set(const std::string& name) {
    if (!use_kernels(name)) throw std::invalid_argument("this CPU or build has no instruction set " + name);
}

template <typename T = void>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void require(bool holds, const char* message) {
    if (!holds) throw std::out_of_range(message);
}

void take_iq_grids() {
    const nb::object packed_points = nb::module_::import_("kernels.reference.iq_grids").attr("grid_bytes");
    for (const IqGridPlace& grid : iq_grid_places) {
        const nb::bytes points = nb::cast<nb::bytes>(packed_points(grid.name));
        if (points.size() != grid.bytes) throw std::length_error(std::string("the points of ") + grid.name + " do not fill its grid");
        std::memcpy(grid.points, points.data(), grid.bytes);
    }
}

bool can_decode(int type_id) { return current_kernels().decoder(type_id) != nullptr; }

void dequantize(int type_id, uintptr_t blocks, uintptr_t out, int64_t rows, int64_t row_bytes, int64_t columns) {
    const Decode decode = current_kernels().decoder(type_id);
    require(decode != nullptr, "dequantize: no native decoder for this type");
    nb::gil_scoped_release release;
    parallel_for(rows, columns, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) decode(at<uint8_t>(blocks) + r * row_bytes, at<float>(out) + r * columns, columns);
    });
}

void matmul(int type_id, uintptr_t weight, int64_t rows, int64_t row_bytes, int64_t block_bytes, int64_t block_length,
            uintptr_t x, int x_type, int64_t tokens, int64_t in_features, uintptr_t out, int out_type, int64_t out_stride) {
    const Decode decode = current_kernels().decoder(type_id);
    require(decode != nullptr, "matmul: no native decoder for this type");
    require(in_features == row_bytes / block_bytes * block_length, "matmul: x and weight differ in width");
    nb::gil_scoped_release release;
    const KernelTable& kernels = current_kernels();
    const int64_t padded = (in_features + 15) / 16 * 16;
    const float* wide = at<float>(x);
    if (Float(x_type) != Float::f32 || padded != in_features) {
        float* buffer = scratch(2, tokens * padded);
        const int64_t width = Float(x_type) == Float::f32 ? 4 : 2;
        for (int64_t t = 0; t < tokens; ++t) {
            kernels.to_f32(at<char>(x) + t * in_features * width, Float(x_type), buffer + t * padded, in_features);
            std::fill(buffer + t * padded + in_features, buffer + (t + 1) * padded, 0.0f);
        }
        wide = buffer;
    }
    const FileMatmulJob job{decode, at<uint8_t>(weight), row_bytes, block_bytes, block_length, wide, tokens, in_features,
                        padded, at(out), out_stride, Float(out_type)};
    parallel_for(rows, in_features * (tokens + 1) / 4,
                 [&](int64_t begin, int64_t end) { kernels.matmul_file(job, begin, end); });
}

}  // namespace

void bind_layers(nb::module_& m);
void bind_sampling(nb::module_& m);
void bind_packed(nb::module_& m);
void bind_program(nb::module_& m);
void bind_quantize(nb::module_& m);
void bind_waiting(nb::module_& m);

NB_MODULE(_native, m) {
    m.attr("ABI") = 5;
    // What lives until Python ends (an engine freezes its objects) ends with the process; nobody's terminal is told of it.
    nb::set_leak_warnings(false);
    take_iq_grids();
    bind_probe(m);
    bind_packed(m);
    bind_program(m);
    bind_quantize(m);
    bind_waiting(m);
    m.def("instruction_sets", instruction_sets);
    m.def("instruction_set", [] { return std::string(current_kernels().name); });
    m.def("use_instruction_set", use_instruction_set);
    m.def("set_num_threads", set_team_size, nb::call_guard<nb::gil_scoped_release>());
    m.def("num_threads", team_size);
    m.def("stay_out_of_team", stay_out_of_team);
    m.def("set_spin", set_team_spin, nb::arg("barrier_ns") = kBarrierSpinNs, nb::arg("idle_ns") = kIdleSpinNs);
    m.def("can_decode", can_decode);
    m.def("dequantize", dequantize);
    m.def("matmul", matmul);
    bind_sampling(m);
    bind_layers(m);
}
