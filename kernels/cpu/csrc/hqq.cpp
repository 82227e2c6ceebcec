#include "hqq.h"

#include <algorithm>
#include <cmath>
#include <mutex>
#include <vector>

#include "scratch.h"
#include "team.h"

namespace {

constexpr int kMostPasses = 20;
constexpr double kBeta = 10.0, kKappa = 1.01, kNorm = 0.7;
constexpr double kFirstError = 1e4;
constexpr int64_t kCostOfWeight = 12;

constexpr float kLimit = 0x1p126f;  // from here on the span of a group may be more than a float holds

// Why a row cannot be encoded, as Refusal has it.
int reason_against(const float* x, int64_t count) {
    if (!all_finite(x, count)) return 1;
    bool is_too_large = false;
    for (int64_t i = 0; i < count; ++i) is_too_large |= std::fabs(x[i]) >= kLimit;
    return is_too_large ? 2 : 0;
}

int64_t group_bytes(int bits) { return 8 + kHqqGroup * bits / 8; }

}  // namespace

Refusal hqq_rows(int bits, const SourceRows& source, uint8_t* out) {
    const KernelTable& kernels = current_kernels();
    const int top = (1 << bits) - 1;
    const int64_t row_groups = source.columns / kHqqGroup, per_piece = source.piece_rows();
    const int64_t pieces = (source.rows + per_piece - 1) / per_piece;
    std::vector<float> inverse(size_t(source.rows * row_groups)), zeros(inverse.size());
    std::vector<double> errors(size_t(pieces), 0.0);  // of each piece, so that the sum's order is fixed
    Refusal refusal;
    std::mutex lock;
    // Calls body(values, first group, groups, piece) for every piece.
    const auto for_pieces = [&](auto body) {
        parallel_for(pieces, per_piece * source.columns * kCostOfWeight, [&](int64_t begin, int64_t end) {
            float* buffer = scratch(0, per_piece * source.columns);
            for (int64_t p = begin; p < end; ++p) {
                const int64_t first = p * per_piece, count = std::min(per_piece, source.rows - first);
                body(source.values(first, count, buffer), first * row_groups, count * row_groups, p);
            }
        });
    };
    for_pieces([&](const float* x, int64_t group, int64_t groups, int64_t piece) {
        const int64_t first = piece * per_piece;
        for (int64_t r = 0; r < groups / std::max<int64_t>(1, row_groups); ++r)
            if (const int reason = reason_against(x + r * source.columns, source.columns)) {
                const std::lock_guard<std::mutex> guard(lock);
                if (refusal.reason == 0 || first + r < refusal.row) refusal = {reason, first + r};
                return;
            }
        kernels.hqq_start(x, top, inverse.data() + group, zeros.data() + group, groups);
    });
    if (refusal.reason || inverse.empty()) return refusal;
    double best = kFirstError, beta = kBeta;
    for (int i = 0; i < kMostPasses; ++i, beta *= kKappa) {
        // |e| > |e|^(p - 1) / beta exactly where |e| is above this; a little lower, for rounding.
        const double threshold = std::pow(beta, -1.0 / (2.0 - kNorm)) * 0.999;
        const HqqPass pass{top, float(beta), float(threshold)};
        for_pieces([&](const float* x, int64_t group, int64_t groups, int64_t piece) {
            errors[size_t(piece)] = kernels.hqq_step(pass, x, inverse.data() + group, zeros.data() + group, groups);
        });
        double error = 0.0;
        for (double e : errors) error += e;
        error /= double(source.rows) * double(source.columns);
        if (!(error < best)) break;
        best = error;
    }
    for_pieces([&](const float* x, int64_t group, int64_t groups, int64_t) {
        kernels.hqq_store(x, inverse.data() + group, zeros.data() + group, bits, groups, out + group * group_bytes(bits));
    });
    return refusal;
}
