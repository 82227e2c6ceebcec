#include "matmul.h"

#include <algorithm>

namespace {

// Activations of one token part should stay in a core's second-level cache while weights stream by.
constexpr int64_t kPartBytes = 512 << 10;
// Weights of a unit: small enough to share the work evenly, large enough to be read in long runs.
constexpr int64_t kUnitBytes = 32 << 10;
constexpr int64_t kGroup = 8;  // tokens that the kernels take at a time

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

}  // namespace

MatmulUnits matmul_units(const MatmulJob& job, int64_t num_tokens, int num_threads) {
    const int64_t tiles = job.weight.tiles();
    const int64_t fitting = std::max<int64_t>(kPartBytes / job.x.layout.row_bytes / kGroup * kGroup, kGroup);
    const int64_t parts = std::max<int64_t>((num_tokens + fitting - 1) / fitting, 1);
    const int64_t tokens = round_up((num_tokens + parts - 1) / parts, kGroup);
    int64_t per_unit = std::max<int64_t>(kUnitBytes / std::max<int64_t>(job.weight.tile_bytes, 1), 1);
    // Several units for each thread, so that one that lost its core can be helped out.
    per_unit = std::min(per_unit, std::max<int64_t>(tiles / (4 * num_threads), 1));
    const int64_t groups = (tiles + per_unit - 1) / per_unit;
    return {per_unit, tokens, groups, num_tokens ? groups * ((num_tokens + tokens - 1) / tokens) : 0};
}

void run_units(MatmulKernel kernel, const MatmulJob& job, const MatmulUnits& units, int64_t num_tokens, int64_t begin, int64_t end) {
    const int64_t tiles = job.weight.tiles();
    for (int64_t u = begin; u < end;) {
        const int64_t part = u / units.tile_groups, last = std::min(end, (part + 1) * units.tile_groups);
        const int64_t first_group = u - part * units.tile_groups, end_group = last - part * units.tile_groups;
        kernel(job, first_group * units.tiles, std::min(end_group * units.tiles, tiles), part * units.tokens,
               std::min((part + 1) * units.tokens, num_tokens));
        u = last;
    }
}

void GroupedMatmul::reserve(std::size_t groups) {
    groups_.reserve(groups);
    ends_.reserve(groups);
}

void GroupedMatmul::clear() {
    groups_.clear();
    ends_.clear();
}

void GroupedMatmul::add(const MatmulJob& job, int64_t num_tokens, int num_threads) {
    const MatmulUnits units = matmul_units(job, num_tokens, num_threads);
    if (units.count == 0) return;
    groups_.push_back({job, units, num_tokens});
    ends_.push_back(num_units() + units.count);
}

void GroupedMatmul::run(MatmulKernel kernel, int64_t begin, int64_t end) const {
    auto g = size_t(std::upper_bound(ends_.begin(), ends_.end(), begin) - ends_.begin());
    for (; begin < end; ++g) {
        const Group& group = groups_[g];
        const int64_t first = ends_[g] - group.units.count, last = std::min(end, ends_[g]);
        run_units(kernel, group.job, group.units, group.num_tokens, begin - first, last - first);
        begin = last;
    }
}
