"""The tile of a weight."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from quark_inductor.lowering.base import GemmProblem
from quark_inductor.lowering.triton.forms import Form, is_turned
from quark_inductor.lowering.triton.operand import (
    Operand,
    Side,
    block_codes,
    block_tile,
    fp8_numbers,
    load_rows,
    load_words,
    names_of_pieces,
)
from quark_inductor.schemes.numerics.block import BLOCK_FORMATS
from quark_inductor.schemes.numerics.int4 import FORMATS as INT4_FORMATS
from quark_inductor.schemes.operands import fp8_weight


@dataclass(frozen=True, kw_only=True, slots=True)
class Strides:
    """How a weight lies in memory, and what else there is of each expert.

    Attributes:
        rows: entries between two rows of its codes.
        columns: entries between two codes of a row.
        scale: entries between two scales of an integer weight's channels, and of its groups.
        zero_point: the same of its zero points.
        experts: entries between those of two experts, of each tensor that has some, by its name.
    """

    rows: int
    columns: int = 1
    scale: tuple[int, ...] = ()
    zero_point: tuple[int, ...] = ()
    experts: Mapping[str, int] = field(default_factory=dict)


def weight(problem: GemmProblem, form: Form, strides: Strides, has: frozenset[str], channels: int) -> Operand:
    """The tile ``b``, ``[BLOCK_N, ...]``, or ``[..., BLOCK_N]`` if it is turned; or its pieces.

    ``channels``: the value of ``BLOCK_N``.
    """
    format = problem.weight_format
    side = Side(tile="b", name="w", index="n", rows="BLOCK_N", pointer="WEIGHT", stride=str(strides.rows))
    if format in BLOCK_FORMATS:
        return _block_weight(problem, form, side)
    if fp8_weight(format) is not None:
        return _fp8_weight(problem, form, side, channels)
    if format in INT4_FORMATS or format == "int4_fp8":
        return _int4_weight(problem, form, side)
    return _integer_weight(problem, form, strides, side, has)


def _block_weight(problem: GemmProblem, form: Form, side: Side) -> Operand:
    operand, format = Operand(), problem.weight_format
    if BLOCK_FORMATS[format].has_global_scale:
        operand.before.append("w_global = tl.load(WEIGHT_SCALE_2).to(tl.float32)")
    block_codes(side, operand, format, form)
    block_tile(side, operand, problem, form, format, 0.0)
    return operand


def _fp8_weight(problem: GemmProblem, form: Form, side: Side, channels: int) -> Operand:
    operand = Operand()
    found = fp8_weight(problem.weight_format)
    assert found is not None
    block, native = found[1], form.kind == "fp8"
    operand.is_turned = native and form.turns
    operand.loop.append(f"w = {load_rows(side, turned=operand.is_turned)}")
    # One number for a tile that lies in a block, two for one of two blocks.
    is_number = block is not None and block[0] % channels == 0
    if block is not None:
        rows, columns = block
        first = f"pid_n * BLOCK_N // {rows}"
        scales = {"w_scale": first if is_number else f"n // {rows}"}
        if native and channels == 2 * rows:
            scales = {"w_scale_0": first, "w_scale_1": f"min({first} + 1, {-(-problem.n // rows) - 1})"}
            operand.partial_numbers = list(scales)
        for name, at in scales.items():
            scale = f"tl.load(WEIGHT_SCALE + {at} * {-(-problem.k // columns)} + k // {columns}).to(tl.float32)"
            operand.loop.append(f"{name} = {scale}")
        if operand.partial_numbers:
            operand.loop.append("b = w")
            return operand
    else:
        at = "WEIGHT_SCALE + n" if problem.weight_scale_ndim else "WEIGHT_SCALE"
        operand.before.append(f"w_scale = tl.load({at}).to(tl.float32)")
    value = "w" if native else fp8_numbers("w", "fp8_e5m2" if "e5m2" in problem.weight_format else "fp8_e4m3", form)
    per_channel = block is not None or problem.weight_scale_ndim > 0
    _finish_scaled(operand, problem, value, block is not None, native, per_channel and not is_number)
    return operand


def _finish_scaled(
    operand: Operand, problem: GemmProblem, value: str, grouped: bool, native: bool, per_channel: bool
) -> None:
    """A weight, as codes or as float32, whose scale ``w_scale`` is a number or one of each channel."""
    of_columns = "w_scale[None, :]" if per_channel else "w_scale"
    if native:
        operand.loop.append(f"b = {value}")
        if not grouped:
            operand.factors.append(of_columns)
        elif per_channel:
            operand.partial.append(of_columns)
        else:
            operand.partial_numbers = [of_columns]
    elif grouped or problem.rounds:
        of_rows = "w_scale[:, None]" if per_channel else "w_scale"
        operand.loop.append(f"b = ({value} * {of_rows}).to(DOT)")
    else:
        operand.loop.append(f"b = {value}.to(DOT)")
        operand.factors.append(of_columns)


def _integer_weight(problem: GemmProblem, form: Form, strides: Strides, side: Side, has: frozenset[str]) -> Operand:
    operand, ndim = Operand(), problem.weight_scale_ndim
    grouped, zero = ndim == 2, "weight_zero_point" in has
    operand.is_turned = form.kind == "int8" and form.turns
    operand.loop.append(f"w = {load_rows(side, step=strides.columns, turned=operand.is_turned)}")

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
    value = "w.to(tl.float32)"
    if zero:
        value = f"(w.to(tl.float32) - {'w_zero[:, None]' if ndim else 'w_zero'})"
    _finish_scaled(operand, problem, value, grouped, native=False, per_channel=ndim > 0)
    return operand


def _int4_weight(problem: GemmProblem, form: Form, side: Side) -> Operand:
    operand, two_stages = Operand(), problem.weight_format == "int4_fp8"
    signed, order = (True, "reorder") if two_stages else INT4_FORMATS[problem.weight_format]
    flags = f"{signed}, {order == 'reorder'}"
    if is_turned(problem):
        group, n = problem.weight_columns, problem.n
        operand.loop.append("rows = k + tl.arange(0, BLOCK_K)")
        if form.pieces > 1:
            operand.loop += [
                f"words = (pid_n * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)) % {n // 4}",
                f"w = tl.load(as_words(WEIGHT) + rows[:, None] * {n // 4} + words[None, :])",
                f"w_zero = tl.load(as_words(WEIGHT_ZERO_POINT) + k // {group} * {n // 4} + words)[None, :]",
                f"w_scale = tl.load(WEIGHT_SCALE + k // {group} * {n} + n)[None, :]",
                f"{names_of_pieces('b', form)} = int4_by_groups(w, w_zero, w_scale, BLOCK_N, {flags}, DOT, PTX)",
            ]
            return operand
        operand.loop += [
            "words = pid_n * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)",
            f"w = tl.load(WEIGHT + rows[:, None] * {n // 8} + words[None, :] % {n // 8})",
            f"w = unpack_int4(w, BLOCK_K, BLOCK_N, {flags})",
            f"w_scale = tl.load(WEIGHT_SCALE + k // {group} * {n} + n).to(tl.float32)",
            f"w_zero = int4_at(WEIGHT_ZERO_POINT, k // {group} * {n} + n, {flags}).to(tl.float32)",
            "b = ((w.to(tl.float32) - w_zero[None, :]) * w_scale[None, :]).to(DOT)",
        ]
        return operand
    if form.pieces > 1:
        return _int4_pieces(problem, form, side)
    operand.loop += [f"w = {load_rows(side, 8)}", f"w = unpack_int4(w, BLOCK_N, BLOCK_K, {flags})"]
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


def _int4_pieces(problem: GemmProblem, form: Form, side: Side) -> Operand:
    """4-bit integers, four to 16 bits, under the scales of channels."""
    operand, two_stages = Operand(in_pieces=True), problem.weight_format == "int4_fp8"
    signed, order = (True, "reorder") if two_stages else INT4_FORMATS[problem.weight_format]
    operand.before.append(f"w_zero = int4_at(WEIGHT_ZERO_POINT, n, {signed}, {order == 'reorder'})")
    if two_stages:
        operand.before.append(
            "w_scale = tl.load(WEIGHT_SCALE_2 + n).to(tl.float32) * tl.load(WEIGHT_SCALE).to(tl.float32)"
        )
    elif problem.rounds:
        operand.before.append("w_scale = tl.load(WEIGHT_SCALE + n)")
    else:
        operand.before.append("w_scale = tl.load(WEIGHT_SCALE + n).to(tl.float32)")
    if not problem.rounds:
        operand.factors.append("w_scale[None, :]")
    names = names_of_pieces("b", form)
    operand.loop += [f"w = {load_words(side, 32)}", f"{names} = int4_quarters(w, w_zero[:, None], {signed}, DOT, PTX)"]
    if problem.rounds:
        operand.loop += [f"{name} = times_exact({name}, w_scale[:, None], DOT, PTX)" for name in names.split(", ")]
    return operand
