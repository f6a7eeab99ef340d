"""The rule that moves a block quantize into its GEMM."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

K, N = 64, 48
q = torch.ops.quark_inductor


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
def test_fuses_once(rewrite: Callable[..., Any], linear: Callable[..., Any], dtype: torch.dtype, bias: bool) -> None:
    model, x = linear("mxfp4", bias=bias, dtype=dtype), randn(3, K, dtype=dtype)
    done = rewrite(model, x)
    assert done.fused() == {"prologue_gemm": 1}
    rules = ("block_weight", "block_activation", "block_prologue")
    assert [done.result.matches(rule) for rule in rules] == [1, 1, 1]
    assert done.result.unfused == done.result.left == ()
    arguments = done.arguments("prologue_gemm")
    formats = {name: arguments[name] for name in ("x_format", "scale_rule", "group_size", "weight_format")}
    assert formats == {"x_format": "mxfp4", "scale_rule": "even", "group_size": 0, "weight_format": "mxfp4"}
    assert (arguments["x_scale"], arguments["x_scale_2"], arguments["x_zero_point"]) == (None, None, None)
    assert (arguments["bias"] is None) is not bias
    assert torch.equal(done.output, model(x))


@pytest.mark.parametrize(
    ("preset", "format", "scale_rule"),
    [
        ("mxfp8", "mxfp8_e4m3", "rceil"),
        ("mxfp6_e3m2", "mxfp6_e3m2", "even"),
        ("mxfp4_mxfp6_e2m3", "mxfp6_e2m3", "even"),
        ("nvfp4", "nvfp4", "sequential"),
        ("amdfp4", "amdfp4_g16", "nearest"),
    ],
)
def test_formats_and_scale_rules(
    rewrite: Callable[..., Any], linear: Callable[..., Any], preset: str, format: str, scale_rule: str
) -> None:
    model, x = linear(preset), randn(3, K)
    done = rewrite(model, x)
    arguments = done.arguments("prologue_gemm")
    assert (arguments["x_format"], arguments["scale_rule"]) == (format, scale_rule)
    assert (arguments["x_scale_2"] is None) is (preset != "nvfp4")
    assert done.result.left == ()
    assert torch.equal(done.output, model(x))


@pytest.mark.parametrize("rows", [(1,), (2, 3), (2, 2, 3)])
@pytest.mark.parametrize("dynamic", [True, False])
def test_any_rank(
    rewrite: Callable[..., Any], linear: Callable[..., Any], rows: tuple[int, ...], dynamic: bool
) -> None:
    model, x = linear("mxfp4", dtype=torch.bfloat16), randn(*rows, K, dtype=torch.bfloat16)
    done = rewrite(model, x, dynamic=dynamic)
    assert done.fused() == {"prologue_gemm": 1}
    assert torch.equal(done.output, model(x))


@pytest.mark.parametrize("dynamic", [True, False])
def test_three_gemms_of_one_input(rewrite: Callable[..., Any], linear: Callable[..., Any], dynamic: bool) -> None:
    class Qkv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = linear("mxfp4"), linear("mxfp4", n=16, bias=False), linear("mxfp4", n=16)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return self.q(x), self.k(x), self.v(x)

    model, x = Qkv(), randn(2, 3, K)
    done = rewrite(model, x, dynamic=dynamic)
    assert done.fused() == {"prologue_gemm": 3}
    assert (done.result.matches("block_activation"), done.result.matches("block_prologue")) == (3, 3)
    for got, expected in zip(done.output, model(x), strict=True):
        assert torch.equal(got, expected)


class CodesUsedTwice(nn.Module):
    """An MXFP4 Linear from our ops, and what else reads the codes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Buffer(torch.arange(N * K // 2).reshape(N, K // 2).to(torch.uint8))
        self.weight_scale = nn.Buffer(torch.full((N, K // 32), 127, dtype=torch.uint8))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        codes, scales = q.block_quantize(x, "mxfp4", "even")
        operand = q.block_dequantize(codes, scales, "mxfp4", "float32")
        weight = q.block_dequantize(self.weight, self.weight_scale, "mxfp4", "float32")
        return operand @ weight.t(), codes + 1, scales + 1


def test_another_user_of_the_codes(rewrite: Callable[..., Any]) -> None:
    module, x = CodesUsedTwice(), randn(3, K)
    done = rewrite(module, x)
    assert done.fused() == {"block_quantize": 1, "prologue_gemm": 1}
    for got, expected in zip(done.output, module(x), strict=True):
        assert torch.equal(got, expected)
