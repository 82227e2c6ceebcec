// float32 rows into the forms that matrix products read (act.h). The same operations in every build: all give equal bits.
#include "act.h"
#include "half.h"
#include "jobs.h"

namespace SIROCCO_ISA {
namespace {

// Sixteen columns in every build; narrower instruction sets hold them in several registers.
typedef uint32_t Words __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(64)));

inline Floats load_floats(const float* p) {
    Floats v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// 16 values from a row that ends `left` values on: zeros beyond.
inline Floats load_some(const float* p, int64_t left) {
    if (left >= 16) return load_floats(p);
    Floats v{};
    for (int64_t i = 0; i < left; ++i) v[i] = p[i];
    return v;
}

inline Floats magnitude(Floats v) {
    Words bits;
    std::memcpy(&bits, &v, sizeof bits);
    bits &= 0x7fffffffu;
    std::memcpy(&v, &bits, sizeof v);
    return v;
}

// The largest magnitude, or NaN where a value is NaN or infinite: the row's products are NaN then.
inline float largest(Floats magnitudes) {
    float most = 0.0f;
    for (int i = 0; i < 16; ++i) {
        const float v = magnitudes[i];
        if (!(v < __builtin_inff())) return __builtin_nanf("");
        most = v > most ? v : most;
    }
    return most;
}

inline Floats larger(Floats a, Floats b) { return (a > b) | (a != a) ? a : b; }

// v rounded to whole numbers, ties to even: adding 1.5 * 2^23 leaves no bits for a fraction.
inline Ints rounded(Floats v) {
    const Floats magic = Floats{} + 0x1.8p23f;
    return __builtin_convertvector((v + magic) - magic, Ints);
}

typedef int8_t Bytes __attribute__((vector_size(16)));

inline int32_t sum(Ints v) {
    int32_t total = 0;
    for (int i = 0; i < 16; ++i) total += v[i];
    return total;
}

// Where sum i lies: 0, 2, 1, 3 of each four.
constexpr int paired(int i) { return (i & ~3) + (i & 1) * 2 + (i & 2) / 2; }

// One block with a common scale, 32 or 256 columns, of which `left` exist.
template <int Block>
void quantise_block(const ActLayout& layout, const float* x, int64_t left, uint8_t* row, int64_t column) {
    constexpr int kParts = Block / 16;
    Floats values[kParts], most{};
    for (int i = 0; i < kParts; ++i) {
        values[i] = load_some(x + 16 * i, left - 16 * i);
        most = larger(magnitude(values[i]), most);
    }
    const float top = largest(most), scale = top / 127.0f;
    const float inverse = top > 1e-36f ? 127.0f / top : 0.0f;  // below, the quotient would overflow: zeros
    const bool is_broken = top != top;
    int32_t sums[kParts];
    for (int i = 0; i < kParts; ++i) {
        const Ints q = is_broken ? Ints{} : rounded(values[i] * (Floats{} + inverse));
        sums[i] = sum(q);
        const Bytes bytes = __builtin_convertvector(q, Bytes);
        std::memcpy(row + column + 16 * i, &bytes, 16);
    }
    reinterpret_cast<float*>(row + layout.scale)[column / Block] = scale;
    if constexpr (Block == 32) {
        reinterpret_cast<float*>(row + layout.sum32)[column / 32] = float(sums[0] + sums[1]);
        reinterpret_cast<int32_t*>(row + layout.minus)[column / 32] = -(sums[0] + sums[1]);
    } else {
        auto* sum16 = reinterpret_cast<int16_t*>(row + layout.sum16) + column / 16;
        auto* sum32 = reinterpret_cast<int16_t*>(row + layout.sum32) + column / 32;
        for (int i = 0; i < kParts; ++i) sum16[paired(i)] = int16_t(sums[i]);
        for (int i = 0; i < kParts / 2; ++i) sum32[paired(i)] = int16_t(sums[2 * i] + sums[2 * i + 1]);
    }
}

}  // namespace

void to_act(const ActLayout& layout, const float* x, uint8_t* row, int64_t column_begin, int64_t column_end) {
    const int64_t end = column_end >= layout.columns ? layout.padded : column_end;  // the padding belongs to the last range
    const auto left = [&](int64_t column) { return layout.columns - column; };
    switch (layout.kind) {
        case Act::f32:
            for (int64_t c = column_begin; c < end; c += 16) {
                const Floats v = load_some(x + c, left(c));
                std::memcpy(row + c * 4, &v, sizeof v);
            }
            break;
        case Act::bf16:
            for (int64_t c = column_begin; c < end; c += 16) {
                const Floats v = load_some(x + c, left(c));
                uint16_t halves[16];
                for (int i = 0; i < 16; ++i) halves[i] = f32_to_bf16(v[i]);
                std::memcpy(row + c * 2, halves, sizeof halves);
            }
            break;
        case Act::q8_32:
            for (int64_t c = column_begin; c < end; c += 32) quantise_block<32>(layout, x + c, left(c), row, c);
            break;
        case Act::q8_256:
            for (int64_t c = column_begin; c < end; c += 256) quantise_block<256>(layout, x + c, left(c), row, c);
            break;
    }
}

}  // namespace SIROCCO_ISA
