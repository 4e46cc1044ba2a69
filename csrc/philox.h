// The noise: Philox4x32-10 and a normal that has the same bits everywhere.
//
// Philox4x32-10 is the counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"
// (SC 2011), identical to Random123's philox4x32(10, ...). Known answers, counter / key -> output:
//   00000000 00000000 00000000 00000000 / 00000000 00000000 -> 6627e8d5 e169c58d bc57ac4c 9b00dbd8
//   ffffffff ffffffff ffffffff ffffffff / ffffffff ffffffff -> 408f276d 41c83b0e a20bc7c6 6d5451fd
//   243f6a88 85a308d3 13198a2e 03707344 / a4093822 299f31d0 -> d16cfe09 94fdcceb 5001e420 24126ea1
//
// The layout of key and counter is a contract (a sample depends on nothing else):
//   key     = seed, low word first
//   counter = { element / 4,  sample id (low 32 bits),  step,  stream | sample id (high 24 bits) << 8 }
//   lane    = element % 4, where element is the logical NCHW index within the sample
//
// The normal is Box-Muller in integer operations and portable.h's arithmetic, no libm: largest error against
// float64 over all 2^24 radii and angles 7e-7. ddpm_fast/noise.py says the same in plain torch, bit for bit.
#pragma once

#include "portable.h"

namespace ddpm {

// In place: (c0, c1, c2, c3) is the counter before and the four random words after. Scalars by reference rather
// than a struct or an array: g++ 12 vectorises a loop over these and gives up on the others.
DDPM_FN void philox4x32_10(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, uint32_t key0, uint32_t key1) {
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 10
#endif
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = uint64_t(0xD2511F53u) * c0;
        const uint64_t p1 = uint64_t(0xCD9E8D57u) * c2;
        c0 = uint32_t(p1 >> 32) ^ c1 ^ key0;
        c2 = uint32_t(p0 >> 32) ^ c3 ^ key1;
        c1 = uint32_t(p1);
        c3 = uint32_t(p0);
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
}

// -2 ln u for u = (bits >> 8 + 1) / 2^24 in (0, 1], then its square root: the radius of Box-Muller.
DDPM_FN float box_muller_radius(uint32_t bits) {
    // Split u = m * 2^-n with m in [sqrt(1/2), sqrt(2)), so that f = m - 1 is small on both sides of zero.
    const uint32_t shifted = as_bits(float(int32_t((bits >> 8) + 1))) + (0x3F800000u - 0x3F3504F3u);
    const float n = float(24 + 127 - int32_t(shifted >> 23));
    const float f = add(as_float((shifted & 0x007FFFFFu) + 0x3F3504F3u), -1.0f);
    // -2 ln(1 + f) = f (-2 + f (1 + f q(f))), q minimax of degree 6: 3.4e-8 relative to f.
    float q = -0.178547591f;
    q = add(mul(q, f), 0.286895365f);
    q = add(mul(q, f), -0.297421604f);
    q = add(mul(q, f), 0.331324518f);
    q = add(mul(q, f), -0.399321407f);
    q = add(mul(q, f), 0.500034630f);
    q = add(mul(q, f), -0.666676760f);
    q = add(mul(q, f), 1.0f);
    q = add(mul(q, f), -2.0f);
    return square_root(add(mul(n, 1.38629436f), mul(q, f)));
}

// One pair of normals: `bits0` gives the radius, `bits1` the angle. The top two bits of the angle choose the
// quadrant, the next 24 the angle within it, in (-pi/4, pi/4): no range reduction is ever needed.
DDPM_FN void normal_pair(uint32_t bits0, uint32_t bits1, float& z0, float& z1) {
    const float radius = box_muller_radius(bits0);
    const int32_t steps = int32_t(bits1 << 2) >> 8;              // signed, 24 bits
    const float x = mul(float(2 * steps + 1), 4.68133798e-08f);  // pi/4 * 2^-24
    const float x2 = mul(x, x);
    float sine = add(mul(add(mul(x2, -0.000195175919f), 0.00833218079f), x2), -0.166666552f);
    sine = add(mul(mul(sine, x2), x), x);
    float cosine = add(mul(add(mul(x2, 2.44385519e-05f), -0.00138873688f), x2), 0.0416666456f);
    cosine = add(mul(add(mul(cosine, x2), -0.5f), x2), 1.0f);
    // Quadrants 0..3 turn (cos, sin) by quarter turns: (c, s), (-s, c), (-c, -s), (s, -c).
    const bool odd = bits1 & 0x40000000u;
    const float first = odd ? sine : cosine;
    const float second = odd ? cosine : sine;
    z0 = mul(radius, as_float(as_bits(first) ^ ((bits1 ^ (bits1 << 1)) & 0x80000000u)));
    z1 = mul(radius, as_float(as_bits(second) ^ (bits1 & 0x80000000u)));
}

// What the noise of one sample is drawn from: everything in the key and the counter but the element.
struct NoiseKey {
    uint32_t key0, key1;  // the seed
    uint32_t c1, c2, c3;  // the counter's words after the element
};

DDPM_FN NoiseKey noise_key(uint64_t seed, uint64_t sample_id, uint32_t step, uint32_t stream) {
    return NoiseKey{uint32_t(seed), uint32_t(seed >> 32), uint32_t(sample_id), step,
                    stream | uint32_t(sample_id >> 32) << 8};
}

// The four normals of elements 4 * counter .. 4 * counter + 3.
DDPM_FN void normal4(uint32_t counter, const NoiseKey& key, float& z0, float& z1, float& z2, float& z3) {
    uint32_t c0 = counter, c1 = key.c1, c2 = key.c2, c3 = key.c3;
    philox4x32_10(c0, c1, c2, c3, key.key0, key.key1);
    normal_pair(c0, c1, z0, z1);
    normal_pair(c2, c3, z2, z3);
}

}  // namespace ddpm
