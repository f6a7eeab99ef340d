"""Device functions that read operands: tiles of codes and scales to numbers, every step exact.

No kernel imports them: :mod:`.source` appends the text of those that it uses. Legend: R rows of a tile, K columns of
the activation or the weight in it; ``float32`` results unless said otherwise.
"""

import triton
import triton.language as tl


@triton.jit
def load_rows(pointer, rows, stride, first, COLUMNS: tl.constexpr, STEP: tl.constexpr):
    """Columns ``first`` to ``first + COLUMNS`` of some rows; ``STEP`` entries from one to the next."""
    columns = (first + tl.arange(0, COLUMNS)) * STEP
    return tl.load(pointer + rows[:, None] * stride + columns[None, :])


@triton.jit
def from_bits(bits):
    """The float32 of these bits (integers of any width)."""
    return bits.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def to_bits(x):
    """The bits of a float32, as int32."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def e2m1(codes):
    """FP4 codes 0 to 15."""
    c = codes.to(tl.uint16)
    # As a float16, whose exponent is biased by 14 more.
    half = (((c & 7) << 9) | ((c & 8) << 12)).to(tl.float16, bitcast=True)
    return half.to(tl.float32) * 16384.0


@triton.jit
def e2m3(codes):
    """FP6 codes 0 to 63, with three bits of mantissa."""
    c = codes.to(tl.uint16)
    half = (((c & 31) << 7) | ((c & 32) << 10)).to(tl.float16, bitcast=True)
    return half.to(tl.float32) * 16384.0


@triton.jit
def e3m2(codes):
    """FP6 codes 0 to 63, with two bits of mantissa."""
    c = codes.to(tl.uint16)
    half = (((c & 31) << 8) | ((c & 32) << 10)).to(tl.float16, bitcast=True)
    return half.to(tl.float32) * 4096.0


@triton.jit
def e8m0(codes):
    """Powers of two biased by 127: code 0 is ``2**-127``, 255 is NaN."""
    c = codes.to(tl.int32)
    bits = tl.where(c == 0, 0x00400000, c << 23)
    return from_bits(tl.where(c == 255, 0x7FC00000, bits))


@triton.jit
def e5m3(codes):
    """Unsigned floats of 8 bits: code 255 is NaN."""
    half = (codes.to(tl.uint16) << 7).to(tl.float16, bitcast=True)
    # 31 << 3 and more are no infinities in E5M3: the largest exponent counts on.
    c = codes.to(tl.int32)
    large = from_bits(tl.where(c == 255, 0x7FC00000, (c + ((127 - 15) << 3)) << 20))
    return tl.where(c < (31 << 3), half.to(tl.float32), large)


@triton.jit
def unpack_fp4(packed, R: tl.constexpr, K: tl.constexpr):
    """Bytes ``[R, K / 2]``, element 2i in the low nibble, to FP4 codes ``[R, K]``."""
    return tl.reshape(tl.join(packed & 15, packed >> 4), (R, K))


@triton.jit
def load_fp6(pointer, rows, stride, first, R: tl.constexpr, K: tl.constexpr):
    """FP6 codes ``[R, K]``, from element ``first`` on: four to three bytes, the first lowest."""
    b0 = load_rows(pointer, rows, stride, first // 4, K // 4, 3).to(tl.uint16)
    b1 = load_rows(pointer + 1, rows, stride, first // 4, K // 4, 3).to(tl.uint16)
    b2 = load_rows(pointer + 2, rows, stride, first // 4, K // 4, 3).to(tl.uint16)
    c0 = b0 & 63
    c1 = (b0 >> 6) | ((b1 & 15) << 2)
    c2 = (b1 >> 4) | ((b2 & 3) << 4)
    c3 = b2 >> 2
    return tl.reshape(tl.join(tl.join(c0, c2), tl.join(c1, c3)), (R, K))


@triton.jit
def unpack_int4(words, R: tl.constexpr, C: tl.constexpr, SIGNED: tl.constexpr, REORDERED: tl.constexpr):
    """int32 ``[R, C / 8]`` to integers ``[R, C]``, int32; ``REORDERED``: nibbles hold elements 0 2 4 6 1 3 5 7."""
    element = tl.arange(0, 8)
    nibble = element
    if REORDERED:
        nibble = (element % 2) * 4 + element // 2
    codes = (words[:, :, None] >> (nibble * 4)[None, None, :]) & 15
    if SIGNED:
        codes = codes - ((codes & 8) << 1)
    return tl.reshape(codes, (R, C))


@triton.jit
def int4_at(pointer, index, SIGNED: tl.constexpr, REORDERED: tl.constexpr):
    """The integers of these indices among packed ones, int32: zero points."""
    element = index % 8
    nibble = element
    if REORDERED:
        nibble = (element % 2) * 4 + element // 2
    codes = (tl.load(pointer + index // 8) >> (nibble * 4)) & 15
    if SIGNED:
        codes = codes - ((codes & 8) << 1)
    return codes


@triton.jit
def times_blocks(values, scales, R: tl.constexpr, K: tl.constexpr, SIZE: tl.constexpr):
    """``values [R, K]`` times a scale ``[R, K / SIZE]`` for each block of columns."""
    blocks = tl.reshape(values, (R, K // SIZE, SIZE))
    return tl.reshape(blocks * scales[:, :, None], (R, K))
