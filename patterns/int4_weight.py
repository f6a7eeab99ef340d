"""A GEMM by a weight of 4-bit integers packed in int32, alone or as the second stage of an FP8 weight."""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from quark_inductor.patterns.base import FLOAT_DTYPES, Found, Variant, register_rule
from quark_inductor.patterns.operands import K, WeightRule, dtypes_and_scales
from quark_inductor.schemes.numerics import int4

_N = 24  # a multiple of 8, as packed zero points are
_FORMAT = "int4"  # whichever: the patterns take any


def _transposed(weight: Tensor, weight_scale: Tensor, weight_zero_point: Tensor, *, dtype: torch.dtype) -> Tensor:
    return int4.dequantize_weight(weight, weight_scale, weight_zero_point, _FORMAT, dtype).t()


def _two_stages(
    weight: Tensor, weight_scale: Tensor, weight_scale_2: Tensor, weight_zero_point: Tensor, *, dtype: torch.dtype
) -> Tensor:
    return int4.dequantize_two_stages(weight, weight_scale, weight_scale_2, weight_zero_point, _FORMAT, dtype).t()


@register_rule
class Int4Weight(WeightRule):
    """Codes and zero points are unpacked by an op of ours, which says their sign and order."""

    name = "int4_weight"

    def variants(self) -> Iterable[Variant]:
        """Per channel, by groups (transposed), and in two stages."""
        channel = {"weight": torch.zeros(_N, K // 8, dtype=torch.int32)}
        zero_point = {"weight_zero_point": torch.zeros(_N // 8, dtype=torch.int32)}
        groups = {
            "weight": torch.zeros(K, _N // 8, dtype=torch.int32),
            "weight_zero_point": torch.zeros(4, _N // 8, dtype=torch.int32),
        }
        for dtype, scale_dtype in dtypes_and_scales():
            search = functools.partial(_transposed, dtype=dtype)
            yield Variant(
                search, {**channel, **zero_point, "weight_scale": torch.zeros(_N, dtype=scale_dtype)}, dtype=dtype
            )
            yield Variant(search, {**groups, "weight_scale": torch.zeros(4, _N, dtype=scale_dtype)}, dtype=dtype)
        scales = {"weight_scale": torch.zeros(()), "weight_scale_2": torch.zeros(_N)}
        for dtype in FLOAT_DTYPES:
            yield Variant(functools.partial(_two_stages, dtype=dtype), {**channel, **zero_point, **scales}, dtype=dtype)

    def operands(self, found: Found) -> dict[str, Any] | str:
        """The tensors as they are, their shapes those of one of the forms."""
        names = ("weight", "weight_scale", "weight_scale_2", "weight_zero_point")
        tensors = {name: found.named.get(name) for name in names}
        shapes = {name: list(found.value(name).shape) for name in names if tensors[name] is not None}
        format = found["format"]
        (rows, entries), scale = shapes["weight"], shapes["weight_scale"]
        if "weight_scale_2" in shapes:
            if format != "int4":
                return f"the weight's codes are {format}, under an FP8 stage expected int4"
            format, expected = "int4_fp8", {"weight_scale": [], "weight_scale_2": [rows]}
            expected["weight_zero_point"] = [rows // 8]
        elif len(scale) == 2:
            expected = {"weight_scale": [scale[0], entries * 8], "weight_zero_point": [scale[0], entries]}
        else:
            expected = {"weight_scale": [rows], "weight_zero_point": [rows // 8]}
        for name, shape in expected.items():
            if shapes[name] != shape:
                return f"{name} has shape {shapes[name]}, a weight of {format} with this form wants {shape}"
        return {**tensors, "weight_format": format}
