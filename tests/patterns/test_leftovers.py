"""What is said of what the rules left: which GEMMs run as emulation, which nodes stay, and why."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quark_inductor.patterns.leftovers import is_left
from quark_inductor.schemes.base import QuarkLinear, scheme_for
from quark_inductor.schemes.spec import LinearSpec, TensorSpec

aten, prims = torch.ops.aten, torch.ops.prims
q = torch.ops.quark_inductor
NOBODY = "no GEMM reads it: it is of an output, a cache or an embedding"


def node_of(target: Any, source: torch.dtype, result: torch.dtype) -> torch.fx.Node:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(2, dtype=source, device="meta")
    node = graph.call_function(target, (x,))
    node.meta["val"] = torch.empty(2, dtype=result, device="meta")
    return node


@pytest.mark.parametrize(
    ("target", "source", "result", "left"),
    [
        (prims.convert_element_type.default, torch.float32, torch.float8_e4m3fn, True),
        (prims.convert_element_type.default, torch.int8, torch.bfloat16, True),
        (prims.convert_element_type.default, torch.uint8, torch.float32, True),
        (prims.convert_element_type.default, torch.bfloat16, torch.float32, False),
        (prims.convert_element_type.default, torch.bool, torch.float32, False),
        (prims.convert_element_type.default, torch.int64, torch.float32, False),
        (aten.neg.default, torch.int8, torch.int8, False),
        (q.block_quantize.default, torch.float32, torch.uint8, True),
        (q.int4_unpack.default, torch.int32, torch.int32, True),
        (q.weight_only_gemm.default, torch.float32, torch.float32, False),
    ],
)
def test_what_quantizes_or_dequantizes(target: Any, source: torch.dtype, result: torch.dtype, left: bool) -> None:
    assert is_left(node_of(target, source, result)) is left


def reasons(done: Any) -> list[str]:
    return [refusal.reason for refusal in done.result.left]


def test_nothing_is_left_of_a_fused_linear(rewrite: Callable[..., Any], linear: Callable[..., QuarkLinear]) -> None:
    for preset in ("mxfp4", "ptpc_fp8", "uint4_wo_32"):
        assert rewrite(linear(preset), torch.randn(3, 64)).result.left == ()


def test_an_output_and_an_embedding(rewrite: Callable[..., Any]) -> None:
    """They are in the graph, and of no GEMM."""
    table = torch.randn(32, 64).to(torch.float8_e4m3fn)

    def fn(x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes, scales = q.block_quantize(x, "mxfp4", "even")
        return codes, scales, nn.functional.embedding(ids, table.float())

    done = rewrite(fn, torch.randn(3, 64), torch.arange(4))
    assert reasons(done) == [NOBODY, NOBODY]
    assert done.result.unfused == done.result.linears == ()


def test_a_quantized_output_of_a_linear(rewrite: Callable[..., Any], linear: Callable[..., QuarkLinear]) -> None:
    """Of a KV cache: the Linear before it is fused, its output's two casts stay."""
    layer = linear("ptpc_fp8")
    spec = layer.scheme.spec
    output = TensorSpec(dtype="fp8_e4m3", qscheme="per_tensor")
    layer.scheme = scheme_for(LinearSpec(weight=spec.weight, input=spec.input, output=output))
    layer.register_parameter("output_scale", nn.Parameter(torch.tensor(0.25), requires_grad=False))
    done = rewrite(layer, torch.randn(3, 64))
    assert done.fused() == {"prologue_gemm": 1}
    assert reasons(done) == [NOBODY, NOBODY]
    assert done.result.unfused == ()


class Twice(nn.Module):
    """A Linear whose weight no rule takes, then one whose activation no rule takes, then one that is fused."""

    def __init__(self, linear: Callable[..., QuarkLinear]) -> None:
        super().__init__()
        self.weight, self.activation, self.whole = (linear("mxfp4", n=64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        layer = self.weight
        x = x @ q.block_dequantize(layer.weight, layer.weight_scale, "mxfp4", "float32").relu().t()
        operand = q.block_dequantize(*q.block_quantize(x, "mxfp4", "even"), "mxfp4", "float32", None, 0.5)
        layer = self.activation
        x = operand @ q.block_dequantize(layer.weight, layer.weight_scale, "mxfp4", "float32").t()
        return self.whole(x)


def test_each_is_said_of_its_own(rewrite: Callable[..., Any], linear: Callable[..., QuarkLinear]) -> None:
    model, x = Twice(linear), torch.randn(3, 64)
    done = rewrite(model, x)
    first, second, third = done.result.linears
    assert [result.provider for result in (first, second, third)] == ["emulation", "cpp", "cpp"]
    assert [result.fused for result in (first, second, third)] == [False, False, True]
    assert [result.partly for result in (first, second, third)] == [False, True, False]
    assert (third.layer, third.refusals) == ("whole", ())
    emulated, partly = done.result.unfused
    assert emulated.reason.endswith("where this graph has aten.relu")
    assert partly.reason == "a scale of 0 stands for 0.5, in mxfp4 for 0.0"
    assert (first.refusals, second.refusals) == ((emulated.reason,), (partly.reason,))
    assert [problem and problem.op for problem in (r.problem for r in done.result.linears)] == [
        None,
        "weight_only_gemm",
        "prologue_gemm",
    ]
    # The second's quantize and dequantize have its reason.
    assert reasons(done).count(partly.reason) == 2
    assert torch.equal(done.output, model(x))


def test_a_quantize_outside_of_its_gemm(rewrite: Callable[..., Any], linear: Callable[..., QuarkLinear]) -> None:
    """It is left, with the reason; the Linear is none that runs as emulation."""
    layer = linear("mxfp4", bias=False)

    def fn(x: Tensor) -> Tensor:
        codes, scales = q.block_quantize(x.unsqueeze(1), "mxfp4", "even")
        operand = q.block_dequantize(codes.flatten(0, 1), scales.flatten(0, 1), "mxfp4", "float32")
        return operand @ q.block_dequantize(layer.weight, layer.weight_scale, "mxfp4", "float32").t()

    x = torch.randn(3, 64)
    done = rewrite(fn, x)
    assert done.fused() == {"block_quantize": 1, "quantized_gemm": 1}
    assert done.result.unfused == ()
    (reason,) = reasons(done)
    assert reason.endswith("block_prologue, which has getitem where this graph has aten.view")
    assert torch.equal(done.output, fn(x))


def test_an_emulated_linear_has_its_layer_on_every_node(
    rewrite: Callable[..., Any], linear: Callable[..., QuarkLinear]
) -> None:
    model = nn.Sequential(linear("mxfp4", n=64), linear("mxfp4", n=64))
    done = rewrite(model, torch.randn(3, 64), provider="emulation")
    assert [refusal.layer for refusal in done.result.left] == ["0"] * 3 + ["1"] * 3
    assert {refusal.reason for refusal in done.result.left} == {done.result.unfused[0].reason}
