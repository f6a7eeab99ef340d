"""The rule that moves a block quantize into its GEMM."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quark_inductor.schemes import ops

K, N = 64, 48
q = torch.ops.quark_inductor


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
def test_fuses_once(rewrite: Callable[..., Any], linear: Callable[..., Any], dtype: torch.dtype, bias: bool) -> None:
    model, x = linear("mxfp4", bias=bias, dtype=dtype), randn(3, K, dtype=dtype)
    done = rewrite(model, x)
    assert done.fused() == {"block_prologue_gemm": 1}
    assert done.result.matches("block_gemm") == done.result.matches("block_prologue") == 1
    assert done.result.unfused == ()
    (node,) = done.graph.find_nodes(op="call_function", target=q.block_prologue_gemm.default)
    assert node.args[4:] == ("mxfp4", "even", "mxfp4")
    assert (node.args[3] is None) is not bias
    assert torch.equal(done.output, model(x))


@pytest.mark.parametrize("rows", [(1,), (2, 3), (2, 2, 3)])
@pytest.mark.parametrize("dynamic", [True, False])
def test_any_rank(
    rewrite: Callable[..., Any], linear: Callable[..., Any], rows: tuple[int, ...], dynamic: bool
) -> None:
    model, x = linear("mxfp4", dtype=torch.bfloat16), randn(*rows, K, dtype=torch.bfloat16)
    done = rewrite(model, x, dynamic=dynamic)
    assert done.fused() == {"block_prologue_gemm": 1}
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
    assert done.fused() == {"block_prologue_gemm": 3}
    assert (done.result.matches("block_gemm"), done.result.matches("block_prologue")) == (3, 3)
    for got, expected in zip(done.output, model(x), strict=True):
        assert torch.equal(got, expected)


class Quantizes(nn.Module):
    """An MXFP4 Linear from our ops. Subclasses change one thing each."""

    out_dtype = "float32"

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Buffer(torch.arange(N * K // 2).reshape(N, K // 2).to(torch.uint8))
        self.weight_scale = nn.Buffer(torch.full((N, K // 32), 127, dtype=torch.uint8))

    def gemm(self, codes: Tensor, scales: Tensor) -> Tensor:
        return ops.block_gemm(codes, scales, self.weight, self.weight_scale, None, "mxfp4", "mxfp4", self.out_dtype)

    def forward(self, x: Tensor, other: Tensor) -> Any:
        return self.gemm(*q.block_quantize(x, "mxfp4", "even"))


class ScalesOfAnother(Quantizes):
    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.gemm(q.block_quantize(x, "mxfp4", "even")[0], q.block_quantize(other, "mxfp4", "even")[1])


class CodesChanged(Quantizes):
    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        codes, scales = q.block_quantize(x, "mxfp4", "even")
        return self.gemm(codes ^ 8, scales)


class FlattenedAfterwards(Quantizes):
    """The quantize is of three dimensions: its results are flattened, so it is not the GEMM's own."""

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        codes, scales = q.block_quantize(x.unsqueeze(1), "mxfp4", "even")
        return self.gemm(codes.flatten(0, 1), scales.flatten(0, 1))


@pytest.mark.parametrize("model", [ScalesOfAnother, CodesChanged, FlattenedAfterwards])
def test_near_miss(rewrite: Callable[..., Any], model: type[Quantizes]) -> None:
    module, args = model(), (randn(3, K), randn(3, K, seed=1))
    done = rewrite(module, *args)
    assert done.result.matches("block_prologue") == 0
    assert done.count("block_gemm") == 1
    assert done.result.unfused == ()
    assert torch.equal(done.output, module(*args))


def test_an_activation_of_another_dtype_is_refused(rewrite: Callable[..., Any]) -> None:
    module, args = Quantizes(), (randn(3, K, dtype=torch.bfloat16), randn(3, K))
    done = rewrite(module, *args)
    assert done.fused() == {"block_quantize": 1, "block_gemm": 1}
    (refusal,) = (r for p in done.result.passes for r in p.refusals)
    assert (
        refusal.reason == "the activation is torch.bfloat16, the result torch.float32: a prologue GEMM keeps one dtype"
    )
    assert refusal.rule == "block_prologue"
    assert torch.equal(done.output, module(*args))


class CodesUsedTwice(Quantizes):
    def forward(self, x: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        codes, scales = q.block_quantize(x, "mxfp4", "even")
        return self.gemm(codes, scales), codes + 1, scales + 1


def test_another_user_of_the_codes(rewrite: Callable[..., Any]) -> None:
    module, args = CodesUsedTwice(), (randn(3, K), randn(3, K))
    done = rewrite(module, *args)
    assert done.fused() == {"block_quantize": 1, "block_prologue_gemm": 1}
    for got, expected in zip(done.output, module(*args), strict=True):
        assert torch.equal(got, expected)
