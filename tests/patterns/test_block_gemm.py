"""The rule that makes a GEMM of block-quantized operands."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quark_inductor.schemes import ops  # noqa: F401

K, N = 64, 48
q = torch.ops.quark_inductor


def draw(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


class MxLinear(nn.Module):
    """A Linear of MXFP4 codes in plain torch. Subclasses change one thing each."""

    def __init__(self, dtype: torch.dtype = torch.float32, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Buffer(draw(0, 256, N, K // 2))
        self.weight_scale = nn.Buffer(draw(120, 130, N, K // 32))
        self.bias = nn.Buffer(torch.linspace(-1, 1, N, dtype=dtype)) if bias else None
        self.dtype = dtype

    def dequantized(self, codes: Tensor, scales: Tensor) -> Tensor:
        return q.block_dequantize(codes, scales, "mxfp4", str(self.dtype).removeprefix("torch."))

    def forward(self, codes: Tensor, scales: Tensor) -> Any:
        # As QuarkLinear does: then K is a constant of the graph when every size is symbolic.
        if codes.shape[-1] != K // 2 or scales.shape[-1] != K // 32:
            raise ValueError("K")
        return F.linear(self.dequantized(codes, scales), self.dequantized(self.weight, self.weight_scale), self.bias)


def activation(*rows: int) -> tuple[Tensor, Tensor]:
    return draw(0, 256, *rows, K // 2, seed=1), draw(120, 130, *rows, K // 32, seed=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
def test_fuses_once(rewrite: Callable[..., Any], dtype: torch.dtype, bias: bool) -> None:
    model, args = MxLinear(dtype, bias=bias), activation(3)
    done = rewrite(model, *args)
    assert done.fused() == {"block_gemm": 1}
    assert (done.result.matches("block_gemm"), done.result.matches("block_prologue")) == (1, 0)
    assert torch.equal(done.output, model(*args))


@pytest.mark.parametrize("rows", [(2, 3), (2, 2, 3)])
@pytest.mark.parametrize("dynamic", [True, False])
def test_any_rank(rewrite: Callable[..., Any], rows: tuple[int, ...], dynamic: bool) -> None:
    """The views that ``F.linear`` puts above the GEMM go above the dequantize."""
    model, args = MxLinear(), activation(*rows)
    done = rewrite(model, *args, dynamic=dynamic)
    assert done.result.matches("hoist_views") == 1
    assert done.fused() == {"block_gemm": 1}
    assert torch.equal(done.output, model(*args))


class Shared(MxLinear):
    def forward(self, codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = self.dequantized(codes, scales), self.dequantized(self.weight, self.weight_scale)
        return F.linear(x, weight, self.bias), x * 2, weight.sum(0)


def test_another_user_of_the_dequantized(rewrite: Callable[..., Any]) -> None:
    model, args = Shared(), activation(3)
    done = rewrite(model, *args)
    assert done.fused() == {"block_gemm": 1, "block_dequantize": 2}
    for got, expected in zip(done.output, model(*args), strict=True):
        assert torch.equal(got, expected)


class Beta(MxLinear):
    def forward(self, codes: Tensor, scales: Tensor) -> Tensor:
        weight = self.dequantized(self.weight, self.weight_scale)
        return torch.addmm(self.bias, self.dequantized(codes, scales), weight.t(), beta=0.5)


def test_addmm_with_beta(rewrite: Callable[..., Any]) -> None:
    model, args = Beta(), activation(3)
    done = rewrite(model, *args)
    assert done.fused() == {"block_dequantize": 2}
    (refusal,) = done.result.unfused
    assert "{'beta': 0.5}, which no fused GEMM computes" in refusal.reason
    assert torch.equal(done.output, model(*args))


@pytest.mark.parametrize("shape", [(3, N), (1, N), ()], ids=str)
def test_what_addmm_adds_is_a_bias_or_stays(rewrite: Callable[..., Any], shape: tuple[int, ...]) -> None:
    """``addmm`` adds anything that broadcasts to ``[M, N]``; a kernel's bias is ``[N]``."""

    class Added(MxLinear):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Buffer(torch.full(shape, 0.5))

        def forward(self, codes: Tensor, scales: Tensor) -> Tensor:
            weight = self.dequantized(self.weight, self.weight_scale)
            return torch.addmm(self.bias, self.dequantized(codes, scales), weight.t())

    model, args = Added(), activation(3)
    done = rewrite(model, *args)
    for node in done.graph.find_nodes(op="call_function", target=q.block_gemm.default):
        assert node.args[4] is None or node.args[4].meta["val"].shape == (N,), "the kernel reads bias[n]"
    # One more rounding, of a result below 2^11: products of up to 6 * 6 * 2^4, 64 of them, mostly cancelling.
    torch.testing.assert_close(done.output, model(*args), rtol=2**-22, atol=2**-12)


class FloatActivation(MxLinear):
    """A quantized weight with an activation that is not."""

    def forward(self, codes: Tensor, scales: Tensor) -> Tensor:
        return F.linear(self.dequantized(codes, scales) + 1, self.dequantized(self.weight, self.weight_scale))


class Cast(MxLinear):
    """Dequantized to float32, computed in another dtype."""

    def forward(self, codes: Tensor, scales: Tensor) -> Tensor:
        weight = q.block_dequantize(self.weight, self.weight_scale, "mxfp4", "float32").bfloat16()
        return F.linear(q.block_dequantize(codes, scales, "mxfp4", "float32").bfloat16(), weight)


@pytest.mark.parametrize("model", [FloatActivation, Cast])
def test_no_match_is_reported(rewrite: Callable[..., Any], model: type[MxLinear]) -> None:
    module, args = model(), activation(3)
    done = rewrite(module, *args)
    assert done.fused() == {"block_dequantize": 2}
    assert ["no rule's pattern is this graph" in u.reason for u in done.result.unfused] == [True]
    assert torch.equal(done.output, module(*args))
