"""Rows that are quantized once, however often they are taken; the same numbers."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

T, K = 5, 64
_ops = torch.ops.quark_inductor


def quantized(x: Tensor, rows: Tensor) -> Tensor:
    codes, scales = _ops.block_quantize(x[rows], "mxfp4", "even")
    result: Tensor = _ops.block_dequantize(codes, scales, "mxfp4", "float32")
    return result


def rows_quantized(graph: Any) -> list[int]:
    return [n.meta["val"][0].shape[0] for n in graph.nodes if n.target is _ops.block_quantize.default]


@pytest.mark.parametrize("count", [T, 4 * T])
def test_each_row_is_quantized_once(rewrite: Callable[..., Any], count: int) -> None:
    x, rows = torch.randn(T, K), torch.randint(0, T, (count,))
    done = rewrite(quantized, x, rows)
    assert [p.matches for p in done.result.passes if p.name == "quantize_before_gather"] == [1]
    assert torch.equal(done.output, quantized(x, rows))


def test_the_graph(rewrite: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes and scales are taken where the rows were; before the late decomposition makes plain aten of it."""
    from quark_inductor.patterns import pipeline

    monkeypatch.setattr(pipeline, "late_decomposition", lambda graph: 0)
    done = rewrite(quantized, torch.randn(T, K), torch.randint(0, T, (3 * T,)))
    assert rows_quantized(done.graph) == [T]
    (quantize,) = [n for n in done.graph.nodes if n.target is _ops.block_quantize.default]
    taken = [n for n in done.graph.nodes if n.target is torch.ops.aten.index.Tensor]
    assert sorted(n.args[0].args[1] for n in taken) == [0, 1]
    assert {(n.args[0].target, n.args[0].args[0]) for n in taken} == {(operator.getitem, quantize)}


@pytest.mark.parametrize("form", ["fewer rows", "columns", "a mask"])
def test_others_stay(rewrite: Callable[..., Any], form: str) -> None:
    x, rows = torch.randn(T, K), torch.randint(0, T, (T - 1 if form == "fewer rows" else 2 * T,))

    def take(x: Tensor, rows: Tensor) -> Tensor:
        if form == "columns":
            x = torch.cat([x, x], 1)[:, rows.repeat(7)[:64]]
        elif form == "a mask":
            x = torch.where(x > 0, x, 0.0)
        else:
            x = x[rows]
        codes, scales = _ops.block_quantize(x, "mxfp4", "even")
        result: Tensor = _ops.block_dequantize(codes, scales, "mxfp4", "float32")
        return result

    done = rewrite(take, x, rows)
    assert [p.matches for p in done.result.passes if p.name == "quantize_before_gather"] == [0]
    assert torch.equal(done.output, take(x, rows))
