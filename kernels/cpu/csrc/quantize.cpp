#include "quantize.h"

#include <algorithm>
#include <cstring>
#include <mutex>

#include "scratch.h"
#include "team.h"

namespace {

constexpr int64_t kPieceValues = 1 << 15;
// Operations for each weight, roughly: a search costs more than a thousand, but threads are worth waking long before.
constexpr int64_t kCostOfWeight = 200;

}  // namespace

int64_t SourceRows::piece_rows() const { return std::max<int64_t>(1, kPieceValues / std::max<int64_t>(1, columns)); }

const float* SourceRows::values(int64_t first, int64_t count, float* buffer) const {
    const uint8_t* from = data + first * row_bytes;
    const bool is_aligned = reinterpret_cast<uintptr_t>(from) % alignof(float) == 0;
    if (!decode && is_aligned && row_bytes == columns * 4) return reinterpret_cast<const float*>(from);
    for (int64_t r = 0; r < count; ++r, from += row_bytes) {
        if (decode) decode(from, buffer + r * columns, columns);
        else std::memcpy(buffer + r * columns, from, size_t(columns) * 4);
    }
    return buffer;
}

bool all_finite(const float* x, int64_t count) {
    // Infinities and NaN are all that have every exponent bit set: adding one at the lowest of them carries into the sign.
    uint32_t carried = 0;
    for (int64_t i = 0; i < count; ++i) {
        uint32_t bits;
        std::memcpy(&bits, x + i, sizeof bits);
        carried |= (bits & 0x7fffffffu) + 0x00800000u;
    }
    return (carried & 0x80000000u) == 0;
}

Refusal quantize_rows(Encode encode, const SourceRows& source, const float* importance, uint8_t* out, int64_t out_row_bytes) {
    Refusal refusal;
    std::mutex lock;
    const auto refuse = [&](int reason, int64_t row) {
        const std::lock_guard<std::mutex> guard(lock);
        if (refusal.reason == 0 || row < refusal.row) refusal = {reason, row};
    };
    const int64_t per_piece = source.piece_rows(), pieces = (source.rows + per_piece - 1) / per_piece;
    parallel_for(pieces, per_piece * source.columns * kCostOfWeight, [&](int64_t begin, int64_t end) {
        float* buffer = scratch(0, per_piece * source.columns);
        for (int64_t p = begin; p < end; ++p) {
            const int64_t first = p * per_piece, count = std::min(per_piece, source.rows - first);
            const float* x = source.values(first, count, buffer);
            if (!all_finite(x, count * source.columns)) {
                for (int64_t r = 0; r < count; ++r)
                    if (!all_finite(x + r * source.columns, source.columns)) {
                        refuse(1, first + r);
                        break;
                    }
                continue;
            }
            bool is_too_large = false;
            encode({x, importance, count, source.columns, out + first * out_row_bytes}, &is_too_large);
            for (int64_t r = 0; is_too_large && r < count; ++r) {  // again, row by row: which one was it?
                bool is_this = false;
                encode({x + r * source.columns, importance, 1, source.columns, out + (first + r) * out_row_bytes}, &is_this);
                if (is_this) {
                    refuse(2, first + r);
                    break;
                }
            }
        }
    });
    return refusal;
}
