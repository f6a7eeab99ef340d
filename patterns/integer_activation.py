"""A GEMM of an integer activation: ``(x - zero_point) * x_scale`` before a GEMM by a quantized weight."""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from quark_inductor.patterns.base import Found, Variant, register_rule, same_shape
from quark_inductor.patterns.integer_weight import FORMATS
from quark_inductor.patterns.operands import ActivationRule, K, M, dtypes_and_scales, refuse_scale
from quark_inductor.schemes.numerics import integer


def _values(x: Tensor, x_scale: Tensor, x_zero_point: Tensor, *, dtype: torch.dtype) -> Tensor:
    return integer.dequantize(x, x_scale, x_zero_point, dtype)


def _of_groups(x: Tensor, x_scale: Tensor, x_zero_point: Tensor, *, dtype: torch.dtype) -> Tensor:
    return integer.dequantize_groups(x, x_scale, x_zero_point, dtype)


def is_zero(node: Node) -> bool:
    """Whether a node is a constant 0: what symmetric quantization has for a zero point."""
    while node.target is torch.ops.aten.squeeze.dim and isinstance(node.args[0], Node):
        node = node.args[0]
    return node.target is torch.ops.aten.full.default and bool(node.args[1] == 0)


@register_rule
class IntegerActivation(ActivationRule):
    """Signed or unsigned, as the codes are."""

    name = "integer_activation"

    def variants(self) -> Iterable[Variant]:
        """A scale and zero point per tensor or per token, and by groups along K."""
        x = {"x": torch.zeros(M, K, dtype=torch.int8)}
        for dtype, scale_dtype in dtypes_and_scales():
            for search, shape in ((_of_groups, (M, 4)), (_values, ())):
                scales = {
                    "x_scale": torch.zeros(shape, dtype=scale_dtype),
                    "x_zero_point": torch.zeros(shape, dtype=torch.int32),
                }
                facts = {"groups": bool(shape)}
                yield Variant(functools.partial(search, dtype=dtype), {**x, **scales}, facts, dtype)

    def operands(self, found: Found) -> dict[str, Any] | str:
        """Codes of 8 bits, and a scale and zero point whose shape is one the op knows; zeros are left out."""
        x, scale, zero_point = (found.value(name) for name in ("x", "x_scale", "x_zero_point"))
        if (format := FORMATS.get(x.dtype)) is None:
            return "" if x.is_floating_point() else f"the activation's codes are {x.dtype}, expected 8 bits"
        for tensor in (scale, zero_point):
            if (reason := refuse_scale(x, tensor)) is not None:
                return reason
            if not found["groups"] and tensor.ndim and tensor.shape[-1] != 1:
                return f"the activation's scale has shape {tuple(tensor.shape)}, expected [] or [M, 1]"
        if not same_shape(scale.shape, zero_point.shape):
            return f"the activation's scale has shape {tuple(scale.shape)}, its zero point {tuple(zero_point.shape)}"
        return {
            "x": found["x"],
            "x_scale": found["x_scale"],
            "x_zero_point": None if is_zero(found["x_zero_point"]) else found["x_zero_point"],
            "x_format": format,
        }
