"""A GEMM of an activation that was just quantized to a block format: the GEMM quantizes it in its own prologue."""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from quark_inductor.patterns.base import FLOAT_DTYPES, Found, Variant, arguments, register_rule
from quark_inductor.patterns.operands import K, M, PrologueRule, gemm_of, some_weight
from quark_inductor.schemes.numerics.block import BLOCK_FORMATS


def _quantize_then_gemm(x: Tensor, x_scale_2: Tensor | None = None, *, format: str, **weight: Tensor) -> Tensor:
    rule = BLOCK_FORMATS[format].scale_rules[0]
    codes, scales = torch.ops.quark_inductor.block_quantize(x, format, rule, x_scale_2)
    return gemm_of(codes, scales, x_scale_2, None, format, x.dtype, **weight)


@register_rule
class BlockPrologue(PrologueRule):
    """One rule for every block format and scale rule: both are arguments of the op."""

    name = "block_prologue"

    def variants(self) -> Iterable[Variant]:
        """Each dtype, with and without a global scale."""
        for dtype in FLOAT_DTYPES:
            x = {**some_weight(), "x": torch.zeros(M, K, dtype=dtype)}
            yield Variant(functools.partial(_quantize_then_gemm, format="mxfp4"), x, dtype=dtype)
            with_global = {**x, "x_scale_2": torch.zeros(())}
            yield Variant(functools.partial(_quantize_then_gemm, format="nvfp4"), with_global, dtype=dtype)

    def operands(self, found: Found) -> dict[str, Any] | str:
        """It was quantized to the format in which the GEMM reads it."""
        format, read = found["format"], arguments(found.node)["x_format"]
        if format != read:
            return f"the activation is quantized to {format} and read as {read}"
        return {"scale_rule": found["scale_rule"]}
