"""The rule that makes a GEMM of an FP8 weight; what it must not take is in test_near_misses.py."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quark_inductor.schemes.ops import dtype_name

K, N = 64, 48
DTYPES = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2, "fp8_e4m3fnuz": torch.float8_e4m3fnuz}
FLOATS = [torch.bfloat16, torch.float16, torch.float32]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Fp8Linear(nn.Module):
    """A Linear of FP8 codes in plain torch, as anybody may write it; its scale is ``[]``, ``[N]`` or of blocks."""

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        *,
        bias: bool = True,
        shape: tuple[int, ...] = (N,),
        format: str = "fp8_e4m3",
        scale_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Buffer(randn(N, K).to(DTYPES[format]))
        self.weight_scale = nn.Buffer(randn(*shape, seed=1).abs().to(scale_dtype or dtype))
        self.bias = nn.Buffer(randn(N, seed=2).to(dtype)) if bias else None
        self.dtype = dtype

    def operand(self) -> Tensor:
        scale = self.weight_scale.float()
        if scale.ndim == 1:
            scale = scale.unsqueeze(-1)
        elif scale.ndim == 2:
            rows, columns = -(-N // scale.shape[0]), -(-K // scale.shape[1])
            scale = scale.repeat_interleave(rows, 0)[:N].repeat_interleave(columns, 1)[:, :K]
        return (self.weight.float() * scale).to(self.dtype)

    def forward(self, x: Tensor) -> Any:
        return F.linear(x, self.operand(), self.bias)


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_name)
@pytest.mark.parametrize("scale", ["in_dtype", "in_float32"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("shape", [(), (N,), (3, 4)], ids=["per_tensor", "per_channel", "blocks"])
def test_fuses_once(
    rewrite: Callable[..., Any], dtype: torch.dtype, scale: str, bias: bool, shape: tuple[int, ...]
) -> None:
    model = Fp8Linear(dtype, bias=bias, shape=shape, scale_dtype=dtype if scale == "in_dtype" else torch.float32)
    x = randn(3, K, seed=3, dtype=dtype)
    done = rewrite(model, x)
    assert done.fused() == {"weight_only_gemm": 1}
    assert done.result.matches("fp8_weight") == 1
    assert done.result.unfused == done.result.left == ()
    arguments = done.arguments("weight_only_gemm")
    assert arguments["weight_format"] == ("fp8_e4m3_16x16" if shape == (3, 4) else "fp8_e4m3")
    # [N, 1] is as good as [N].
    assert arguments["weight_scale"].meta["val"].shape in (shape, (*shape, 1))
    assert arguments["weight_scale_2"] is arguments["weight_zero_point"] is None
    assert (arguments["bias"] is None) is not bias
    assert torch.equal(done.output, model(x))


@pytest.mark.parametrize("format", DTYPES)
@pytest.mark.parametrize("shape", [(), (N,), (3, 4)], ids=["per_tensor", "per_channel", "blocks"])
def test_every_fp8_dtype(rewrite: Callable[..., Any], format: str, shape: tuple[int, ...]) -> None:
    """The rule takes "fnuz" too, for which there is no kernel here."""
    model, x = Fp8Linear(format=format, shape=shape), randn(3, K, seed=3)
    done = rewrite(model, x)
    assert done.result.matches("fp8_weight") == 1
    (result,) = done.result.linears
    assert result.problem.weight_format.removesuffix("_16x16") == format
    assert result.fused is (format != "fp8_e4m3fnuz")
    assert torch.equal(done.output, model(x))


@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (5, 5), (1, 1), (1, 4), (3, 1), (N, 4), (3, K), (N, K)], ids=str)
def test_blocks_of_any_size(rewrite: Callable[..., Any], shape: tuple[int, int]) -> None:
    """The last blocks may be cut off. A fused weight's blocks are as large as the graph says."""
    model, x = Fp8Linear(shape=shape), randn(3, K, seed=3)
    done = rewrite(model, x)
    if done.fused():
        (result,) = done.result.linears
        format = result.problem.weight_format
        rows, columns = -(-N // shape[0]), -(-K // shape[1])
        assert format == f"fp8_e4m3_{rows}x{columns}"
    else:
        # A block of one row, or of all, is no repetition.
        assert 1 in (*shape, N // shape[0], K // shape[1])
        assert len(done.result.unfused) == 1
    assert torch.equal(done.output, model(x))


@pytest.mark.parametrize("rows", [(1,), (2, 3), (2, 2, 3)], ids=str)
@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
def test_any_rank(rewrite: Callable[..., Any], rows: tuple[int, ...], dynamic: bool) -> None:
    model, x = Fp8Linear(), randn(*rows, K, seed=3)
    done = rewrite(model, x, dynamic=dynamic)
    assert done.fused() == {"weight_only_gemm": 1}
    assert torch.equal(done.output, model(x))


def test_a_weight_that_two_gemms_read(rewrite: Callable[..., Any]) -> None:
    model = Fp8Linear()

    def twice(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return model(x), model(y)

    args = randn(3, K, seed=3), randn(5, K, seed=4)
    done = rewrite(twice, *args)
    assert done.fused() == {"weight_only_gemm": 2}
    for got, expected in zip(done.output, twice(*args), strict=True):
        assert torch.equal(got, expected)


def test_another_user_of_the_dequantized(rewrite: Callable[..., Any]) -> None:
    class Shared(Fp8Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            weight = self.operand()
            return F.linear(x, weight, self.bias), weight.sum(0)

    model, x = Shared(torch.bfloat16), randn(3, K, dtype=torch.bfloat16)
    done = rewrite(model, x)
    assert done.fused() == {"weight_only_gemm": 1}
    for got, expected in zip(done.output, model(x), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("shape", [(3, N), (3, 1), (1, N), (1,), ()], ids=str)
def test_what_addmm_adds_is_a_bias_or_stays(rewrite: Callable[..., Any], shape: tuple[int, ...]) -> None:
    """``addmm`` adds what broadcasts to ``[M, N]``; a kernel's bias is ``[N]``."""

    class Added(Fp8Linear):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Buffer(randn(*shape, seed=6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x, self.operand().t())

    model, x = Added(), randn(3, K, seed=3)
    done = rewrite(model, x)
    if done.fused():  # added afterwards
        assert done.arguments("weight_only_gemm")["bias"] is None
    else:
        (refusal,) = done.result.unfused
        assert (refusal.reason, refusal.rule) == (
            f"what is added has shape {shape}, expected a bias [{N}]",
            "fp8_weight",
        )
    # Adding after the GEMM instead of in it: one more float32 rounding of a result of magnitude below 2^8.
    torch.testing.assert_close(done.output, model(x), rtol=2**-22, atol=2**-15)


class NotTransposed(Fp8Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :N] @ self.operand()


class DequantizedInFloat64(Fp8Linear):
    def operand(self) -> Tensor:
        return (self.weight.double() * self.weight_scale.double().unsqueeze(-1)).to(self.dtype)


@pytest.mark.parametrize("model", [NotTransposed, DequantizedInFloat64])
def test_no_match_is_reported(rewrite: Callable[..., Any], model: type[Fp8Linear]) -> None:
    """No rule refused it, none came near: it is still an FP8 weight that runs as emulation."""
    module, x = model(torch.bfloat16), randn(3, K, dtype=torch.bfloat16)
    done = rewrite(module, x)
    assert done.fused() == {}
    assert ["no rule's pattern is this graph" in u.reason for u in done.result.unfused] == [True]
    assert torch.equal(done.output, module(x))
