#include "iq_grids.h"

IqGrids iq_grids{};

const IqGridPlace iq_grid_places[6] = {
    {"IQ2_XXS", iq_grids.iq2_xxs[0], sizeof iq_grids.iq2_xxs}, {"IQ2_XS", iq_grids.iq2_xs[0], sizeof iq_grids.iq2_xs},
    {"IQ2_S", iq_grids.iq2_s[0], sizeof iq_grids.iq2_s},       {"IQ3_XXS", iq_grids.iq3_xxs[0], sizeof iq_grids.iq3_xxs},
    {"IQ3_S", iq_grids.iq3_s[0], sizeof iq_grids.iq3_s},       {"IQ1", iq_grids.iq1[0], sizeof iq_grids.iq1},
};
