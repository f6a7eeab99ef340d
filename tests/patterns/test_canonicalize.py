"""The pass that moves views above a dequantize: it changes no result, and leaves alone what it must."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from quark_inductor.patterns.canonicalize import hoist_views
from quark_inductor.schemes.numerics import fp8

aten, prims = torch.ops.aten, torch.ops.prims
FP8 = torch.float8_e4m3fn


def trace(fn: Callable[..., Any], *args: Tensor, mode: str = "fake") -> torch.fx.GraphModule:
    return make_fx(fn, decomposition_table=select_decomp_table(), tracing_mode=mode)(*args)


def run(gm: torch.fx.GraphModule, *args: Tensor) -> Any:
    gm.graph.lint()
    gm.recompile()
    return gm(*(a.clone() for a in args))


def dequantized(codes: Tensor, scale: Tensor) -> Tensor:
    return codes.to(torch.float32) * scale


def flat_source(gm: torch.fx.GraphModule) -> Any:
    """The op whose result goes into the GEMM."""
    (mm,) = gm.graph.find_nodes(op="call_function", target=aten.mm.default)
    return mm.args[0].target


@pytest.mark.parametrize("shape", [(2, 3, 8), (2, 2, 3, 8)])
@pytest.mark.parametrize("per_row", [False, True])
def test_a_view_moves_above_the_dequantize(shape: tuple[int, ...], per_row: bool) -> None:
    codes = torch.randn(shape).to(FP8)
    scale = torch.rand(*shape[:-1], 1) if per_row else torch.tensor(0.5)
    weight = torch.randn(8, 5)

    def fn(codes: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
        return dequantized(codes, scale).reshape(-1, 8) @ weight

    gm = trace(fn, codes, scale, weight)
    assert flat_source(gm) is not aten.mul.Tensor
    assert hoist_views(gm.graph) == 2  # above the product, then above the conversion
    assert flat_source(gm) is aten.mul.Tensor
    (mul,) = gm.graph.find_nodes(op="call_function", target=aten.mul.Tensor)
    assert mul.meta["val"].shape == (codes.numel() // 8, 8)
    assert torch.equal(run(gm, codes, scale, weight), fn(codes, scale, weight))


def test_a_view_moves_above_a_block_dequantize() -> None:
    codes = torch.randint(0, 256, (2, 3, 32), dtype=torch.uint8)
    scales, weight = torch.randint(120, 130, (2, 3, 2), dtype=torch.uint8), torch.randn(64, 5)

    def fn(codes: Tensor, scales: Tensor, weight: Tensor) -> Tensor:
        x = torch.ops.quark_inductor.block_dequantize(codes, scales, "mxfp4", "float32")
        return x.reshape(6, 64) @ weight

    gm = trace(fn, codes, scales, weight)
    assert hoist_views(gm.graph) == 1
    assert flat_source(gm) is torch.ops.quark_inductor.block_dequantize.default
    assert torch.equal(run(gm, codes, scales, weight), fn(codes, scales, weight))


@pytest.mark.parametrize(
    ("scale_shape", "rows"),
    [
        ((8,), (-1, 8)),  # a scale of each column
        ((3, 1), (-1, 8)),  # of each row, shared by the batch
        ((2, 1, 1), (-1, 8)),  # of each matrix
        ((2, 3, 1), (-1, 4)),  # the view cuts rows in two
        ((2, 3, 1), (-1, 16)),  # the view joins two rows
    ],
)
def test_a_view_that_cannot_move(scale_shape: tuple[int, ...], rows: tuple[int, int]) -> None:
    codes, scale = torch.randn(2, 3, 8).to(FP8), torch.rand(scale_shape)
    weight = torch.randn(rows[1], 5)

    def fn(codes: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
        return dequantized(codes, scale).reshape(rows) @ weight

    gm = trace(fn, codes, scale, weight)
    assert hoist_views(gm.graph) == 0
    assert torch.equal(run(gm, codes, scale, weight), fn(codes, scale, weight))


def test_a_view_that_makes_rows_of_single_numbers_cannot_move() -> None:
    """A last dimension of 1 is that of a scale; here it is the codes' own."""
    codes, weight = torch.randn(8, 3, 1).to(FP8), torch.randn(8, 5)

    def fn(codes: Tensor, weight: Tensor) -> Tensor:
        return codes.to(torch.float32).reshape(3, 8) @ weight

    gm = trace(fn, codes, weight)
    assert hoist_views(gm.graph) == 0
    assert torch.equal(run(gm, codes, weight), fn(codes, weight))


def test_another_user_of_the_dequantized_keeps_its_shape() -> None:
    codes, scale, weight = torch.randn(2, 3, 8).to(FP8), torch.tensor(0.5), torch.randn(8, 5)

    def fn(codes: Tensor, scale: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        x = dequantized(codes, scale)
        return x.reshape(-1, 8) @ weight, x.sum(1)

    gm = trace(fn, codes, scale, weight)
    assert hoist_views(gm.graph) == 2
    for got, expected in zip(run(gm, codes, scale, weight), fn(codes, scale, weight), strict=True):
        assert torch.equal(got, expected)


def test_a_view_moves_with_symbolic_sizes() -> None:
    """One graph for every batch and length; no size of it is the example's."""

    def fn(codes: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
        torch._check(codes.shape[-1] == 8)
        return dequantized(codes, scale).reshape(-1, 8) @ weight

    def operands(*rows: int) -> tuple[Tensor, ...]:
        return torch.randn(*rows, 8).to(FP8), torch.rand(*rows, 1), torch.randn(8, 5)

    gm = trace(fn, *operands(2, 3), mode="symbolic")
    assert hoist_views(gm.graph) == 2
    assert flat_source(gm) is aten.mul.Tensor
    for rows in ((2, 3), (4, 7)):
        args = operands(*rows)
        assert torch.equal(run(gm, *args), fn(*args))


class Unflattened(torch.nn.Module):
    """``F.linear`` of a 3-D dequantized tensor, which flattens it between the dequantize and the GEMM."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Buffer(torch.randn(5, 64).to(FP8))
        self.channel = torch.nn.Buffer(torch.rand(5))
        self.scale = torch.nn.Buffer(torch.tensor(0.5))

    def forward(self, codes: Tensor) -> Tensor:
        x = fp8.dequantize(codes, self.scale, torch.float32)
        return F.linear(x, fp8.dequantize_weight(self.weight, self.channel, torch.float32))


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_linear_without_flattening(rewrite: Callable[..., Any], dynamic: bool) -> None:
    model, codes = Unflattened(), torch.randn(2, 3, 64).to(FP8)
    done = rewrite(model, codes, dynamic=dynamic)
    assert done.result.matches("hoist_views") == 2
    assert done.fused() == {"quantized_gemm": 1}
    assert torch.equal(done.output, model(codes))
