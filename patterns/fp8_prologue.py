"""An FP8 GEMM whose activation was just quantized becomes a GEMM that quantizes in its own prologue.

The quantize is ``clamp(x / scale, -448, 448)`` cast to E4M3, by a stored scale or by one computed from the activation.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from quark_inductor.patterns._inductor import Match
from quark_inductor.patterns.base import (
    FLOAT_DTYPES,
    Options,
    Rule,
    Variant,
    fused_call,
    refuse_two_dtypes,
    refuse_unless_provided,
    register_rule,
    value,
    with_and_without_bias,
)
from quark_inductor.patterns.fp8_gemm import weight_examples
from quark_inductor.schemes import ops
from quark_inductor.schemes.numerics import fp8


def _quantize_then_gemm(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    granularity: str,
    x_scale: Tensor | None = None,
) -> Tensor:
    scale = fp8.dynamic_scale(x, granularity) if x_scale is None else x_scale
    result: Tensor = torch.ops.quark_inductor.fp8_gemm(
        x=fp8.quantize(x, scale),
        x_scale=scale,
        weight=weight,
        weight_scale=weight_scale,
        bias=bias,
        out_dtype=ops.dtype_name(x.dtype),
    )
    return result


@register_rule
class Fp8Prologue(Rule):
    """Runs after ``fp8_gemm``, on what that made."""

    name = "fp8_prologue"

    def variants(self) -> Iterable[Variant]:
        """The scale computed a row before the scale given, whose pattern takes any."""
        m, n, k = 3, 5, 64
        for granularity in ("per_token", "per_tensor"):
            for dtype in FLOAT_DTYPES:
                x = {"x": torch.zeros(m, k, dtype=dtype)}
                if granularity == "per_tensor":
                    x["x_scale"] = torch.zeros((), dtype=dtype)
                facts: dict[str, Any] = {"granularity": granularity}
                search = functools.partial(_quantize_then_gemm, **facts)
                weight, *_ = weight_examples(n, k, dtype)  # the kind of its scale makes no difference here
                yield from with_and_without_bias(search, x | weight, n, dtype, **facts)

    def check(self, match: Match, facts: Mapping[str, Any], options: Options) -> str | None:
        """One dtype throughout, a scale the op knows, and a provider can run it."""
        if (reason := refuse_two_dtypes(match)) is not None:
            return reason
        scale = match.kwargs.get("x_scale")
        if scale is not None and value(scale).ndim != 0:
            return f"the activation's scale has shape {tuple(value(scale).shape)} and is not amax / 448 of its rows"
        k = value(match.kwargs["x"]).shape[1]
        return refuse_unless_provided("fp8_prologue_gemm", match, options, k=k, granularity=facts["granularity"])

    def rewrite(self, match: Match, facts: Mapping[str, Any]) -> Node:
        """One ``fp8_prologue_gemm``."""
        return fused_call(match, torch.ops.quark_inductor.fp8_prologue_gemm.default, facts)
