"""The rule that makes a GEMM of quantized operands where the activation is in a block format."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quark_inductor.schemes import operands
from quark_inductor.schemes.base import QuarkLinear
from quark_inductor.schemes.numerics.block import BLOCK_FORMATS
from quark_inductor.schemes.ops import dtype_name

K, N = 128, 48
q = torch.ops.quark_inductor


class OfCodes(nn.Module):
    """A Linear of codes and scales, by any scheme's weight."""

    def __init__(self, weight: QuarkLinear, format: str = "mxfp4", scale_2: Tensor | None = None) -> None:
        super().__init__()
        self.linear, self.format, self.scale_2 = weight, format, scale_2

    def values(self, codes: Tensor, scales: Tensor) -> Tensor:
        zero_scale = operands.zero_scale(self.format)
        dtype = dtype_name(self.linear.params_dtype)
        return q.block_dequantize(codes, scales, self.format, dtype, self.scale_2, zero_scale)

    def forward(self, codes: Tensor, scales: Tensor) -> Any:
        # As QuarkLinear does: then K is a constant of the graph when every size is symbolic.
        f = BLOCK_FORMATS[self.format]
        if codes.shape[-1] != f.packed(K) or scales.shape[-1] != K // f.size:
            raise ValueError("K")
        weight = self.linear.scheme.dequantize_weight(self.linear, self.linear.params_dtype)
        return F.linear(self.values(codes, scales), weight, self.linear.bias)


def activation(*rows: int, format: str = "mxfp4", scale_2: Tensor | None = None) -> tuple[Tensor, Tensor]:
    x = torch.randn(*rows, K, generator=torch.Generator().manual_seed(1))
    return q.block_quantize(x, format, BLOCK_FORMATS[format].scale_rules[0], scale_2)


@pytest.mark.parametrize("format", BLOCK_FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=dtype_name)
def test_fuses_once(
    rewrite: Callable[..., Any], linear: Callable[..., QuarkLinear], format: str, dtype: torch.dtype
) -> None:
    scale_2 = torch.tensor(0.25) if BLOCK_FORMATS[format].has_global_scale else None
    model = OfCodes(linear("mxfp4_weight_only", K, N, dtype=dtype), format, scale_2)
    args = activation(3, format=format, scale_2=scale_2)
    done = rewrite(model, *args)
    assert done.fused() == {"quantized_gemm": 1}
    rules = ("block_weight", "block_activation", "block_prologue")
    assert [done.result.matches(rule) for rule in rules] == [1, 1, 0]
    assert done.result.unfused == done.result.left == ()
    arguments = done.arguments("quantized_gemm")
    assert (arguments["x_format"], arguments["weight_format"]) == (format, "mxfp4")
    assert arguments["out_dtype"] == dtype_name(dtype)
    assert (arguments["x_scale_2"] is None) is (scale_2 is None)
    assert torch.equal(done.output, model(*args))


@pytest.mark.parametrize("preset", ["nvfp4_weight_only", "fp8_weight_only", "int8_wo_128", "uint4_wo_32"])
def test_any_weight(rewrite: Callable[..., Any], linear: Callable[..., QuarkLinear], preset: str) -> None:
    """N kinds of weights and M of activations take N + M rules."""
    model, args = OfCodes(linear(preset, K, N), "mxfp6_e2m3"), activation(3, format="mxfp6_e2m3")
    done = rewrite(model, *args)
    assert done.fused() == {"quantized_gemm": 1}
    assert torch.equal(done.output, model(*args))


@pytest.mark.parametrize("rows", [(2, 3), (2, 2, 3)], ids=str)
@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
def test_any_rank(
    rewrite: Callable[..., Any], linear: Callable[..., QuarkLinear], rows: tuple[int, ...], dynamic: bool
) -> None:
    """The views that ``F.linear`` puts above the GEMM go above the dequantize."""
    model, args = OfCodes(linear("mxfp4_weight_only", K, N)), activation(*rows)
    done = rewrite(model, *args, dynamic=dynamic)
    assert done.result.matches("hoist_views") == 1
    assert done.fused() == {"quantized_gemm": 1}
    assert torch.equal(done.output, model(*args))


def test_another_user_of_the_dequantized(rewrite: Callable[..., Any], linear: Callable[..., QuarkLinear]) -> None:
    class Shared(OfCodes):
        def forward(self, codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(codes, scales), self.values(codes, scales) * 2

    model, args = Shared(linear("mxfp4_weight_only", K, N)), activation(3)
    done = rewrite(model, *args)
    assert done.fused() == {"quantized_gemm": 1, "block_dequantize": 1}
    for got, expected in zip(done.output, model(*args), strict=True):
        assert torch.equal(got, expected)


def test_two_gemms_of_one_activation(rewrite: Callable[..., Any], linear: Callable[..., QuarkLinear]) -> None:
    first, second = OfCodes(linear("mxfp4_weight_only", K, N)), OfCodes(linear("fp8_weight_only", K, N))

    def both(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        return first(codes, scales), second(codes, scales)

    args = activation(3)
    done = rewrite(both, *args)
    assert done.fused() == {"quantized_gemm": 2}
    for got, expected in zip(done.output, both(*args), strict=True):
        assert torch.equal(got, expected)
