"""exp, log and tanh as csrc/functions.h has them, bit for bit: no approximate instruction of the GPU, no double
precision. The comments on their accuracy and their constants are there.
"""

import triton
import triton.language as tl


@triton.jit
def lesser(a, b):
    """min, but NaN where a is NaN."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def greater(a, b):
    """max, but NaN where a is NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def power_of_two(shifted):
    """2^n of an n to which 1.5 * 2^23 was added, for n in -126..127."""
    return ((shifted.to(tl.int32, bitcast=True) - (0x4B400000 - 127)) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exponential(x):
    """e^x, held within e^-87 .. e^88."""
    held = greater(lesser(x, 88.0), -87.0)
    shifted = held * 1.44269502 + 12582912.0
    n = shifted - 12582912.0
    r = (held - n * 0.693359375) + n * 0.000212194442
    q = r * 0.00139505998 + 0.00836895406
    q = q * r + 0.041666206
    q = q * r + 0.166665182
    q = q * r + 0.5
    return (r * r * q + r + 1.0) * power_of_two(shifted)


@triton.jit
def open_exponential(x):
    """e^x, which does reach infinity, and zero below -87."""
    large = x > 88.0
    value = exponential(tl.where(large, x - 1.0, x)) * tl.where(large, 2.71828175, 1.0)
    return tl.where(x < -87.0, 0.0, value)


@triton.jit
def logarithm(x):
    """ln x for a normal x > 0; infinity and NaN stay what they are."""
    bits = x.to(tl.int32, bitcast=True) + (0x3F800000 - 0x3F3504F3)
    n = ((bits >> 23) - 127).to(tl.float32)
    f = ((bits & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    q = f * 0.0897943452 + -0.144268423
    q = q * f + 0.148837
    q = q * f + -0.165517941
    q = q * f + 0.199634761
    q = q * f + -0.250025839
    q = q * f + 0.333339334
    q = q * f + -0.499999821
    value = n * 0.693147182 + (f * f * q + f)
    # fp32's largest number, written so that it does not round up: older compilers would make a double of it.
    return tl.where(x <= 3.4028234e38, value, x)


@triton.jit
def fast_two_sum(a, b):
    """The rounded sum and what the rounding lost, for |a| >= |b|."""
    high = a + b
    return high, b - (high - a)


@triton.jit
def two_sum(a, b):
    """The rounded sum and what the rounding lost, for any a and b."""
    high = a + b
    part = high - a
    return high, (a - (high - part)) + (b - part)


@triton.jit
def upper_half(x):
    """The first 12 bits of the significand."""
    return (x.to(tl.uint32, bitcast=True) & 0xFFFFF000).to(tl.float32, bitcast=True)


@triton.jit
def two_product(a, b):
    """The rounded product and what the rounding lost."""
    high = a * b
    a1, b1 = upper_half(a), upper_half(b)
    a2, b2 = a - a1, b - b1
    return high, a1 * b1 - high + a1 * b2 + a2 * b1 + a2 * b2


@triton.jit
def precise_exponential(x):
    """e^x as two floats, for x held within -60 .. 60."""
    held = greater(lesser(x, 60.0), -60.0)
    shifted = held * 1.44269502 + 12582912.0
    n = shifted - 12582912.0
    r, r_low = fast_two_sum(held - n * 0.693138123, n * -9.05800061e-06)
    square, square_low = two_product(r, r)
    q = r * 0.000198412701 + 0.00138888892
    q = q * r + 0.00833333377
    q = q * r + 0.0416666679
    q = q * r + 0.166666672
    a, a_low = fast_two_sum(1.0, r)
    b, b_low = fast_two_sum(a, 0.5 * square)
    high, c_low = fast_two_sum(b, square * r * q)
    low = (a_low + b_low + c_low) + (r_low + (0.5 * square_low + r * r_low))
    power = power_of_two(shifted)
    return high * power, low * power


@triton.jit
def rounded_exponential(x):
    """e^x: the nearest fp32 number in 99 of 100 values."""
    high, low = precise_exponential(x)
    return high + low


@triton.jit
def rounded_tanh(x):
    """tanh x likewise."""
    u = x * x
    s = u * 0.00214753905 + -0.00818267651
    s = s * u + 0.0217029676
    s = s * u + -0.0539472029
    s = s * u + 0.133332103
    s = s * u + -0.333333313
    small = x + x * u * s
    e, e_low = precise_exponential(tl.abs(x) * -2.0)
    d, d_low = fast_two_sum(1.0, e)
    quotient = tl.div_rn(2.0 * e, d)
    product, product_low = two_product(quotient, d)
    rest = 2.0 * e - product - product_low
    correction = rest + (2.0 * e_low - quotient * (d_low + e_low))
    y, y_low = fast_two_sum(1.0, -quotient)
    large = y + (y_low - tl.div_rn(correction, d))
    sign = x.to(tl.uint32, bitcast=True) & 0x80000000
    signed = (large.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(x) < 0.625, small, signed)
