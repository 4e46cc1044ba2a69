"""Philox4x32-10 and the portable normal in Triton: the same integers and the same normals, bit for bit, as
csrc/philox.h and ddpm_fast/noise.py, where the contract and the reasons are written down.

Launch every kernel that uses these with enable_fp_fusion=False: a fused multiply-add changes 1% of normals.
"""

import triton
import triton.language as tl


@triton.jit
def philox4x32_10(c0, c1, c2, c3, k0, k1):
    """Four random words (uint32) for a counter and key of uint32 words."""
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 = (k0.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)
        k1 = (k1.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def box_muller_radius(word):
    """sqrt(-2 ln u), u = (word // 256 + 1) / 2^24."""
    bits = ((word >> 8) + 1).to(tl.int32).to(tl.float32).to(tl.int32, bitcast=True) + (0x3F800000 - 0x3F3504F3)
    n = (24 + 127 - (bits >> 23)).to(tl.float32)
    f = ((bits & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    q = f * -0.178547591 + 0.286895365
    q = q * f + -0.297421604
    q = q * f + 0.331324518
    q = q * f + -0.399321407
    q = q * f + 0.500034630
    q = q * f + -0.666676760
    q = q * f + 1.0
    q = q * f + -2.0
    return tl.sqrt_rn(n * 1.38629436 + q * f)  # tl.sqrt is approximate on a GPU


@triton.jit
def normal_pair(word0, word1):
    """Two normals (fp32) from two random words."""
    radius = box_muller_radius(word0)
    steps = (word1 << 2).to(tl.int32, bitcast=True) >> 8
    x = (2 * steps + 1).to(tl.float32) * 4.681338e-08
    x2 = x * x
    sine = (x2 * -0.000195175919 + 0.00833218079) * x2 + -0.166666552
    sine = sine * x2 * x + x
    cosine = (x2 * 2.44385519e-05 + -0.00138873688) * x2 + 0.0416666456
    cosine = (cosine * x2 + -0.5) * x2 + 1.0
    odd = (word1 & 0x40000000) != 0
    # Quadrants 0..3 turn (cos, sin) by quarter turns: the signs go on as bits, so that a zero gets its sign too.
    first = tl.where(odd, sine, cosine).to(tl.uint32, bitcast=True) ^ ((word1 ^ (word1 << 1)) & 0x80000000)
    second = tl.where(odd, cosine, sine).to(tl.uint32, bitcast=True) ^ (word1 & 0x80000000)
    return radius * first.to(tl.float32, bitcast=True), radius * second.to(tl.float32, bitcast=True)


@triton.jit
def random_words(counter, sample_id, step, stream, seed):
    """The four words (uint32 [BLOCK] each) of a block of counters [BLOCK]; the rest are int64 scalars, stream an
    integer."""
    c1 = (sample_id & 0xFFFFFFFF).to(tl.uint32)
    c2 = (step & 0xFFFFFFFF).to(tl.uint32)
    c3 = (((sample_id >> 32) & 0xFFFFFF) << 8 | stream).to(tl.uint32)
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    counter = counter.to(tl.uint32)
    zero = counter ^ counter
    return philox4x32_10(counter, zero + c1, zero + c2, zero + c3, k0, k1)


@triton.jit
def normal4(counter, sample_id, step, stream, seed):
    """The normals of elements 4 * counter + 0..3, in order: [4 * BLOCK] of a block of counters [BLOCK]; the rest as in
    random_words."""
    c0, c1, c2, c3 = random_words(counter, sample_id, step, stream, seed)
    z0, z1 = normal_pair(c0, c1)
    z2, z3 = normal_pair(c2, c3)
    # All four stay in the thread that drew them, side by side: it writes 16 bytes of fp32 at once.
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))
