"""A GEMM of an FP8 activation: ``x * x_scale`` before a GEMM by a quantized weight."""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from quark_inductor.patterns.base import Found, Variant, register_rule
from quark_inductor.patterns.operands import ActivationRule, K, M, dtypes_and_scales, refuse_scale
from quark_inductor.schemes.numerics import fp8
from quark_inductor.schemes.operands import fp8_format


def _values(x: Tensor, x_scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    return fp8.dequantize(x, x_scale, dtype)


def _unpromoted(x: Tensor, x_scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    # Of no dimension, a float32 scale does not promote: the product is rounded once, as that of fp8.dequantize.
    return x.to(dtype) * x_scale


def _of_groups(x: Tensor, x_scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    return fp8.dequantize_groups(x, x_scale, dtype)


@register_rule
class Fp8Activation(ActivationRule):
    """The FP8 dtype is that of the codes."""

    name = "fp8_activation"

    def variants(self) -> Iterable[Variant]:
        """A scale per tensor or per token, and by groups along K."""
        x = {"x": torch.zeros(M, K, dtype=fp8.DTYPE)}
        for dtype, scale_dtype in dtypes_and_scales():
            for search, shape in ((_of_groups, (M, 4)), (_values, ())):
                example = {**x, "x_scale": torch.zeros(shape, dtype=scale_dtype)}
                yield Variant(functools.partial(search, dtype=dtype), example, {"groups": bool(shape)}, dtype)
        for dtype in (torch.bfloat16, torch.float16):
            example = {**x, "x_scale": torch.zeros(())}
            yield Variant(functools.partial(_unpromoted, dtype=dtype), example, {"groups": False}, dtype)

    def operands(self, found: Found) -> dict[str, Any] | str:
        """Codes in FP8, and a scale whose shape is one the op knows."""
        x, scale = found.value("x"), found.value("x_scale")
        if (format := fp8_format(x.dtype)) is None:
            return ""
        if (reason := refuse_scale(x, scale)) is not None:
            return reason
        # The form of the graph says how a scale is spread: [M, 1] of groups is that of a row too.
        if not found["groups"] and scale.ndim and scale.shape[-1] != 1:
            return f"the activation's scale has shape {tuple(scale.shape)}, expected [] or [M, 1]"
        return {"x": found["x"], "x_scale": found["x_scale"], "x_format": format}
