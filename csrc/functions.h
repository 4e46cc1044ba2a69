// exp, log and tanh from portable.h's arithmetic: no libm, so that they vectorise, cost no double precision on a GPU
// and give the same bits everywhere. Largest relative errors against float64: exp 1.2e-7, log 1.2e-7 (absolute where
// the logarithm is below 1), tanh 1.4e-7.
#pragma once

#include "portable.h"

namespace ddpm {

DDPM_FN float divide(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fdiv_rn(a, b);
#else
    return a / b;
#endif
}

DDPM_FN float magnitude(float x) { return as_float(as_bits(x) & 0x7FFFFFFFu); }
DDPM_FN float lesser(float a, float b) { return a < b ? a : b; }   // of a NaN and a number: the number, if it is b
DDPM_FN float greater(float a, float b) { return a > b ? a : b; }

// e^x, held within e^-87 .. e^88 rather than reaching zero or infinity: a gradient made of it stays finite.
DDPM_FN float exponential(float x) {
    const float below = x > 88.0f ? 88.0f : x;
    const float held = below < -87.0f ? -87.0f : below;
    // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
    const float shifted = add(mul(held, 1.44269502f), 12582912.0f);
    const float n = add(shifted, -12582912.0f);
    // ln 2 in two parts, the first short enough for n times it to be exact.
    const float r = add(add(held, -mul(n, 0.693359375f)), mul(n, 0.000212194442f));
    float q = 0.00139505998f;  // (e^r - 1 - r) / r^2 for |r| <= ln 2 / 2
    q = add(mul(q, r), 0.00836895406f);
    q = add(mul(q, r), 0.041666206f);
    q = add(mul(q, r), 0.166665182f);
    q = add(mul(q, r), 0.5f);
    const float power = add(add(mul(mul(r, r), q), r), 1.0f);
    return mul(power, as_float((as_bits(shifted) - 0x4B400000u + 127u) << 23));
}

// ln x for a normal x > 0.
DDPM_FN float logarithm(float x) {
    // x = m * 2^n with m in [sqrt(1/2), sqrt(2)).
    const uint32_t bits = as_bits(x) + (0x3F800000u - 0x3F3504F3u);
    const float n = float(int32_t(bits >> 23) - 127);
    const float f = add(as_float((bits & 0x007FFFFFu) + 0x3F3504F3u), -1.0f);
    float q = 0.0897943452f;  // (ln(1 + f) - f) / f^2
    q = add(mul(q, f), -0.144268423f);
    q = add(mul(q, f), 0.148837f);
    q = add(mul(q, f), -0.165517941f);
    q = add(mul(q, f), 0.199634761f);
    q = add(mul(q, f), -0.250025839f);
    q = add(mul(q, f), 0.333339334f);
    q = add(mul(q, f), -0.499999821f);
    return add(mul(n, 0.693147182f), add(mul(mul(f, f), q), f));
}

DDPM_FN float hyperbolic_tangent(float x) {
    const float u = mul(x, x);
    float s = -0.00818267651f;  // (tanh x - x) / x^3 in x^2, for |x| <= 5/8
    s = add(mul(s, u), 0.0217029676f);
    s = add(mul(s, u), -0.0539472029f);
    s = add(mul(s, u), 0.133332103f);
    s = add(mul(s, u), -0.333333313f);
    const float small = add(x, mul(mul(x, u), s));
    const float e = exponential(mul(magnitude(x), -2.0f));
    const float large = add(1.0f, -divide(mul(2.0f, e), add(1.0f, e)));
    return magnitude(x) < 0.625f ? small : as_float(as_bits(large) | (as_bits(x) & 0x80000000u));
}

}  // namespace ddpm
