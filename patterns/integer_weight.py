"""A GEMM by an 8-bit integer weight: ``x @ ((weight - zero_point) * weight_scale).T``, zero points left out if 0."""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from quark_inductor.patterns.base import FLOAT_DTYPES, Found, Variant, register_rule, same_shape
from quark_inductor.patterns.fp8_weight import refuse_weight_scale, scaled_weights
from quark_inductor.patterns.operands import K, N, WeightRule, dtypes_and_scales, source_of
from quark_inductor.schemes.numerics import integer

FORMATS = {torch.int8: "int8", torch.uint8: "uint8"}


def _transposed(weight: Tensor, weight_scale: Tensor, weight_zero_point: Tensor, *, dtype: torch.dtype) -> Tensor:
    return integer.dequantize_weight(weight, weight_scale, weight_zero_point, dtype).t()


def _in_int32(weight: Tensor, weight_scale: Tensor, weight_zero_point: Tensor, *, dtype: torch.dtype) -> Tensor:
    # As amd-quark 0.13 writes it. The difference of 8-bit codes is exact in float32, too.
    difference = weight.to(torch.int32) - weight_zero_point.to(torch.int32)
    return (difference.to(torch.float32) * weight_scale).to(dtype).t()


@register_rule
class IntegerWeight(WeightRule):
    """Signed or unsigned, as the codes are."""

    name = "integer_weight"

    def variants(self) -> Iterable[Variant]:
        """Each kind of scale: per channel, per tensor, and by groups along K."""
        codes = torch.zeros(N, K, dtype=torch.int8)
        for dtype, scale_dtype in dtypes_and_scales():
            for shape in ((N,), (), (N, 4)):
                example = {
                    "weight": codes,
                    "weight_scale": torch.zeros(shape, dtype=scale_dtype),
                    "weight_zero_point": torch.zeros(shape, dtype=torch.int8),
                }
                form = ("plain", "spread", "groups")[len(shape)]
                yield Variant(functools.partial(_transposed, dtype=dtype), example, {"form": form}, dtype)
        yield from scaled_weights(torch.int8)
        zero_point = torch.zeros((), dtype=torch.int8)
        for dtype in FLOAT_DTYPES:
            example = {"weight": codes, "weight_scale": torch.zeros(()), "weight_zero_point": zero_point}
            facts = {"form": "plain", "difference": torch.int32}
            yield Variant(functools.partial(_in_int32, dtype=dtype), example, facts, dtype)

    def operands(self, found: Found) -> dict[str, Any] | str:
        """Codes of 8 bits, and a scale and zero point whose shape is one the op knows."""
        weight, scale = found.value("weight"), found.value("weight_scale")
        if (format := FORMATS.get(weight.dtype)) is None:
            # int4_weight's, if they are unpacked.
            unpacked = source_of(found["weight"]).target is torch.ops.quark_inductor.int4_unpack.default
            others = unpacked or weight.is_floating_point()
            return "" if others else f"the weight's codes are {weight.dtype}, expected 8 bits"
        if weight.ndim != 2:
            return f"the weight is {format} and has {weight.ndim} dimensions, expected 2"
        if found["form"] == "groups":
            if scale.ndim != 2 or not same_shape(scale.shape[:1], weight.shape[:1]) or weight.shape[1] % scale.shape[1]:
                return f"the weight's scale has shape {tuple(scale.shape)}, expected [N, K / group]"
        elif (reason := refuse_weight_scale(weight, scale, found["form"])) is not None:
            return reason
        zero_point = found.named.get("weight_zero_point")
        if zero_point is not None and not same_shape(found.value("weight_zero_point").shape, scale.shape):
            shape = tuple(found.value("weight_zero_point").shape)
            return f"the weight's zero point has shape {shape}, its scale {tuple(scale.shape)}"
        if "difference" in found.named and found.value("weight_zero_point").dtype not in FORMATS:
            return ""  # float32 might round it; the forms before this one have refused the int32 for codes
        return {
            "weight": found["weight"],
            "weight_scale": found["weight_scale"],
            "weight_zero_point": zero_point,
            "weight_format": format,
        }
