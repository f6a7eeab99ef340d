"""The rule that makes a GEMM of a block-quantized weight."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quark_inductor.schemes.numerics.block import BLOCK_FORMATS
from quark_inductor.schemes.ops import dtype_name

K, N = 64, 48
q = torch.ops.quark_inductor


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class BlockLinear(nn.Module):
    """A Linear of a weight in a block format, from our ops. Subclasses change one thing each."""

    def __init__(self, format: str = "mxfp4", dtype: torch.dtype = torch.float32, *, bias: bool = True) -> None:
        super().__init__()
        f = BLOCK_FORMATS[format]
        weight = randn(N, K)
        global_scale = f.global_scale(weight.abs().amax()) if f.has_global_scale else None
        codes, scales = q.block_quantize(weight, format, f.scale_rules[0], global_scale)
        self.weight, self.weight_scale = nn.Buffer(codes), nn.Buffer(scales)
        self.weight_scale_2 = None if global_scale is None else nn.Buffer(global_scale)
        self.bias = nn.Buffer(torch.linspace(-1, 1, N, dtype=dtype)) if bias else None
        self.format, self.dtype = format, dtype

    def operand(self) -> Tensor:
        return q.block_dequantize(
            self.weight, self.weight_scale, self.format, dtype_name(self.dtype), self.weight_scale_2
        )

    def forward(self, x: Tensor) -> Any:
        # As QuarkLinear does: then K is a constant of the graph when every size is symbolic.
        if x.shape[-1] != K:
            raise ValueError("K")
        return F.linear(x, self.operand(), self.bias)


@pytest.mark.parametrize("format", BLOCK_FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=dtype_name)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_fuses_once(rewrite: Callable[..., Any], format: str, dtype: torch.dtype, bias: bool) -> None:
    model, x = BlockLinear(format, dtype, bias=bias), randn(3, K, dtype=dtype)
    done = rewrite(model, x)
    assert done.fused() == {"weight_only_gemm": 1}
    assert (done.result.matches("block_weight"), done.result.matches("block_activation")) == (1, 0)
    assert done.result.unfused == done.result.left == ()
    arguments = done.arguments("weight_only_gemm")
    assert arguments["weight_format"] == format
    given = {name for name, argument in arguments.items() if argument is not None}
    # The last three say that the weight is not packed.
    expected = {"x", "weight", "weight_scale", "weight_format", "weight_layout", "weight_rows", "weight_columns"}
    expected |= {"weight_scale_2"} if BLOCK_FORMATS[format].has_global_scale else set()
    assert given == expected | ({"bias"} if bias else set())
    assert torch.equal(done.output, model(x))


@pytest.mark.parametrize("rows", [(1,), (2, 3), (2, 2, 3)], ids=str)
@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
def test_any_rank(rewrite: Callable[..., Any], rows: tuple[int, ...], dynamic: bool) -> None:
    model, x = BlockLinear(), randn(*rows, K)
    done = rewrite(model, x, dynamic=dynamic)
    assert done.fused() == {"weight_only_gemm": 1}
    assert torch.equal(done.output, model(x))


class Shared(BlockLinear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.operand()
        return F.linear(x, weight, self.bias), weight.sum(0)


def test_another_user_of_the_dequantized(rewrite: Callable[..., Any]) -> None:
    model, x = Shared(), randn(3, K)
    done = rewrite(model, x)
    assert done.fused() == {"weight_only_gemm": 1, "block_dequantize": 1}
    assert [r.reason for r in done.result.left] == ["no GEMM reads it: it is of an output, a cache or an embedding"]
    for got, expected in zip(done.output, model(x), strict=True):
        assert torch.equal(got, expected)


def test_a_weight_that_two_gemms_read(rewrite: Callable[..., Any]) -> None:
    model = BlockLinear()
    args = randn(3, K), randn(5, K, seed=1)

    def twice(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return model(x), model(y)

    done = rewrite(twice, *args)
    assert done.fused() == {"weight_only_gemm": 2}
    for got, expected in zip(done.output, twice(*args), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("shape", [(3, N), (1, N), (1,), ()], ids=str)
def test_what_addmm_adds_is_a_bias_or_stays(rewrite: Callable[..., Any], shape: tuple[int, ...]) -> None:
    """``addmm`` adds anything that broadcasts to ``[M, N]``; a kernel's bias is ``[N]``."""

    class Added(BlockLinear):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Buffer(torch.full(shape, 0.5))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x, self.operand().t())

    model, x = Added(), randn(3, K)
    done = rewrite(model, x)
    fused = done.count("weight_only_gemm")
    if fused:  # added afterwards
        assert done.arguments("weight_only_gemm")["bias"] is None
    else:
        (refusal,) = done.result.unfused
        assert refusal.reason == f"what is added has shape {shape}, expected a bias [{N}]"
    # One more rounding, of a result below 2^6, if it is added after the GEMM.
    torch.testing.assert_close(done.output, model(x), rtol=0, atol=2**-18)
