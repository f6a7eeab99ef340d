"""Which C++ computes a problem: how a row of the activation is prepared, and a tile of the product.

Two pairs of formats have kernels of their own; every other goes through ``generic.h``, right but not fast.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quark_inductor.lowering.base import GemmProblem
from quark_inductor.schemes.numerics import integer
from quark_inductor.schemes.numerics.block import BLOCK_FORMATS, BlockFormat
from quark_inductor.schemes.numerics.int4 import FORMATS as INT4_FORMATS
from quark_inductor.schemes.operands import fp8_weight, zero_scale

# C++ names in generic.h.
_ELEMENTS = {
    "fp4": "Fp4",
    "fp6_e2m3": "Fp6E2M3",
    "fp6_e3m2": "Fp6E3M2",
    "fp8_e4m3": "Fp8E4M3",
    "fp8_e5m2": "Fp8E5M2",
}
_SCALES = {"e8m0": "E8M0", "e4m3": "E4M3", "e5m3": "E5M3"}
_RULES = {
    "even": "Even",
    "rceil": "Rceil",
    "nearest": "Nearest",
    "sequential": "Sequential",
    "combined": "Combined",
}

# Measured: benchmarks/cpu_fused.md. Below it, and where M is not known before run time, the generic kernel runs.
_MANY_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Kernel:
    """C++ for the template.

    Attributes:
        namespace: of ``row_bytes`` and ``zero_row``, and the header's name.
        prepare: a statement: row ``m`` of the activation into ``row``.
        tile: a statement: ``MT`` rows at ``prepared`` times channels ``n_start`` to ``n_end`` into ``tile``.
        rows: the largest ``MT``.
        scratch: bytes a thread needs for the tile, in C++; ``""``: none.
        experts: what lies between the weights of two experts, in elements, by the name of the tensor.
    """

    namespace: str
    prepare: str
    tile: str
    rows: int
    scratch: str = ""
    experts: Mapping[str, int] = field(default_factory=dict)


def refuse(problem: GemmProblem) -> str | None:
    """``None`` if there is a kernel for a problem, else why not."""
    if problem.scale_rule in ("floor", "ceil"):
        return f"scale rule {problem.scale_rule!r} takes a logarithm, which two libraries round differently"
    of_fp8 = fp8_weight(problem.weight_format)
    for format in (problem.x_format, problem.weight_format if of_fp8 else ""):
        if "fnuz" in format:
            return f"has no kernel for {format}"
    for format in (problem.x_format, problem.weight_format):
        if format in BLOCK_FORMATS and problem.k % BLOCK_FORMATS[format].size:
            return f"K = {problem.k} is not a multiple of {BLOCK_FORMATS[format].size}"
    if problem.group_size and problem.k % problem.group_size:
        return f"K = {problem.k} is not a multiple of {problem.group_size}"
    if _family(problem) == "generic" and problem.m is not None and problem.m >= _MANY_TOKENS:
        return f"from M = {_MANY_TOKENS} on the generic kernel is slower than the compiled emulation; M is {problem.m}"
    return None


def _family(problem: GemmProblem) -> str:
    """Whose kernel: also the name of its header."""
    alike = problem.x_format == problem.weight_format and not problem.experts
    if alike and problem.x_format == "mxfp4" and problem.scale_rule in ("", "even"):
        return "mxfp4"
    simple = problem.weight_scale_ndim < 2 and problem.x_granularity != "per_group" and not problem.group_size
    return "fp8" if alike and problem.x_format == "fp8_e4m3" and simple else "generic"


def kernel_for(problem: GemmProblem, inputs: Mapping[str, Any], rounds_to: str | None) -> Kernel:
    """The kernel of a problem that :func:`refuse` does not refuse.

    Args:
        problem: what to compute.
        inputs: Inductor IR of the tensors, by the op's names.
        rounds_to: the C++ type to which the emulation rounds operands that are not exact in it, if that is wanted.
    """
    family = _family(problem)
    if family == "mxfp4":
        prologue = problem.op == "prologue_gemm"
        load = "load_row(x + m * (K / 2), x_scale + m * (K / 32), K, row)"
        return Kernel(
            family,
            "quantize_row(x + m * K, K, row)" if prologue else load,
            "quark::mxfp4::tile<MT>(prepared, K, weight + n_start * (K / 2), weight_scale + n_start * (K / 32), "
            "n_end - n_start, tile, NT)",
            rows=8,
        )
    if family == "fp8":
        row = "x + m * K, K"
        if problem.op == "quantized_gemm":
            prepare = f"load_row({row}, {_given_scale(problem)}, row)"
        else:
            scale = _given_scale(problem) if problem.scale_rule == "given" else f"dynamic_scale({row})"
            prepare = f"quantize_row({row}, {scale}, row)"
        mode = "Exact" if rounds_to is None else f"Rounded<{rounds_to}>"
        return Kernel(
            family,
            prepare if rounds_to is None else f"{prepare}; dequantize_row<{rounds_to}>(K, row)",
            f"quark::fp8::tile<MT, {mode}>(prepared, K, weight + n_start * K, weight_scale + "
            f"{'n_start, 1' if problem.weight_scale_ndim else '0, 0'}, n_end - n_start, tile, NT)",
            rows=8,
        )
    tile = (
        "quark::generic::tile(prepared, m_end - m_start, K, n_start, n_end - n_start, decoded, tile, NT, "
        f"[&](int64_t n, float* w) {{ {_decode_weight(problem, inputs)}; }})"
    )
    return Kernel(
        family, _prepare(problem, inputs), tile, rows=64, scratch="weight_bytes(K)", experts=_experts(problem)
    )


def _experts(problem: GemmProblem) -> dict[str, int]:
    if not problem.experts:
        return {}
    n, k = problem.n, problem.k
    if problem.weight_format in BLOCK_FORMATS:
        f = BLOCK_FORMATS[problem.weight_format]
        return {"weight": n * f.packed(k), "weight_scale": n * (k // f.size)}
    return {"weight": n * k, "weight_scale": n if problem.weight_scale_ndim else 0}


def _given_scale(problem: GemmProblem, name: str = "x_scale") -> str:
    return f"float({name}[{'m' if problem.x_granularity == 'per_token' else '0'}])"


def _block(name: str) -> tuple[BlockFormat, str, str]:
    f = BLOCK_FORMATS[name]
    return f, _ELEMENTS[f.element], _SCALES[f.scale]


def _prepare(problem: GemmProblem, inputs: Mapping[str, Any]) -> str:
    format, rule, row = problem.x_format, problem.scale_rule, "x + m * K, K"
    if problem.op == "weight_only_gemm":
        return f"copy_row({row}, row)"
    global_scale = "float(x_scale_2[0])" if "x_scale_2" in inputs else "1.0f"
    if problem.op == "quantized_gemm":
        return _decode_activation(problem, inputs, global_scale)
    if format in BLOCK_FORMATS:
        f, element, _ = _block(format)
        zero = f"{zero_scale(format)}f"
        return f"quantize_blocks<{element}, {f.size}, {_RULES[rule]}>({row}, {global_scale}, {zero}, row)"
    if format in _ELEMENTS:
        element = _ELEMENTS[format]
        if problem.group_size:
            return f"quantize_fp8_groups<{element}>({row}, {problem.group_size}, row)"
        scale = _given_scale(problem) if rule == "given" else f"fp8_scale<{element}>({row})"
        return f"quantize_fp8<{element}>({row}, {scale}, row)"
    low, high = integer.BOUNDS[format]
    if problem.group_size:
        symmetric = str(rule == "symmetric").lower()
        return f"quantize_integer_groups<{low}, {high}, {symmetric}>({row}, {problem.group_size}, row)"
    if rule == "given":
        zero_point = _given_scale(problem, "x_zero_point") if "x_zero_point" in inputs else "0.0f"
        grid = f"Grid{{{_given_scale(problem)}, {zero_point}}}"
    else:
        grid = f"integer_grid<{low}, {high}, {str(rule == 'symmetric').lower()}>({row})"
    return f"quantize_integer_row<{low}, {high}>({row}, {grid}, row)"


def _decode_activation(problem: GemmProblem, inputs: Mapping[str, Any], global_scale: str) -> str:
    format, k = problem.x_format, problem.k
    if format in BLOCK_FORMATS:
        f, element, scale = _block(format)
        return (
            f"decode_blocks<{element}, {f.size}, {scale}, T>(x + m * {f.packed(k)}, x_scale + m * {k // f.size}, K, "
            f"{global_scale}, {zero_scale(format)}f, floats(row))"
        )
    shape = inputs["x_scale"].get_size()
    groups = int(shape[-1]) if shape else 1
    at = "" if problem.x_granularity == "per_tensor" else f" + m * {groups}"
    if format in _ELEMENTS:
        return f"decode_fp8<{_ELEMENTS[format]}, T>(x + m * K, x_scale{at}, K, {k // groups}, floats(row))"
    zero_points = f"x_zero_point{at}, 1" if "x_zero_point" in inputs else "(const int8_t*)nullptr, 0"
    return f"decode_integers<T>(x + m * K, 1, x_scale{at}, 1, {zero_points}, K, {k // groups}, floats(row))"


def _decode_weight(problem: GemmProblem, inputs: Mapping[str, Any]) -> str:
    format, n, k, ndim = problem.weight_format, problem.n, problem.k, problem.weight_scale_ndim
    if format in BLOCK_FORMATS:
        f, element, scale = _block(format)
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
        element = _ELEMENTS["fp8_e5m2" if "e5m2" in format else "fp8_e4m3"]
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
