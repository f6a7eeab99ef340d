"""Any packed weight on any CPU: ``portable.h``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quark_inductor.lowering.base import GemmProblem
from quark_inductor.lowering.cpp.kernel import ELEMENTS, PREPARED, ROW, Kernel, block, float_row
from quark_inductor.lowering.cpp.panel64 import COLUMNS, bits, tile_bytes
from quark_inductor.schemes.numerics.block import BLOCK_FORMATS
from quark_inductor.schemes.numerics.int4 import FORMATS as INT4_FORMATS
from quark_inductor.schemes.operands import fp8_weight


def kernel(
    problem: GemmProblem,
    inputs: Mapping[str, Any],
    channels: int,
    namespace: str = "portable",
    sizes: str = "NT / 16",
    rounds_to: str = "T",
) -> Kernel:
    """The kernel for units of so many channels: tile<sizes, code, rounds_to> of a namespace."""
    format = problem.weight_format
    panel = -(-problem.k // COLUMNS) * tile_bytes(format)
    step, second, scales = _scales(problem, inputs)
    tile = (
        f"auto scales = {scales}; {PREPARED}; "
        f"quark::{namespace}::tile<{sizes}, quark::portable::{code_type(problem)}, {rounds_to}>(prepared, "
        f"m_end - m_start, K, weight + n_start / 64 * {panel}, n_start % 64 / 16, {step}, {second}, scales, scratch, "
        "tile, NT)"
    )
    return Kernel(
        namespace="generic",
        headers=("generic", "portable"),
        prepare=f"{ROW}; {float_row(problem, inputs)}",
        tile=tile,
        rows_bytes="most * row_bytes(K)",
        rows=384,
        rows_at_a_time=384,
        channels=channels,
        scratch=f"quark::{namespace}::scratch_bytes()",
    )


def code_type(problem: GemmProblem) -> str:
    """The C++ type of a weight's codes, by one name in every header that has it."""
    format = problem.weight_format
    if format in BLOCK_FORMATS:
        return ELEMENTS[BLOCK_FORMATS[format].element]
    if fp8_weight(format) is not None:
        return ELEMENTS["fp8_e5m2" if "e5m2" in format else "fp8_e4m3"]
    return f"{'UInt' if format.startswith('u') else 'Int'}{bits(format)}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Beside:
    """Scales and zero points that lie beside a panel, as C++: of channel ``n`` and column ``k``.

    Attributes:
        columns: how many columns share them; at least K: all.
        scale: the scale.
        zero: the zero point.
        second: what multiplies after the scale.
        scales: a pointer to the scale of channel ``n`` where those of the next channels follow, else ``None``.
        zeros: the same of zero points of 4 bits: whether they are signed, whether reordered, a pointer to words.
    """

    columns: int
    scale: str
    zero: str = "0.0f"
    second: str = "1.0f"
    scales: str | None = None
    zeros: tuple[str, str, str] | None = None


def scales_beside(problem: GemmProblem, inputs: Mapping[str, Any]) -> Beside:
    """Those of a weight whose scales are not those of blocks."""
    format, k, ndim = problem.weight_format, problem.k, problem.weight_scale_ndim
    of_fp8 = fp8_weight(format)
    if of_fp8 is not None and of_fp8[1] is not None:
        rows, columns = of_fp8[1]
        return Beside(columns=columns, scale=f"float(weight_scale[n / {rows} * {-(-k // columns)} + k / {columns}])")
    if of_fp8 is not None:
        scales = "weight_scale + n" if ndim else None
        return Beside(columns=k, scale=f"float(weight_scale[{'n' if ndim else 0}])", scales=scales)
    if format == "int4_fp8":
        return Beside(
            columns=k,
            scale="weight_scale_2[n]",
            zero=_zero_point("true", "true", "n"),
            second="float(weight_scale[0])",
            scales="weight_scale_2 + n",
            zeros=("true", "true", "weight_zero_point + n / 8"),
        )
    if format in INT4_FORMATS:
        signed, reorder = str(INT4_FORMATS[format][0]).lower(), str(INT4_FORMATS[format][1] == "reorder").lower()
        columns = k // int(inputs["weight_scale"].get_size()[0]) if ndim == 2 else k
        at = f"k / {columns} * N + n" if ndim == 2 else "n"
        return Beside(
            columns=columns,
            scale=f"float(weight_scale[{at}])",
            zero=_zero_point(signed, reorder, at),
            scales=f"weight_scale + {at}",
            zeros=(signed, reorder, f"weight_zero_point + ({at}) / 8"),
        )
    columns = k // int(inputs["weight_scale"].get_size()[1]) if ndim == 2 else k

    def at_channel(name: str) -> tuple[str, bool]:
        strides = [int(s) for s in inputs[name].get_stride()]
        group = f" + k / {columns} * {strides[1]}" if ndim == 2 else ""
        return f"n * {strides[0] if strides else 0}{group}", bool(strides) and strides[0] == 1

    at, in_a_row = at_channel("weight_scale")
    has_zero = "weight_zero_point" in inputs
    return Beside(
        columns=columns,
        scale=f"float(weight_scale[{at}])",
        zero=f"float(weight_zero_point[{at_channel('weight_zero_point')[0]}])" if has_zero else "0.0f",
        scales=f"weight_scale + {at}" if in_a_row else None,
    )


def _zero_point(signed: str, reorder: str, at: str) -> str:
    word = f"weight_zero_point[({at}) / 8]"
    return f"quark::generic::int4<{signed}>({word}, quark::generic::nibble<{reorder}>(n % 8))"


def _scales(problem: GemmProblem, inputs: Mapping[str, Any]) -> tuple[int, str, str]:
    """How many columns share a scale, what multiplies after it, and an object that gives them."""
    format = problem.weight_format
    if format in BLOCK_FORMATS:
        f, _, scale = block(format)
        global_scale = "float(weight_scale_2[0])" if "weight_scale_2" in inputs else "1.0f"
        return f.size, "1.0f", f"quark::portable::InTile<{scale}, {f.size}>{{{global_scale}}}"
    beside = scales_beside(problem, inputs)
    # Channels that pad a panel have no scale.
    fill = (
        "[&](int64_t k, float* scale, float* zero) { for (int64_t c = 0; c < 64; c++) { "
        "const int64_t n = n_start / 64 * 64 + c; if (n >= N) { scale[c] = zero[c] = 0.0f; continue; } "
        f"scale[c] = {beside.scale}; zero[c] = {beside.zero}; }} }}"
    )
    return -(-beside.columns // 8) * 8, beside.second, f"quark::portable::Beside{{{fill}}}"
