"""A new format from outside: a scheme, a rule and a provider, one class each, and everything else works by itself.

The format is a toy: float activations, and "toy8" weights, mid-rise int8, ``(code + 1/2) * scale`` with a scale of each
output channel: no code means 0, which no rule of this package knows. Its op's lowering is registered with a private
function, for which there is no public name yet.
"""

from collections.abc import Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.lowering import fallback_handler, lowerings
from torch.fx import Node

from quark_inductor.lowering import registry as lowering_registry
from quark_inductor.lowering.base import (
    GemmProblem,
    No,
    Provider,
    provider_names,
    register_provider,
    unregister_provider,
)
from quark_inductor.lowering.target import Target
from quark_inductor.patterns.base import (
    FLOAT_DTYPES,
    GEMMS,
    Found,
    Rule,
    Variant,
    call,
    register_rule,
    unregister_rule,
)
from quark_inductor.patterns.pipeline import GraphResult, collect_results
from quark_inductor.quantize import quantize_
from quark_inductor.schemes import base, ops
from quark_inductor.schemes.base import QuarkLinear, QuarkScheme, register_scheme
from quark_inductor.schemes.errors import NotFusedError
from quark_inductor.schemes.spec import PRESETS, LinearSpec, TensorSpec

SPEC = LinearSpec(weight=TensorSpec(dtype="toy8", qscheme="per_channel"), input=None)
OP = "toy_int8_gemm"
# Those that are asked before "cpp".
GPU = ", ".join(provider_names()[: provider_names().index("cpp")])


# --- the scheme


class ToyScheme(QuarkScheme):
    name = "toy_int8"

    @classmethod
    def refuses(cls, spec: LinearSpec) -> str | None:
        return None if spec == SPEC else f"takes only [{SPEC}]"

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    def weight_tensors(self, widths: list[int], k: int, params_dtype: torch.dtype) -> Mapping[str, Tensor]:
        n = sum(widths)
        return {"weight": torch.empty(n, k, dtype=torch.int8), "weight_scale": torch.empty(n, dtype=params_dtype)}

    def dequantize_weight(self, layer: Any, dtype: torch.dtype) -> Tensor:
        return toy_values(layer.weight, layer.weight_scale)

    def quantize_weight(self, weight: Tensor) -> Mapping[str, Tensor]:
        scale = weight.abs().amax(-1) / 127
        return {"weight": (weight / scale.unsqueeze(-1)).floor().to(torch.int8), "weight_scale": scale}


def toy_values(weight: Tensor, weight_scale: Tensor) -> Tensor:
    """``[N, K]`` in the dtype of the scale."""
    return (weight.to(weight_scale.dtype) + 0.5) * weight_scale.unsqueeze(-1)


def toy_int8_gemm(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """The emulation, and what the op does when it is called eagerly."""
    return F.linear(x, toy_values(weight, weight_scale), bias)


# --- the rule


class ToyRule(Rule):
    """``mm`` or ``addmm`` by the toy's weight, whose dequantize is the pattern."""

    name = "toy_int8_gemm"

    def variants(self) -> Iterable[Variant]:
        for dtype in FLOAT_DTYPES:
            example = {"weight": torch.zeros(5, 64, dtype=torch.int8), "weight_scale": torch.zeros(5, dtype=dtype)}
            yield Variant(toy_weight, example, dtype=dtype)

    def operand(self, node: Node) -> Node | None:
        return node.args[GEMMS[node.target][1]] if node.target in GEMMS else None

    def check(self, found: Found) -> str | None:
        weight, scale = found.value("weight"), found.value("weight_scale")
        if weight.dtype is not torch.int8:
            return ""
        return None if scale.shape == weight.shape[:1] else f"the scale's shape is {tuple(scale.shape)}"

    def rewrite(self, found: Found) -> Node:
        x, _, bias = (None if i is None else found.node.args[i] for i in GEMMS[found.node.target])
        named = {**found.named, "x": x, "bias": bias}
        return call(found.node.graph, torch.ops.quark_inductor.toy_int8_gemm.default, named)


def toy_weight(weight: Tensor, weight_scale: Tensor) -> Tensor:
    """As a GEMM reads it, ``[K, N]``."""
    return toy_values(weight, weight_scale).t()


# --- the providers: one that refuses, one that runs


class Picky(Provider):
    name = "picky"

    def can_run(self, target: Target, problem: GemmProblem) -> No | None:
        return No(f"N = {problem.n}, it likes only multiples of 1000")

    def lower(self, target: Target, problem: GemmProblem, args: Mapping[str, Any]) -> Any:
        raise AssertionError("it said no")


class Toy(Provider):
    name = "toy"

    def can_run(self, target: Target, problem: GemmProblem) -> No | None:
        if problem.op != OP:
            return No(f"has no kernel for {problem.op}")
        return No(f"K = {problem.k} is more than 64") if problem.k > 64 else None

    def lower(self, target: Target, problem: GemmProblem, args: Mapping[str, Any]) -> Any:
        assert (problem.op, problem.k) == (OP, 64)
        op = torch.ops.quark_inductor.toy_int8_gemm.default
        return fallback_handler(op, add_to_fallback_set=False)(*(args.get(a.name) for a in op._schema.arguments))


@pytest.fixture(scope="module", autouse=True)
def extension() -> Iterator[None]:
    """Register it all, and take it all away again."""
    lib = torch.library.Library(ops.NAMESPACE, "FRAGMENT")
    lib.define(f"{OP}(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias) -> Tensor")
    lib.impl(OP, toy_int8_gemm, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{ops.NAMESPACE}::{OP}", fake, lib=lib)
    lowering_registry._register(toy_int8_gemm)
    known, presets = dict(base._SCHEMES), dict(PRESETS)
    ops.FUSED_OPS.add(OP)
    register_scheme(ToyScheme)
    PRESETS["toy"] = SPEC
    register_rule(ToyRule)
    register_provider(Picky)
    register_provider(Toy)
    yield
    unregister_provider("toy")
    unregister_provider("picky")
    unregister_rule("toy_int8_gemm")
    ops.FUSED_OPS.remove(OP)
    for of, before in ((base._SCHEMES, known), (PRESETS, presets)):
        of.clear()
        of.update(before)
    del lowerings[torch.ops.quark_inductor.toy_int8_gemm.default]
    torch._dynamo.reset()
    lib._destroy()


def fake(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


# --- it works


class Two(nn.Module):
    """One layer the toy can run, and one it cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = nn.Linear(64, 96), nn.Linear(96, 7, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.large(torch.relu(self.small(x)))


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    no_graphs = torch._inductor.config.patch(fx_graph_cache=False)
    with no_graphs, torch._functorch.config.patch(enable_autograd_cache=False), torch.no_grad():
        yield
    torch._dynamo.reset()


def run(model: nn.Module, x: Tensor, **options: Any) -> SimpleNamespace:
    torch._dynamo.reset()
    counters.clear()
    named = {f"quark.{key}": v for key, v in options.items()}
    with collect_results() as results:
        y = torch.compile(model, backend="quark", fullgraph=True, options=named)(x)
    result: GraphResult = results[0]
    kernels = {k: n for k, n in counters["inductor"].items() if k.startswith("quark.")}
    return SimpleNamespace(y=y, result=result, kernels=kernels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_end_to_end(dtype: torch.dtype) -> None:
    model = quantize_(Two().to(dtype), "toy")
    assert [type(m) for m in model.children()] == [QuarkLinear, QuarkLinear]
    assert model.small.scheme.name == "toy_int8"
    x = torch.randn(2, 3, 64).to(dtype)
    done = run(model, x)
    assert done.result.matches("toy_int8_gemm") == 2
    assert done.kernels == {f"quark.{OP}.toy": 1}
    assert [(of.layer, of.provider, of.rules, of.shape) for of in done.result.linears] == [
        ("small", "toy", ("toy_int8_gemm",), (96, 64)),
        ("large", "emulation", (), (7, 96)),
    ]
    # The first is the same call in both; of the second Inductor may round the dequantized weight, or not.
    torch.testing.assert_close(done.y, model(x), rtol=2**-6 if dtype is torch.bfloat16 else 2**-18, atol=2**-6)


def test_a_refusal_is_reported() -> None:
    """Everybody's reason, for the layer, in the order they were asked."""
    done = run(quantize_(Two(), "toy"), torch.randn(3, 64))
    reasons = (
        f"{OP}: {GPU}: for GPUs, the device is cpu",
        f"{OP}: cpp: has no kernel for {OP}; it has prologue_gemm, quantized_gemm, weight_only_gemm",
        f"{OP}: picky: N = 7, it likes only multiples of 1000",
        f"{OP}: toy: K = 96 is more than 64",
    )
    small, large = done.result.linears
    assert (small.layer, small.fused, small.refusals) == ("small", True, ())
    assert (large.layer, large.fused, large.problem.op) == ("large", False, OP)
    assert [(u.layer, u.reason) for u in done.result.unfused] == [("large", "; ".join(reasons))]
    assert done.result.left != ()


def test_strict_knows_it() -> None:
    model = quantize_(Two(), "toy")
    with pytest.raises(Exception, match="1 quantized Linears were not fused") as error:
        run(model, torch.randn(3, 64), strict=True)
    assert NotFusedError.__name__ in str(error.value)
    assert f"large: {OP}: {GPU}: for GPUs" in str(error.value)
    assert f"; {OP}: cpp: has no kernel" in str(error.value)


def test_it_can_be_asked_for_by_name() -> None:
    done = run(quantize_(Two(), "toy"), torch.randn(3, 64), provider="toy")
    assert done.kernels == {f"quark.{OP}.toy": 1}
    emulated = run(quantize_(Two(), "toy"), torch.randn(3, 64), provider="emulation")
    assert emulated.kernels == {}
    assert [of.provider for of in emulated.result.linears] == ["emulation"] * 2


def test_the_others_are_as_before() -> None:
    """A provider more, in the middle of a list, changes nothing for those it has no kernel for."""
    torch.manual_seed(0)
    model, x = quantize_(nn.Sequential(nn.Linear(64, 32)), "mxfp4"), torch.randn(3, 64)
    done = run(model, x)
    assert done.kernels == {"quark.prologue_gemm.cpp": 1}
    torch.testing.assert_close(done.y, model(x))
