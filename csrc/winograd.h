// Winograd's minimal filtering F(4x4, 3x3): 16 outputs of a 3x3 correlation from 36 products where the definition takes
// 144. Lavin & Gray 2016, "Fast Algorithms for Convolutional Neural Networks" (arXiv:1509.09308), section 4:
//
//     Y = A^T [ (G g G^T) * (B^T d B) ] A,   d a 6x6 tile of the image, g the filter, * element by element
//
// The gradient of a loss by the filter is the transpose of that, with dY the 4x4 tile of the gradient by the output:
//
//     dg = sum over the tiles of G^T [ (A dY A^T) * (B^T d B) ] G
//
// With interpolation points 0, a, -a, b, -b and infinity (Toom-Cook), p any finite one and N(p) the product of its
// distances to the other finite ones,
//
//     G:   (1, p, p^2) / N(p);  (0, 0, 1)             the filter's polynomial at p; its leading coefficient
//     B^T: coefficients of prod_{q != p} (x - q);  of prod_q (x - q)
//     A^T: (1, p, p^2, p^3);  (0, 0, 0, 1)
//
// The paper's points are a = 1, b = 2. With a = 5/8, b = 3/2, which are exact in fp32 too, the error is 2.2 times less:
// of 256 channels 8.0e-7 of the output's norm instead of 1.8e-6, and its largest 6e-6 of their standard deviation
// instead of 3e-5. Points of opposite sign share their even and odd parts: a transform of six values takes 10
// multiplications and 12 additions, the one back to four 6 and 10.
#pragma once

#include "portable.h"

namespace ddpm {

constexpr float kWinogradA = 0.625f, kWinogradB = 1.5f;
// 1 / N(p) for p = 0, for a and -a, and for b and -b.
constexpr float kWinogradBy0 = float(1.0 / (0.625 * 0.625 * 1.5 * 1.5));
constexpr float kWinogradByA = float(1.0 / (2 * 0.625 * 0.625 * (0.625 * 0.625 - 1.5 * 1.5)));
constexpr float kWinogradByB = float(1.0 / (2 * 1.5 * 1.5 * (1.5 * 1.5 - 0.625 * 0.625)));

// B^T d: d[0..5] at the points 0, a, -a, b, -b, infinity.
DDPM_FN void winograd_input(float d0, float d1, float d2, float d3, float d4, float d5, float& at_0, float& at_a,
                            float& at_minus_a, float& at_b, float& at_minus_b, float& at_infinity) {
    constexpr float a = kWinogradA, b = kWinogradB, aa = a * a, bb = b * b;
    const float even_a = d4 - mul(bb, d2), odd_a = mul(a, d3 - mul(bb, d1));
    const float even_b = d4 - mul(aa, d2), odd_b = mul(b, d3 - mul(aa, d1));
    at_0 = add(mul(aa * bb, d0) - mul(aa + bb, d2), d4);
    at_a = even_a + odd_a;
    at_minus_a = even_a - odd_a;
    at_b = even_b + odd_b;
    at_minus_b = even_b - odd_b;
    at_infinity = add(mul(aa * bb, d1) - mul(aa + bb, d3), d5);
}

// A^T m: the four outputs from the products at the six points.
DDPM_FN void winograd_output(float at_0, float at_a, float at_minus_a, float at_b, float at_minus_b, float at_infinity,
                             float& y0, float& y1, float& y2, float& y3) {
    constexpr float a = kWinogradA, b = kWinogradB, aa = a * a, bb = b * b;
    const float even_a = at_a + at_minus_a, odd_a = mul(a, at_a - at_minus_a);
    const float even_b = at_b + at_minus_b, odd_b = mul(b, at_b - at_minus_b);
    y0 = add(at_0, even_a + even_b);
    y1 = odd_a + odd_b;
    y2 = mul(aa, even_a) + mul(bb, even_b);
    y3 = add(mul(aa, odd_a) + mul(bb, odd_b), at_infinity);
}

// G g: the filter's three taps at the six points.
DDPM_FN void winograd_filter(float g0, float g1, float g2, float& at_0, float& at_a, float& at_minus_a, float& at_b,
                             float& at_minus_b, float& at_infinity) {
    const float even_a = mul(kWinogradByA, g0) + mul(kWinogradByA * kWinogradA * kWinogradA, g2);
    const float even_b = mul(kWinogradByB, g0) + mul(kWinogradByB * kWinogradB * kWinogradB, g2);
    const float odd_a = mul(kWinogradByA * kWinogradA, g1), odd_b = mul(kWinogradByB * kWinogradB, g1);
    at_0 = mul(kWinogradBy0, g0);
    at_a = even_a + odd_a;
    at_minus_a = even_a - odd_a;
    at_b = even_b + odd_b;
    at_minus_b = even_b - odd_b;
    at_infinity = g2;
}

// A y: the gradient by four outputs at the six points.
DDPM_FN void winograd_gradient(float y0, float y1, float y2, float y3, float& at_0, float& at_a, float& at_minus_a,
                               float& at_b, float& at_minus_b, float& at_infinity) {
    constexpr float a = kWinogradA, b = kWinogradB, aa = a * a, bb = b * b;
    const float even_a = y0 + mul(aa, y2), odd_a = mul(a, y1 + mul(aa, y3));
    const float even_b = y0 + mul(bb, y2), odd_b = mul(b, y1 + mul(bb, y3));
    at_0 = y0;
    at_a = even_a + odd_a;
    at_minus_a = even_a - odd_a;
    at_b = even_b + odd_b;
    at_minus_b = even_b - odd_b;
    at_infinity = y3;
}

// G^T m: the gradient by the three taps from that at the six points.
DDPM_FN void winograd_taps(float at_0, float at_a, float at_minus_a, float at_b, float at_minus_b, float at_infinity,
                           float& g0, float& g1, float& g2) {
    constexpr float a = kWinogradA, b = kWinogradB, aa = a * a, bb = b * b;
    const float even_a = mul(kWinogradByA, at_a + at_minus_a), odd_a = mul(kWinogradByA * a, at_a - at_minus_a);
    const float even_b = mul(kWinogradByB, at_b + at_minus_b), odd_b = mul(kWinogradByB * b, at_b - at_minus_b);
    g0 = add(mul(kWinogradBy0, at_0), even_a + even_b);
    g1 = odd_a + odd_b;
    g2 = add(mul(aa, even_a) + mul(bb, even_b), at_infinity);
}

}  // namespace ddpm
