"""Any packed weight by an activation that bfloat16 holds, exactly or rounded, with AVX512-BF16: ``bf16.h``."""

from collections.abc import Mapping
from typing import Any

from quark_inductor.lowering.base import GemmProblem
from quark_inductor.lowering.cpp.kernel import ELEMENTS, RULES, Kernel, block, given_scale
from quark_inductor.lowering.cpp.panel64 import COLUMNS, tile_bytes
from quark_inductor.lowering.cpp.portable import code_type, scales_beside
from quark_inductor.schemes.numerics import integer
from quark_inductor.schemes.numerics.block import BLOCK_FORMATS
from quark_inductor.schemes.operands import zero_scale

# Products of an element and a block scale of these are exact in bfloat16; ``""``: so is the activation as it is.
EXACT = frozenset({"", "mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2", "amdfp4_g16", "amdfp4_g32"})


def kernel(problem: GemmProblem, inputs: Mapping[str, Any], rounds_to: str | None, channels: int) -> Kernel | None:
    """The kernel for units of so many channels; ``None`` if there is none.

    Args:
        problem: what to compute.
        inputs: see :func:`quark_inductor.lowering.cpp.kernels.kernel_for`.
        rounds_to: ``"at::BFloat16"``: operands are rounded to it with their scales; ``None``: they are not rounded.
        channels: those of a unit.
    """
    if rounds_to not in (None, "at::BFloat16"):
        return None
    if (prepared := _prepare(problem, inputs)) is None or (scaled := _scales(problem, inputs)) is None:
        return None
    (prepare, activation), (columns, scales) = prepared, scaled
    code, rows = f"quark::bf16::{code_type(problem)}", "rows"
    if rounds_to is not None:
        if problem.weight_format == "int4_fp8":  # rounds between its two scales
            return None
        if problem.weight_format not in EXACT:
            code = f"quark::bf16::Rounded<{code}>"
        if problem.x_format not in EXACT:
            rows, activation = "{rows, true}", "quark::bf16::OfRows{}"
    panel = -(-problem.k // COLUMNS) * tile_bytes(problem.weight_format)
    return Kernel(
        namespace="bf16",
        headers=("generic", "panels", "bf16_codes", "bf16"),
        prepare=f"{prepare}{rows}, i, count)",
        tile=(
            f"const auto scales = {scales}; quark::bf16::tile<NT / 16, MT, {code}>(rows, "
            f"count, K, weight + n_start / 64 * {panel}, n_start % 64 / 16, {activation}, scales, scratch, tile, NT)"
        ),
        rows_bytes="rows_bytes(most, K)",
        rows=384,
        rows_at_a_time=384,
        channels=channels,
        scratch=f"scratch_bytes(K, {columns})",
        multiplies="bf16",
    )


def _prepare(problem: GemmProblem, inputs: Mapping[str, Any]) -> tuple[str, str] | None:
    """A call that prepares a row, without its last arguments, and what says how it is scaled."""
    format, rule, group, row = problem.x_format, problem.scale_rule, problem.group_size, "x + m * K, K, "
    rows, columns = "quark::bf16::OfRows{}", f"quark::bf16::OfColumns{{{group}}}"
    if problem.op == "weight_only_gemm":
        return (f"copy({row}", rows) if problem.dtype == "bfloat16" else None
    if group % COLUMNS or (rule == "given" and problem.x_granularity == "per_group"):
        return None
    if problem.op == "quantized_gemm":
        return _load(problem, inputs)
    if format in BLOCK_FORMATS:
        f, element, _ = block(format)
        global_scale = "float(x_scale_2[0])" if "x_scale_2" in inputs else "1.0f"
        of = f"quark::generic::{element}, {f.size}, quark::generic::{RULES[rule]}"
        return f"quantize_blocks<{of}>({row}{global_scale}, {zero_scale(format)}f, ", rows
    if format in ELEMENTS:
        element = f"quark::generic::{ELEMENTS[format]}"
        if group:
            return f"quantize_fp8_groups<{element}>({row}{group}, ", columns
        return f"quantize_fp8<{element}>({row}{f'{given_scale(problem)}, ' if rule == 'given' else ''}", rows
    low, high = integer.BOUNDS[format]
    if rule == "given":
        zero_point = given_scale(problem, "x_zero_point") if "x_zero_point" in inputs else "0.0f"
        grid = f"quark::generic::Grid{{{given_scale(problem)}, {zero_point}}}"
        return f"quantize_integers<{low}, {high}>({row}{grid}, ", rows
    bounds = f"{low}, {high}, {str(rule == 'symmetric').lower()}"
    if group:
        return f"quantize_integer_groups<{bounds}>({row}{group}, ", columns
    return f"quantize_integers<{bounds}>({row}", rows


def _load(problem: GemmProblem, inputs: Mapping[str, Any]) -> tuple[str, str] | None:
    """The same of an activation that is quantized already."""
    format, k = problem.x_format, problem.k
    if format in BLOCK_FORMATS:
        f, element, scale = block(format)
        global_scale = "float(x_scale_2[0])" if "x_scale_2" in inputs else "1.0f"
        of = f"quark::generic::{element}, {f.size}, quark::generic::{scale}"
        at = f"x + m * {f.packed(k)}, x_scale + m * {k // f.size}, K, "
        return f"load_blocks<{of}>({at}{global_scale}, {zero_scale(format)}f, ", "quark::bf16::OfRows{}"
    shape = inputs["x_scale"].get_size()
    groups = int(shape[-1]) if shape else 1
    if groups > 1 and k // groups % COLUMNS:
        return None
    columns, at = k // groups, "" if problem.x_granularity == "per_tensor" else f" + m * {groups}"
    activation = f"quark::bf16::OfColumns{{{columns}}}" if groups > 1 else "quark::bf16::OfRows{}"
    if format in ELEMENTS:
        of = f"quark::generic::{ELEMENTS[format]}"
        return f"load_fp8<{of}>(x + m * K, x_scale{at}, K, {columns}, ", activation
    zero_points = f"x_zero_point{at}" if "x_zero_point" in inputs else "(const int8_t*)nullptr"
    return f"load_integers(x + m * K, x_scale{at}, {zero_points}, K, {columns}, ", activation


def _scales(problem: GemmProblem, inputs: Mapping[str, Any]) -> tuple[str, str] | None:
    """How many columns share a scale that is not in the panel, and an object that gives the scales."""
    format = problem.weight_format
    if format in BLOCK_FORMATS:
        f, _, scale = block(format)
        global_scale = "float(weight_scale_2[0])" if "weight_scale_2" in inputs else "1.0f"
        return str(COLUMNS), f"quark::bf16::InTile<quark::generic::{scale}, {f.size}>{{{global_scale}}}"
    beside = scales_beside(problem, inputs)
    fill = (
        f"[&](int64_t k, float* scale, float* zero) {{ const int64_t n = n_start / 64 * 64; {_fill(problem, inputs)} }}"
    )
    if beside.columns >= problem.k:
        return "K", f"quark::bf16::PerChannel{{{fill}}}"
    if beside.columns % COLUMNS:
        return None
    return str(beside.columns), f"quark::bf16::PerGroup{{{beside.columns}, {fill}}}"


def _fill(problem: GemmProblem, inputs: Mapping[str, Any]) -> str:
    """Statements that write the scales and zero points of a panel, vectorized where they lie side by side."""
    beside = scales_beside(problem, inputs)
    parts = []
    if beside.scales is not None:
        parts.append(f"quark::bf16::fill_scales({beside.scales}, N - n, scale);")
    if beside.zeros is not None:
        signed, reorder, words = beside.zeros
        parts.append(f"quark::bf16::fill_zeros<{signed}, {reorder}>({words}, N - n, zero);")
    if beside.scales is None or beside.zeros is None:
        one = "" if beside.scales is not None else f"scale[c] = {beside.scale}; "
        one += "" if beside.zeros is not None else f"zero[c] = {beside.zero}; "
        parts.append(
            f"for (int64_t c = 0; c < 64; c++) {{ const int64_t n = n_start / 64 * 64 + c; if (n < N) {{ {one}}} else "
            "{ scale[c] = zero[c] = 0.0f; } }"
        )
    if beside.second != "1.0f":
        parts.append(f"for (int64_t c = 0; c < 64; c++) scale[c] *= {beside.second};")
    return " ".join(parts)
