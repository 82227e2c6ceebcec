#include "kernel_choice.h"

namespace generic {
extern const KernelTable table;
}
#if defined(SIROCCO_X86)
namespace avx2 {
extern const KernelTable table;
}
namespace avx512 {
extern const KernelTable table;
}
#endif

std::vector<const KernelTable*> usable_kernels() {
    std::vector<const KernelTable*> tables;
#if defined(SIROCCO_X86)
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                          __builtin_cpu_supports("bmi2");
    if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni"))
        tables.push_back(&avx512::table);
    if (has_avx2) tables.push_back(&avx2::table);
#endif
    tables.push_back(&generic::table);
    return tables;
}

namespace {

const KernelTable* kernels = usable_kernels().front();

}  // namespace

bool use_kernels(const std::string& name) {
    for (const KernelTable* table : usable_kernels())
        if (name == table->name) {
            kernels = table;
            return true;
        }
    return false;
}

const KernelTable& current_kernels() { return *kernels; }
