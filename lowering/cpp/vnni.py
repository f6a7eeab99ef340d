"""FP4 by FP4 and INT8 by INT8 in integers, with AVX512-VNNI: ``vnni_*.h``."""

from collections.abc import Mapping
from typing import Any

from quark_inductor.lowering.base import GemmProblem
from quark_inductor.lowering.cpp.kernel import RULES, Kernel, given_scale
from quark_inductor.lowering.cpp.panel64 import COLUMNS, tile_bytes
from quark_inductor.lowering.cpp.portable import scales_beside
from quark_inductor.schemes.numerics import integer

# Sums of products of codes are int32.
_MOST_COLUMNS = 65535


def kernel(
    problem: GemmProblem, inputs: Mapping[str, Any], rounds_to: str | None, channels: int, namespace: str = "vnni"
) -> Kernel | None:
    """See :func:`quark_inductor.lowering.cpp.bf16.kernel`; rounds nothing. ``namespace``: whose functions it calls."""
    if rounds_to is not None:
        return None
    if problem.x_format == problem.weight_format == "mxfp4" and problem.scale_rule in ("", "even"):
        return _mxfp4(problem, channels, namespace)
    if problem.x_format == problem.weight_format == "nvfp4":
        return _nvfp4(problem, channels, namespace)
    of_bytes = {problem.x_format, problem.weight_format} <= {"int8", "uint8"}
    by_groups = problem.group_size or problem.weight_scale_ndim == 2 or problem.x_granularity == "per_group"
    if of_bytes and not by_groups and problem.k <= _MOST_COLUMNS:
        return _int8(problem, inputs, channels, namespace)
    return None


def _mxfp4(problem: GemmProblem, channels: int, namespace: str) -> Kernel:
    if problem.op == "prologue_gemm":
        prepare = "quantize(x + m * K, K, rows, i, count)"
    else:
        prepare = "load(x + m * (K / 2), x_scale + m * (K / 32), K, rows, i, count)"
    return _kernel(problem, f"{namespace}::mxfp4", prepare, "", channels)


def _nvfp4(problem: GemmProblem, channels: int, namespace: str) -> Kernel:
    if problem.op == "prologue_gemm":
        rule = f"quark::generic::{RULES[problem.scale_rule]}"
        prepare = f"quantize<{rule}>(x + m * K, K, float(x_scale_2[0]), rows, i, count)"
    else:
        scales = "reinterpret_cast<const uint8_t*>(x_scale) + m * (K / 16)"
        prepare = f"load(x + m * (K / 2), {scales}, K, float(x_scale_2[0]), rows, i, count)"
    return _kernel(problem, f"{namespace}::nvfp4", prepare, "float(weight_scale_2[0]), ", channels)


def _int8(problem: GemmProblem, inputs: Mapping[str, Any], channels: int, namespace: str) -> Kernel:
    low, high = integer.BOUNDS[problem.x_format]
    zero_point = given_scale(problem, "x_zero_point") if "x_zero_point" in inputs else "0.0f"
    if problem.op == "quantized_gemm":
        prepare = f"load(x + m * K, K, {given_scale(problem)}, int32_t({zero_point}), rows, i, count)"
    else:
        grid = f"quark::generic::Grid{{{given_scale(problem)}, {zero_point}}}"
        if problem.scale_rule != "given":
            symmetric = str(problem.scale_rule == "symmetric").lower()
            grid = f"quark::{namespace}::integer_grid<{low}, {high}, {symmetric}>(x + m * K, K)"
        prepare = f"quantize<{low}, {high}>(x + m * K, K, {grid}, rows, i, count)"
    beside = scales_beside(problem, inputs)
    offset = 128 if problem.weight_format == "int8" else 0
    before = (
        "alignas(64) float weight_scales[NT] = {}; alignas(64) int32_t weight_zeros[NT] = {}; "
        f"for (int64_t n = n_start; n < n_end; n++) {{ weight_scales[n - n_start] = {beside.scale}; "
        f"weight_zeros[n - n_start] = int32_t({beside.zero}); }} "
        f"const quark::{namespace}::int8::Epilogue of_channels{{{offset}, weight_scales, weight_zeros, nullptr}}; "
    )
    return _kernel(problem, f"{namespace}::int8", prepare, "of_channels, ", channels, before)


def _kernel(problem: GemmProblem, namespace: str, prepare: str, more: str, channels: int, before: str = "") -> Kernel:
    panel = -(-problem.k // COLUMNS) * tile_bytes(problem.weight_format)
    return Kernel(
        namespace=namespace,
        headers=("generic", "panels", "vnni", namespace.replace("::", "_")),
        prepare=prepare,
        tile=(
            f"{before}quark::{namespace}::tile<NT / 16, MT>(rows, count, K, weight + n_start / 64 * {panel}, "
            f"n_start % 64 / 16, {more}scratch, tile, NT)"
        ),
        rows_bytes="rows_bytes(most, K)",
        rows=384,
        rows_at_a_time=384,
        channels=channels,
        scratch="scratch_bytes(K)",
        multiplies="int8",
    )
