"""Device functions that quantize: as :mod:`quark_inductor.schemes.numerics`, code for code.

No kernel imports them: :mod:`.source` appends the text of those that it uses. All in float32; ``T`` is the dtype of the
activation, to which amd-quark rounds what it says.
"""

import triton
import triton.language as tl

from quark_inductor.lowering.triton.decode import from_bits, to_bits


@triton.jit
def divide(x, divisor):
    """``x / divisor``, rounded as IEEE 754 has it: a product, and one step of Newton's.

    A division takes several times as many instructions on GPUs. Exact unless the quotient is subnormal; an infinite
    one, whose correction would be NaN, stays.
    """
    inverse = tl.div_rn(1.0, divisor)
    quotient = x * inverse
    better = tl.fma(tl.fma(-quotient, divisor, x), inverse, quotient)
    return tl.where(tl.abs(quotient) < float("inf"), better, quotient)


@triton.jit
def round_even(x):
    """Rounded to an integer, half to even; a magnitude above 2**22 is not to be had."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def rounded_to(x, T: tl.constexpr):
    """float32 rounded half to even to what ``T`` can hold."""
    return x.to(T).to(tl.float32)


@triton.jit
def encode_small(x, BITS: tl.constexpr, MANTISSA: tl.constexpr, SMALLEST: tl.constexpr, MAX: tl.constexpr):
    """FP4 and FP6 codes, int32, of numbers that are divided by their scale: half to even, above MAX saturates, no -0.

    ``BITS``: of a code; ``SMALLEST``: the exponent of the smallest normal number. A NaN's is some code. Where numbers
    have one exponent, codes are a linear function of the magnitude, and over all exponents the least of those: each is
    rounded by a sum so large that codes are its last bits.
    """
    magnitude = tl.minimum(tl.abs(x), MAX)
    anchor: tl.constexpr = 2.0 ** (23 + SMALLEST - MANTISSA)
    rounded = magnitude + anchor
    for i in tl.static_range(1, (1 << (BITS - 1 - MANTISSA)) - 1):
        rounded = tl.minimum(rounded, magnitude * 2.0**-i + anchor * (1.0 + i * 2.0 ** (MANTISSA - 23)))
    code = to_bits(rounded) & ((1 << (BITS - 1)) - 1)
    # What is nearer to 0 than half the smallest number becomes 0.
    return tl.where(x < -(2.0 ** (SMALLEST - MANTISSA - 1)), code | (1 << (BITS - 1)), code)


@triton.jit
def pack_fp4(codes, R: tl.constexpr, K: tl.constexpr):
    """FP4 codes ``[R, K]`` to bytes ``[R, K / 2]``, element 2i in the low nibble."""
    low, high = tl.split(tl.reshape(codes, (R, K // 2, 2)))
    return low | (high << 4)


@triton.jit
def round_minifloat(x, MANTISSA: tl.constexpr, SMALLEST: tl.constexpr, MAX: tl.constexpr):
    """The nearest number of a small format: half to even, saturated; NaN stays.

    ``MANTISSA`` explicit bits, ``SMALLEST`` the exponent of the smallest normal number.
    """
    clamped = tl.minimum(tl.maximum(x, -MAX), MAX)
    exponent = tl.maximum((to_bits(clamped) >> 23) & 255, 127 + SMALLEST)
    # 1.5 * 2**23 times what two numbers of this magnitude are apart.
    anchor = from_bits(((exponent + 23 - MANTISSA) << 23) | 0x400000)
    return tl.where(x == x, (clamped + anchor) - anchor, x)


@triton.jit
def pack_fp6(codes, R: tl.constexpr, K: tl.constexpr):
    """FP6 codes ``[R, K]`` to three tiles of bytes ``[R, K / 4]``: of every four codes, the first lowest."""
    even, odd = tl.split(tl.reshape(codes, (R, K // 4, 2, 2)))
    c0, c2 = tl.split(even)
    c1, c3 = tl.split(odd)
    bits = c0 | (c1 << 6) | (c2 << 12) | (c3 << 18)
    return bits.to(tl.uint8), (bits >> 8).to(tl.uint8), (bits >> 16).to(tl.uint8)


@triton.jit
def amax_bits(x, axis: tl.constexpr):
    """The bits, int32, of the largest magnitude: as integers, those of NaN are the largest."""
    return tl.max(to_bits(x) & 0x7FFFFFFF, axis)


@triton.jit
def scale_even(bits, MANTISSA: tl.constexpr, EXPONENT: tl.constexpr):
    """E8M0 codes, int32, of blocks by rule "even"; their largest magnitudes as :func:`amax_bits`."""
    exponent = (bits.to(tl.uint32) + (1 << (22 - MANTISSA))).to(tl.int32, bitcast=True) >> 23
    # A NaN's sum may have overflowed.
    code = tl.where((exponent >= 255) | (exponent < 0), 254, tl.maximum(exponent - EXPONENT, 0))
    return tl.where(bits > 0x7F800000, 255, code)


@triton.jit
def scale_rceil(bits, MAX: tl.constexpr):
    """E8M0 codes, int32, of blocks by rule "rceil"."""
    quotient = to_bits(tl.div_rn(from_bits(bits), MAX))
    exponent = (quotient >> 23) + tl.where((quotient & 0x7FFFFF) != 0, 1, 0)
    code = tl.where(quotient <= 0x00400000, 0, tl.minimum(exponent, 254))
    return tl.where(bits >= 0x7F800000, 255, code)


@triton.jit
def scale_nearest(bits, T: tl.constexpr):
    """E5M3 codes, int32, of blocks by rule "nearest"."""
    scale = rounded_to(tl.div_rn(from_bits(bits), 6.0), T)
    clamped = tl.minimum(scale, 114688.0)
    exponent = tl.maximum(to_bits(clamped) >> 23, 127 - 14)
    anchor = from_bits(((exponent + 20) << 23) | 0x400000)
    rounded = (clamped + anchor) - anchor
    normal = (to_bits(rounded) >> 20) - ((126 - 14) << 3)
    subnormal = (rounded * 131072.0).to(tl.int32)
    code = tl.where(to_bits(rounded) < ((127 - 14) << 23), subnormal, normal)
    return tl.where((to_bits(scale) & 0x7FFFFFFF) >= 0x7F800000, 255, code)


@triton.jit
def scale_e4m3(bits, global_scale, SEQUENTIAL: tl.constexpr):
    """E4M3 scales of blocks under a global scale, by rule "sequential" or "combined"."""
    amax = from_bits(bits)
    if SEQUENTIAL:
        scale = tl.div_rn(tl.div_rn(amax, 6.0), global_scale)
    else:
        scale = tl.div_rn(amax, global_scale * 6.0)
    code = tl.where(bits < 0x7F800000, tl.minimum(scale, 448.0), float("nan")).to(tl.float8e4nv)
    if SEQUENTIAL:
        return code
    return tl.where(code.to(tl.float32) == 0.0, 1.0, code.to(tl.float32)).to(tl.float8e4nv)


@triton.jit
def or_eps(x):
    """``2**-23``, what amd-quark divides by, where a number is 0."""
    return tl.where(x == 0.0, 2.0**-23, x)


@triton.jit
def inverse_e8m0(codes):
    """``1 / scale`` of E8M0 codes, int32; a NaN's is some number."""
    return from_bits(tl.where(codes >= 254, 0x00400000, (254 - codes) << 23))


@triton.jit
def over_powers(x, codes, R: tl.constexpr, K: tl.constexpr, SIZE: tl.constexpr):
    """``x [R, K]`` divided by powers of two, E8M0 codes ``[R, K / SIZE]``: times the inverse, which is exact."""
    return tl.reshape(tl.reshape(x, (R, K // SIZE, SIZE)) * inverse_e8m0(codes)[:, :, None], (R, K))


@triton.jit
def over_blocks(x, multiplier, R: tl.constexpr, K: tl.constexpr, SIZE: tl.constexpr):
    """``x [R, K]`` divided by a multiplier ``[R, K / SIZE]`` for each block."""
    return tl.reshape(divide(tl.reshape(x, (R, K // SIZE, SIZE)), multiplier[:, :, None]), (R, K))


@triton.jit
def fp8_scale(bits, MAX: tl.constexpr, T: tl.constexpr):
    """The scale of the largest magnitude of a row or a group, rounded to ``T``."""
    return or_eps(rounded_to(tl.div_rn(from_bits(bits), MAX), T))


@triton.jit
def over_scale(x, scale, MAX: tl.constexpr, T: tl.constexpr):
    """``x / scale``, rounded to ``T``, saturated; NaN stays."""
    quotient = rounded_to(divide(x, scale), T)
    clamped = tl.minimum(tl.maximum(quotient, -MAX), MAX)
    # What minimum and maximum make of NaN is the hardware's choice.
    return tl.where(quotient == quotient, clamped, quotient)


@triton.jit
def encode_integer(x, scale, zero_point, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Integers of ``x / scale + zero_point``, int32: times a reciprocal, half to even, saturated."""
    product = x * tl.div_rn(1.0, scale)
    # What is far out saturates all the same, and would be too large to round.
    rounded = round_even(tl.minimum(tl.maximum(product, -1024.0), 1024.0))
    return tl.minimum(tl.maximum(rounded + zero_point, LOW), HIGH).to(tl.int32)


@triton.jit
def at_least_eps(x):
    """``2**-23`` where a number is smaller; NaN stays."""
    return tl.where(x < 2.0**-23, 2.0**-23, x)


@triton.jit
def symmetric_scale(bits, STEPS: tl.constexpr, T: tl.constexpr):
    """The scale of the largest magnitude of a row or a group, rounded to ``T``."""
    return at_least_eps(rounded_to(tl.div_rn(from_bits(bits), STEPS * 0.5), T))


@triton.jit
def asymmetric_scale(bits, smallest, largest, STEPS: tl.constexpr, T: tl.constexpr):
    """The scale of a row or a group between two numbers that enclose 0, each step rounded to ``T``."""
    scale = rounded_to(tl.div_rn(rounded_to(largest - smallest, T), STEPS * 1.0), T)
    # Neither number need be NaN where a third is.
    return at_least_eps(tl.where(bits > 0x7F800000, from_bits(bits), scale))


@triton.jit
def integer_zero_point(smallest, scale, LOW: tl.constexpr, HIGH: tl.constexpr, T: tl.constexpr):
    """The zero point, float32, that puts 0 on a code."""
    quotient = rounded_to(tl.div_rn(smallest, scale), T)
    rounded = round_even(tl.maximum(quotient, -1024.0))
    return tl.minimum(tl.maximum(rounded_to(LOW - rounded, T), LOW), HIGH)
