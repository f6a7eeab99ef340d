"""The tile of an activation: loaded, or quantized in the kernel."""

from quark_inductor.lowering.base import GemmProblem
from quark_inductor.lowering.triton.forms import Form, is_turned
from quark_inductor.lowering.triton.operand import (
    FLOATS,
    FP8,
    MAX_EXPONENT,
    MINIFLOATS,
    Operand,
    Side,
    block_codes,
    block_numbers,
    block_tile,
    fp8_numbers,
    load_rows,
    names_of_pieces,
)
from quark_inductor.schemes.numerics import integer
from quark_inductor.schemes.numerics.block import BLOCK_FORMATS
from quark_inductor.schemes.numerics.int4 import FORMATS as INT4_FORMATS
from quark_inductor.schemes.operands import FP8_FORMATS, zero_scale

SIDE = Side(tile="a", name="x", index="m", rows="BLOCK_M", pointer="X", stride='{{stride("X", 0)}}')
_LOAD = f"x = {load_rows(SIDE)}"
_LOAD_FLOAT = f"{_LOAD}.to(tl.float32)"


def activation(problem: GemmProblem, form: Form, has: frozenset[str]) -> Operand:
    """The tile ``a``, or its pieces ``a_0``, ...; ``has`` names the tensors that the kernel gets."""
    if problem.op == "weight_only_gemm":
        operand = Operand(loop=[f"a = {load_rows(SIDE)}"])
    elif problem.x_format in BLOCK_FORMATS:
        operand = _blocks(problem, form)
    elif problem.x_format in FP8_FORMATS:
        operand = _fp8(problem, form)
    else:
        operand = _integers(problem, form, has)
    if form.pieces > 1 and not operand.in_pieces and not is_turned(problem):
        operand.loop.append(f"{names_of_pieces('a', form)} = {split(problem, form)}")
    return operand


def split(problem: GemmProblem, form: Form) -> str:
    """The pieces of a tile of numbers."""
    if form.pieces == 2:
        return "tl.split(tl.reshape(a, (BLOCK_M, BLOCK_K // 2, 2)))"
    format = problem.weight_format
    reordered = format == "int4_fp8" or (format in INT4_FORMATS and INT4_FORMATS[format][1] == "reorder")
    return f"split_quarters(a, BLOCK_M, BLOCK_K, {reordered})"


def _blocks(problem: GemmProblem, form: Form) -> Operand:
    format, operand = problem.x_format, Operand()
    f, zero = BLOCK_FORMATS[format], zero_scale(format)
    if f.has_global_scale:
        operand.before.append("x_global = tl.load(X_SCALE_2).to(tl.float32)")
    if problem.op == "quantized_gemm":
        block_codes(SIDE, operand, format, form)
        block_tile(SIDE, operand, problem, form, format, zero)
        return operand
    operand.loop += [_LOAD_FLOAT, *_block_scales(problem)]
    mantissa, smallest, largest = MINIFLOATS[f.element]
    rounded = f"x = round_minifloat(x, {mantissa}, {smallest}, {largest})"
    if form.kind != "block_scaled":
        operand.loop += [rounded, f"a = {block_numbers(SIDE, problem, form, format, 'x', zero)}"]
        if f.has_global_scale and not problem.rounds:
            operand.factors.append("x_global")
        return operand
    if problem.scale_rule == "even":
        # Codes of the largest scale would be finite here, which are infinite in the emulation.
        operand.loop.append("x_scale = tl.where(amax >= 0x7F800000, 255, x_scale)")
    if f.scale == "e8m0":
        operand.loop.append("x_scale = x_scale.to(tl.uint8)")
    if f.element == "fp4":
        codes = f"encode_small(x, 4, {mantissa}, {smallest}, {largest})"
        operand.loop.append(f"x = pack_fp4({codes}, BLOCK_M, BLOCK_K).to(tl.uint8)")
    elif f.element.startswith("fp6"):
        operand.loop.append(rounded)
    else:
        operand.loop.append(f"x = tl.minimum(tl.maximum(x, -{largest}), {largest}).to({FP8[f.element]})")
    block_tile(SIDE, operand, problem, form, format, zero)
    return operand


def _block_scales(problem: GemmProblem) -> list[str]:
    """Lines that compute the scales of ``x``, float32, and divide it by them."""
    f, rule = BLOCK_FORMATS[problem.x_format], problem.scale_rule
    shape = f"BLOCK_M, BLOCK_K, {f.size}"
    lines = [f"amax = amax_bits(tl.reshape(x, (BLOCK_M, BLOCK_K // {f.size}, {f.size})), 2)"]
    if f.scale == "e8m0":
        mantissa, _, largest = MINIFLOATS[f.element]
        even = f"scale_even(amax, {mantissa}, {MAX_EXPONENT[f.element]})"
        code = even if rule == "even" else f"scale_rceil(amax, {largest})"
        return [*lines, f"x_scale = {code}", f"x = over_powers(x, x_scale, {shape})"]
    if f.scale == "e5m3":
        lines.append(f"x_scale = scale_nearest(amax, {FLOATS[problem.dtype]})")
        multiplier = "e5m3(x_scale)"
    else:
        lines.append(f"x_scale = scale_e4m3(amax, x_global, {rule == 'sequential'})")
        multiplier = "x_scale.to(tl.float32) * x_global"
    return [*lines, f"x = over_blocks(x, or_eps({multiplier}), {shape})"]


def _given(problem: GemmProblem, pointer: str) -> str:
    """The given scales, or zero points, of the rows, float32, ``[BLOCK_M, 1]`` or a number."""
    if problem.x_granularity == "per_tensor":
        return f"tl.load({pointer}).to(tl.float32)"
    if problem.x_granularity == "per_token":
        return f"tl.load({pointer} + m)[:, None].to(tl.float32)"
    columns = problem.x_columns
    return f"tl.load({pointer} + m * {problem.k // columns} + k // {columns})[:, None].to(tl.float32)"


def _whole_row(lines: list[str], start: list[str]) -> list[str]:
    """A loop of its own over all of K, before that of the product."""
    loop = ["k = step * BLOCK_K", _LOAD_FLOAT, *lines]
    return [*start, "for step in range(0, STEPS):", *(f"    {line}" for line in loop)]


def _fp8(problem: GemmProblem, form: Form) -> Operand:
    format, dtype, operand = problem.x_format, FLOATS[problem.dtype], Operand()
    mantissa, smallest, limit = MINIFLOATS[format]
    grouped = problem.x_columns > 0
    place = operand.loop if grouped else operand.before
    native = form.kind in ("fp8", "block_scaled")
    if problem.op == "quantized_gemm":
        operand.loop.append(_LOAD)
        place.append(f"x_scale = {_given(problem, 'X_SCALE')}")
        number = fp8_numbers("x", format, form)
    else:
        operand.loop.append(_LOAD_FLOAT)
        if problem.group_size:
            place.append(f"x_scale = fp8_scale(amax_bits(x, 1), {limit}, {dtype})[:, None]")
        elif problem.scale_rule == "given":
            place.append(f"x_scale = {_given(problem, 'X_SCALE')}")
        else:
            start = ["amax = tl.zeros((BLOCK_M,), dtype=tl.int32)"]
            place += _whole_row(["amax = tl.maximum(amax, amax_bits(x, 1))"], start)
            place.append(f"x_scale = fp8_scale(amax, {limit}, {dtype})[:, None]")
        # That of groups stays in float32.
        operand.loop.append(f"x = over_scale(x, x_scale, {limit}, {'tl.float32' if problem.group_size else dtype})")
        number = f"round_minifloat(x, {mantissa}, {smallest}, {limit})"
        if native:
            operand.loop.append(f"x = x.to({FP8[format]})")
    if native:
        operand.loop.append("a = x")
        (operand.partial if grouped else operand.factors).append("x_scale")
        if form.kind == "block_scaled" and form.unit_scales:
            operand.before.append("unit = tl.full((BLOCK_M, BLOCK_K // 32), 127, dtype=tl.uint8)")
            operand.scale = "unit"
    elif grouped or problem.rounds:
        operand.loop.append(f"a = ({number} * x_scale).to(DOT)")
    else:
        operand.loop.append(f"a = {number}.to(DOT)")
        operand.factors.append("x_scale")
    return operand


def _integers(problem: GemmProblem, form: Form, has: frozenset[str]) -> Operand:
    format, dtype, operand = problem.x_format, FLOATS[problem.dtype], Operand()
    low, high = integer.BOUNDS[format]
    grouped, symmetric = problem.x_columns > 0, problem.scale_rule == "symmetric"
    zero = "x_zero_point" in has or problem.scale_rule == "asymmetric"
    place = operand.loop if grouped else operand.before
    if problem.op == "quantized_gemm" or problem.scale_rule == "given":
        operand.loop.append(f"{_LOAD}.to(tl.int32)" if problem.op == "quantized_gemm" else _LOAD_FLOAT)
        place.append(f"x_scale = {_given(problem, 'X_SCALE')}")
        if zero:
            place.append(f"x_zero = {_given(problem, 'X_ZERO_POINT')}")
    else:
        operand.loop.append(_LOAD_FLOAT)
        # Of all numbers of a row or a group: a variable, its dtype, what a tile adds to it.
        facts = [("amax", "tl.int32", "tl.maximum(amax, amax_bits(x, 1))")]
        if not symmetric:
            facts.append(("smallest", "tl.float32", "tl.minimum(smallest, tl.min(x, 1))"))
            facts.append(("largest", "tl.float32", "tl.maximum(largest, tl.max(x, 1))"))
        start = [f"{name} = tl.zeros((BLOCK_M,), dtype={kind})" for name, kind, _ in facts]
        steps = [f"{name} = {value}" for name, _, value in facts]
        place += [*start, *steps] if grouped else _whole_row(steps, start)
        rest = f"{high - low}, {dtype}"
        scale = f"symmetric_scale(amax, {rest})" if symmetric else f"asymmetric_scale(amax, smallest, largest, {rest})"
        place.append(f"x_scale = {scale}[:, None]")
        if zero:
            place.append(f"x_zero = integer_zero_point(smallest[:, None], x_scale, {low}, {high}, {dtype})")
    if problem.op == "prologue_gemm":
        operand.loop.append(f"x = encode_integer(x, x_scale, {'x_zero' if zero else '0.0'}, {low}, {high})")
    if form.kind == "int8":
        # Unsigned codes are moved into the signed range, and their zero point with them.
        moved = 128 if format == "uint8" else 0
        operand.loop.append(f"a = (x - {moved}).to(tl.int8)" if moved else "a = x.to(tl.int8)")
        operand.factors.append("x_scale")
        if zero or moved:
            operand.before.append(f"a_zero = {'x_zero.to(tl.int32)' if zero else '0'} - {moved}")
            operand.zero = "a_zero"
        return operand
    value = "(x.to(tl.float32) - x_zero)" if zero else "x.to(tl.float32)"
    if grouped or problem.rounds:
        operand.loop.append(f"a = ({value} * x_scale).to(DOT)")
    else:
        operand.loop.append(f"a = {value}.to(DOT)")
        operand.factors.append("x_scale")
    return operand
