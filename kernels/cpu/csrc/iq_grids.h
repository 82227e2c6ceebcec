// The grids of the IQ block types: points that the weights of a group are taken from. They are part of the file format and
// live in kernels/reference/iq_grids.py, from where the module takes them over when it is loaded (bindings.cpp).
#pragma once
#include <cstddef>
#include <cstdint>

struct IqGrids {
    int8_t iq2_xxs[256][8], iq2_xs[512][8], iq2_s[1024][8], iq3_xxs[256][4], iq3_s[512][4], iq1[2048][8];
};

// Zeros until the module is loaded, constant after.
extern IqGrids iq_grids;

// One grid by its name in iq_grids.py.
struct IqGridPlace {
    const char* name;
    int8_t* points;
    size_t bytes;
};
extern const IqGridPlace iq_grid_places[6];
