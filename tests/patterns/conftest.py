"""Compile up to the kernels: the graph that the passes leave is interpreted, so a case takes a tenth of a second."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch._inductor.compile_fx import compile_fx

from quark_inductor import testing
from quark_inductor.lowering import providers  # noqa: F401  in their order of preference, whatever a test imports
from quark_inductor.patterns import _inductor, base, matcher
from quark_inductor.patterns.pipeline import GraphResult
from quark_inductor.schemes import registry  # noqa: F401
from quark_inductor.schemes.base import QuarkLinear, scheme_for, set_parameters
from quark_inductor.schemes.spec import PRESETS


@dataclass
class Rewritten:
    """What the passes made of one function: its output, and the graph before anything was lowered."""

    output: Any
    result: GraphResult
    graph: torch.fx.Graph

    def count(self, op: Any) -> int:
        """Calls of an op; of one of ours by its bare name."""
        op = getattr(torch.ops.quark_inductor, op).default if isinstance(op, str) else op
        return len(self.graph.find_nodes(op="call_function", target=op))

    def arguments(self, op: str) -> dict[str, Any]:
        """Those of the only call of an op of ours, by name."""
        (node,) = self.graph.find_nodes(op="call_function", target=getattr(torch.ops.quark_inductor, op).default)
        return base.arguments(node)

    def fused(self) -> dict[str, int]:
        """Calls of every op of ours that is in the graph."""
        names = [str(n.target) for n in self.graph.nodes if str(n.target).startswith("quark_inductor.")]
        return {name.split(".")[1]: names.count(name) for name in names}


# What a static activation is quantized with.
STATIC = {"input_scale": 0.0078, "input_scale_2": 0.0015, "input_zero_point": 0}


@pytest.fixture(autouse=True)
def every_test_is_fresh(fresh: None) -> None:
    """See the conftest above this one."""


@pytest.fixture(autouse=True)
def both_matchers_agree() -> Iterator[None]:
    """Wherever a pattern is tried in a test of this folder, Inductor's own matcher says the same."""
    patterns: dict[int, Any] = {}
    traced = base.Rule._traced

    def remember(rule: base.Rule, index: int) -> base.Traced:
        result = traced(rule, index)
        patterns[id(result.calls)] = result.pattern
        return result

    def match(calls: Any, end: torch.fx.Node) -> Any:
        ours, reference = matcher.match(calls, end), _inductor.attempt(patterns[id(calls)], end)
        if ours is None:
            assert not isinstance(reference, _inductor.Match)
            return None
        assert isinstance(reference, _inductor.Match)
        assert ours[0] == reference.kwargs
        assert set(ours[1]) == set(reference.nodes)
        return ours

    with pytest.MonkeyPatch.context() as patch:  # its own: a test's is undone before this one
        patch.setattr(base.Rule, "_traced", remember)
        patch.setattr(base, "match", match)
        yield


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """Graphs are interpreted where Inductor would make kernels; the list of them."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(gm: torch.fx.GraphModule, example_inputs: Any, **kwargs: Any) -> torch.fx.GraphModule:
        graphs.append(gm)
        return gm

    monkeypatch.setattr(_inductor, "compile_fx", functools.partial(compile_fx, inner_compile=keep))
    return graphs


@pytest.fixture
def rewrite() -> Callable[..., Rewritten]:
    """``quark_inductor.testing.rewrite``, with options of this package as keyword arguments."""

    def run(fn: Callable[..., Any], *args: Any, dynamic: bool | None = None, **options: Any) -> Rewritten:
        named = {f"quark.{name}": value for name, value in options.items()}
        done = testing.rewrite(fn, *args, dynamic=dynamic, options=named)
        return Rewritten(done.output, done.result, done.after)

    return run


@pytest.fixture
def linear() -> Callable[..., QuarkLinear]:
    """A quantized Linear of a preset's name, its weight random."""

    def make(
        preset: str, k: int = 64, n: int = 48, *, bias: bool = True, dtype: torch.dtype = torch.float32
    ) -> QuarkLinear:
        generator = torch.Generator().manual_seed(k * 1000 + n)
        module = QuarkLinear(k, n, scheme_for(PRESETS[preset]), bias=bias, dtype=dtype)
        weight = torch.randn(n, k, generator=generator).to(dtype)
        set_parameters(module, **module.scheme.quantize_weight(weight))
        for name, scale in STATIC.items():
            if name in module._parameters:
                set_parameters(module, **{name: torch.tensor(scale, dtype=getattr(module, name).dtype)})
        if bias:
            module.bias = nn.Parameter(torch.randn(n, generator=generator).to(dtype), requires_grad=False)
        module.scheme.process_weights_after_loading(module)
        return module.eval()

    return make
