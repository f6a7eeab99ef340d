"""A block-format GEMM whose activation was just quantized becomes a GEMM that quantizes in its own prologue.

Done wherever a provider has such a kernel. The quantize then runs once per GEMM instead of once for q, k and v
together, but vectorized and without a packed intermediate: on CPU that wins at every size.
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
from quark_inductor.patterns.block_gemm import FORMATS, quantized_example
from quark_inductor.schemes import ops


def _quantize_then_gemm(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    x_format: str,
    scale_rule: str,
    weight_format: str,
    out_dtype: str,
) -> Tensor:
    q = torch.ops.quark_inductor
    codes, scales = q.block_quantize(x, x_format, scale_rule)
    result: Tensor = q.block_gemm(
        x=codes,
        x_scale=scales,
        weight=weight,
        weight_scale=weight_scale,
        bias=bias,
        x_format=x_format,
        weight_format=weight_format,
        out_dtype=out_dtype,
    )
    return result


@register_rule
class BlockPrologue(Rule):
    """Runs after ``block_gemm``, on what that made."""

    name = "block_prologue"

    def variants(self) -> Iterable[Variant]:
        """Each of ``FORMATS`` with scale rule "even", every dtype, with and without bias."""
        m, n, k = 3, 5, 64
        for fmt in FORMATS:
            for dtype in FLOAT_DTYPES:
                facts: dict[str, Any] = {"x_format": fmt, "scale_rule": "even", "weight_format": fmt}
                search = functools.partial(_quantize_then_gemm, **facts, out_dtype=ops.dtype_name(dtype))
                example = {"x": torch.zeros(m, k, dtype=dtype)} | quantized_example(fmt, n, k, "weight")
                yield from with_and_without_bias(search, example, n, dtype, **facts)

    def check(self, match: Match, facts: Mapping[str, Any], options: Options) -> str | None:
        """A provider can run it, and the activation's dtype is the result's."""
        if (reason := refuse_two_dtypes(match)) is not None:
            return reason
        formats, k = (facts["x_format"], facts["weight_format"]), value(match.kwargs["x"]).shape[1]
        return refuse_unless_provided("block_prologue_gemm", match, options, k=k, formats=formats)

    def rewrite(self, match: Match, facts: Mapping[str, Any]) -> Node:
        """One ``block_prologue_gemm``."""
        return fused_call(match, torch.ops.quark_inductor.block_prologue_gemm.default, facts)
