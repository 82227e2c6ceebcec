// The encoders of the K types: rows of super-blocks through search and packing, some super-blocks at a time.
#include "encode_k.h"
#include "jobs.h"

namespace SIROCCO_ISA {
namespace {

void q2_k(const float* x, const float* importance, uint8_t* out, bool* is_too_large, int valid) {
    Found<16> found;
    search_q2_k(x, importance, found);
    for (int s = 0; s < valid; ++s) pack_q2_k(found, 16 * s, x + kSuper * s, importance, out + 84 * s, *is_too_large);
}

void q3_k(const float* x, const float* importance, uint8_t* out, bool* is_too_large, int valid) {
    Found<16> found;
    alignas(64) uint8_t codes[Found<16>::count * 16];
    search_q3_k(x, importance, found, codes);
    for (int s = 0; s < valid; ++s)
        pack_q3_k(found, 16 * s, x + kSuper * s, importance ? nullptr : codes + kSuper * s, out + 110 * s, *is_too_large);
}

template <int bits>
void q45_k(const float* x, const float* importance, uint8_t* out, bool* is_too_large, int valid) {
    Found<32> found;
    search_q45_k<bits>(x, importance, found);
    for (int s = 0; s < valid; ++s)
        pack_q45_k<bits>(found, 8 * s, x + kSuper * s, importance, out + s * (bits == 4 ? 144 : 176), *is_too_large);
}

void q6_k(const float* x, const float* importance, uint8_t* out, bool* is_too_large, int valid) {
    Found<16> found;
    search_q6_k(x, importance, found);
    for (int s = 0; s < valid; ++s) pack_q6_k(found, 16 * s, x + kSuper * s, out + 210 * s, *is_too_large);
}

// Q8_K: d (float32), qs 256, sums of sixteen codes as int16.
void q8_k(const float* x, const float*, uint8_t* out, bool*, int) {
    std::memset(out, 0, 292);
    float magnitude = 0.0f, value = 0.0f;
    for (int i = 0; i < kSuper; ++i)
        if (absolute(x[i]) > magnitude) magnitude = absolute(x[i]), value = x[i];
    if (magnitude == 0.0f) return;
    const float inverse = -127.0f / value, d = 1.0f / inverse;
    std::memcpy(out, &d, 4);
    for (int sub = 0; sub < 16; ++sub) {
        int16_t sum = 0;
        for (int i = 0; i < 16; ++i) {
            const int q = nearest_int(inverse * x[16 * sub + i]);
            const int8_t code = int8_t(q < 127 ? q : 127);
            out[4 + 16 * sub + i] = uint8_t(code);
            sum = int16_t(sum + code);
        }
        std::memcpy(out + 260 + 2 * sub, &sum, 2);
    }
}

// All super-blocks of some rows, `supers` at a time. The last ones are filled up with copies of the last.
template <int supers, void (*Encode)(const float*, const float*, uint8_t*, bool*, int)>
void all(const EncodeJob& job, int block_bytes, bool* is_too_large) {
    const int64_t per_row = job.columns / kSuper, count = job.rows * per_row;
    for (int64_t b = 0; b < count; b += supers) {
        const int valid = count - b < supers ? int(count - b) : supers;
        const float *x = job.x + b * kSuper, *importance = nullptr;
        uint8_t* out = job.out + b * block_bytes;
        alignas(64) float copied[supers * kSuper], weights[supers * kSuper];
        if (valid < supers) {
            for (int s = 0; s < supers; ++s) std::memcpy(copied + s * kSuper, x + (s < valid ? s : valid - 1) * kSuper, kSuper * 4);
            x = copied;
        }
        if (job.importance) {
            for (int s = 0; s < supers; ++s) {
                const int64_t block = b + (s < valid ? s : valid - 1);
                std::memcpy(weights + s * kSuper, job.importance + block % per_row * kSuper, kSuper * 4);
            }
            importance = weights;
        }
        Encode(x, importance, out, is_too_large, valid);
    }
}

}  // namespace

extern Encode encoder_k(int type_id);
Encode encoder_k(int type_id) {
    constexpr int wide = Shape<32>::supers, narrow = Shape<16>::supers;
    switch (type_id) {
        case 10: return [](const EncodeJob& j, bool* f) { all<narrow, q2_k>(j, 84, f); };
        case 11: return [](const EncodeJob& j, bool* f) { all<narrow, q3_k>(j, 110, f); };
        case 12: return [](const EncodeJob& j, bool* f) { all<wide, q45_k<4>>(j, 144, f); };
        case 13: return [](const EncodeJob& j, bool* f) { all<wide, q45_k<5>>(j, 176, f); };
        case 14: return [](const EncodeJob& j, bool* f) { all<narrow, q6_k>(j, 210, f); };
        case 15: return [](const EncodeJob& j, bool* f) { all<1, q8_k>(j, 292, f); };
        default: return nullptr;
    }
}

}  // namespace SIROCCO_ISA
