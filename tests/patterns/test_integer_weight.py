"""The rule that makes a GEMM of an 8-bit integer weight; what it must not take is in test_near_misses.py."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quark_inductor.schemes.ops import dtype_name

K, N = 64, 48
DTYPES = {"int8": torch.int8, "uint8": torch.uint8}
SHAPES = {"per_tensor": (), "per_channel": (N,), "per_group": (N, 4)}


class IntegerLinear(nn.Module):
    """A Linear of integer codes in plain torch; zero points have the shape of the scale, or there are none."""

    def __init__(
        self,
        shape: tuple[int, ...] = (N,),
        *,
        format: str = "int8",
        zero_point: torch.dtype | None = torch.int8,
        dtype: torch.dtype = torch.float32,
        bias: bool = True,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        low = -128 if format == "int8" else 0
        codes = torch.randint(low, low + 256, (N, K), generator=generator)
        self.weight = nn.Buffer(codes.to(DTYPES[format]))
        self.weight_scale = nn.Buffer((torch.rand(shape, generator=generator) + 0.125).to(dtype))
        points = torch.randint(0, 100, shape, generator=generator)
        self.zero_point = None if zero_point is None else nn.Buffer(points.to(zero_point))
        self.bias = nn.Buffer(torch.linspace(-1, 1, N, dtype=dtype)) if bias else None
        self.dtype = dtype

    def operand(self) -> Tensor:
        codes, scale, zero_point = self.weight, self.weight_scale, self.zero_point
        if scale.ndim == 2:
            codes = codes.unflatten(-1, (scale.shape[1], -1))
        if scale.ndim:
            scale, zero_point = scale.unsqueeze(-1), None if zero_point is None else zero_point.unsqueeze(-1)
        difference = codes.float() if zero_point is None else codes.float() - zero_point.float()
        return (difference * scale.float()).to(self.dtype).view(N, K)

    def forward(self, x: Tensor) -> Any:
        return F.linear(x, self.operand(), self.bias)


def activation(*rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*rows, K, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("granularity", SHAPES)
@pytest.mark.parametrize("format", DTYPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=dtype_name)
def test_fuses_once(rewrite: Callable[..., Any], granularity: str, format: str, dtype: torch.dtype) -> None:
    model = IntegerLinear(SHAPES[granularity], format=format, dtype=dtype, bias=format == "int8")
    x = activation(3, dtype=dtype)
    done = rewrite(model, x)
    assert done.fused() == {"weight_only_gemm": 1}
    assert done.result.matches("integer_weight") == 1
    assert done.result.unfused == done.result.left == ()
    arguments = done.arguments("weight_only_gemm")
    assert arguments["weight_format"] == format
    assert arguments["weight_zero_point"] is not None
    assert arguments["weight_scale_2"] is None
    assert (arguments["bias"] is None) is (format == "uint8")
    assert torch.equal(done.output, model(x))


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("format", DTYPES)
def test_without_zero_points(rewrite: Callable[..., Any], granularity: str, format: str) -> None:
    model, x = IntegerLinear(SHAPES[granularity], format=format, zero_point=None), activation(3)
    done = rewrite(model, x)
    assert done.fused() == {"weight_only_gemm": 1}
    assert done.arguments("weight_only_gemm")["weight_zero_point"] is None
    assert torch.equal(done.output, model(x))


@pytest.mark.parametrize("zero_point", [torch.uint8, torch.int32, torch.int64, torch.bfloat16], ids=dtype_name)
def test_zero_points_of_any_dtype(rewrite: Callable[..., Any], zero_point: torch.dtype) -> None:
    """It is cast to float32 first."""
    model, x = IntegerLinear(zero_point=zero_point), activation(3)
    done = rewrite(model, x)
    assert done.fused() == {"weight_only_gemm": 1}
    assert torch.equal(done.output, model(x))


class InInt32(IntegerLinear):
    """As amd-quark's own Linears have it."""

    def operand(self) -> Tensor:
        assert self.zero_point is not None
        difference = self.weight.to(torch.int32) - self.zero_point.to(torch.int32)
        return (difference.to(torch.float32) * self.weight_scale).to(self.dtype)


@pytest.mark.parametrize("format", DTYPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=dtype_name)
def test_a_difference_in_int32(rewrite: Callable[..., Any], format: str, dtype: torch.dtype) -> None:
    model, x = InInt32(SHAPES["per_tensor"], format=format, dtype=dtype), activation(3, dtype=dtype)
    model.weight_scale = model.weight_scale.float()
    done = rewrite(model, x)
    assert done.fused() == {"weight_only_gemm": 1}
    assert torch.equal(done.output, model(x))


def test_a_difference_that_float32_would_round(rewrite: Callable[..., Any]) -> None:
    model, x = InInt32(SHAPES["per_tensor"], zero_point=torch.int32), activation(3)
    done = rewrite(model, x)
    assert done.fused() == {}
    (refusal,) = done.result.unfused
    assert refusal.reason == "the weight's codes are torch.int32, expected 8 bits"


def test_a_transposed_weight(rewrite: Callable[..., Any]) -> None:
    """Stored ``[K, N]``, as amd-quark has groups: a view of it is the weight."""

    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            other = IntegerLinear(SHAPES["per_group"])
            assert other.zero_point is not None
            self.weight, self.weight_scale, self.zero_point = (
                nn.Buffer(t.t().contiguous()) for t in (other.weight, other.weight_scale, other.zero_point)
            )

        def forward(self, x: Tensor) -> Tensor:
            codes = self.weight.t().unflatten(-1, (4, -1)).float() - self.zero_point.t().unsqueeze(-1).float()
            return x @ (codes * self.weight_scale.t().unsqueeze(-1)).flatten(1).t()

    model, x = Transposed(), activation(3)
    done = rewrite(model, x)
    assert done.fused() == {"weight_only_gemm": 1}
    assert torch.equal(done.output, model(x))


@pytest.mark.parametrize("rows", [(1,), (2, 3), (2, 2, 3)], ids=str)
@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
def test_any_rank(rewrite: Callable[..., Any], rows: tuple[int, ...], dynamic: bool) -> None:
    model, x = IntegerLinear(), activation(*rows)
    done = rewrite(model, x, dynamic=dynamic)
    assert done.fused() == {"weight_only_gemm": 1}
    assert torch.equal(done.output, model(x))
