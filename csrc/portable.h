// What every kernel file includes: the types, the function qualifiers, and the fp32 arithmetic that gives the same bits
// on every machine. It is IEEE multiplication, addition and a correctly rounded square root, rounded separately and
// never fused.
//
// A fused multiply-add rounds once where these round twice, so it would change results between machines that
// have it and machines that do not (with contraction left on, 1% of normals differ). On the host the switch is
// -ffp-contract=off; on a GPU the intrinsics below cannot be contracted whatever the switches say. (Where fma appears
// below, it is a step towards a correctly rounded result.)
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define DDPM_FN static __host__ __device__ __forceinline__
#define DDPM_METHOD __host__ __device__ __forceinline__
#else
// `static` matters on the host: these headers are compiled once per instruction set, and an ordinary inline
// function would leave the linker free to keep the AVX-512 copy for a CPU that has only SSE2. For the same
// reason the kernels use nothing from the C++ standard library.
#define DDPM_FN static inline __attribute__((always_inline))
#define DDPM_METHOD inline __attribute__((always_inline))
#endif

namespace ddpm {

DDPM_FN float mul(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}

DDPM_FN float add(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fadd_rn(a, b);
#else
    return a + b;
#endif
}

// Correctly rounded, for a = 0 and for a from 2^-101 to the largest number: all that a radius of Box-Muller asks for.
DDPM_FN float square_root(float a) {
#if defined(__CUDA_ARCH__)
    // What __fsqrt_rn does within that range, without the branch to a slow path for other arguments: six instructions
    // instead of ten, and the compiler can interleave two roots.
    const float held = fmaxf(a, 7.88860905e-31f);  // of 0: 0 times a finite number
    float reciprocal;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(held));
    const float root = __fmul_rn(a, reciprocal);
    return __fmaf_rn(__fmaf_rn(-root, root, a), __fmul_rn(reciprocal, 0.5f), root);
#else
    return __builtin_sqrtf(a);
#endif
}

DDPM_FN float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

DDPM_FN uint32_t as_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

}  // namespace ddpm
