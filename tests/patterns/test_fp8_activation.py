"""The rule that makes a GEMM of quantized operands where the activation is FP8."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quark_inductor.schemes.base import QuarkLinear
from quark_inductor.schemes.ops import dtype_name

K, N = 128, 48
DTYPES = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
# Rows of the scale, and numbers in a row of it, for `rows` tokens.
SHAPES: dict[str, Callable[[tuple[int, ...]], tuple[int, ...]]] = {
    "per_tensor": lambda rows: (),
    "per_token": lambda rows: (*rows, 1),
    "per_group": lambda rows: (*rows, 4),
}


class OfCodes(nn.Module):
    """A Linear of FP8 codes and their scale in plain torch, by any scheme's weight."""

    def __init__(self, weight: QuarkLinear) -> None:
        super().__init__()
        self.linear, self.dtype = weight, weight.params_dtype

    def values(self, codes: Tensor, scale: Tensor) -> Tensor:
        if scale.ndim and scale.shape[-1] != 1:
            groups = codes.float().unflatten(-1, (scale.shape[-1], -1))
            return (groups * scale.float().unsqueeze(-1)).flatten(-2).to(self.dtype)
        return codes.to(self.dtype) * scale

    def forward(self, codes: Tensor, scale: Tensor) -> Any:
        torch._check(codes.shape[-1] == K)
        weight = self.linear.scheme.dequantize_weight(self.linear, self.dtype)
        return F.linear(self.values(codes, scale), weight, self.linear.bias)


def activation(
    *rows: int, shape: str = "per_tensor", dtype: torch.dtype = torch.float32, codes: torch.dtype = torch.float8_e4m3fn
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    scale = torch.rand(SHAPES[shape](rows), generator=generator) + 0.125
    return torch.randn(*rows, K, generator=generator).to(codes), scale.to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=dtype_name)
@pytest.mark.parametrize("format", DTYPES)
def test_fuses_once(
    rewrite: Callable[..., Any],
    linear: Callable[..., QuarkLinear],
    shape: str,
    dtype: torch.dtype,
    format: str,
) -> None:
    model = OfCodes(linear("fp8_weight_only", K, N, dtype=dtype))
    args = activation(3, shape=shape, dtype=dtype, codes=DTYPES[format])
    done = rewrite(model, *args)
    assert done.fused() == {"quantized_gemm": 1}
    assert [done.result.matches(f"fp8_{stage}") for stage in ("weight", "activation", "prologue")] == [1, 1, 0]
    assert done.result.unfused == done.result.left == ()
    arguments = done.arguments("quantized_gemm")
    assert (arguments["x_format"], arguments["out_dtype"]) == (format, dtype_name(dtype))
    assert arguments["x_zero_point"] is None
    (result,) = done.result.linears
    assert result.problem.x_granularity == shape
    assert torch.equal(done.output, model(*args))


@pytest.mark.parametrize("preset", ["mxfp4_weight_only", "nvfp4_weight_only", "int8_weight_only", "int4_wo_32"])
def test_any_weight(rewrite: Callable[..., Any], linear: Callable[..., QuarkLinear], preset: str) -> None:
    """N kinds of weights and M of activations take N + M rules."""
    model, args = OfCodes(linear(preset, K, N)), activation(3, shape="per_token")
    done = rewrite(model, *args)
    assert done.fused() == {"quantized_gemm": 1}
    assert done.result.matches("fp8_activation") == 1
    assert torch.equal(done.output, model(*args))


@pytest.mark.parametrize("rows", [(3,), (2, 3), (2, 2, 3)], ids=str)
@pytest.mark.parametrize("shape", ["per_tensor", "per_token"])
@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
def test_any_rank(
    rewrite: Callable[..., Any], linear: Callable[..., QuarkLinear], rows: tuple[int, ...], shape: str, dynamic: bool
) -> None:
    model, args = OfCodes(linear("fp8_weight_only", K, N)), activation(*rows, shape=shape)
    done = rewrite(model, *args, dynamic=dynamic)
    assert done.fused() == {"quantized_gemm": 1}
    assert torch.equal(done.output, model(*args))


@pytest.mark.parametrize("promoted", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
def test_a_float32_scale_of_a_tensor(
    rewrite: Callable[..., Any], linear: Callable[..., QuarkLinear], dtype: torch.dtype, promoted: bool
) -> None:
    """The product is rounded once, whether somebody writes that it is float32 or not."""

    class InFloat32(OfCodes):
        def values(self, codes: Tensor, scale: Tensor) -> Tensor:
            return (codes.float() * scale).to(self.dtype) if promoted else codes.to(self.dtype) * scale

    model, args = InFloat32(linear("fp8_weight_only", K, N, dtype=dtype)), activation(3)
    done = rewrite(model, *args)
    assert done.fused() == {"quantized_gemm": 1}
    assert torch.equal(done.output, model(*args))


def test_another_user_of_the_dequantized(rewrite: Callable[..., Any], linear: Callable[..., QuarkLinear]) -> None:
    class Shared(OfCodes):
        def forward(self, codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(codes, scale), self.values(codes, scale) * 2

    model = Shared(linear("fp8_weight_only", K, N, dtype=torch.bfloat16))
    args = activation(3, dtype=torch.bfloat16)
    done = rewrite(model, *args)
    assert done.fused() == {"quantized_gemm": 1}
    for got, expected in zip(done.output, model(*args), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float64], ids=dtype_name)
def test_codes_of_another_dtype(
    rewrite: Callable[..., Any], linear: Callable[..., QuarkLinear], dtype: torch.dtype
) -> None:
    """They are no FP8 activation, whatever else they are: the weight is fused alone."""
    model, (codes, scale) = OfCodes(linear("fp8_weight_only", K, N)), activation(3)
    args = codes.float().to(dtype), scale
    done = rewrite(model, *args)
    assert done.fused() == {"weight_only_gemm": 1}
    assert done.result.matches("fp8_activation") == 0
    assert torch.equal(done.output, model(*args))
