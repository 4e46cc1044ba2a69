// How numbers are stored: uint8, fp32, bf16 and fp16, to fp32 and back. Everything is computed in fp32 and rounded
// once, to nearest even. Plain bit operations, so that a loop over them vectorises on any instruction set.
#pragma once

#include "portable.h"

namespace ddpm {

enum class DType : int32_t { u8 = 0, f32 = 1, bf16 = 2, f16 = 3 };

// An 8-bit pixel 0..255 as the network sees it, in [-1, 1].
DDPM_FN float from_u8(uint8_t pixel) {
#if defined(__CUDA_ARCH__)
    return __fadd_rn(__fdiv_rn(float(pixel), 127.5f), -1.0f);
#else
    return float(pixel) / 127.5f - 1.0f;
#endif
}

DDPM_FN float from_bf16(uint16_t bits) { return as_float(uint32_t(bits) << 16); }

DDPM_FN uint16_t to_bf16(float value) {
    const uint32_t bits = as_bits(value);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return uint16_t((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

DDPM_FN float from_f16(uint16_t bits) {
    const uint32_t magnitude = uint32_t(bits & 0x7FFFu) << 13;
    // The exponent's bias differs by 112; multiplying by 2^112 mends it for normal and subnormal numbers alike.
    const uint32_t finite = as_bits(as_float(magnitude) * 5.19229686e+33f);
    const uint32_t value = magnitude >= 0x0F800000u ? (magnitude | 0x7F800000u) : finite;
    return as_float(value | uint32_t(bits & 0x8000u) << 16);
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

}  // namespace ddpm
