// exp, log and tanh from portable.h's arithmetic: no libm, so that they vectorise, cost no double precision on a GPU
// and give the same bits everywhere. Largest errors against float64: exp 8.1e-8 and log 1.1e-7 of the value (log 8.4e-8
// absolute where it is below 1). The rounded ones carry a second float and give the nearest fp32 number in at least 19
// of 20 cases. They serve where published numbers depend on the rounding.
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

// 1 / sqrt(a), of two correctly rounded operations.
DDPM_FN float inverse_root(float a) {
#if defined(__CUDA_ARCH__)
    return __fdiv_rn(1.0f, __fsqrt_rn(a));
#else
    return 1.0f / __builtin_sqrtf(a);
#endif
}

DDPM_FN float magnitude(float x) { return as_float(as_bits(x) & 0x7FFFFFFFu); }
DDPM_FN float lesser(float a, float b) { return b < a ? b : a; }  // of a NaN and a number: the first
DDPM_FN float greater(float a, float b) { return b > a ? b : a; }

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

// e^x, which does reach infinity, from 88.73 on, and zero, below -87: what diverges shows. In between it has the bits
// of exponential().
DDPM_FN float open_exponential(float x) {
    const bool large = x > 88.0f;
    const float value = mul(exponential(large ? add(x, -1.0f) : x), large ? 2.71828175f : 1.0f);
    return x < -87.0f ? 0.0f : value;
}

// ln x for a normal x > 0; infinity and NaN stay what they are.
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
    const float value = add(mul(n, 0.693147182f), add(mul(mul(f, f), q), f));
    return x <= 3.40282347e+38f ? value : x;
}

// A sum and a product as two floats: the rounded result and what the rounding lost. fast_two_sum wants |a| >= |b|.
DDPM_FN void two_sum(float a, float b, float& high, float& low) {
    high = add(a, b);
    const float of_b = add(high, -a);
    low = add(add(a, -add(high, -of_b)), add(b, -of_b));
}

DDPM_FN void fast_two_sum(float a, float b, float& high, float& low) {
    high = add(a, b);
    low = add(b, -add(high, -a));
}

DDPM_FN void two_product(float a, float b, float& high, float& low) {
    high = mul(a, b);
    // Halves of 12 bits, whose products are exact.
    const float a1 = as_float(as_bits(a) & 0xFFFFF000u), a2 = add(a, -a1);
    const float b1 = as_float(as_bits(b) & 0xFFFFF000u), b2 = add(b, -b1);
    low = add(add(add(add(mul(a1, b1), -high), mul(a1, b2)), mul(a2, b1)), mul(a2, b2));
}

// e^x as two floats, to 1e-9 of itself, for x held within -60 .. 60.
DDPM_FN void precise_exponential(float x, float& high, float& low) {
    const float held = greater(lesser(x, 60.0f), -60.0f);
    const float shifted = add(mul(held, 1.44269502f), 12582912.0f);
    const float n = add(shifted, -12582912.0f);
    float r, r_low, square, square_low, a, a_low, b, b_low, c_low;
    // ln 2 in two parts, the first of 17 bits, so that n times it is exact.
    fast_two_sum(add(held, -mul(n, 0.693138123f)), mul(n, -9.05800061e-06f), r, r_low);
    two_product(r, r, square, square_low);
    float q = 0.000198412701f;  // e^r = 1 + r + r^2/2 + r^3 q
    q = add(mul(q, r), 0.00138888892f);
    q = add(mul(q, r), 0.00833333377f);
    q = add(mul(q, r), 0.0416666679f);
    q = add(mul(q, r), 0.166666672f);
    fast_two_sum(1.0f, r, a, a_low);
    fast_two_sum(a, mul(0.5f, square), b, b_low);
    fast_two_sum(b, mul(mul(square, r), q), high, c_low);
    low = add(add(add(a_low, b_low), c_low), add(r_low, add(mul(0.5f, square_low), mul(r, r_low))));
    const float power = as_float((as_bits(shifted) - 0x4B400000u + 127u) << 23);
    high = mul(high, power);
    low = mul(low, power);
}

// e^x: the nearest fp32 number for 99 of 100 values, a neighbour of it for the others.
DDPM_FN float rounded_exponential(float x) {
    float high, low;
    precise_exponential(x, high, low);
    return add(high, low);
}

// tanh x likewise (19 of 20 around the switch at 5/8, else 998 of 1000): 1 - 2e/(1 + e) with e = e^-2|x|, in two floats
// until the last sum.
DDPM_FN float rounded_tanh(float x) {
    const float u = mul(x, x);
    float s = 0.00214753905f;  // (tanh x - x) / x^3 in x^2, for |x| <= 5/8
    s = add(mul(s, u), -0.00818267651f);
    s = add(mul(s, u), 0.0217029676f);
    s = add(mul(s, u), -0.0539472029f);
    s = add(mul(s, u), 0.133332103f);
    s = add(mul(s, u), -0.333333313f);
    const float small = add(x, mul(mul(x, u), s));
    float e, e_low, d, d_low, product, product_low, y, y_low;
    precise_exponential(mul(magnitude(x), -2.0f), e, e_low);
    fast_two_sum(1.0f, e, d, d_low);
    const float quotient = divide(mul(2.0f, e), d);
    two_product(quotient, d, product, product_low);
    const float rest = add(add(mul(2.0f, e), -product), -product_low);
    const float correction = add(rest, add(mul(2.0f, e_low), -mul(quotient, add(d_low, e_low))));
    fast_two_sum(1.0f, -quotient, y, y_low);
    const float large = add(y, add(y_low, -divide(correction, d)));
    return magnitude(x) < 0.625f ? small : as_float(as_bits(large) | (as_bits(x) & 0x80000000u));
}

}  // namespace ddpm
