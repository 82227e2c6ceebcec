// The Python face of the native kernels.
#include <nanobind/nanobind.h>

namespace nb = nanobind;

NB_MODULE(_native, m) {
    m.attr("ABI") = 1;
}
