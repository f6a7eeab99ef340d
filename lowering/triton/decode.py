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
def e4m3(codes):
    """FP8 codes, as bytes: the bits of a float16 whose exponent is biased by 8 more; the largest code is NaN."""
    c = codes.to(tl.uint16)
    half = (((c & 127) << 7) | ((c & 128) << 8)).to(tl.float16, bitcast=True)
    return tl.where((c & 127) == 127, float("nan"), half.to(tl.float32) * 256.0)


@triton.jit
def e5m2(codes):
    """FP8 codes, as bytes: the upper half of a float16."""
    return (codes.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def e4m3fnuz(codes):
    """FP8 codes, as bytes: half of E4M3, but that -0 is NaN and nothing else is."""
    c = codes.to(tl.uint16)
    half = (((c & 127) << 7) | ((c & 128) << 8)).to(tl.float16, bitcast=True)
    return tl.where(c == 128, float("nan"), half.to(tl.float32) * 128.0)


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


@triton.jit
def fp4_halves(
    packed, scales, R: tl.constexpr, K: tl.constexpr, SIZE: tl.constexpr, DOT: tl.constexpr, PACKED: tl.constexpr
):
    """Numbers of even and of odd columns, ``[R, K / 2]`` each in ``DOT``, from bytes and scales ``[R, K / SIZE]``.

    ``DOT`` holds every product of a code and a scale exactly. ``PACKED``: it is multiplied in it, else in float32. The
    bits of a code, put where a float has them, are a number whose exponent is biased by so much more.
    """
    if DOT == tl.float16:
        c = packed.to(tl.uint16)
        even = (((c & 7) << 9) | ((c & 8) << 12)).to(tl.float16, bitcast=True)
        odd = (((c & 0x70) << 5) | ((c & 0x80) << 8)).to(tl.float16, bitcast=True)
        halves = times_half(even, 16384.0, scales, R, K, SIZE), times_half(odd, 16384.0, scales, R, K, SIZE)
    elif PACKED:
        c = packed.to(tl.uint16)
        even = (((c & 7) << 6) | ((c & 8) << 12)).to(tl.bfloat16, bitcast=True)
        odd = (((c & 0x70) << 2) | ((c & 0x80) << 8)).to(tl.bfloat16, bitcast=True)
        halves = times_half(even, 2.0**126, scales, R, K, SIZE), times_half(odd, 2.0**126, scales, R, K, SIZE)
    else:
        c = packed.to(tl.uint32)
        even = (((c & 7) << 22) | ((c & 8) << 28)).to(tl.float32, bitcast=True)
        odd = (((c & 0x70) << 18) | ((c & 0x80) << 24)).to(tl.float32, bitcast=True)
        even = times_half(even, 2.0**126, scales, R, K, SIZE)
        odd = times_half(odd, 2.0**126, scales, R, K, SIZE)
        halves = upper_half(even), upper_half(odd)
    return halves


@triton.jit
def times_half(values, FACTOR: tl.constexpr, scales, R: tl.constexpr, K: tl.constexpr, SIZE: tl.constexpr):
    """``values [R, K / 2]``, half of the columns, times a factor and the scales of their blocks, in their dtype."""
    blocks = tl.reshape(values, (R, K // SIZE, SIZE // 2)) * FACTOR
    return tl.reshape(blocks * scales.to(values.dtype)[:, :, None], (R, K // 2))


@triton.jit
def upper_half(x):
    """float32 that bfloat16 holds exactly, in bfloat16: its upper bits."""
    return (x.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
