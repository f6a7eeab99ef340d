"""A GEMM by an FP8 weight: ``x @ (weight * weight_scale).T``, scaled per tensor, per channel or by blocks."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from quark_inductor.patterns.base import Found, Variant, register_rule, same_shape, value
from quark_inductor.patterns.operands import K, N, WeightRule, dtypes_and_scales
from quark_inductor.schemes.numerics import fp8
from quark_inductor.schemes.operands import fp8_format


def _spread(weight: Tensor, weight_scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    return fp8.dequantize_weight(weight, weight_scale, dtype).transpose(-1, -2)


def _plain(weight: Tensor, weight_scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    return (weight.float() * weight_scale.float()).to(dtype).transpose(-1, -2)


def _promoted(weight: Tensor, weight_scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    return (weight.float() * weight_scale).to(dtype).transpose(-1, -2)


def _in_dtype(weight: Tensor, weight_scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    # The product of 4 and 8 bits is exact in float32, so it is rounded once here too.
    return (weight.to(dtype) * weight_scale).transpose(-1, -2)


def _by_blocks(weight: Tensor, weight_scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    return fp8.dequantize_weight(weight, weight_scale, dtype, (2, 16)).t()


def scaled_weights(codes: torch.dtype) -> Iterable[Variant]:
    """``codes * scale`` as it is written here and elsewhere, with a scale per channel or per tensor."""
    weight = {"weight": torch.zeros(N, K, dtype=codes)}
    experts = {"weight": torch.zeros(2, N, K, dtype=codes)}
    for dtype, scale_dtype in dtypes_and_scales():
        channel, tensor = torch.zeros(N, dtype=scale_dtype), torch.zeros((), dtype=scale_dtype)
        spread, plain = functools.partial(_spread, dtype=dtype), functools.partial(_plain, dtype=dtype)
        yield Variant(spread, {**weight, "weight_scale": channel}, {"form": "spread"}, dtype)
        yield Variant(plain, {**weight, "weight_scale": tensor}, {"form": "plain"}, dtype)
        if scale_dtype == dtype != torch.float32:
            for search in (_promoted, _in_dtype):
                for form, scale in (("plain", tensor), ("spread", channel)):
                    shaped = functools.partial(_unsqueezed, search) if form == "spread" else search
                    yield Variant(
                        functools.partial(shaped, dtype=dtype), {**weight, "weight_scale": scale}, {"form": form}, dtype
                    )
        scale = torch.zeros(2, N, dtype=scale_dtype)
        yield Variant(spread, {**experts, "weight_scale": scale}, {"form": "spread"}, dtype)
        yield Variant(plain, {**experts, "weight_scale": tensor}, {"form": "plain"}, dtype)


def _unsqueezed(search: Callable[..., Tensor], weight: Tensor, weight_scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    return search(weight, weight_scale.unsqueeze(-1), dtype=dtype)


def refuse_weight_scale(weight: Tensor, scale: Tensor, form: str) -> str | None:
    """``None`` if a scale has a shape that the ops know for a weight ``[N, K]``, or one of experts.

    The form of the graph says along which dimension a scale runs: ``[K]`` may be as long as ``[N]``.
    """
    channels = weight.shape[:-1]
    expected = channels if form == "spread" else (*channels, 1)
    if same_shape(scale.shape, expected) or (form == "plain" and scale.ndim == 0):
        return None
    return f"the weight's scale has shape {tuple(scale.shape)}, the weight {tuple(weight.shape)}; expected [] or [N]"


@register_rule
class Fp8Weight(WeightRule):
    """The FP8 dtype is that of the codes."""

    name = "fp8_weight"

    def variants(self) -> Iterable[Variant]:
        """Each kind of scale: ``[N]``, ``[]``, and blocks, of which the last row or column may be cut off."""
        yield from scaled_weights(fp8.DTYPE)
        for dtype, scale_dtype in dtypes_and_scales():
            for cut_n in (0, 1):
                for cut_k in (0, 1):
                    example = {
                        "weight": torch.zeros(6 - cut_n, K - cut_k, dtype=fp8.DTYPE),
                        "weight_scale": torch.zeros(3, 4, dtype=scale_dtype),
                    }
                    yield Variant(functools.partial(_by_blocks, dtype=dtype), example, {"form": "blocks"}, dtype)

    def operands(self, found: Found) -> dict[str, Any] | str:
        """Codes in FP8, and a scale whose shape is one the op knows."""
        weight, scale = found.value("weight"), found.value("weight_scale")
        if (format := fp8_format(weight.dtype)) is None:
            return ""
        if found["form"] == "blocks":
            rows, columns = _block_size(found)
            expected = tuple(-(-size // block) for size, block in zip(weight.shape, (rows, columns), strict=True))
            if not same_shape(scale.shape, expected):
                return f"the weight's scale is {tuple(scale.shape)}, of blocks of {rows} x {columns} it is {expected}"
            for node in found.nodes:
                if node.target is torch.ops.aten.mul.Tensor and not all(
                    same_shape(value(factor).shape, weight.shape) for factor in node.all_input_nodes
                ):
                    return "the spread scale has not the shape of the weight, but is spread further by the product"
            format += f"_{rows}x{columns}"
        elif (reason := refuse_weight_scale(weight, scale, found["form"])) is not None:
            return reason
        return {"weight": found["weight"], "weight_scale": found["weight_scale"], "weight_format": format}


def _block_size(found: Found) -> tuple[int, int]:
    """How often the scale is repeated along each dimension."""
    repeated = {}
    for node in found.nodes:
        if node.target is torch.ops.aten.expand.default:
            unsqueezed = node.args[0]
            assert isinstance(unsqueezed, torch.fx.Node)
            dim = unsqueezed.args[1]
            repeated[dim] = int(value(node).shape[dim])  # type: ignore[index]
    return repeated[1], repeated[2]
