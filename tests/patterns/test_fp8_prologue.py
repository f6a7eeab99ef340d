"""The rule that moves an FP8 quantize into its GEMM: which quantizes are the kernel's, and which only look like it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

FP8 = torch.float8_e4m3fn
K, N = 64, 48
PRESETS = {"fp8": "given", "fp8_dynamic": "given", "ptpc_fp8": "amax"}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
def test_fuses_once(
    rewrite: Callable[..., Any], linear: Callable[..., Any], preset: str, dtype: torch.dtype, bias: bool
) -> None:
    model, x = linear(preset, K, N, bias=bias, dtype=dtype), randn(3, K, dtype=dtype)
    done = rewrite(model, x)
    assert done.fused() == {"prologue_gemm": 1}
    assert [done.result.matches(f"fp8_{stage}") for stage in ("weight", "activation", "prologue")] == [1, 1, 1]
    assert done.result.unfused == ()
    arguments = done.arguments("prologue_gemm")
    assert (arguments["x_format"], arguments["weight_format"]) == ("fp8_e4m3", "fp8_e4m3")
    assert (arguments["scale_rule"], arguments["group_size"]) == (PRESETS[preset], 0)
    assert (arguments["x_scale"] is None) is (preset == "ptpc_fp8")  # the scale is computed in the prologue, or given
    assert (arguments["bias"] is None) is not bias
    # Nothing of the quantize is left, but the amax of a whole tensor, which no row can compute.
    assert done.count(torch.ops.aten.amax.default) == (preset == "fp8_dynamic")
    assert done.count(torch.ops.prims.convert_element_type.default) == (preset == "fp8_dynamic")
    assert torch.equal(done.output, model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_groups(rewrite: Callable[..., Any], linear: Callable[..., Any], dtype: torch.dtype) -> None:
    model, x = linear("fp8_block128", 256, 200, dtype=dtype), randn(3, 256, dtype=dtype)
    done = rewrite(model, x)
    assert done.fused() == {"prologue_gemm": 1}
    arguments = done.arguments("prologue_gemm")
    assert (arguments["scale_rule"], arguments["group_size"]) == ("amax", 128)
    assert (arguments["x_scale"], arguments["weight_format"]) == (None, "fp8_e4m3_128x128")
    assert done.result.left == ()
    assert torch.equal(done.output, model(x))


@pytest.mark.parametrize("preset", ["fp8_e5m2", "mxfp4_fp8_token", "int4_fp8"])
def test_other_formats_and_weights(rewrite: Callable[..., Any], linear: Callable[..., Any], preset: str) -> None:
    model, x = linear(preset), randn(3, K)
    done = rewrite(model, x)
    assert done.fused() == {"prologue_gemm": 1}
    assert done.result.matches("fp8_prologue") == 1
    assert done.arguments("prologue_gemm")["x_format"] == ("fp8_e5m2" if preset == "fp8_e5m2" else "fp8_e4m3")
    assert torch.equal(done.output, model(x))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("rows", [(1,), (2, 3), (2, 2, 3)])
@pytest.mark.parametrize("dynamic", [True, False])
def test_any_rank(
    rewrite: Callable[..., Any], linear: Callable[..., Any], preset: str, rows: tuple[int, ...], dynamic: bool
) -> None:
    model, x = linear(preset, dtype=torch.bfloat16), randn(*rows, K, dtype=torch.bfloat16)
    done = rewrite(model, x, dynamic=dynamic)
    assert done.fused() == {"prologue_gemm": 1}
    assert torch.equal(done.output, model(x))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dynamic", [True, False])
def test_three_gemms_of_one_input(
    rewrite: Callable[..., Any], linear: Callable[..., Any], preset: str, dynamic: bool
) -> None:
    q, k, v = linear(preset, K, 48), linear(preset, K, 16, bias=False), linear(preset, K, 16)
    x = randn(2, 3, K)

    class Qkv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = q, k, v

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return self.q(x), self.k(x), self.v(x)

    model = Qkv()
    done = rewrite(model, x, dynamic=dynamic)
    assert done.fused() == {"prologue_gemm": 3}
    assert done.count(torch.ops.aten.amax.default) == (preset == "fp8_dynamic")
    for got, expected in zip(done.output, model(x), strict=True):
        assert torch.equal(got, expected)


class Quantizes(nn.Module):
    """An FP8 Linear of a float input in plain torch. Subclasses change one thing each."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = dtype
        self.weight = nn.Buffer(randn(N, K).to(FP8))
        self.weight_scale = nn.Buffer(randn(N, seed=1).abs().to(dtype))

    def scale(self, x: Tensor) -> Tensor:
        """As :func:`quark_inductor.schemes.numerics.fp8.dynamic_scale` of each row."""
        scale = x.abs().amax(-1, keepdim=True) / 448.0
        return scale + (scale == 0).to(scale.dtype) * 2.0**-23

    def quantize(self, x: Tensor, scale: Tensor) -> Tensor:
        return (x / scale).clamp(-448.0, 448.0).to(FP8)

    def gemm(self, codes: Tensor, scale: Tensor) -> Tensor:
        weight = (self.weight.float() * self.weight_scale.float().unsqueeze(-1)).to(self.dtype)
        return F.linear(codes.to(self.dtype) * scale, weight)

    def forward(self, x: Tensor, other: Tensor) -> Any:
        scale = self.scale(x)
        return self.gemm(self.quantize(x, scale), scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_of_amax_is_computed_in_the_prologue(rewrite: Callable[..., Any], dtype: torch.dtype) -> None:
    args = randn(3, K, dtype=dtype), randn(3, K, seed=2, dtype=dtype)
    done = rewrite(Quantizes(dtype), *args)
    assert done.fused() == {"prologue_gemm": 1}
    assert done.arguments("prologue_gemm")["scale_rule"] == "amax"


class GivenInFloat32(Quantizes):
    """Of no dimension, a float32 scale leaves the dtype as it is."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.input_scale = nn.Buffer(torch.tensor(0.0123))

    def scale(self, x: Tensor) -> Tensor:
        return self.input_scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_given_float32_scale(rewrite: Callable[..., Any], dtype: torch.dtype) -> None:
    model, args = GivenInFloat32(dtype), (randn(3, K, dtype=dtype), randn(3, K, seed=2, dtype=dtype))
    done = rewrite(model, *args)
    assert done.fused() == {"prologue_gemm": 1}
    assert done.arguments("prologue_gemm")["scale_rule"] == "given"
    assert torch.equal(done.output, model(*args))


class AmaxOfAnother(Quantizes):
    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        scale = self.scale(other)
        return self.gemm(self.quantize(x, scale), scale)


class AmaxBefore(Quantizes):
    """Of a tensor that is nearly the one that is quantized."""

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        scale = self.scale(x)
        return self.gemm(self.quantize(x * 2, scale), scale)


class OtherEps(Quantizes):
    def scale(self, x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True) / 448.0
        return scale + (scale == 0).to(scale.dtype) * 2.0**-10


class OtherMax(Quantizes):
    def scale(self, x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True) / 240.0
        return scale + (scale == 0).to(scale.dtype) * 2.0**-23


class NoAbs(Quantizes):
    def scale(self, x: Tensor) -> Tensor:
        scale = x.amax(-1, keepdim=True) / 448.0
        return scale + (scale == 0).to(scale.dtype) * 2.0**-23


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", [AmaxOfAnother, AmaxBefore, OtherEps, OtherMax, NoAbs])
def test_another_scale_is_given(rewrite: Callable[..., Any], model: type[Quantizes], dtype: torch.dtype) -> None:
    """It is nearly that of the prologue: computed before the GEMM, as the graph says, and given to it."""
    module = model(dtype)
    args = randn(3, K, dtype=dtype), randn(3, K, seed=2, dtype=dtype)
    done = rewrite(module, *args)
    assert done.fused() == {"prologue_gemm": 1}
    arguments = done.arguments("prologue_gemm")
    assert arguments["scale_rule"] == "given"
    assert arguments["x_scale"].meta["val"].shape == (3, 1)
    assert done.result.unfused == ()
    assert torch.equal(done.output, module(*args))


class PerTensorOfAnother(Quantizes):
    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        scale = other.abs().amax() / 448.0
        return self.gemm(self.quantize(x, scale), scale)


def test_a_scale_of_one_number_may_come_from_anywhere(rewrite: Callable[..., Any]) -> None:
    """It is computed before the GEMM, and given to it."""
    module, args = PerTensorOfAnother(), (randn(3, K), randn(5, K, seed=2))
    done = rewrite(module, *args)
    assert done.fused() == {"prologue_gemm": 1}
    arguments = done.arguments("prologue_gemm")
    assert (arguments["scale_rule"], arguments["x_scale"].target) == ("given", torch.ops.aten.div.Tensor)
    assert torch.equal(done.output, module(*args))


class CodesUsedTwice(Quantizes):
    def forward(self, x: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scale = self.scale(x)
        codes = self.quantize(x, scale)
        return self.gemm(codes, scale), codes.float() + 1, scale * 2


def test_another_user_of_the_codes(rewrite: Callable[..., Any]) -> None:
    module, args = CodesUsedTwice(), (randn(3, K), randn(3, K))
    done = rewrite(module, *args)
    assert done.fused() == {"prologue_gemm": 1}
    for got, expected in zip(done.output, module(*args), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.bfloat16, torch.float16])
def test_an_activation_of_another_dtype(rewrite: Callable[..., Any], dtype: torch.dtype) -> None:
    """Quantized from ``dtype``, multiplied in float32: a prologue would compute, and return, the wrong dtype."""

    class Given(Quantizes):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return self.gemm(self.quantize(x, scale), scale)

    module, args = Given(), ((randn(3, K) * 100).to(dtype), torch.tensor(0.37))
    expected = module(*args)
    done = rewrite(module, *args)
    assert done.fused() == {"quantized_gemm": 1}
    assert done.output.dtype == expected.dtype == torch.float32
    assert torch.equal(done.output, expected)
