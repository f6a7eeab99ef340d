"""The rule that makes a GEMM of FP8 codes: what it takes, and the near misses it must leave alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

FP8 = torch.float8_e4m3fn
K, N = 64, 48


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Fp8Linear(nn.Module):
    """A Linear of FP8 codes in plain torch, as anybody may write it. Subclasses change one thing each."""

    def __init__(
        self, dtype: torch.dtype = torch.float32, *, bias: bool = True, per_channel: bool = True, n: int = N
    ) -> None:
        super().__init__()
        self.weight = nn.Buffer(randn(n, K).to(FP8))
        self.weight_scale = nn.Buffer(
            randn(n, seed=1).abs().to(dtype) if per_channel else torch.tensor(0.5, dtype=dtype)
        )
        self.bias = nn.Buffer(randn(n, seed=2).to(dtype)) if bias else None
        self.dtype = dtype

    def operand(self) -> Tensor:
        scale = self.weight_scale.float()
        return (self.weight.float() * (scale.unsqueeze(-1) if scale.ndim == 1 else scale)).to(self.dtype)

    def forward(self, codes: Tensor, scale: Tensor) -> Any:
        return F.linear(codes.to(self.dtype) * scale, self.operand(), self.bias)


def activation(*rows: int, dtype: torch.dtype = torch.float32, per_token: bool = False) -> tuple[Tensor, Tensor]:
    scale = randn(*rows, 1, seed=4).abs() if per_token else torch.tensor(0.25)
    return randn(*rows, K, seed=3).to(FP8), scale.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("per_token", [True, False])
def test_fuses_once(
    rewrite: Callable[..., Any], dtype: torch.dtype, bias: bool, per_channel: bool, per_token: bool
) -> None:
    model = Fp8Linear(dtype, bias=bias, per_channel=per_channel)
    args = activation(3, dtype=dtype, per_token=per_token)
    done = rewrite(model, *args)
    assert done.fused() == {"fp8_gemm": 1}
    assert done.result.matches("fp8_gemm") == 1
    assert done.result.unfused == ()
    assert torch.equal(done.output, model(*args))


@pytest.mark.parametrize("rows", [(3,), (2, 3), (2, 2, 3)])
@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("dynamic", [True, False])
def test_any_rank(rewrite: Callable[..., Any], rows: tuple[int, ...], per_token: bool, dynamic: bool) -> None:
    model, args = Fp8Linear(), activation(*rows, per_token=per_token)
    done = rewrite(model, *args, dynamic=dynamic)
    assert done.fused() == {"fp8_gemm": 1}
    assert torch.equal(done.output, model(*args))


def test_a_weight_that_two_gemms_read(rewrite: Callable[..., Any]) -> None:
    model = Fp8Linear()

    def twice(x: Tensor, scale: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return model(x, scale), model(y, scale)

    x, scale = activation(3)
    args = x, scale, activation(5)[0]
    done = rewrite(twice, *args)
    assert done.fused() == {"fp8_gemm": 2}
    for got, expected in zip(done.output, twice(*args), strict=True):
        assert torch.equal(got, expected)


def test_another_user_of_the_dequantized(rewrite: Callable[..., Any]) -> None:
    class Shared(Fp8Linear):
        def forward(self, codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            x, weight = codes.to(self.dtype) * scale, self.operand()
            return F.linear(x, weight, self.bias), x * 2, weight.sum(0)

    model, args = Shared(torch.bfloat16), activation(3, dtype=torch.bfloat16)
    done = rewrite(model, *args)
    assert done.fused() == {"fp8_gemm": 1}
    for got, expected in zip(done.output, model(*args), strict=True):
        assert torch.equal(got, expected)


# --- what it must not take


class Beta(Fp8Linear):
    def forward(self, codes: Tensor, scale: Tensor) -> Tensor:
        return torch.addmm(self.bias, codes.to(self.dtype) * scale, self.operand().t(), beta=0.5)


class Alpha(Fp8Linear):
    def forward(self, codes: Tensor, scale: Tensor) -> Tensor:
        return torch.addmm(self.bias, codes.to(self.dtype) * scale, self.operand().t(), alpha=2.0)


class Int8Weight(Fp8Linear):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Buffer(self.weight.to(torch.int8))


class E5M2Weight(Fp8Linear):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Buffer(self.weight.to(torch.float8_e5m2))


class ScaleOfTwoDimensions(Fp8Linear):
    def operand(self) -> Tensor:
        return self.weight.float() * self.weight_scale.reshape(-1, 1)


class ScaleOfColumns(Fp8Linear):
    """One scale an input feature, of a square weight: ``[K]`` is as long as ``[N]``."""

    def __init__(self) -> None:
        super().__init__(n=K)

    def operand(self) -> Tensor:
        return self.weight.float() * self.weight_scale


def codes_of(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x, scale = activation(3)
    return x.float().to(dtype), scale


@pytest.mark.parametrize(
    ("model", "args", "reason"),
    [
        (Beta, activation(3), "beta"),
        (Alpha, activation(3), "alpha"),
        (Int8Weight, activation(3), "expected two torch.float8_e4m3fn"),
        (E5M2Weight, activation(3), "expected two torch.float8_e4m3fn"),
        (Fp8Linear, codes_of(torch.float8_e5m2), "expected two torch.float8_e4m3fn"),
        (Fp8Linear, codes_of(torch.int8), "expected two torch.float8_e4m3fn"),
        (Fp8Linear, codes_of(torch.float64), "expected two torch.float8_e4m3fn"),
        (Fp8Linear, (activation(3)[0], randn(K, seed=5)), "the activation's scale has shape (64,)"),
        (Fp8Linear, (activation(3)[0], randn(1, K, seed=5)), "the activation's scale has shape (1, 64)"),
        (Fp8Linear, (activation(3)[0], randn(3, K, seed=5)), "the activation's scale has shape (3, 64)"),
        (Fp8Linear, (activation(3)[0], randn(1, seed=5)), "the activation's scale has shape (1,)"),
        # A kernel would read it as [M, 1], past its end.
        (Fp8Linear, (activation(3)[0], randn(1, 1, seed=5)), "the activation's scale has shape (1, 1)"),
        (ScaleOfTwoDimensions, activation(3), "the weight's scale has shape (48, 1)"),
        (ScaleOfColumns, activation(3), "the weight's scale"),
    ],
    ids=lambda p: p.__name__ if isinstance(p, type) else None,
)
def test_near_miss(
    rewrite: Callable[..., Any], model: Callable[[], Fp8Linear], args: tuple[Tensor, Tensor], reason: str
) -> None:
    module = model()
    done = rewrite(module, *args)
    assert done.fused() == {}
    (refusal,) = (r for p in done.result.passes for r in p.refusals)
    assert reason in refusal.reason
    assert refusal.rule == "fp8_gemm"
    assert torch.equal(done.output, module(*args))


@pytest.mark.parametrize("shape", [(3, N), (3, 1), (1, N), (1,), ()], ids=str)
def test_what_addmm_adds_is_a_bias_or_stays(rewrite: Callable[..., Any], shape: tuple[int, ...]) -> None:
    """``addmm`` adds what broadcasts to ``[M, N]``; a kernel's bias is ``[N]`` (Inductor broadcasts ``[1]``)."""

    class Added(Fp8Linear):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Buffer(randn(*shape, seed=6))

        def forward(self, codes: Tensor, scale: Tensor) -> Tensor:
            return torch.addmm(self.bias, codes.to(self.dtype) * scale, self.operand().t())

    model, args = Added(), activation(3)
    done = rewrite(model, *args)
    for node in done.graph.find_nodes(op="call_function", target=torch.ops.quark_inductor.fp8_gemm.default):
        bias = node.args[4]
        assert bias is None or bias.meta["val"].shape in ((N,), (1,)), "the kernel reads bias[n]"
    # Adding after the GEMM instead of in it: one more float32 rounding of a result of magnitude below 2^8.
    torch.testing.assert_close(done.output, model(*args), rtol=2**-22, atol=2**-15)


class DequantizedInFloat32(Fp8Linear):
    """The activation's product is rounded once more than the pattern's."""

    def forward(self, codes: Tensor, scale: Tensor) -> Tensor:
        return F.linear((codes.float() * scale).to(self.dtype), self.operand(), self.bias)


class NotTransposed(Fp8Linear):
    def forward(self, codes: Tensor, scale: Tensor) -> Tensor:
        return (codes.to(self.dtype) * scale)[:, :N] @ self.operand()


class WeightOnly(Fp8Linear):
    def forward(self, codes: Tensor, scale: Tensor) -> Tensor:
        return F.linear(codes.to(self.dtype).sin() * scale, self.operand())


@pytest.mark.parametrize("model", [DequantizedInFloat32, NotTransposed, WeightOnly])
def test_no_match_is_reported(rewrite: Callable[..., Any], model: type[Fp8Linear]) -> None:
    """No rule refused it, none came near: it is still an FP8 weight that runs as emulation."""
    module, args = model(torch.bfloat16), activation(3, dtype=torch.bfloat16)
    done = rewrite(module, *args)
    assert done.fused() == {}
    assert ["no rule's pattern is this graph" in u.reason for u in done.result.unfused] == [True]
    assert torch.equal(done.output, module(*args))
