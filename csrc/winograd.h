// Winograd's minimal filtering F(4x4, 3x3): 16 outputs of a 3x3 correlation from 36 products where the definition takes
// 144. Lavin & Gray 2016, "Fast Algorithms for Convolutional Neural Networks" (arXiv:1509.09308), section 4:
//
//     Y = A^T [ (G g G^T) * (B^T d B) ] A,   d a 6x6 tile of the image, g the filter, * element by element
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

}  // namespace ddpm
