"""The rule that makes a GEMM of quantized operands where the activation is integers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quark_inductor.schemes.base import QuarkLinear
from quark_inductor.schemes.ops import dtype_name

K, N = 128, 48
DTYPES = {"int8": torch.int8, "uint8": torch.uint8}
SHAPES: dict[str, Callable[[tuple[int, ...]], tuple[int, ...]]] = {
    "per_tensor": lambda rows: (),
    "per_token": lambda rows: (*rows, 1),
    "per_group": lambda rows: (*rows, 4),
}


class OfCodes(nn.Module):
    """A Linear of integer codes, their scale and zero point in plain torch, by any scheme's weight."""

    def __init__(self, weight: QuarkLinear) -> None:
        super().__init__()
        self.linear, self.dtype = weight, weight.params_dtype

    def values(self, codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        if not scale.ndim or scale.shape[-1] == 1:
            return ((codes.float() - zero_point.float()) * scale.float()).to(self.dtype)
        groups = codes.unflatten(-1, (scale.shape[-1], -1)).float() - zero_point.unsqueeze(-1).float()
        return (groups * scale.unsqueeze(-1).float()).to(self.dtype).flatten(-2)

    def forward(self, codes: Tensor, scale: Tensor, zero_point: Tensor) -> Any:
        torch._check(codes.shape[-1] == K)
        weight = self.linear.scheme.dequantize_weight(self.linear, self.dtype)
        return F.linear(self.values(codes, scale, zero_point), weight, self.linear.bias)


def activation(
    *rows: int, granularity: str = "per_tensor", format: str = "int8", dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator, shape = torch.Generator().manual_seed(3), SHAPES[granularity](rows)
    codes = torch.randint(0, 256, (*rows, K), generator=generator).to(torch.uint8).view(DTYPES[format])
    scale = torch.rand(shape, generator=generator) + 0.125
    return codes, scale.to(dtype), torch.randint(-9, 9, shape, generator=generator, dtype=torch.int32)


@pytest.mark.parametrize("granularity", SHAPES)
@pytest.mark.parametrize("format", DTYPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=dtype_name)
def test_fuses_once(
    rewrite: Callable[..., Any], linear: Callable[..., QuarkLinear], granularity: str, format: str, dtype: torch.dtype
) -> None:
    model = OfCodes(linear("int8_weight_only", K, N, dtype=dtype))
    args = activation(3, granularity=granularity, format=format, dtype=dtype)
    done = rewrite(model, *args)
    assert done.fused() == {"quantized_gemm": 1}
    assert [done.result.matches(f"integer_{stage}") for stage in ("weight", "activation", "prologue")] == [1, 1, 0]
    assert done.result.unfused == done.result.left == ()
    arguments = done.arguments("quantized_gemm")
    assert (arguments["x_format"], arguments["out_dtype"]) == (format, dtype_name(dtype))
    assert arguments["x_zero_point"] is not None
    (result,) = done.result.linears
    assert result.problem.x_granularity == granularity
    assert torch.equal(done.output, model(*args))


@pytest.mark.parametrize("preset", ["mxfp4_weight_only", "nvfp4_weight_only", "fp8_weight_only", "uint4_wo_32"])
def test_any_weight(rewrite: Callable[..., Any], linear: Callable[..., QuarkLinear], preset: str) -> None:
    """N kinds of weights and M of activations take N + M rules."""
    model, args = OfCodes(linear(preset, K, N)), activation(3, granularity="per_token")
    done = rewrite(model, *args)
    assert done.fused() == {"quantized_gemm": 1}
    assert done.result.matches("integer_activation") == 1
    assert torch.equal(done.output, model(*args))


def test_two_gemms_of_one_activation(rewrite: Callable[..., Any], linear: Callable[..., QuarkLinear]) -> None:
    first, second = OfCodes(linear("int8_weight_only", K, N)), OfCodes(linear("fp8_weight_only", K, N))

    def both(*args: Tensor) -> tuple[Tensor, Tensor]:
        return first(*args), second(*args)

    args = activation(3)
    done = rewrite(both, *args)
    assert done.fused() == {"quantized_gemm": 2}
    for got, expected in zip(done.output, both(*args), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("granularity", SHAPES)
def test_any_number_of_tokens(
    rewrite: Callable[..., Any], linear: Callable[..., QuarkLinear], granularity: str, dynamic: bool
) -> None:
    model, args = OfCodes(linear("int8_weight_only", K, N)), activation(5, granularity=granularity)
    done = rewrite(model, *args, dynamic=dynamic)
    assert torch.equal(done.output, model(*args))
    # Groups whose number is not known when compiling are no format.
    unknown = dynamic and granularity == "per_group"
    assert done.fused() == ({"weight_only_gemm": 1} if unknown else {"quantized_gemm": 1})
