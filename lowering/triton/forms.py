"""How a problem is multiplied on a chip: which of its matrix instructions, and what they are given."""

import math
from dataclasses import dataclass, replace

from quark_inductor.lowering.base import GemmProblem
from quark_inductor.lowering.triton.chips import Chip
from quark_inductor.schemes.numerics.block import BLOCK_FORMATS
from quark_inductor.schemes.numerics.int4 import FORMATS as INT4_FORMATS
from quark_inductor.schemes.operands import FP8_FORMATS, fp8_weight

# Above it sums of products of codes minus zero points could leave 32 bits.
_LARGEST_K_WITH_ZERO_POINTS = 32768


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """What the loop multiplies.

    Attributes:
        kind: ``"block_scaled"``: codes and the scales of their blocks, by one instruction; ``"fp8"``, ``"int8"``:
            codes, scaled afterwards; ``"float"``: numbers, which are the codes times the scales of their blocks.
        dot: of ``"float"``, the dtype of the numbers.
        x_element: of ``"block_scaled"``, the activation's element as Triton calls it.
        weight_element: the weight's.
        unit_scales: the activation has no scales of blocks, but the instruction wants some.
        pieces: as how many tiles the numbers of a 4-bit weight are multiplied, each a nibble of every byte (2) or of
            every 16 bits (4): sums over K do not mind its order, and no nibble has to move to another thread.
        packed_products: the chip multiplies pairs of bfloat16 numbers in one instruction.
        ptx: pieces are made by PTX instructions.
        tensor_memory: the left operand lies there.
        converts_fp8: the chip converts FP8 to other dtypes.
        turns: a tile of codes of the weight is turned as it is loaded, not afterwards. Of the latter Triton 3.7 makes
            rows that share banks of gfx942's LDS, and on gfx950 more additions of addresses.
        orders_blocks: both operands' blocks are multiplied in an order in which a lane's scales are neighbours: sums do
            not mind it.
    """

    kind: str
    dot: str = ""
    x_element: str = ""
    weight_element: str = ""
    unit_scales: bool = False
    pieces: int = 1
    packed_products: bool = False
    ptx: bool = False
    tensor_memory: bool = False
    converts_fp8: bool = True
    turns: bool = False
    orders_blocks: bool = False


def form_of(chip: Chip, problem: GemmProblem) -> Form:
    """The form in which a chip multiplies the operands of a problem.

    Args:
        chip: where it will run.
        problem: what to compute. Where it asks for rounded operands, those that are not exact are multiplied as
            numbers.
    """
    weight_only = problem.op == "weight_only_gemm"
    if not weight_only and (form := _block_scaled(chip, problem)) is not None:
        return form
    # Fewer columns are not to be had for operands of 8 bits.
    columns = math.gcd(problem.k, problem.x_columns, problem.weight_columns)
    if not weight_only and not problem.rounds and columns % 32 == 0:
        if _is_fp8(chip, problem):
            return Form(kind="fp8", turns="fp8" in chip.turns_weights)
        if _is_int8(problem):
            return Form(kind="int8", turns="int8" in chip.turns_weights)
    dot = _dot(problem)
    return Form(
        kind="float",
        dot=dot,
        pieces=_pieces(chip, problem, dot),
        packed_products=chip.packed_products,
        ptx=chip.ptx,
        tensor_memory=chip.left_rows == 128,
        converts_fp8=chip.converts_fp8,
    )


def _pieces(chip: Chip, problem: GemmProblem, dot: str) -> int:
    """The most tiles as which a 4-bit weight's numbers are multiplied: where the dtype holds them exactly."""
    format = problem.weight_format
    if format in INT4_FORMATS or format == "int4_fp8":
        exact = dot != "float32" and not (format == "int4_fp8" and problem.rounds)
        return 4 if exact and (chip.ptx or not is_turned(problem)) else 1
    w = BLOCK_FORMATS.get(format)
    if w is None or w.element != "fp4" or (problem.rounds and w.has_global_scale):
        return 1
    if dot != "bfloat16" and not (dot == "float16" and w.scale == "e4m3"):
        return 1
    return 4 if chip.ptx or chip.rounds_bfloat16 else 2


def is_turned(problem: GemmProblem) -> bool:
    """Whether the tile of the weight has a row for each column of the activation: 4-bit integers by groups."""
    return problem.weight_format in INT4_FORMATS and problem.weight_scale_ndim == 2


def cut(form: Form, problem: GemmProblem, rows: int, channels: int, columns: int) -> Form:
    """The form with as many pieces as a tile of this size is worth."""
    if is_turned(problem):
        # Along N. Those of fewer channels are too narrow for a program's warps.
        return form if channels // 4 >= 64 else replace(form, pieces=1)
    # Each needs 16 columns.
    pieces = min(form.pieces, columns // 16)
    if form.tensor_memory and rows > 16:
        # Each piece takes its own part of it, and with more rows a kernel would fill it, and spill.
        pieces = min(pieces, 2)
    if problem.weight_format not in BLOCK_FORMATS and pieces < 4:
        pieces = 1
    return replace(form, pieces=pieces)


def _block_scaled(chip: Chip, problem: GemmProblem) -> Form | None:
    w = BLOCK_FORMATS.get(problem.weight_format)
    if w is None or problem.k % chip.block_scaled_columns:
        return None
    x = BLOCK_FORMATS.get(problem.x_format)
    if w.scale == "e4m3":
        both = x is not None and x.scale == "e4m3" and chip.nvfp4 and not problem.rounds
        return Form(kind="block_scaled", x_element="e2m1", weight_element="e2m1") if both else None
    if w.scale != "e8m0" or not chip.mx:
        return None
    weight_element = _DOT_ELEMENTS[w.element]
    if x is not None:
        if x.scale != "e8m0":
            return None
        x_element = _DOT_ELEMENTS[x.element]
    else:
        # FP8 under a scale of a tensor or a token, which is applied afterwards.
        if problem.x_format not in ("fp8_e4m3", "fp8_e5m2") or problem.x_columns or problem.rounds:
            return None
        x_element = _DOT_ELEMENTS[problem.x_format]
    if not chip.mixes_elements and x_element != weight_element:
        # FP4 codes are exact in E4M3.
        if "e5m2" in (x_element, weight_element):
            return None
        x_element = weight_element = "e4m3"
    return Form(
        kind="block_scaled",
        x_element=x_element,
        weight_element=weight_element,
        unit_scales=x is None and chip.wants_scales,
        turns="block_scaled" in chip.turns_weights,
        orders_blocks=chip.orders_blocks
        and problem.op == "quantized_gemm"
        and x is not None
        and x.element == "fp4" == w.element,
    )


# FP6 ones are exact in E4M3.
_DOT_ELEMENTS = {"fp4": "e2m1", "fp6_e2m3": "e4m3", "fp6_e3m2": "e4m3", "fp8_e4m3": "e4m3", "fp8_e5m2": "e5m2"}


def _is_fp8(chip: Chip, problem: GemmProblem) -> bool:
    weight = fp8_weight(problem.weight_format)
    return weight is not None and problem.x_format in chip.fp8 and FP8_FORMATS[problem.x_format] == weight[0]


def _is_int8(problem: GemmProblem) -> bool:
    alike = problem.x_format in ("int8", "uint8") and problem.weight_format in ("int8", "uint8")
    small = problem.k <= _LARGEST_K_WITH_ZERO_POINTS
    return alike and small and not problem.weight_columns and not problem.x_columns


def _dot(problem: GemmProblem) -> str:
    """The dtype in which numbers are multiplied: one that holds them exactly, if what scales them later can do so."""
    if problem.rounds or problem.op == "weight_only_gemm" or problem.x_columns or problem.weight_columns:
        return problem.dtype
    scales = {BLOCK_FORMATS[f].scale for f in (problem.x_format, problem.weight_format) if f in BLOCK_FORMATS}
    # float16 holds all codes, less zero points, but not every power of two.
    return "bfloat16" if scales & {"e8m0", "e5m3"} else "float16"
