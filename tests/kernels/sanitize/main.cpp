#include <cstring>

#include "driver.h"
#include "iq_grids.h"
#include "kernel_choice.h"

int main() {
    // The module takes these from Python; any points do here.
    for (const IqGridPlace& grid : iq_grid_places)
        for (size_t i = 0; i < grid.bytes; ++i) grid.points[i] = int8_t(random_bits() % 64);
    run_teams();
    for (const KernelTable* kernels : usable_kernels()) {
        run_products(*kernels);
        run_layers(*kernels);
        run_attention(*kernels);
        run_sampling(*kernels);
        require(use_kernels(kernels->name), "a usable build cannot be used");
        run_program();
        std::printf("%s ran clean\n", kernels->name);
        std::fflush(stdout);
    }
    return 0;
}
