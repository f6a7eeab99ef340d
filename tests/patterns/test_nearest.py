"""The reason for "no rule's pattern is this graph" names the nearest rule, and where the graph parts from it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quark_inductor.patterns import leftovers
from quark_inductor.patterns.nearest import nearest
from quark_inductor.schemes.base import QuarkLinear
from quark_inductor.testing import rewrite

NO_RULE = "no rule's pattern is this graph; the nearest is "


def int4_without_its_zero_points(layer: QuarkLinear) -> Tensor:
    codes = torch.ops.quark_inductor.int4_unpack(layer.weight, "uint4")
    return codes.t().float() * layer.weight_scale.t().repeat_interleave(32, 1).float()


def scaled_twice(layer: QuarkLinear) -> Tensor:
    return layer.scheme.dequantize_weight(layer, torch.float32) * 2.0


def from_another_dtype(layer: QuarkLinear) -> Tensor:
    return layer.scheme.dequantize_weight(layer, torch.bfloat16).float()


@pytest.mark.parametrize(
    ("preset", "operand", "told"),
    [
        ("mxfp6_e2m3", scaled_twice, "where this graph has quark_inductor.block_dequantize"),
        ("nvfp4", scaled_twice, "where this graph has quark_inductor.block_dequantize"),
        ("mxfp4_fp8", from_another_dtype, "where this graph has prims.convert_element_type"),
        ("int8", from_another_dtype, "where this graph has prims.convert_element_type"),
        ("uint4_wo_32", int4_without_its_zero_points, "where this graph has aten."),
    ],
)
def test_where_the_graph_parts(
    linear: Callable[..., QuarkLinear], preset: str, operand: Callable[[QuarkLinear], Tensor], told: str
) -> None:
    layer = linear(preset)
    (refusal,) = rewrite(lambda x: x @ operand(layer).t(), torch.randn(3, 64)).refusals
    assert refusal.reason.startswith(NO_RULE)
    assert told in refusal.reason


def test_an_activation_that_no_rule_takes(linear: Callable[..., QuarkLinear]) -> None:
    """Its GEMM is half a kernel: the reason is of the activation's rules."""
    layer = linear("int8_weight_only", bias=False)

    def forward(codes: Tensor) -> Tensor:
        return layer((codes.float() * 0.5).bfloat16().float())

    (refusal,) = rewrite(forward, torch.ones(3, 64, dtype=torch.int8)).refusals
    assert refusal.reason.startswith(NO_RULE)
    assert "_activation, which has " in refusal.reason
    assert refusal.reason.endswith("where this graph has prims.convert_element_type")


def test_another_constant(linear: Callable[..., QuarkLinear]) -> None:
    """A quantize that clamps to other limits than FP8 has."""
    layer = linear("fp8_weight_only", bias=False)

    def forward(x: Tensor, scale: Tensor) -> Tensor:
        codes = (x / scale).clamp(-240.0, 240.0).to(torch.float8_e4m3fn)
        return layer(codes.float() * scale)

    done = rewrite(forward, torch.randn(3, 64), torch.tensor(0.5))
    assert done.fused == {"quantized_gemm": 1}
    (left,) = done.result.left
    assert left.reason == NO_RULE + "fp8_prologue, whose aten.clamp_min has -448.0 where this graph has -240.0"


def test_alike_layers_are_looked_at_once(linear: Callable[..., QuarkLinear], monkeypatch: pytest.MonkeyPatch) -> None:
    known: list[dict[Any, str]] = []

    def spy(node: torch.fx.Node, reasons: dict[Any, str]) -> str:
        known.append(reasons)
        return nearest(node, reasons)

    monkeypatch.setattr(leftovers, "nearest", spy)
    layers = [linear("int8_weight_only", 64, 64, bias=False) for _ in range(3)]
    other = linear("mxfp6_e2m3", 64, 64, bias=False)

    class Strange(nn.Module):
        def __init__(self, layer: QuarkLinear) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return x @ scaled_twice(self.layer).t()

    done = rewrite(nn.Sequential(*map(Strange, (*layers, other))), torch.randn(3, 64))
    assert [r.layer for r in done.refusals] == ["0", "1", "2", "3"]
    assert len(known) == 4
    assert len(known[0]) == 2
