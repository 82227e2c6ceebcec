// Philox4x32-10, a counter-based random generator. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
// SC 2011, section 3.3 and table 2.
#pragma once
#include <cstdint>

struct Philox {
    uint32_t x[4];
};

inline Philox philox4x32_10(Philox counter, uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = uint64_t(0xD2511F53u) * counter.x[0], b = uint64_t(0xCD9E8D57u) * counter.x[2];
        counter = {{uint32_t(b >> 32) ^ counter.x[1] ^ key0, uint32_t(b), uint32_t(a >> 32) ^ counter.x[3] ^ key1, uint32_t(a)}};
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return counter;
}
