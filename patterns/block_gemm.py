"""``dequantize(x) @ dequantize(weight).T (+ bias)`` of block formats becomes one GEMM on the quantized operands."""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.fx import Node

from quark_inductor.patterns._inductor import Match
from quark_inductor.patterns.base import (
    FLOAT_DTYPES,
    Options,
    Rule,
    Variant,
    fused_call,
    refuse_unless_provided,
    register_rule,
    value,
    with_and_without_bias,
)
from quark_inductor.schemes import ops
from quark_inductor.schemes.numerics import mx


def quantized_example(rows: int, k: int, prefix: str) -> dict[str, torch.Tensor]:
    """A block-quantized ``[rows, K]`` operand to trace with, as the arguments ``prefix`` and ``prefix_scale``."""
    codes = torch.zeros(rows, k // 2, dtype=torch.uint8)
    return {prefix: codes, f"{prefix}_scale": torch.zeros(rows, k // mx.BLOCK, dtype=torch.uint8)}


@register_rule
class MxGemm(Rule):
    """Its leaves are the quantized tensors: the quantize stays outside and is shared by q, k and v."""

    name = "mx_gemm"

    def variants(self) -> Iterable[Variant]:
        """Every format and result dtype, with and without bias."""
        m, n, k = 3, 5, 64
        example = quantized_example(m, k, "x") | quantized_example(n, k, "weight")
        for fmt in mx.FORMATS:
            for dtype in FLOAT_DTYPES:
                facts: dict[str, Any] = {"x_format": fmt, "weight_format": fmt, "out_dtype": ops.dtype_name(dtype)}
                yield from with_and_without_bias(functools.partial(ops.mx_gemm, **facts), example, n, dtype, **facts)

    def check(self, match: Match, facts: Mapping[str, Any], options: Options) -> str | None:
        """A provider can run it."""
        return refuse_unless_provided(self.name, match, options, k=value(match.kwargs["weight"]).shape[1] * 2)

    def rewrite(self, match: Match, facts: Mapping[str, Any]) -> Node:
        """One ``mx_gemm``."""
        return fused_call(match, torch.ops.quark_inductor.mx_gemm.default, facts)
