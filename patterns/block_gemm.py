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
from quark_inductor.schemes.numerics.block import BLOCK_FORMATS

# Those some provider has kernels for.
FORMATS = ("mxfp4",)


def quantized_example(fmt: str, rows: int, k: int, prefix: str) -> dict[str, torch.Tensor]:
    """A ``[rows, K]`` operand in a block format to trace with, as the arguments ``prefix`` and ``prefix_scale``."""
    f = BLOCK_FORMATS[fmt]
    codes = torch.zeros(rows, f.packed(k), dtype=f.codes_dtype)
    return {prefix: codes, f"{prefix}_scale": torch.zeros(rows, k // f.size, dtype=f.scales_dtype)}


@register_rule
class BlockGemm(Rule):
    """Its leaves are the quantized tensors: the quantize stays outside and is shared by q, k and v."""

    name = "block_gemm"

    def variants(self) -> Iterable[Variant]:
        """Each of ``FORMATS`` and result dtype, with and without bias."""
        m, n, k = 3, 5, 64
        for fmt in FORMATS:
            example = quantized_example(fmt, m, k, "x") | quantized_example(fmt, n, k, "weight")
            for dtype in FLOAT_DTYPES:
                facts: dict[str, Any] = {"x_format": fmt, "weight_format": fmt, "out_dtype": ops.dtype_name(dtype)}
                yield from with_and_without_bias(functools.partial(ops.block_gemm, **facts), example, n, dtype, **facts)

    def check(self, match: Match, facts: Mapping[str, Any], options: Options) -> str | None:
        """A provider can run it."""
        formats = (facts["x_format"], facts["weight_format"])
        k = BLOCK_FORMATS[formats[1]].unpacked(value(match.kwargs["weight"]).shape[1])
        return refuse_unless_provided(self.name, match, options, k=k, formats=formats)

    def rewrite(self, match: Match, facts: Mapping[str, Any]) -> Node:
        """One ``block_gemm``."""
        return fused_call(match, torch.ops.quark_inductor.block_gemm.default, facts)
