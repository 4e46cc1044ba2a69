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

// What the two formulas below ask of a number beside arithmetic. They are templates, so that cpu/philox_block.h can
// apply them to several registers at a time; here a Word is a uint32_t and a Real a float.
DDPM_FN float signed_to_real(uint32_t word) { return float(int32_t(word)); }
DDPM_FN uint32_t signed_shift_right(uint32_t word, int by) { return uint32_t(int32_t(word) >> by); }
DDPM_FN float if_negative(uint32_t word, float yes, float no) { return int32_t(word) < 0 ? yes : no; }

// -2 ln u for u = (bits >> 8 + 1) / 2^24 in (0, 1], then its square root: the radius of Box-Muller.
template <class Word, class Real>
DDPM_FN void box_muller_radius(const Word& bits, Real& radius) {
    // Split u = m * 2^-n with m in [sqrt(1/2), sqrt(2)), so that f = m - 1 is small on both sides of zero.
    const Word shifted = as_bits(signed_to_real((bits >> 8) + 1u)) + (0x3F800000u - 0x3F3504F3u);
    const Real n = signed_to_real((24u + 127u) - (shifted >> 23));
    const Real f = add(as_float((shifted & 0x007FFFFFu) + 0x3F3504F3u), -1.0f);
    // -2 ln(1 + f) = f (-2 + f (1 + f q(f))), q minimax of degree 6: 3.4e-8 relative to f.
    Real q = add(mul(f, -0.178547591f), 0.286895365f);
    q = add(mul(q, f), -0.297421604f);
    q = add(mul(q, f), 0.331324518f);
    q = add(mul(q, f), -0.399321407f);
    q = add(mul(q, f), 0.500034630f);
    q = add(mul(q, f), -0.666676760f);
    q = add(mul(q, f), 1.0f);
    q = add(mul(q, f), -2.0f);
    radius = square_root(add(mul(n, 1.38629436f), mul(q, f)));
}

// One pair of normals: `bits0` gives the radius, `bits1` the angle. The top two bits of the angle choose the
// quadrant, the next 24 the angle within it, in (-pi/4, pi/4): no range reduction is ever needed.
template <class Word, class Real>
DDPM_FN void normal_pair(const Word& bits0, const Word& bits1, Real& z0, Real& z1) {
    Real radius;
    box_muller_radius(bits0, radius);
    const Word steps = signed_shift_right(bits1 << 2, 8);                     // 24 bits
    const Real x = mul(signed_to_real(steps + steps + 1u), 4.68133798e-08f);  // pi/4 * 2^-24
    const Real x2 = mul(x, x);
    Real sine = add(mul(add(mul(x2, -0.000195175919f), 0.00833218079f), x2), -0.166666552f);
    sine = add(mul(mul(sine, x2), x), x);
    Real cosine = add(mul(add(mul(x2, 2.44385519e-05f), -0.00138873688f), x2), 0.0416666456f);
    cosine = add(mul(add(mul(cosine, x2), -0.5f), x2), 1.0f);
    // Quadrants 0..3 turn (cos, sin) by quarter turns: (c, s), (-s, c), (-c, -s), (s, -c).
    const Word odd = bits1 << 1;  // its sign
    const Real first = if_negative(odd, sine, cosine);
    const Real second = if_negative(odd, cosine, sine);
    z0 = mul(radius, as_float(as_bits(first) ^ ((bits1 ^ odd) & 0x80000000u)));
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
