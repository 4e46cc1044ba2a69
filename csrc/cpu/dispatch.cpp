// Which instruction sets the kernels were built for, which of them this machine can run, and which one is in use.
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#if defined(__linux__)
#include <unistd.h>
#endif

#include "kernels.h"

namespace ddpm {

#define DDPM_POINTER(name, Arguments) name,
#define DDPM_KERNELS(isa)                                               \
    namespace isa {                                                     \
    static const Kernels kKernels = {#isa, DDPM_CPU_OPS(DDPM_POINTER)}; \
    }
DDPM_KERNELS(generic)
#if defined(DDPM_AVX2)
DDPM_KERNELS(avx2)
#endif
#if defined(DDPM_AVX512)
DDPM_KERNELS(avx512)
#endif

namespace {

// Slowest first. `generic` is what the compiler does without being told more: SSE2 on x86-64, NEON on AArch64.
const Kernels* const kBuilt[] = {
    &generic::kKernels,
#if defined(DDPM_AVX2)
    &avx2::kKernels,
#endif
#if defined(DDPM_AVX512)
    &avx512::kKernels,
#endif
};
constexpr int kCount = sizeof kBuilt / sizeof kBuilt[0];

bool runnable(const char* isa) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!std::strcmp(isa, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (!std::strcmp(isa, "avx512"))
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    return !std::strcmp(isa, "generic");
}

const Kernels* fastest() {
    const Kernels* best = kBuilt[0];
    for (const Kernels* kernels : kBuilt)
        if (runnable(kernels->isa)) best = kernels;
    return best;
}

const Kernels* active = fastest();

}  // namespace

const char* const* runnable_isas() {
    static const char* names[kCount + 1] = {};
    if (!names[0]) {
        int count = 0;
        for (const Kernels* kernels : kBuilt)
            if (runnable(kernels->isa)) names[count++] = kernels->isa;
    }
    return names;
}

const Kernels& active_kernels() { return *active; }

bool has_matrix_units() {
#if defined(__x86_64__)
    unsigned eax, ebx, ecx, edx;  // AMX-BF16, which not every compiler's __builtin_cpu_supports knows
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx >> 22 & 1);
#else
    return true;  // AArch64's bf16 products have not been measured: they are left to the library
#endif
}

int64_t cache_bytes() {
    static const int64_t bytes = [] {
        int64_t found = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
        found = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
        return found > 0 ? found : int64_t(512) << 10;  // unknown where a container hides it: what most cores have
    }();
    return bytes;
}

bool use_isa(const char* name) {
    for (const Kernels* kernels : kBuilt)
        if (!std::strcmp(kernels->isa, name) && runnable(name)) {
            active = kernels;
            return true;
        }
    return false;
}

}  // namespace ddpm
