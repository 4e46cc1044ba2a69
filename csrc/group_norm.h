// What a group norm does to one element, on the CPU and on the GPU: the map, SiLU, and their gradients. With v the
// value that is normalised and d = v - centre,
//
//     u = d * gain + offset,   y = silu(u) or u
//     g = dL/dy * silu'(u),    dL/dv = g * gain - (d * slope + level)
//
// where gain, offset, slope and level are a channel's.
//
// SiLU, u / (1 + e^-u), and its derivative are both made of e = e^-|u|, which cannot overflow. Largest errors against
// float64: SiLU 6.3e-7 of the value from u = -8 on, 4e-6 of the small ones below it; the derivative 2.3e-7. e is held
// where |u| is 87: SiLU is 0 or u there. Of -infinity it is NaN, as torch's is, and the derivative is NaN of both
// infinities. A GPU takes e^-u and 1 / (1 + e^-u) from its special function unit: with about 20 instructions an element
// in all, a norm in bf16 is limited by its bytes (31 instructions take as long), and with these 60 it would not be.
#pragma once

#include "functions.h"
#include "ops.h"

namespace ddpm {

// a * b + c. What it computes is not promised to be the same bits everywhere, and a GPU has one instruction for it.
DDPM_FN float fused(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
    return __fmaf_rn(a, b, c);
#elif defined(__FMA__) || defined(__AVX512F__)
    return __builtin_fmaf(a, b, c);
#else
    return add(mul(a, b), c);
#endif
}

DDPM_FN float value_of(const Rows& rows, int64_t sample, int64_t channel) {
    if (!rows.data) return 0.0f;
    const int64_t index = sample * rows.sample_stride + channel * rows.channel_stride;
    switch (rows.dtype) {
        case DType::bf16: return from_bf16(static_cast<const uint16_t*>(rows.data)[index]);
        case DType::f16: return from_f16(static_cast<const uint16_t*>(rows.data)[index]);
        default: return static_cast<const float*>(rows.data)[index];
    }
}

// A group's mean, centre + rest, and 1/sqrt(variance + eps). centre is the nearest fp32 number: by itself it would be
// off by up to 2^-24 of the mean, which is much of a standard deviation where that is small compared with the mean.
struct NormStatistics {
    float centre, rest, rstd;
};

// From the sums over `1 / inverse_count` values of v - about and of its square, where `about` is close to the mean.
DDPM_FN NormStatistics norm_statistics(float about, float sum, float sum_of_squares, float inverse_count, float eps) {
    NormStatistics made;
    const float shift = mul(sum, inverse_count);
    const float variance = add(mul(sum_of_squares, inverse_count), -mul(shift, shift));
    two_sum(about, shift, made.centre, made.rest);
    made.rstd = inverse_root(add(variance < 0.0f ? 0.0f : variance, eps));
    return made;
}

// The same of v - added, for one channel.
DDPM_FN NormStatistics without_added(const NormStatistics& group, float added) {
    NormStatistics made = group;
    float lost;
    two_sum(group.centre, -added, made.centre, lost);
    made.rest = add(group.rest, lost);
    return made;
}

// Scale and shift (0 where there are none) go into weight and bias.
DDPM_FN void norm_spread(float& weight, float& bias, float scale, float shift) {
    const float spread = add(1.0f, scale);
    weight = mul(weight, spread);
    bias = fused(bias, spread, shift);
}

// A channel's gain and offset, from its group's statistics and what norm_spread made.
struct NormChannel {
    float gain, offset;
};
DDPM_FN NormChannel norm_channel(const NormStatistics& group, float factor, float offset) {
    const float gain = mul(group.rstd, factor);
    return NormChannel{gain, add(offset, -mul(group.rest, gain))};
}

DDPM_FN float norm_gradient(float g, float d, float gain, float slope, float level) {
    return fused(gain, g, -fused(slope, d, level));
}

#if defined(__CUDA_ARCH__)

// 1 / (1 + e^-u). e^-u reaches infinity, and its reciprocal 0, where u is -88.
DDPM_FN float sigmoid(float u) {
    float e, s;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(mul(u, -1.44269502f)));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(add(1.0f, e)));
    return s;
}

DDPM_FN float silu(float u) { return mul(u, sigmoid(u)); }

DDPM_FN float silu_derivative(float u) {
    const float s = sigmoid(u);
    return fused(mul(u, s), add(1.0f, -s), s);
}

#else

// 2^t for t from -126 on: 14 operations where exponential() takes 22 for twice the digits at large t. 2^128 is
// infinity.
DDPM_FN float power_of_two(float t) {
    // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
    const float shifted = add(t, 12582912.0f);
    const float f = add(t, -add(shifted, -12582912.0f));
    float p = 0.00132647273f;  // 2^f for |f| <= 1/2
    p = fused(p, f, 0.00967151299f);
    p = fused(p, f, 0.0555073358f);
    p = fused(p, f, 0.240222424f);
    p = fused(p, f, 0.693147004f);
    p = fused(p, f, 1.0f);
    return as_float(as_bits(p) + (as_bits(shifted) << 23));
}

DDPM_FN float silu(float u) {
    const float t = lesser(greater(mul(u, -1.44269502f), -126.0f), 128.0f);
    return divide(u, add(1.0f, power_of_two(t)));
}

// s (1 + u (1 - s)), where 1 - s = e s. The last product is 0, or NaN of infinities.
DDPM_FN float silu_derivative(float u) {
    const float held = lesser(greater(u, -87.0f), 87.0f);
    const float e = power_of_two(mul(held, -1.44269502f));
    const float s = divide(1.0f, add(1.0f, e));
    return fused(s, fused(held, mul(e, s), 1.0f), mul(0.0f, u));
}

#endif

}  // namespace ddpm
