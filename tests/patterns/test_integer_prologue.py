"""The rule that moves an integer quantize into its GEMM."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quark_inductor.schemes.numerics import integer
from quark_inductor.schemes.ops import dtype_name

K, N = 128, 48
# What the prologue computes: format, scale rule, group size, and whether scale and zero point are given.
PRESETS = {
    "int8": ("int8", "given", 0),
    "int8_dynamic": ("int8", "given", 0),
    "ptpc_int8": ("int8", "symmetric", 0),
    "int4_wa_64": ("int4", "symmetric", 64),
}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=dtype_name)
def test_fuses_once(rewrite: Callable[..., Any], linear: Callable[..., Any], preset: str, dtype: torch.dtype) -> None:
    model, x = linear(preset, K, N, dtype=dtype), randn(3, K, dtype=dtype)
    done = rewrite(model, x)
    assert done.fused() == {"prologue_gemm": 1}
    assert [done.result.matches(f"integer_{stage}") for stage in ("activation", "prologue")] == [1, 1]
    assert done.result.unfused == ()
    arguments = done.arguments("prologue_gemm")
    found = tuple(arguments[name] for name in ("x_format", "scale_rule", "group_size"))
    assert found == PRESETS[preset]
    given = found[1] == "given"
    # A symmetric activation's zero point, which is 0, is left out; a stored one may be 0 or not.
    zero_point = given and preset != "int8_dynamic"
    assert (arguments["x_scale"] is not None, arguments["x_zero_point"] is not None) == (given, zero_point)
    # Nothing of the quantize is left, but the range of a whole tensor, which no row can compute.
    ranges = [done.count(op) for op in (torch.ops.aten.amax.default, torch.ops.aten.amin.default)]
    assert ranges == [preset == "int8_dynamic"] * 2
    assert torch.equal(done.output, model(x))


class Quantizes(nn.Module):
    """An integer Linear of a float input in plain torch. Subclasses change one thing each."""

    low, high, codes = -128, 127, torch.int8

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Buffer(torch.randint(-128, 128, (N, K), dtype=torch.int8))
        self.weight_scale = nn.Buffer(torch.rand(N) + 0.125)

    def parameters_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As :func:`quark_inductor.schemes.numerics.integer.parameters` of each row, asymmetric."""
        smallest, largest = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
        scale = ((largest - smallest) / (self.high - self.low)).clamp(min=2.0**-23)
        zero_point = (self.low - torch.round(smallest / scale)).clamp(self.low, self.high)
        return scale, zero_point.to(torch.int32)

    def forward(self, x: Tensor) -> Any:
        scale, zero_point = self.parameters_of(x)
        rounded = torch.round(x * (1.0 / scale)) + zero_point.to(torch.float32)
        codes = rounded.clamp(self.low, self.high).to(self.codes)
        operand = (codes.float() - zero_point.float()) * scale
        return operand @ (self.weight.float() * self.weight_scale.unsqueeze(-1)).t()


class Unsigned(Quantizes):
    low, high, codes = 0, 255, torch.uint8


class FourBits(Quantizes):
    low, high = -8, 7


class FourBitsUnsigned(Quantizes):
    low, high, codes = 0, 15, torch.uint8


@pytest.mark.parametrize(
    ("model", "format"), [(Quantizes, "int8"), (Unsigned, "uint8"), (FourBits, "int4"), (FourBitsUnsigned, "uint4")]
)
def test_asymmetric_per_token(rewrite: Callable[..., Any], model: type[Quantizes], format: str) -> None:
    module, x = model(), randn(3, K)
    done = rewrite(module, x)
    assert done.fused() == {"prologue_gemm": 1}
    arguments = done.arguments("prologue_gemm")
    found = tuple(arguments[name] for name in ("x_format", "scale_rule", "group_size", "x_scale", "x_zero_point"))
    assert found == (format, "asymmetric", 0, None, None)
    assert torch.equal(done.output, module(x))


class OtherEps(Quantizes):
    def parameters_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale, zero_point = super().parameters_of(x)
        return scale.clamp(min=2.0**-10), zero_point


class OtherRange(Quantizes):
    def parameters_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.abs().amax(-1, keepdim=True) / 100.0, torch.full((len(x), 1), 3, dtype=torch.int32)


@pytest.mark.parametrize("model", [OtherEps, OtherRange])
def test_another_scale_is_given(rewrite: Callable[..., Any], model: type[Quantizes]) -> None:
    """Computed before the GEMM, as the graph says."""
    module, x = model(), randn(3, K)
    done = rewrite(module, x)
    assert done.fused() == {"prologue_gemm": 1}
    arguments = done.arguments("prologue_gemm")
    assert (arguments["x_format"], arguments["scale_rule"]) == ("int8", "given")
    assert arguments["x_scale"].meta["val"].shape == arguments["x_zero_point"].meta["val"].shape == (3, 1)
    assert torch.equal(done.output, module(x))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("rows", [(1,), (2, 3)], ids=str)
@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
def test_any_rank(
    rewrite: Callable[..., Any], linear: Callable[..., Any], preset: str, rows: tuple[int, ...], dynamic: bool
) -> None:
    model, x = linear(preset, K, N), randn(*rows, K)
    done = rewrite(model, x, dynamic=dynamic)
    assert done.fused() == {"prologue_gemm": 1}
    assert torch.equal(done.output, model(x))


def test_three_gemms_of_one_input(rewrite: Callable[..., Any], linear: Callable[..., Any]) -> None:
    class Qkv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (linear("ptpc_int8", K, n) for n in (48, 16, 24))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return self.q(x), self.k(x), self.v(x)

    model, x = Qkv(), randn(2, 3, K)
    done = rewrite(model, x)
    assert done.fused() == {"prologue_gemm": 3}
    for got, expected in zip(done.output, model(x), strict=True):
        assert torch.equal(got, expected)


class CodesUsedTwice(Quantizes):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale, zero_point = self.parameters_of(x)
        codes = (torch.round(x * (1.0 / scale)) + zero_point.to(torch.float32)).clamp(-128, 127).to(torch.int8)
        operand = (codes.float() - zero_point.float()) * scale
        return operand @ (self.weight.float() * self.weight_scale.unsqueeze(-1)).t(), codes + 1


def test_another_user_of_the_codes(rewrite: Callable[..., Any]) -> None:
    module, x = CodesUsedTwice(), randn(3, K)
    done = rewrite(module, x)
    assert done.fused() == {"prologue_gemm": 1}
    for got, expected in zip(done.output, module(x), strict=True):
        assert torch.equal(got, expected)


def test_symmetric_codes_that_are_read_with_a_zero_point(rewrite: Callable[..., Any]) -> None:
    """The quantize has none to give to the prologue: it stays outside."""
    weight, scale = torch.randint(-128, 128, (N, K), dtype=torch.int8), torch.rand(N) + 0.125
    shift = torch.full((3, 1), 5, dtype=torch.int32)

    def fn(x: Tensor, shift: Tensor) -> Tensor:
        step, zero = integer.parameters(x, "int8", True, -1)
        values = integer.dequantize(integer.quantize(x, step, zero, "int8"), step, shift, x.dtype)
        return values @ (weight.float() * scale.unsqueeze(-1)).t()

    x = randn(3, K)
    done = rewrite(fn, x, shift)
    assert done.fused() == {"quantized_gemm": 1}
    assert {r.reason for r in done.result.left} == {
        "the activation is quantized without a zero point and dequantized with one"
    }
    assert torch.equal(done.output, fn(x, shift))
