// bfloat16 products by the instruction made for them; its own file, as not every CPU with AVX-512 has it.
#include "matmul_kernel.h"

namespace SIROCCO_ISA {
namespace {

template <int M>
struct DotPairs {
    static void run(const MatmulJob& job, int64_t tile, int64_t token) {
        multiply_tile<M>(job, tile, token, [&](const uint8_t* words, const uint8_t* const* x, Floats* acc) {
            for (int64_t b = 0; b < job.weight.blocks; ++b, words += 64) {
                if constexpr (kAsks<M>) ask_ahead(words, 1, 0, 1);
                const auto w = __m512bh(_mm512_loadu_si512(words));
                SIROCCO_UNROLL
                for (int m = 0; m < M; ++m) {
                    int32_t pair;
                    std::memcpy(&pair, x[m] + b * 4, 4);
                    acc[m] = Floats(_mm512_dpbf16_ps(__m512(acc[m]), w, __m512bh(_mm512_set1_epi32(pair))));
                }
            }
        });
    }
};

}  // namespace

MatmulKernel bf16_dot_kernel();
MatmulKernel bf16_dot_kernel() {
    static const bool has = __builtin_cpu_supports("avx512bf16");
    return has ? multiply_all<DotPairs> : nullptr;
}

}  // namespace SIROCCO_ISA
