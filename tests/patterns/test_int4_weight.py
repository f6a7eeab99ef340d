"""The rule that makes a GEMM of a weight of packed 4-bit integers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quark_inductor.schemes.numerics import int4
from quark_inductor.schemes.ops import dtype_name

K, N = 64, 48
FORMS = ["per_channel", "per_group", "two_stages"]


def words(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31 - 1, shape, generator=generator).to(torch.int32)


def scales(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.125


class Int4Linear(nn.Module):
    """A Linear of packed integers: one of the three forms in which amd-quark stores them."""

    def __init__(
        self, form: str, *, format: str = "int4", dtype: torch.dtype = torch.float32, scale_dtype: Any = None
    ) -> None:
        super().__init__()
        groups = form == "per_group"
        self.weight = nn.Buffer(words(K, N // 8) if groups else words(N, K // 8))
        self.zero_point = nn.Buffer(words(*((4,) if groups else ()), N // 8, seed=2))
        self.weight_scale = nn.Buffer(scales(*((4, N) if groups else (N,))))
        self.second_scale = nn.Buffer(scales(seed=3)) if form == "two_stages" else None
        if self.second_scale is None:
            self.weight_scale = nn.Buffer(self.weight_scale.to(scale_dtype or dtype))
        self.format, self.dtype = format, dtype

    def operand(self) -> Tensor:
        codes, zero = (torch.ops.quark_inductor.int4_unpack(t, self.format) for t in (self.weight, self.zero_point))
        scale = self.weight_scale
        if scale.ndim == 2:
            groups = codes.t().unflatten(-1, (4, -1)).float() - zero.t().unsqueeze(-1).float()
            return (groups * scale.t().unsqueeze(-1).float()).to(self.dtype).flatten(-2)
        stage = (codes.float() - zero.unsqueeze(-1).float()) * scale.unsqueeze(-1).float()
        return (stage if self.second_scale is None else stage * self.second_scale).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.operand())


def activation(*rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*rows, K, generator=torch.Generator().manual_seed(4)).to(dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=dtype_name)
@pytest.mark.parametrize("scale", ["in_dtype", "in_float32"])
def test_fuses_once(rewrite: Callable[..., Any], form: str, dtype: torch.dtype, scale: str) -> None:
    model = Int4Linear(form, dtype=dtype, scale_dtype=dtype if scale == "in_dtype" else torch.float32)
    x = activation(3, dtype=dtype)
    done = rewrite(model, x)
    assert done.fused() == {"weight_only_gemm": 1}
    assert done.result.matches("int4_weight") == 1
    assert done.result.unfused == done.result.left == ()
    arguments = done.arguments("weight_only_gemm")
    assert arguments["weight_format"] == ("int4_fp8" if form == "two_stages" else "int4")
    assert (arguments["weight_scale_2"] is None) is (form != "two_stages")
    assert arguments["weight_zero_point"] is not None
    if form == "two_stages":  # the FP8 stage's scale is the first
        shapes = [list(arguments[name].meta["val"].shape) for name in ("weight_scale", "weight_scale_2")]
        assert shapes == [[], [N]]
    (result,) = done.result.linears
    assert result.shape == (N, K)
    assert torch.equal(done.output, model(x))


@pytest.mark.parametrize("form", ["per_channel", "per_group"])
@pytest.mark.parametrize("format", int4.FORMATS)
def test_every_sign_and_order(rewrite: Callable[..., Any], form: str, format: str) -> None:
    model, x = Int4Linear(form, format=format), activation(3)
    done = rewrite(model, x)
    assert done.fused() == {"weight_only_gemm": 1}
    assert done.arguments("weight_only_gemm")["weight_format"] == format
    assert torch.equal(done.output, model(x))


@pytest.mark.parametrize("format", [format for format in int4.FORMATS if format != "int4"])
def test_two_stages_are_of_one_format(rewrite: Callable[..., Any], format: str) -> None:
    """amd-quark exports no other."""
    model, x = Int4Linear("two_stages", format=format), activation(3)
    done = rewrite(model, x)
    assert done.count("weight_only_gemm") == 0
    (refusal,) = done.result.unfused
    assert refusal.reason == f"the weight's codes are {format}, under an FP8 stage expected int4"
    assert torch.equal(done.output, model(x))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [(1,), (2, 3)], ids=str)
@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
def test_any_rank(rewrite: Callable[..., Any], form: str, rows: tuple[int, ...], dynamic: bool) -> None:
    model, x = Int4Linear(form), activation(*rows)
    done = rewrite(model, x, dynamic=dynamic)
    assert done.fused() == {"weight_only_gemm": 1}
    assert torch.equal(done.output, model(x))
