// Python's view of the encoders. Addresses and counts come from kernels/cpu/quantize.py, which owns the tensors.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <vector>

#include "hqq.h"
#include "jobs.h"
#include "quantize.h"

namespace nb = nanobind;

namespace {

template <typename T = void>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void require(bool holds, const char* message) {
    if (!holds) throw std::out_of_range(message);
}

SourceRows source_rows(int type_id, uintptr_t data, int64_t row_bytes, int64_t rows, int64_t columns) {
    const Decode decode = current_kernels().decoder(type_id);
    require(decode != nullptr, "quantize: no native decoder for the type of the source");
    return {type_id == 0 ? nullptr : decode, at<const uint8_t>(data), row_bytes, rows, columns};
}

std::pair<int, int64_t> quantize(int type_id, int source_type_id, uintptr_t source, int64_t source_row_bytes, uintptr_t importance,
                                 int64_t rows, int64_t columns, uintptr_t out, int64_t out_row_bytes) {
    const Encode encode = current_kernels().encoder(type_id);
    require(encode != nullptr, "quantize: no native encoder for this type");
    const SourceRows from = source_rows(source_type_id, source, source_row_bytes, rows, columns);
    nb::gil_scoped_release release;
    const Refusal refusal = quantize_rows(encode, from, at<const float>(importance), at<uint8_t>(out), out_row_bytes);
    return {refusal.reason, refusal.row};
}

std::pair<int, int64_t> quantize_hqq(int bits, int source_type_id, uintptr_t source, int64_t source_row_bytes, int64_t rows,
                                     int64_t columns, uintptr_t out) {
    require(bits == 4 || bits == 8, "quantize_hqq: 4 or 8 bits");
    require(columns % kHqqGroup == 0, "quantize_hqq: rows must be whole groups");
    const SourceRows from = source_rows(source_type_id, source, source_row_bytes, rows, columns);
    nb::gil_scoped_release release;
    const Refusal refusal = hqq_rows(bits, from, at<uint8_t>(out));
    return {refusal.reason, refusal.row};
}

}  // namespace

void bind_quantize(nb::module_& m) {
    m.def("can_encode", [](int type_id) { return current_kernels().encoder(type_id) != nullptr; });
    m.def("quantize", quantize);
    m.def("quantize_hqq", quantize_hqq);
}
