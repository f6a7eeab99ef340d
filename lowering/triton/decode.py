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
def load_columns(pointer, rows, stride, first, COLUMNS: tl.constexpr, STEP: tl.constexpr):
    """The same, turned: a row for each column."""
    columns = (first + tl.arange(0, COLUMNS)) * STEP
    return tl.load(pointer + rows[None, :] * stride + columns[:, None])


@triton.jit
def block_columns(COLUMNS: tl.constexpr, BLOCKS: tl.constexpr):
    """Columns by blocks, in the order of :func:`block_scales`."""
    size: tl.constexpr = COLUMNS // BLOCKS
    column = tl.arange(0, COLUMNS)
    block = column // size
    return (block % 4 * (BLOCKS // 4) + block // 4) * size + column % size


@triton.jit
def load_block_rows(pointer, rows, stride, first, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr):
    """:func:`load_rows` in that order."""
    return tl.load(pointer + rows[:, None] * stride + (first + block_columns(COLUMNS, BLOCKS))[None, :])


@triton.jit
def load_block_columns(pointer, rows, stride, first, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr):
    """:func:`load_columns` in that order."""
    return tl.load(pointer + rows[None, :] * stride + (first + block_columns(COLUMNS, BLOCKS))[:, None])


@triton.jit
def block_scales(scales, R: tl.constexpr, BLOCKS: tl.constexpr):
    """Scales ``[R, BLOCKS]``: those of blocks 0, B / 4, B / 2, 3 B / 4, then of 1, ...

    An instruction multiplies four blocks, each by a quarter of the lanes: so a lane's scales are neighbours in memory.
    """
    return tl.reshape(tl.permute(tl.reshape(scales, (R, 4, BLOCKS // 4)), (0, 2, 1)), (R, BLOCKS))


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


@triton.jit
def as_words(pointer):
    """A pointer to packed codes of 4 bits as one to int16, which hold four of them."""
    return pointer.to(tl.pointer_type(tl.int16), bitcast=True)


@triton.jit
def split_quarters(values, R: tl.constexpr, K: tl.constexpr, REORDERED: tl.constexpr):
    """The columns of ``values [R, K]`` whose codes are nibble 0, 1, 2 and 3 of int16: four times ``[R, K / 4]``."""
    if REORDERED:
        # Nibbles of an int32 hold elements 0 2 4 6 1 3 5 7.
        values = tl.permute(tl.reshape(values, (R, K // 8, 4, 2)), (0, 1, 3, 2))
    even, odd = tl.split(tl.reshape(values, (R, K // 4, 2, 2)))
    q0, q2 = tl.split(even)
    q1, q3 = tl.split(odd)
    return q0, q1, q2, q3


@triton.jit
def multiply_add(x, y, z, DOT: tl.constexpr):
    """``x * y + z`` of pairs, rounded once, by PTX."""
    if DOT == tl.bfloat16:
        result = tl.inline_asm_elementwise(
            "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [x, y, z], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        result = tl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [x, y, z], dtype=tl.float16, is_pure=True, pack=2
        )
    return result


@triton.jit
def times_exact(x, scale, DOT: tl.constexpr, PTX: tl.constexpr):
    """``x``, in ``DOT``, times scales of any dtype, rounded once."""
    if PTX and scale.dtype == DOT:
        result = multiply_add(x, scale, tl.full(scale.shape, -0.0, DOT), DOT)
    else:
        result = (x.to(tl.float32) * scale.to(tl.float32)).to(DOT)
    return result


@triton.jit
def nibbles(words, SIGNED: tl.constexpr, DOT: tl.constexpr):
    """Nibble 0, 1, 2 and 3 of int16 plus 128 or, in float16, 1024, and 8 if they are signed: by PTX.

    A nibble becomes the last bits of a number that has no fraction; if it is signed, with its sign turned.
    """
    moved: tl.constexpr = 8 if SIGNED else 0
    magic = tl.full([1] * len(words.shape), (0x4300 if DOT == tl.bfloat16 else 0x6400) + moved, tl.int16)
    q0, q1, q2, q3 = tl.inline_asm_elementwise(
        """
        {
        .reg .b32 a, b, c;
        shr.u32 a, $4, 4;
        shr.u32 b, $4, 8;
        shr.u32 c, $4, 12;
        lop3.b32 $0, $4, 0x000F000F, $5, 0x6A;
        lop3.b32 $1, a, 0x000F000F, $5, 0x6A;
        lop3.b32 $2, b, 0x000F000F, $5, 0x6A;
        lop3.b32 $3, c, 0x000F000F, $5, 0x6A;
        }
        """,
        "=&r,=&r,=&r,=&r,r,r",
        [words, magic],
        dtype=(tl.int16, tl.int16, tl.int16, tl.int16),
        is_pure=True,
        pack=2,
    )
    return q0.to(DOT, bitcast=True), q1.to(DOT, bitcast=True), q2.to(DOT, bitcast=True), q3.to(DOT, bitcast=True)


@triton.jit
def int4_codes(words, SHIFT: tl.constexpr, SIGNED: tl.constexpr):
    """The integers of one nibble of int16, int32."""
    codes = (words.to(tl.int32) >> SHIFT) & 15
    if SIGNED:
        codes = (codes ^ 8) - 8
    return codes


@triton.jit
def int4_quarters(words, zeros, SIGNED: tl.constexpr, DOT: tl.constexpr, PTX: tl.constexpr):
    """The integers in nibble 0, 1, 2 and 3 of int16, minus zero points (int32), in ``DOT``."""
    if PTX:
        offset: tl.constexpr = (128 if DOT == tl.bfloat16 else 1024) + (8 if SIGNED else 0)
        one, minus = tl.full(zeros.shape, 1.0, DOT), (-offset - zeros).to(tl.float32).to(DOT)
        q0, q1, q2, q3 = nibbles(words, SIGNED, DOT)
        q0 = multiply_add(q0, one, minus, DOT)
        q1 = multiply_add(q1, one, minus, DOT)
        q2 = multiply_add(q2, one, minus, DOT)
        q3 = multiply_add(q3, one, minus, DOT)
    else:
        q0 = (int4_codes(words, 0, SIGNED) - zeros).to(tl.float32).to(DOT)
        q1 = (int4_codes(words, 4, SIGNED) - zeros).to(tl.float32).to(DOT)
        q2 = (int4_codes(words, 8, SIGNED) - zeros).to(tl.float32).to(DOT)
        q3 = (int4_codes(words, 12, SIGNED) - zeros).to(tl.float32).to(DOT)
    return q0, q1, q2, q3


@triton.jit
def int4_by_groups(
    words,
    zeros,
    scales,
    C: tl.constexpr,
    SIGNED: tl.constexpr,
    REORDERED: tl.constexpr,
    DOT: tl.constexpr,
    PTX: tl.constexpr,
):
    """The numbers of nibble 0, 1, 2 and 3 of int16 ``[R, C / 4]``; zero points ``[1, C / 4]``, scales ``[1, C]``."""
    s0, s1, s2, s3 = split_quarters(scales, 1, C, REORDERED)
    if PTX:
        minus = tl.full(zeros.shape, -1.0, DOT)
        q0, q1, q2, q3 = nibbles(words, SIGNED, DOT)
        z0, z1, z2, z3 = nibbles(zeros, SIGNED, DOT)
        q0 = multiply_add(z0, minus, q0, DOT)
        q1 = multiply_add(z1, minus, q1, DOT)
        q2 = multiply_add(z2, minus, q2, DOT)
        q3 = multiply_add(z3, minus, q3, DOT)
    else:
        q0 = (int4_codes(words, 0, SIGNED) - int4_codes(zeros, 0, SIGNED)).to(tl.float32)
        q1 = (int4_codes(words, 4, SIGNED) - int4_codes(zeros, 4, SIGNED)).to(tl.float32)
        q2 = (int4_codes(words, 8, SIGNED) - int4_codes(zeros, 8, SIGNED)).to(tl.float32)
        q3 = (int4_codes(words, 12, SIGNED) - int4_codes(zeros, 12, SIGNED)).to(tl.float32)
    q0 = times_exact(q0, s0, DOT, PTX)
    q1 = times_exact(q1, s1, DOT, PTX)
    q2 = times_exact(q2, s2, DOT, PTX)
    q3 = times_exact(q3, s3, DOT, PTX)
    return q0, q1, q2, q3


@triton.jit
def join_quarters(q0, q1, q2, q3, R: tl.constexpr, C: tl.constexpr, REORDERED: tl.constexpr):
    """The inverse of :func:`split_quarters`."""
    values = tl.join(tl.join(q0, q2), tl.join(q1, q3))
    if REORDERED:
        values = tl.permute(tl.reshape(values, (R, C // 8, 2, 4)), (0, 1, 3, 2))
    return tl.reshape(values, (R, C))


@triton.jit
def fp4_quarters(
    packed, scales, R: tl.constexpr, K: tl.constexpr, SIZE: tl.constexpr, DOT: tl.constexpr, PTX: tl.constexpr
):
    """:func:`fp4_halves` of each nibble of int16 ``[R, K / 4]``."""
    words = tl.reshape(packed, (R, K // SIZE, SIZE // 4))
    scales = scales[:, :, None]
    if PTX:
        if DOT == tl.bfloat16:
            q0, q1, q2, q3 = tl.inline_asm_elementwise(
                """
                {
                .reg .b32 a, b, c, d, e, f, g;
                shl.b32 a, $4, 6;
                shl.b32 b, $4, 2;
                shr.u32 c, $4, 2;
                shr.u32 d, $4, 6;
                shl.b32 e, $4, 12;
                shl.b32 f, $4, 8;
                shl.b32 g, $4, 4;
                and.b32 a, a, 0x01C001C0;
                and.b32 b, b, 0x01C001C0;
                and.b32 c, c, 0x01C001C0;
                and.b32 d, d, 0x01C001C0;
                lop3.b32 $0, e, 0x80008000, a, 0xEA;
                lop3.b32 $1, f, 0x80008000, b, 0xEA;
                lop3.b32 $2, g, 0x80008000, c, 0xEA;
                lop3.b32 $3, $4, 0x80008000, d, 0xEA;
                }
                """,
                "=&r,=&r,=&r,=&r,r",
                [words],
                dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
                is_pure=True,
                pack=2,
            )
        else:
            q0, q1, q2, q3 = tl.inline_asm_elementwise(
                """
                {
                .reg .b32 a, b, c, d, e, f, g;
                shl.b32 a, $4, 9;
                shl.b32 b, $4, 5;
                shl.b32 c, $4, 1;
                shr.u32 d, $4, 3;
                shl.b32 e, $4, 12;
                shl.b32 f, $4, 8;
                shl.b32 g, $4, 4;
                and.b32 a, a, 0x0E000E00;
                and.b32 b, b, 0x0E000E00;
                and.b32 c, c, 0x0E000E00;
                and.b32 d, d, 0x0E000E00;
                lop3.b32 $0, e, 0x80008000, a, 0xEA;
                lop3.b32 $1, f, 0x80008000, b, 0xEA;
                lop3.b32 $2, g, 0x80008000, c, 0xEA;
                lop3.b32 $3, $4, 0x80008000, d, 0xEA;
                }
                """,
                "=&r,=&r,=&r,=&r,r",
                [words],
                dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
                is_pure=True,
                pack=2,
            )
        factor: tl.constexpr = 2.0**126 if DOT == tl.bfloat16 else 2.0**14
        q0 = two_factors(q0, factor, scales, R, K, DOT)
        q1 = two_factors(q1, factor, scales, R, K, DOT)
        q2 = two_factors(q2, factor, scales, R, K, DOT)
        q3 = two_factors(q3, factor, scales, R, K, DOT)
    else:
        q0 = tl.reshape((e2m1(words & 15) * scales).to(DOT), (R, K // 4))
        q1 = tl.reshape((e2m1((words >> 4) & 15) * scales).to(DOT), (R, K // 4))
        q2 = tl.reshape((e2m1((words >> 8) & 15) * scales).to(DOT), (R, K // 4))
        q3 = tl.reshape((e2m1((words >> 12) & 15) * scales).to(DOT), (R, K // 4))
    return q0, q1, q2, q3


@triton.jit
def two_factors(x, FACTOR: tl.constexpr, scales, R: tl.constexpr, K: tl.constexpr, DOT: tl.constexpr):
    """``x * FACTOR * scales``, which is exact, by PTX."""
    nothing = tl.full(scales.shape, -0.0, DOT)
    x = multiply_add(x, tl.full(scales.shape, FACTOR, DOT), nothing, DOT)
    return tl.reshape(multiply_add(x, scales.to(DOT), nothing, DOT), (R, K // 4))
