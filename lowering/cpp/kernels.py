"""Which C++ computes a problem: how a row of the activation is prepared, and a tile of the product.

Of weights that are not packed, as graphs of other libraries have them, two pairs of formats have kernels of their own;
every other goes through ``generic.h``, right but not fast.
"""

from collections.abc import Mapping
from typing import Any

from quark_inductor.lowering.base import GemmProblem, no_layout, no_rule
from quark_inductor.lowering.cpp.kernel import ELEMENTS, PREPARED, ROW, Kernel, block, float_row, given_scale
from quark_inductor.lowering.cpp.panel64 import NAME
from quark_inductor.lowering.cpp.panels import kernel_of_panels
from quark_inductor.lowering.target import Target
from quark_inductor.schemes.numerics.block import BLOCK_FORMATS
from quark_inductor.schemes.numerics.int4 import FORMATS as INT4_FORMATS
from quark_inductor.schemes.operands import fp8_weight

# Measured on two cores of Zen 5. Below it, and where M is not known before run time, the generic kernel runs.
_MANY_TOKENS = 128


def refuse(problem: GemmProblem) -> str | None:
    """``None`` if there is a kernel for a problem, else why not."""
    if problem.scale_rule in ("floor", "ceil"):
        return no_rule(problem.scale_rule)
    of_fp8 = fp8_weight(problem.weight_format)
    for format in (problem.x_format, problem.weight_format if of_fp8 else ""):
        if "fnuz" in format:
            return f"has no kernel for {format}"
    for format in (problem.x_format, problem.weight_format):
        if format in BLOCK_FORMATS and problem.k % BLOCK_FORMATS[format].size:
            return f"K = {problem.k} is not a multiple of {BLOCK_FORMATS[format].size}"
    if problem.group_size and problem.k % problem.group_size:
        return f"K = {problem.k} is not a multiple of {problem.group_size}"
    if problem.layout:
        return None if problem.layout == NAME else no_layout(problem)
    if _family(problem) == "generic" and problem.m is not None and problem.m >= _MANY_TOKENS:
        return (
            f"from M = {_MANY_TOKENS} on the generic kernel is slower than the compiled emulation; M is {problem.m}: "
            "weights packed by load or quantize_ have faster ones"
        )
    return None


def _family(problem: GemmProblem) -> str:
    """Whose kernel: also the name of its header."""
    alike = problem.x_format == problem.weight_format and not problem.experts
    if alike and problem.x_format == "mxfp4" and problem.scale_rule in ("", "even"):
        return "mxfp4"
    simple = problem.weight_scale_ndim < 2 and problem.x_granularity != "per_group" and not problem.group_size
    return "fp8" if alike and problem.x_format == "fp8_e4m3" and simple else "generic"


def kernel_for(
    target: Target, problem: GemmProblem, inputs: Mapping[str, Any], rounds_to: str | None, threads: int
) -> Kernel:
    """The kernel of a problem that :func:`refuse` does not refuse.

    Args:
        target: where it will run.
        problem: what to compute.
        inputs: Inductor IR of the tensors, by the op's names.
        rounds_to: the C++ type to which the emulation rounds operands that are not exact in it, if that is wanted.
        threads: how many will run it.
    """
    if problem.layout:
        return kernel_of_panels(target, problem, inputs, rounds_to, threads)
    family = _family(problem)
    if family == "mxfp4":
        prologue = problem.op == "prologue_gemm"
        load = "load_row(x + m * (K / 2), x_scale + m * (K / 32), K, row)"
        return _by_rows(
            family,
            "quantize_row(x + m * K, K, row)" if prologue else load,
            "tile<MT>(prepared, K, weight + n_start * (K / 2), weight_scale + n_start * (K / 32), "
            "n_end - n_start, tile, NT)",
        )
    if family == "fp8":
        row = "x + m * K, K"
        if problem.op == "quantized_gemm":
            prepare = f"load_row({row}, {given_scale(problem)}, row)"
        else:
            scale = given_scale(problem) if problem.scale_rule == "given" else f"dynamic_scale({row})"
            prepare = f"quantize_row({row}, {scale}, row)"
        mode = "Exact" if rounds_to is None else f"Rounded<{rounds_to}>"
        return _by_rows(
            family,
            prepare if rounds_to is None else f"{prepare}; dequantize_row<{rounds_to}>(K, row)",
            f"tile<MT, {mode}>(prepared, K, weight + n_start * K, weight_scale + "
            f"{'n_start, 1' if problem.weight_scale_ndim else '0, 0'}, n_end - n_start, tile, NT)",
        )
    return Kernel(
        namespace=family,
        headers=(family,),
        prepare=f"{ROW}; {float_row(problem, inputs)}",
        tile=(
            f"{PREPARED}; quark::generic::tile(prepared, m_end - m_start, K, n_start, n_end - n_start, "
            "reinterpret_cast<float*>(scratch), tile, NT, "
            f"[&](int64_t n, float* w) {{ {_decode_weight(problem, inputs)}; }})"
        ),
        rows_bytes="most * row_bytes(K)",
        rows=64,
        scratch="weight_bytes(K)",
        experts=_experts(problem),
    )


def _by_rows(family: str, prepare: str, tile: str) -> Kernel:
    """A kernel that reads a row of the weight for 8 rows of the activation."""
    return Kernel(
        namespace=family,
        headers=(family,),
        prepare=f"{ROW}; if (m >= m_stop) {{ zero_row(row, K); }} else {{ {prepare}; }}",
        tile=f"{PREPARED}; quark::{family}::{tile}",
        rows_bytes="quark::round_up(most, MT) * row_bytes(K)",
        rows=8,
        pads=True,
        multiplies="int8" if family == "mxfp4" else "fp32",
    )


def _experts(problem: GemmProblem) -> dict[str, int]:
    if not problem.experts:
        return {}
    n, k = problem.n, problem.k
    if problem.weight_format in BLOCK_FORMATS:
        f = BLOCK_FORMATS[problem.weight_format]
        return {"weight": n * f.packed(k), "weight_scale": n * (k // f.size)}
    return {"weight": n * k, "weight_scale": n if problem.weight_scale_ndim else 0}


def _decode_weight(problem: GemmProblem, inputs: Mapping[str, Any]) -> str:
    format, n, k, ndim = problem.weight_format, problem.n, problem.k, problem.weight_scale_ndim
    if format in BLOCK_FORMATS:
        f, element, scale = block(format)
        global_scale = "float(weight_scale_2[0])" if "weight_scale_2" in inputs else "1.0f"
        return (
            f"decode_blocks<{element}, {f.size}, {scale}, T>(weight + n * {f.packed(k)}, "
            f"weight_scale + n * {k // f.size}, K, {global_scale}, 0.0f, w)"
        )
    if (of_fp8 := fp8_weight(format)) is not None:
        block_size = of_fp8[1]
        at, columns = "n" if ndim else "0", k
        if block_size is not None:
            columns = block_size[1]
            at = f"n / {block_size[0]} * {-(-k // columns)}"
        element = ELEMENTS["fp8_e5m2" if "e5m2" in format else "fp8_e4m3"]
        return f"decode_fp8<{element}, T>(weight + n * K, weight_scale + {at}, K, {columns}, w)"
    if format == "int4_fp8":
        words = f"weight + n * {k // 8}"
        return f"decode_int4_fp8<T>({words}, float(weight_scale[0]), weight_scale_2, weight_zero_point, n, K, w)"
    if format in INT4_FORMATS:
        signed, method = INT4_FORMATS[format]
        flags = f"{str(signed).lower()}, {str(method == 'reorder').lower()}, T"
        if ndim == 1:
            return f"decode_int4<{flags}>(weight + n * {k // 8}, weight_scale, weight_zero_point, n, K, w)"
        group = k // int(inputs["weight_scale"].get_size()[0])
        return f"decode_int4_groups<{flags}>(weight, weight_scale, weight_zero_point, n, {n}, K, {group}, w)"
    rows, step = (int(s) for s in inputs["weight"].get_stride())
    groups = int(inputs["weight_scale"].get_size()[1]) if ndim == 2 else 1

    def at_channel(name: str) -> str:
        strides = [int(s) for s in inputs[name].get_stride()]
        return f"{name} + n * {strides[0] if strides else 0}, {strides[1] if ndim == 2 else 0}"

    zero_points = at_channel("weight_zero_point") if "weight_zero_point" in inputs else "(const int8_t*)nullptr, 0"
    return (
        f"decode_integers<T>(weight + n * {rows}, {step}, {at_channel('weight_scale')}, {zero_points}, K, "
        f"{k // groups}, w)"
    )
