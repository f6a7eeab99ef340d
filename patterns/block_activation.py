"""A GEMM of an activation in a block format: ``block_dequantize(x)`` before a GEMM by a quantized weight."""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from quark_inductor.patterns.base import FLOAT_DTYPES, Found, Variant, register_rule
from quark_inductor.patterns.block_weight import block_example
from quark_inductor.patterns.operands import ActivationRule, M
from quark_inductor.schemes import operands
from quark_inductor.schemes.ops import dtype_name


def _values(
    x: Tensor,
    x_scale: Tensor,
    x_scale_2: Tensor | None = None,
    *,
    format: str,
    dtype: torch.dtype,
    zero_scale: float = 0.0,
) -> Tensor:
    values: Tensor = torch.ops.quark_inductor.block_dequantize(
        x, x_scale, format, dtype_name(dtype), x_scale_2, zero_scale
    )
    return values


@register_rule
class BlockActivation(ActivationRule):
    """One rule for every block format: the format is an argument of the op."""

    name = "block_activation"

    def variants(self) -> Iterable[Variant]:
        """Each dtype, with and without a global scale, and with a value for scales of 0."""
        for global_scale, zero_scale in ((False, 0.0), (True, 0.0), (False, 1.0)):
            format, example = block_example(M, "x", global_scale=global_scale)
            for dtype in FLOAT_DTYPES:
                search = functools.partial(_values, format=format, dtype=dtype, zero_scale=zero_scale)
                yield Variant(search, example, dtype=dtype)

    def operands(self, found: Found) -> dict[str, Any] | str:
        """The tensors as they are; the value for scales of 0 must be the one the format has in an activation."""
        format, zero_scale = found["format"], found.named.get("zero_scale", 0.0)
        if zero_scale != operands.zero_scale(format):
            return f"a scale of 0 stands for {zero_scale}, in {format} for {operands.zero_scale(format)}"
        if found.named.get("x_scale_2") is not None and found.value("x_scale_2").ndim:
            return f"the global scale has shape {tuple(found.value('x_scale_2').shape)}, expected []"
        names = ("x", "x_scale", "x_scale_2")
        return {**{name: found.named.get(name) for name in names}, "x_format": format}
