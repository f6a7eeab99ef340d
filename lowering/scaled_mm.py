"""Provider ``scaled_mm``: PyTorch's own ``aten._scaled_mm``, for an FP8 activation and an FP8 weight on a GPU.

That is cuBLASLt, hipBLASLt or CUTLASS, and with ``max_autotune`` Inductor's Triton templates: upstream's lowering of
the op chooses. Source of what it takes: torch 2.13, ``torch/_meta_registrations.py: _check_scaled_mm_sizes`` and
``aten/src/ATen/native/cuda/ScaledBlas.cpp: _scaled_mm_out_cuda``.
"""

from collections.abc import Mapping
from typing import Any

import torch

from quark_inductor.lowering.base import GemmProblem, No, Provider, no_dtype, no_layout, register_provider
from quark_inductor.lowering.target import Target
from quark_inductor.schemes.ops import dtype_of

# The FP8 that an architecture multiplies. The codes of "fnuz" mean half of the others' values.
FORMATS: Mapping[str, str] = {
    "sm_89": "fp8_e4m3",
    "sm_90": "fp8_e4m3",
    "sm_100": "fp8_e4m3",
    "sm_120": "fp8_e4m3",
    "gfx942": "fp8_e4m3fnuz",
    "gfx950": "fp8_e4m3",
}
# Below, a kernel that quantizes in its prologue and splits K reads the weight with all of the GPU, which a library's
# tiles do not. Not measured.
FEW_TOKENS = 64
# cuBLASLt and hipBLASLt align rows and columns to 16 bytes.
_MULTIPLE = 16


@register_provider
class ScaledMm(Provider):
    """Per tensor or row-wise: a scale of one and a scale of rows are multiplied row-wise, the former repeated."""

    name = "scaled_mm"

    def can_run(self, target: Target, problem: GemmProblem) -> No | None:
        """FP8 by FP8, N and K multiples of 16, from 64 tokens on or for a number not known before run time."""
        if target.device_type != "cuda":
            return No(f"for GPUs, the device is {target.device_type}")
        if (format := FORMATS.get(target.arch)) is None:
            return No(f"runs on {', '.join(FORMATS)}, the device is {target.arch}")
        if problem.op != "quantized_gemm":
            return No(f"multiplies two operands in FP8, which {problem.op} does not give it")
        if (problem.x_format, problem.weight_format) != (format, format):
            found = f"{problem.x_format} and {problem.weight_format}"
            return No(f"on {target.arch} it multiplies {format} by {format}, the operands are {found}")
        if problem.rounds:
            return No("does not round operands, as emulate_precision_casts asks for: leave it out")
        if problem.layout or problem.experts:
            return No(no_layout(problem))
        if problem.x_granularity == "per_group":
            return No("has no kernel for an activation scaled by groups")
        if problem.n % _MULTIPLE or problem.k % _MULTIPLE:
            return No(f"N = {problem.n} and K = {problem.k} are not both multiples of {_MULTIPLE}")
        dtypes = ("bfloat16",) if _is_row_wise(problem) else ("bfloat16", "float16", "float32")
        if problem.dtype not in dtypes:
            return No(no_dtype(problem, dtypes, "with such scales it"))
        if problem.m is not None and problem.m < FEW_TOKENS:
            return No(f"is for {FEW_TOKENS} tokens and more, M is {problem.m}")
        return None

    def lower(self, target: Target, problem: GemmProblem, args: Mapping[str, Any]) -> Any:
        """See :class:`Provider`."""
        from quark_inductor.lowering._inductor import contiguous, lowered, to_dtype

        aten = torch.ops.aten
        x, weight, bias = contiguous(args["x"]), contiguous(args["weight"]), args["bias"]
        scales = [to_dtype(args[name], torch.float32) for name in ("x_scale", "weight_scale")]
        if _is_row_wise(problem):
            shapes = [x.get_size()[0], 1], [1, problem.n]
            scales = [lowered(aten.expand.default, s, shape) for s, shape in zip(scales, shapes, strict=True)]
        # A bias is added in half precision only.
        inside = bias is not None and problem.dtype != "float32"
        # Not use_fast_accum: Hopper then keeps 14 bits of a sum, fewer than the emulation.
        y = lowered(
            aten._scaled_mm.default,
            x,
            lowered(aten.permute.default, weight, [1, 0]),
            *(contiguous(scale) for scale in scales),
            bias=bias if inside else None,
            out_dtype=dtype_of(problem.dtype),
            use_fast_accum=False,
        )
        return y if bias is None or inside else lowered(aten.add.Tensor, y, bias)


def _is_row_wise(problem: GemmProblem) -> bool:
    return problem.x_granularity == "per_token" or problem.weight_scale_ndim == 1
