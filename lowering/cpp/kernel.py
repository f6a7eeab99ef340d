"""What a kernel of the template is, and what kernels share: names in C++, and the activation as rows of floats."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quark_inductor.lowering.base import GemmProblem
from quark_inductor.schemes.numerics import integer
from quark_inductor.schemes.numerics.block import BLOCK_FORMATS, BlockFormat
from quark_inductor.schemes.operands import zero_scale

# C++ names in generic.h.
ELEMENTS = {
    "fp4": "Fp4",
    "fp6_e2m3": "Fp6E2M3",
    "fp6_e3m2": "Fp6E3M2",
    "fp8_e4m3": "Fp8E4M3",
    "fp8_e5m2": "Fp8E5M2",
}
SCALES = {"e8m0": "E8M0", "e4m3": "E4M3", "e5m3": "E5M3"}
RULES = {
    "even": "Even",
    "rceil": "Rceil",
    "nearest": "Nearest",
    "sequential": "Sequential",
    "combined": "Combined",
}

# How statements find a row, and a tile's rows, of a header whose rows lie one after the other.
ROW = "uint8_t* row = rows + i * row_bytes(K)"
PREPARED = "const uint8_t* prepared = rows + m_tile * MT * row_bytes(K)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """C++ for the template.

    Attributes:
        namespace: whose names the statements use.
        headers: what they need, in this order.
        prepare: a statement: row ``m`` of the activation, row ``i`` of ``count``, into ``rows``.
        tile: a statement: rows ``m_start`` to ``m_end`` times channels ``n_start`` to ``n_end`` into ``tile``.
        rows_bytes: bytes of ``most`` prepared rows.
        rows: the largest ``MT``, the rows of a tile.
        channels: the channels of a tile.
        rows_at_a_time: how many rows are prepared at a time: bounds the memory of a long prefill.
        pads: whether rows are prepared, as zeros, until there are whole tiles of them.
        before: a statement for before the threads start; ``""``: none.
        scratch: bytes a thread needs for the tile at ``scratch``; ``""``: none.
        experts: what lies between the weights of two experts, in elements, by the name of the tensor.
        multiplies: what its inner loop multiplies with: ``"int8"`` (integer dot products), ``"bf16"`` (those of
            bfloat16), ``"fp32"`` (fused multiply-add, whatever the compiler makes of it).
    """

    namespace: str
    headers: tuple[str, ...]
    prepare: str
    tile: str
    rows_bytes: str
    rows: int
    channels: int = 32
    rows_at_a_time: int = 512
    pads: bool = False
    before: str = ""
    scratch: str = ""
    experts: Mapping[str, int] = field(default_factory=dict)
    multiplies: str = "fp32"


def given_scale(problem: GemmProblem, name: str = "x_scale") -> str:
    """A scale, or a zero point, that is an operand, as a float."""
    return f"float({name}[{'m' if problem.x_granularity == 'per_token' else '0'}])"


def block(name: str) -> tuple[BlockFormat, str, str]:
    """A block format, and its element and scale in C++."""
    f = BLOCK_FORMATS[name]
    return f, ELEMENTS[f.element], SCALES[f.scale]


def float_row(problem: GemmProblem, inputs: Mapping[str, Any]) -> str:
    """A call of generic.h: row ``m`` of the activation as floats, quantized and dequantized, into ``row``."""
    format, rule, row = problem.x_format, problem.scale_rule, "x + m * K, K"
    if problem.op == "weight_only_gemm":
        return f"copy_row({row}, row)"
    global_scale = "float(x_scale_2[0])" if "x_scale_2" in inputs else "1.0f"
    if problem.op == "quantized_gemm":
        return _decode_activation(problem, inputs, global_scale)
    if format in BLOCK_FORMATS:
        f, element, _ = block(format)
        zero = f"{zero_scale(format)}f"
        return f"quantize_blocks<{element}, {f.size}, {RULES[rule]}>({row}, {global_scale}, {zero}, row)"
    if format in ELEMENTS:
        element = ELEMENTS[format]
        if problem.group_size:
            return f"quantize_fp8_groups<{element}>({row}, {problem.group_size}, row)"
        scale = given_scale(problem) if rule == "given" else f"fp8_scale<{element}>({row})"
        return f"quantize_fp8<{element}>({row}, {scale}, row)"
    low, high = integer.BOUNDS[format]
    if problem.group_size:
        symmetric = str(rule == "symmetric").lower()
        return f"quantize_integer_groups<{low}, {high}, {symmetric}>({row}, {problem.group_size}, row)"
    if rule == "given":
        zero_point = given_scale(problem, "x_zero_point") if "x_zero_point" in inputs else "0.0f"
        grid = f"Grid{{{given_scale(problem)}, {zero_point}}}"
    else:
        grid = f"integer_grid<{low}, {high}, {str(rule == 'symmetric').lower()}>({row})"
    return f"quantize_integer_row<{low}, {high}>({row}, {grid}, row)"


def _decode_activation(problem: GemmProblem, inputs: Mapping[str, Any], global_scale: str) -> str:
    format, k = problem.x_format, problem.k
    if format in BLOCK_FORMATS:
        f, element, scale = block(format)
        return (
            f"decode_blocks<{element}, {f.size}, {scale}, T>(x + m * {f.packed(k)}, x_scale + m * {k // f.size}, K, "
            f"{global_scale}, {zero_scale(format)}f, floats(row))"
        )
    shape = inputs["x_scale"].get_size()
    groups = int(shape[-1]) if shape else 1
    at = "" if problem.x_granularity == "per_tensor" else f" + m * {groups}"
    if format in ELEMENTS:
        return f"decode_fp8<{ELEMENTS[format]}, T>(x + m * K, x_scale{at}, K, {k // groups}, floats(row))"
    zero_points = f"x_zero_point{at}, 1" if "x_zero_point" in inputs else "(const int8_t*)nullptr, 0"
    return f"decode_integers<T>(x + m * K, 1, x_scale{at}, 1, {zero_points}, K, {k // groups}, floats(row))"
