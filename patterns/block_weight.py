"""A GEMM by a weight in a block format: ``x @ block_dequantize(weight).T``."""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from quark_inductor.patterns.base import FLOAT_DTYPES, Found, Variant, register_rule
from quark_inductor.patterns.operands import K, N, WeightRule
from quark_inductor.schemes.numerics.block import BLOCK_FORMATS
from quark_inductor.schemes.ops import dtype_name


def block_example(rows: int, prefix: str, *, global_scale: bool) -> tuple[str, dict[str, Tensor]]:
    """A format to trace with, and an operand in it; the pattern takes any format with or without a global scale."""
    name = "nvfp4" if global_scale else "mxfp4"
    f = BLOCK_FORMATS[name]
    example = {
        prefix: torch.zeros(rows, f.packed(K), dtype=f.codes_dtype),
        f"{prefix}_scale": torch.zeros(rows, K // f.size, dtype=f.scales_dtype),
    }
    return name, {**example, **({f"{prefix}_scale_2": torch.zeros(())} if global_scale else {})}


def _transposed(
    weight: Tensor, weight_scale: Tensor, weight_scale_2: Tensor | None = None, *, format: str, dtype: torch.dtype
) -> Tensor:
    values: Tensor = torch.ops.quark_inductor.block_dequantize(
        weight, weight_scale, format, dtype_name(dtype), weight_scale_2
    )
    return values.transpose(-1, -2)


@register_rule
class BlockWeight(WeightRule):
    """One rule for every block format: the format is an argument of the op."""

    name = "block_weight"

    def variants(self) -> Iterable[Variant]:
        """Each dtype, with and without a global scale, of one weight and of those of experts."""
        for global_scale in (False, True):
            format, example = block_example(N, "weight", global_scale=global_scale)
            experts = {name: tensor if tensor.ndim == 0 else tensor.unsqueeze(0) for name, tensor in example.items()}
            for dtype in FLOAT_DTYPES:
                search = functools.partial(_transposed, format=format, dtype=dtype)
                yield Variant(search, example, dtype=dtype)
                yield Variant(search, experts, dtype=dtype)

    def operands(self, found: Found) -> dict[str, Any] | str:
        """The tensors as they are."""
        if found.named.get("weight_scale_2") is not None and found.value("weight_scale_2").ndim:
            return f"the global scale has shape {tuple(found.value('weight_scale_2').shape)}, expected []"
        names = ("weight", "weight_scale", "weight_scale_2")
        return {**{name: found.named.get(name) for name in names}, "weight_format": found["format"]}
