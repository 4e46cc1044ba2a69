// How numbers are stored: uint8, fp32, bf16 and fp16, to fp32 and back. Everything is computed in fp32 and rounded
// once, to nearest even. Plain bit operations, so that a loop over them vectorises on any instruction set.
#pragma once

#include "portable.h"

namespace ddpm {

enum class DType : int32_t { u8 = 0, f32 = 1, bf16 = 2, f16 = 3 };

// An 8-bit pixel 0..255 as the network sees it, in [-1, 1]: float(pixel) / 127.5f - 1.0f, to the bit.
DDPM_FN float from_u8(uint8_t pixel) {
#if defined(__CUDA_ARCH__)
    // The product with the reciprocal, and one correction, which rounds all 256 quotients correctly. It takes four
    // instructions; a division takes eight and a branch.
    constexpr float kReciprocal = 0.00784313772f;
    const float quotient = __fmul_rn(float(pixel), kReciprocal);
    return __fadd_rn(__fmaf_rn(__fmaf_rn(-quotient, 127.5f, float(pixel)), kReciprocal, quotient), -1.0f);
#else
    // Times 2/255 in two parts, the first short enough for its product to be exact: the same, without an fma.
    const float value = float(pixel);
    return add(add(mul(value, 0.00784325600f), mul(value, -1.18741806e-07f)), -1.0f);
#endif
}

DDPM_FN float from_bf16(uint16_t bits) { return as_float(uint32_t(bits) << 16); }

DDPM_FN uint16_t to_bf16(float value) {
    const uint32_t bits = as_bits(value);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return uint16_t((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

DDPM_FN float from_f16(uint16_t bits) {
#if defined(__CUDA_ARCH__)
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
#else
    const uint32_t magnitude = uint32_t(bits & 0x7FFFu) << 13;
    // The exponent's bias differs by 112; multiplying by 2^112 mends it for normal and subnormal numbers alike.
    const uint32_t finite = as_bits(as_float(magnitude) * 5.19229686e+33f);
    const uint32_t value = magnitude >= 0x0F800000u ? (magnitude | 0x7F800000u) : finite;
    return as_float(value | uint32_t(bits & 0x8000u) << 16);
#endif
}

DDPM_FN uint16_t to_f16(float value) {
    const uint32_t bits = as_bits(value);
    const uint32_t magnitude = bits & 0x7FFFFFFFu;
    const uint32_t sign = (bits >> 16) & 0x8000u;
    // Below 2^-14 the result is subnormal: adding 0.5 puts its last place at the fp32's, which rounds it.
    const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - 0x3F000000u;
    const uint32_t normal = (magnitude - 0x38000000u + 0x0FFFu + ((magnitude >> 13) & 1u)) >> 13;
    uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
    half = magnitude >= 0x477FF000u ? 0x7C00u : half;  // 65520 and above round to infinity
    half = magnitude > 0x7F800000u ? 0x7E00u : half;   // NaN
    return uint16_t(half | sign);
}

// Two numbers as one word, the first in its lower half: a GPU has an instruction for it.
DDPM_FN uint32_t to_bf16_pair(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
#else
    return uint32_t(to_bf16(low)) | uint32_t(to_bf16(high)) << 16;
#endif
}

DDPM_FN uint32_t to_f16_pair(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
#else
    return uint32_t(to_f16(low)) | uint32_t(to_f16(high)) << 16;
#endif
}

}  // namespace ddpm
