"""The Triton source of a fused GEMM, as a template of Inductor's.

A kernel is a loop over K: read a tile of the activation and one of the weight, each made what the matrix cores take
(:class:`Operand`), and multiply. Scales that do not change along K, and the epilogue, come after the loop.
"""

import ast
import functools
from dataclasses import dataclass, field
from pathlib import Path

from quark_inductor.lowering.base import GemmProblem
from quark_inductor.lowering.triton.forms import Form
from quark_inductor.lowering.triton.tiles import Tile
from quark_inductor.schemes.numerics import integer
from quark_inductor.schemes.numerics.block import BLOCK_FORMATS
from quark_inductor.schemes.numerics.int4 import FORMATS as INT4_FORMATS
from quark_inductor.schemes.operands import FP8_FORMATS, fp8_weight, zero_scale

# Triton's names of dtypes; FP8 ones by the names of formats.
FLOATS = {"bfloat16": "tl.bfloat16", "float16": "tl.float16", "float32": "tl.float32"}
FP8 = {"fp8_e4m3": "tl.float8e4nv", "fp8_e5m2": "tl.float8e5", "fp8_e4m3fnuz": "tl.float8e4b8"}
FP8_MAX = {"fp8_e4m3": "448.0", "fp8_e5m2": "57344.0", "fp8_e4m3fnuz": "224.0"}
# What dot_scaled calls elements; FP6 ones are read as E4M3, in which they are exact.
DOT_FORMATS = {"fp4": "e2m1", "fp6_e2m3": "e4m3", "fp6_e3m2": "e4m3", "fp8_e4m3": "e4m3", "fp8_e5m2": "e5m2"}
# Mantissa bits and largest exponent of an element; of FP6 ones the smallest exponent and the largest number too.
_SHAPE = {"fp4": (1, 2), "fp6_e2m3": (3, 2), "fp6_e3m2": (2, 4), "fp8_e4m3": (3, 8), "fp8_e5m2": (2, 15)}
_FP6 = {"fp6_e2m3": (3, 0, 7.5), "fp6_e3m2": (2, -2, 28.0)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Strides:
    """How operands lie in memory, where that is not said by their shapes.

    Attributes:
        weight_rows: entries between two output channels of the weight's codes.
        weight_columns: entries between two codes of a channel.
        scale: entries between two scales of an integer weight's channels, and of its groups.
        zero_point: the same of its zero points.
    """

    weight_rows: int
    weight_columns: int = 1
    scale: tuple[int, ...] = ()
    zero_point: tuple[int, ...] = ()


@dataclass(slots=True)
class Operand:
    """What a kernel does for one operand.

    Attributes:
        before: lines before the loop.
        loop: lines in the loop, at column ``k``; they leave the tile in ``a`` or ``b``.
        scale: in the loop, the name of the scales of a block-scaled tile.
        factors: of the product's rows or columns, float32, applied after the loop.
        partial: of the product of one step, applied in the loop.
        zero: the zero points of rows or columns of integers, int32, that are not in the tile; ``""``: none.
    """

    before: list[str] = field(default_factory=list)
    loop: list[str] = field(default_factory=list)
    scale: str = "None"
    factors: list[str] = field(default_factory=list)
    partial: list[str] = field(default_factory=list)
    zero: str = ""


def activation(problem: GemmProblem, form: Form, has: frozenset[str]) -> Operand:
    """The tile ``a``: rows of the activation."""
    if problem.op == "weight_only_gemm":
        return Operand(loop=[f"a = {_rows('X', 'm', _stride('X'))}"])
    if problem.x_format in BLOCK_FORMATS:
        return _block_activation(problem, form, has)
    if problem.x_format in FP8_FORMATS:
        return _fp8_activation(problem, form)
    return _integer_activation(problem, form, has)


def _rows(pointer: str, rows: str, stride: str, share: int = 1, step: str = "1") -> str:
    """A tile of a tensor that has an entry for so many columns of the operand."""
    first, columns = ("k", "BLOCK_K") if share == 1 else (f"k // {share}", f"BLOCK_K // {share}")
    return f"load_rows({pointer}, {rows}, {stride}, {first}, {columns}, {step})"


def _stride(name: str) -> str:
    return f"{{{{stride('{name}', 0)}}}}"


def _x(problem: GemmProblem) -> str:
    return f"x = {_rows('X', 'm', _stride('X'))}.to(tl.float32)"


# --- block formats


def _block_activation(problem: GemmProblem, form: Form, has: frozenset[str]) -> Operand:
    f, name = BLOCK_FORMATS[problem.x_format], problem.x_format
    operand = Operand()
    if "x_scale_2" in has:
        operand.before.append("x_global = tl.load(X_SCALE_2).to(tl.float32)")
    if problem.op == "quantized_gemm":
        operand.loop = [
            *_load_elements(name, "X", "m", "BLOCK_M", _stride("X"), "x"),
            f"x_scale = {_rows('X_SCALE', 'm', f'(K // {f.size})', f.size)}",
        ]
        numbers = f.element != "fp4"
    else:
        operand.loop = [_x(problem), *_quantize_blocks(problem)]
        numbers = f.element.startswith("fp6")
    _finish_block(operand, problem, form, name, "x", "BLOCK_M", "a", numbers, zero_scale(name))
    return operand


def _load_elements(name: str, pointer: str, rows: str, count: str, stride: str, to: str) -> list[str]:
    """Lines that leave the elements in a variable: packed FP4 codes, FP6 numbers, or FP8."""
    element = BLOCK_FORMATS[name].element
    if element == "fp4":
        return [f"{to} = {_rows(pointer, rows, stride, 2)}"]
    if element in _FP6:
        decode = element.removeprefix("fp6_")
        return [f"{to} = {decode}(load_fp6({pointer}, {rows}, {stride}, k, {count}, BLOCK_K))"]
    return [f"{to} = {_rows(pointer, rows, stride)}"]


def _quantize_blocks(problem: GemmProblem) -> list[str]:
    """Lines that quantize ``x``, float32: leave ``x`` as packed FP4 codes, FP6 numbers or FP8, and ``x_scale``."""
    f, rule = BLOCK_FORMATS[problem.x_format], problem.scale_rule
    dtype, tile = FLOATS[problem.dtype], "BLOCK_M, BLOCK_K"
    mantissa, exponent = _SHAPE[f.element]
    lines = [f"amax = amax_bits(tl.reshape(x, (BLOCK_M, BLOCK_K // {f.size}, {f.size})), 2)"]
    if f.scale == "e8m0":
        code = (
            f"scale_even(amax, {mantissa}, {exponent})"
            if rule == "even"
            else f"scale_rceil(amax, {FP8_MAX[f.element]})"
        )
        lines += [f"x_scale = {code}.to(tl.uint8)", "multiplier = e8m0(x_scale)"]
    elif f.scale == "e5m3":
        lines += [f"x_scale = scale_nearest(amax, {dtype})", "multiplier = or_eps(e5m3(x_scale))"]
    else:
        lines.append(f"x_scale = scale_e4m3(amax, x_global, {rule == 'sequential'})")
        lines.append("multiplier = or_eps(x_scale.to(tl.float32) * x_global)")
    lines.append(f"x = over_blocks(x, multiplier, {tile}, {f.size}, {f.scale == 'e8m0'})")
    if f.element == "fp4":
        lines.append(f"x = pack_fp4(encode_fp4(x), {tile})")
    elif f.element in _FP6:
        lines.append(f"x = round_fp6(x, {', '.join(map(str, _FP6[f.element]))})")
    else:
        limit = FP8_MAX[f.element]
        lines.append(f"x = tl.minimum(tl.maximum(x, -{limit}), {limit}).to({FP8[f.element]})")
    return lines


def _finish_block(
    operand: Operand,
    problem: GemmProblem,
    form: Form,
    name: str,
    source: str,
    rows: str,
    tile: str,
    numbers: bool,
    zero: float,
) -> None:
    """From elements and scales to what the form multiplies."""
    f = BLOCK_FORMATS[name]
    if form.kind == "block_scaled":
        wanted = form.x_element if tile == "a" else form.weight_element
        value = source
        if wanted == "e4m3" and f.element == "fp4":
            value = f"e2m1(unpack_fp4({source}, {rows}, BLOCK_K)).to(tl.float8e4nv)"
        elif f.element in _FP6:
            value = f"{source}.to(tl.float8e4nv)"
        operand.loop.append(f"{tile} = {value}")
        operand.scale = f"{source}_scale"
        if f.has_global_scale:
            operand.factors.append(f"{source}_global")
        return
    value = f"e2m1(unpack_fp4({source}, {rows}, BLOCK_K))" if f.element == "fp4" else f"{source}.to(tl.float32)"
    scale = {"e8m0": "e8m0({0})", "e4m3": "{0}.to(tl.float32)", "e5m3": "e5m3({0})"}[f.scale].format(f"{source}_scale")
    if zero:
        scale = f"or_eps({scale})"
    if f.has_global_scale:
        if problem.rounds:
            scale = f"{scale} * {source}_global"
        else:
            operand.factors.append(f"{source}_global")
    operand.loop.append(f"{tile} = times_blocks({value}, {scale}, {rows}, BLOCK_K, {f.size}).to(DOT)")


# --- FP8


def _scale_of_rows(problem: GemmProblem, pointer: str) -> str:
    """The given scales, or zero points, of the activation's rows, float32, ``[BLOCK_M, 1]`` or a number."""
    if problem.x_granularity == "per_tensor":
        return f"tl.load({pointer}).to(tl.float32)"
    if problem.x_granularity == "per_token":
        return f"tl.load({pointer} + m)[:, None].to(tl.float32)"
    columns = problem.x_columns
    return f"tl.load({pointer} + m * {problem.k // columns} + k // {columns})[:, None].to(tl.float32)"


def _whole_row(problem: GemmProblem, lines: list[str], start: list[str]) -> list[str]:
    """A loop of its own over all of K, before the product's."""
    return [
        *start,
        "for step in range(0, STEPS):",
        "    k = step * BLOCK_K",
        *(f"    {line}" for line in (_x(problem), *lines)),
    ]


def _fp8_activation(problem: GemmProblem, form: Form) -> Operand:
    format, dtype, operand = problem.x_format, FLOATS[problem.dtype], Operand()
    limit = FP8_MAX[format]
    grouped = problem.x_columns > 0
    if problem.op == "quantized_gemm":
        operand.loop.append(f"x = {_rows('X', 'm', _stride('X'))}")
        (operand.loop if grouped else operand.before).append(f"x_scale = {_scale_of_rows(problem, 'X_SCALE')}")
    else:
        operand.loop.append(_x(problem))
        if problem.group_size:
            operand.loop.append(f"x_scale = fp8_scale(amax_bits(x, 1), {limit}, {dtype})[:, None]")
        elif problem.scale_rule == "given":
            operand.before.append(f"x_scale = {_scale_of_rows(problem, 'X_SCALE')}")
        else:
            operand.before += _whole_row(
                problem,
                ["amax = tl.maximum(amax, amax_bits(x, 1))"],
                ["amax = tl.zeros((BLOCK_M,), dtype=tl.int32)"],
            )
            operand.before.append(f"x_scale = fp8_scale(amax, {limit}, {dtype})[:, None]")
        rounds = "tl.float32" if problem.group_size else dtype
        operand.loop.append(f"x = encode_fp8(x, x_scale, {FP8[format]}, {limit}, {rounds})")
    if form.kind in ("fp8", "block_scaled"):
        operand.loop.append("a = x")
        (operand.partial if grouped else operand.factors).append("x_scale")
        if form.kind == "block_scaled" and form.unit_scales:
            operand.before.append("unit = tl.full((BLOCK_M, BLOCK_K // 32), 127, dtype=tl.uint8)")
            operand.scale = "unit"
    elif grouped or problem.rounds:
        operand.loop.append("a = (x.to(tl.float32) * x_scale).to(DOT)")
    else:
        operand.loop.append("a = x.to(tl.float32).to(DOT)")
        operand.factors.append("x_scale")
    return operand


# --- integers


def _integer_activation(problem: GemmProblem, form: Form, has: frozenset[str]) -> Operand:
    format, dtype, operand = problem.x_format, FLOATS[problem.dtype], Operand()
    low, high = integer.BOUNDS[format]
    grouped = problem.x_columns > 0
    symmetric = problem.scale_rule == "symmetric"
    zero = "x_zero_point" in has or problem.scale_rule == "asymmetric"
    place = operand.loop if grouped else operand.before
    if problem.op == "quantized_gemm":
        operand.loop.append(f"x = {_rows('X', 'm', _stride('X'))}.to(tl.int32)")
    else:
        operand.loop.append(_x(problem))
    if problem.op == "quantized_gemm" or problem.scale_rule == "given":
        place.append(f"x_scale = {_scale_of_rows(problem, 'X_SCALE')}")
        if zero:
            place.append(f"x_zero = {_scale_of_rows(problem, 'X_ZERO_POINT')}")
    else:
        # Of all numbers of a row or a group: a variable, its dtype, what a tile adds to it.
        facts = [("amax", "tl.int32", "tl.maximum(amax, amax_bits(x, 1))")]
        if not symmetric:
            facts.append(("smallest", "tl.float32", "tl.minimum(smallest, tl.min(x, 1))"))
            facts.append(("largest", "tl.float32", "tl.maximum(largest, tl.max(x, 1))"))
        start = [f"{name} = tl.zeros((BLOCK_M,), dtype={kind})" for name, kind, _ in facts]
        steps = [f"{name} = {value}" for name, _, value in facts]
        place += [*start, *steps] if grouped else _whole_row(problem, steps, start)
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
    value = "x.to(tl.float32) - x_zero" if zero else "x.to(tl.float32)"
    if grouped or problem.rounds:
        operand.loop.append(f"a = (({value}) * x_scale).to(DOT)")
    else:
        operand.loop.append(f"a = ({value}).to(DOT)")
        operand.factors.append("x_scale")
    return operand


# --- weights


def weight(problem: GemmProblem, form: Form, strides: Strides, has: frozenset[str]) -> Operand:
    """The tile ``b``: rows of the weight, ``[BLOCK_N, ...]``; or ``[BLOCK_K, BLOCK_N]`` if :func:`is_turned`."""
    format = problem.weight_format
    if format in BLOCK_FORMATS:
        return _block_weight(problem, form, strides, has)
    if fp8_weight(format) is not None:
        return _fp8_weight(problem, form, strides)
    if format in INT4_FORMATS or format == "int4_fp8":
        return _int4_weight(problem, form, strides)
    return _integer_weight(problem, form, strides, has)


def is_turned(problem: GemmProblem) -> bool:
    """Whether the tile of the weight has a row for each column of the activation: 4-bit integers by groups."""
    return problem.weight_format in INT4_FORMATS and problem.weight_scale_ndim == 2


def _block_weight(problem: GemmProblem, form: Form, strides: Strides, has: frozenset[str]) -> Operand:
    f, name, operand = BLOCK_FORMATS[problem.weight_format], problem.weight_format, Operand()
    if "weight_scale_2" in has:
        operand.before.append("w_global = tl.load(WEIGHT_SCALE_2).to(tl.float32)")
    operand.loop = [
        *_load_elements(name, "WEIGHT", "n", "BLOCK_N", str(strides.weight_rows), "w"),
        f"w_scale = {_rows('WEIGHT_SCALE', 'n', f'(K // {f.size})', f.size)}",
    ]
    _finish_block(operand, problem, form, name, "w", "BLOCK_N", "b", f.element != "fp4", 0.0)
    return operand


def _fp8_weight(problem: GemmProblem, form: Form, strides: Strides) -> Operand:
    operand = Operand()
    found = fp8_weight(problem.weight_format)
    assert found is not None
    block = found[1]
    operand.loop.append(f"w = {_rows('WEIGHT', 'n', str(strides.weight_rows))}")
    if block is not None:
        rows, columns = block
        scale = f"tl.load(WEIGHT_SCALE + n // {rows} * {-(-problem.k // columns)} + k // {columns}).to(tl.float32)"
        operand.loop.append(f"w_scale = {scale}")
    else:
        at = "WEIGHT_SCALE + n" if problem.weight_scale_ndim else "WEIGHT_SCALE"
        operand.before.append(f"w_scale = tl.load({at}).to(tl.float32)")
    _finish_scaled(operand, problem, form, "w", grouped=block is not None, native=form.kind == "fp8")
    return operand


def _finish_scaled(operand: Operand, problem: GemmProblem, form: Form, value: str, grouped: bool, native: bool) -> None:
    """A weight whose scale ``w_scale`` is a number or one of each channel."""
    per_channel = grouped or problem.weight_scale_ndim > 0
    of_columns = "w_scale[None, :]" if per_channel else "w_scale"
    if native:
        operand.loop.append(f"b = {value}")
        (operand.partial if grouped else operand.factors).append(of_columns)
    elif grouped or problem.rounds:
        of_rows = "w_scale[:, None]" if per_channel else "w_scale"
        operand.loop.append(f"b = ({value}.to(tl.float32) * {of_rows}).to(DOT)")
    else:
        operand.loop.append(f"b = {value}.to(tl.float32).to(DOT)")
        operand.factors.append(of_columns)


def _integer_weight(problem: GemmProblem, form: Form, strides: Strides, has: frozenset[str]) -> Operand:
    operand, ndim = Operand(), problem.weight_scale_ndim
    grouped, zero = ndim == 2, "weight_zero_point" in has
    rows = _rows("WEIGHT", "n", str(strides.weight_rows), step=str(strides.weight_columns))
    operand.loop.append(f"w = {rows}")

    def load(pointer: str, strides: tuple[int, ...]) -> str:
        places = ("n", f"k // {problem.weight_columns}" if grouped else "")
        at = "".join(f" + {place} * {step}" for place, step in zip(places, strides, strict=False))
        return f"tl.load({pointer}{at}).to(tl.float32)"

    place = operand.loop if grouped else operand.before
    place.append(f"w_scale = {load('WEIGHT_SCALE', strides.scale)}")
    if zero:
        place.append(f"w_zero = {load('WEIGHT_ZERO_POINT', strides.zero_point)}")
    if form.kind == "int8":
        moved = 128 if problem.weight_format == "uint8" else 0
        operand.loop.append(f"b = (w.to(tl.int32) - {moved}).to(tl.int8)" if moved else "b = w")
        operand.factors.append("w_scale[None, :]" if ndim else "w_scale")
        if zero or moved:
            operand.before.append(f"b_zero = {'w_zero.to(tl.int32)' if zero else '0'} - {moved}")
            operand.zero = "b_zero[None, :]" if zero and ndim else "b_zero"
        return operand
    value = "w"
    if zero:
        value = f"(w.to(tl.float32) - {'w_zero[:, None]' if ndim else 'w_zero'})"
    _finish_scaled(operand, problem, form, value, grouped, native=False)
    return operand


def _int4_weight(problem: GemmProblem, form: Form, strides: Strides) -> Operand:
    operand, two_stages = Operand(), problem.weight_format == "int4_fp8"
    signed, order = (True, "reorder") if two_stages else INT4_FORMATS[problem.weight_format]
    flags = f"{signed}, {order == 'reorder'}"
    if is_turned(problem):
        group = problem.weight_columns
        n = problem.n
        operand.loop += [
            "rows = k + tl.arange(0, BLOCK_K)",
            "words = pid_n * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)",
            f"w = tl.load(WEIGHT + rows[:, None] * {n // 8} + words[None, :] % {n // 8})",
            f"w = unpack_int4(w, BLOCK_K, BLOCK_N, {flags})",
            f"w_scale = tl.load(WEIGHT_SCALE + k // {group} * {n} + n).to(tl.float32)",
            f"w_zero = int4_at(WEIGHT_ZERO_POINT, k // {group} * {n} + n, {flags}).to(tl.float32)",
            "b = ((w.to(tl.float32) - w_zero[None, :]) * w_scale[None, :]).to(DOT)",
        ]
        return operand
    words = _rows("WEIGHT", "n", str(strides.weight_rows), 8)
    operand.loop += [f"w = {words}", f"w = unpack_int4(w, BLOCK_N, BLOCK_K, {flags})"]
    operand.before.append(f"w_zero = int4_at(WEIGHT_ZERO_POINT, n, {flags}).to(tl.float32)")
    if two_stages:
        operand.before.append(
            "w_scale = tl.load(WEIGHT_SCALE_2 + n).to(tl.float32) * tl.load(WEIGHT_SCALE).to(tl.float32)"
        )
    else:
        operand.before.append("w_scale = tl.load(WEIGHT_SCALE + n).to(tl.float32)")
    value = "(w.to(tl.float32) - w_zero[:, None])"
    if problem.rounds and two_stages:
        operand.before[-1] = "w_scale = tl.load(WEIGHT_SCALE_2 + n).to(tl.float32)"
        operand.before.append("w_outer = tl.load(WEIGHT_SCALE).to(tl.float32)")
        operand.loop.append(f"b = (({value} * w_scale[:, None]) * w_outer).to(DOT)")
    elif problem.rounds:
        operand.loop.append(f"b = ({value} * w_scale[:, None]).to(DOT)")
    else:
        operand.loop.append(f"b = {value}.to(DOT)")
        operand.factors.append("w_scale[None, :]")
    return operand


# --- the kernel


_HEAD = """{{{{def_kernel({names})}}}}
    M = {{{{size("X", 0)}}}}
    N: tl.constexpr = {n}
    K: tl.constexpr = {k}
    if M * N == 0:
        return
    STEPS: tl.constexpr = K // BLOCK_K
    pid = tl.program_id(0).to(INDEX_DTYPE)
    tiles_m = (M + BLOCK_M - 1) // BLOCK_M
    tiles_n = (N + BLOCK_N - 1) // BLOCK_N
    # Programs that run together share what they read: GROUP_M tiles of rows, then the next columns.
    width = GROUP_M * tiles_n
    group = pid // width
    height = min(tiles_m - group * GROUP_M, GROUP_M)
    pid_m = group * GROUP_M + (pid % width) % height
    pid_n = (pid % width) // height
    # Rows and columns past the end read others, and are not stored.
    m = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M).to(INDEX_DTYPE)) % M
    n = (pid_n * BLOCK_N + tl.arange(0, BLOCK_N).to(INDEX_DTYPE)) % N
"""

_TAIL = """    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M).to(INDEX_DTYPE)
    columns = pid_n * BLOCK_N + tl.arange(0, BLOCK_N).to(INDEX_DTYPE)
    idx_m = rows[:, None]
    idx_n = columns[None, :]
    mask = (idx_m < M) & (idx_n < N)
"""


def kernel(problem: GemmProblem, form: Form, tile: Tile, strides: Strides, names: tuple[str, ...]) -> str:
    """The source of a kernel, for ``TritonTemplate``.

    Args:
        problem: what it computes.
        form: how it multiplies.
        tile: whether operands are swapped, and K is split; its sizes are constants that the template gets besides.
        strides: how the operands lie in memory.
        names: of the tensors it gets, those of the op: ``"x"``, ``"weight"``, ...
    """
    has = frozenset(names)
    a, b = activation(problem, form, has), weight(problem, form, strides, has)
    head = _HEAD.format(names=", ".join(f'"{name.upper()}"' for name in names), n=problem.n, k=problem.k)
    if form.kind == "float":
        head += f"    DOT: tl.constexpr = {FLOATS[form.dot]}\n"
    integers = form.kind == "int8"
    shape = "(BLOCK_N, BLOCK_M)" if tile.swapped else "(BLOCK_M, BLOCK_N)"
    before = [*a.before, *b.before, f"acc = tl.zeros({shape}, dtype={'tl.int32' if integers else 'tl.float32'})"]
    sums_b, sums_a = integers and bool(a.zero), integers and bool(b.zero)
    before += ["sum_b = tl.zeros((BLOCK_N,), dtype=tl.int32)"] * sums_b
    before += ["sum_a = tl.zeros((BLOCK_M,), dtype=tl.int32)"] * sums_a
    before += ["first = 0", "last = STEPS"]
    loop = ["k = step * BLOCK_K", *a.loop, *b.loop, *_product(problem, form, a, b, tile.swapped)]
    loop += ["sum_b += tl.sum(b.to(tl.int32), 1)"] * sums_b + ["sum_a += tl.sum(a.to(tl.int32), 1)"] * sums_a
    after = ["acc = tl.trans(acc)"] * tile.swapped
    if sums_b:
        after.append(f"acc -= {a.zero} * sum_b[None, :]")
    if sums_a:
        after.append(f"acc -= {b.zero} * sum_a[:, None]")
    if sums_a and sums_b:
        after.append(f"acc += {a.zero} * {b.zero} * ((last - first) * BLOCK_K)")
    after += ["acc = acc.to(tl.float32)"] * integers
    after += [f"acc = acc * {factor}" for factor in (*a.factors, *b.factors)]
    lines = [*before, "for step in range(first, last):", *(f"    {line}" for line in loop), *after]
    if tile.parts > 1:
        at = lines.index("first = 0")
        lines[at : at + 2] = [
            "part = tl.program_id(1)",
            "first = part * STEPS_A_PART",
            "last = min(first + STEPS_A_PART, STEPS)",
        ]
    body = "".join(f"    {line}\n" for line in lines)
    indices = '("part", "idx_m", "idx_n")' if tile.parts > 1 else '("idx_m", "idx_n")'
    store = f'    {{{{store_output({indices}, "acc", "mask", val_shape=("BLOCK_M", "BLOCK_N"))}}}}\n'
    return head + body + _TAIL + store + functions(body)


def _product(problem: GemmProblem, form: Form, a: Operand, b: Operand, swapped: bool) -> list[str]:
    """The lines that multiply the tiles."""
    if form.kind == "block_scaled":
        x, w = f'{a.scale}, "{form.x_element}"', f'{b.scale}, "{form.weight_element}"'
        product = f"b, {w}, tl.trans(a), {x}" if swapped else f"a, {x}, tl.trans(b), {w}"
        return [f"acc = tl.dot_scaled({product}, acc)"]
    if swapped:
        tiles = "tl.trans(b), tl.trans(a)" if is_turned(problem) else "b, tl.trans(a)"
    else:
        tiles = "a, b" if is_turned(problem) else "a, tl.trans(b)"
    if form.kind == "int8":
        return [f"acc = tl.dot({tiles}, acc, out_dtype=tl.int32)"]
    options = ', input_precision="ieee"' if form.dot == "float32" else ""
    if form.kind == "fp8":
        # Hopper sums FP8 products in 14 bits: no more than those of a tile before they are added in float32.
        options = ", max_num_imprecise_acc=BLOCK_K"
    if partial := [*a.partial, *b.partial]:
        factors = (f"tl.trans({factor})" if swapped else factor for factor in partial)
        return [f"acc += tl.dot({tiles}) * " + " * ".join(factors)]
    return [f"acc = tl.dot({tiles}, acc{options})"]


@functools.cache
def _device_functions() -> dict[str, tuple[str, frozenset[str]]]:
    """Source of each device function, and the names in it."""
    found = {}
    for file in ("decode", "encode"):
        text = Path(__file__).with_name(f"{file}.py").read_text()
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef):
                names = frozenset(n.id for n in ast.walk(node) if isinstance(n, ast.Name))
                lines = text.splitlines()[node.decorator_list[0].lineno - 1 : node.end_lineno]
                found[node.name] = "\n".join(lines), names
    return found


def functions(body: str) -> str:
    """The device functions that a kernel calls, and those that they call."""
    known = _device_functions()
    wanted = [name for name in known if f"{name}(" in body]
    for name in wanted:
        wanted += sorted((known[name][1] & known.keys()) - set(wanted))
    return "".join(f"\n\n{known[name][0]}\n" for name in known if name in wanted)
