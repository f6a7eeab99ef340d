"""The reason for "no rule's pattern is this graph" names the nearest rule, and where the graph parts from it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quark_inductor.patterns import pipeline
from quark_inductor.patterns.nearest import nearest
from quark_inductor.schemes.base import QuarkLinear
from quark_inductor.testing import rewrite

NO_RULE = "no rule's pattern is this graph; the nearest is "


@pytest.mark.parametrize(
    ("preset", "told"),
    {
        "mxfp6_e2m3": "block_gemm, whose quark_inductor.block_dequantize has 'mxfp4' where this graph has 'mxfp6_e2m3'",
        "mxfp4_fp8": "fp8_gemm, which has aten.mul.Tensor where this graph has quark_inductor.block_dequantize",
        "nvfp4": "block_gemm, whose quark_inductor.block_dequantize has other arguments",
        "int4_fp8": "fp8_gemm, which has prims.convert_element_type where this graph has aten.mul.Tensor",
    }.items(),
)
def test_where_the_graph_parts(linear: Callable[..., QuarkLinear], preset: str, told: str) -> None:
    (refusal,) = rewrite(linear(preset), torch.randn(3, 64)).refusals
    assert refusal.reason == NO_RULE + told


def test_an_activation_that_is_not_quantized(linear: Callable[..., QuarkLinear]) -> None:
    (refusal,) = rewrite(linear("int8_weight_only"), torch.randn(3, 64)).refusals
    assert refusal.reason.startswith(NO_RULE)
    assert refusal.reason.endswith("where this graph has aten.view")


def test_another_constant(linear: Callable[..., QuarkLinear]) -> None:
    """A dequantize into another dtype than the GEMM's."""
    layer = linear("mxfp4", bias=False)

    def forward(x: Tensor) -> Tensor:
        q = torch.ops.quark_inductor
        codes, scales = q.block_quantize(x, "mxfp4", "even")
        operand = q.block_dequantize(codes, scales, "mxfp4", "float32")
        return F.linear(operand, q.block_dequantize(layer.weight, layer.weight_scale, "mxfp4", "bfloat16").float())

    (refusal,) = rewrite(forward, torch.randn(3, 64)).refusals
    assert refusal.reason == (
        NO_RULE
        + "block_gemm, which has quark_inductor.block_dequantize where this graph has prims.convert_element_type"
    )


def test_alike_layers_are_looked_at_once(linear: Callable[..., QuarkLinear], monkeypatch: pytest.MonkeyPatch) -> None:
    known: list[dict[Any, str]] = []

    def spy(node: torch.fx.Node, reasons: dict[Any, str]) -> str:
        known.append(reasons)
        return nearest(node, reasons)

    monkeypatch.setattr(pipeline, "nearest", spy)
    layers = [linear("int8_weight_only", 64, 64) for _ in range(3)]
    done = rewrite(nn.Sequential(*layers, linear("mxfp6_e2m3", 64, 64)), torch.randn(3, 64))
    assert [r.layer for r in done.refusals] == ["0", "1", "2", "3"]
    assert len(known) == 4
    assert len(known[0]) == 2
