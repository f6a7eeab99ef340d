"""For tests of graph rewrites: what the rules make of a function, without making kernels of it.

    from quark_inductor.testing import assert_fused, rewrite

    done = rewrite(model, x)
    assert_fused(done, block_gemm=1, block_prologue=1)
    print(done.after_text)

A case takes a tenth of a second: the graph that the rules leave is interpreted, not compiled.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from quark_inductor.backend import BEFORE, compile_graph, split_options, unwrapped_errors, users_passes
from quark_inductor.patterns._inductor import CustomGraphPass, graphs_not_cached
from quark_inductor.patterns.base import Refusal
from quark_inductor.patterns.pipeline import GraphResult, collect_results
from quark_inductor.schemes.errors import QuarkInductorError
from quark_inductor.schemes.ops import FUSED_OPS, NAMESPACE, dtype_name


@dataclass(frozen=True, slots=True)
class Rewrite:
    """What the rules did to one graph.

    Attributes:
        output: what the rewritten graph computed from the arguments.
        before: the graph as the rules got it.
        after: the graph as the rules, and Inductor's own joint-graph passes after them, left it. Block quantizes and
            dequantizes that nobody consumed are still one node each.
        result: each pass's result, and the layers left to the emulation.
    """

    output: Any
    before: Graph
    after: Graph
    result: GraphResult

    @property
    def matches(self) -> dict[str, int]:
        """Rewrites by rule; rules that did none are left out."""
        return {p.name: p.matches for p in self.result.passes if p.matches}

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """The quantized Linears left to the emulation, each with its layer and the reason."""
        return self.result.unfused

    @property
    def fused(self) -> dict[str, int]:
        """Calls of this package's ops in :attr:`after`, by bare name."""
        targets = [str(node.target).split(".") for node in self.after.nodes if node.op == "call_function"]
        return dict(Counter(target[1] for target in targets if target[0] == NAMESPACE and target[1] in FUSED_OPS))

    @property
    def before_text(self) -> str:
        """:attr:`before` by :func:`graph_text`."""
        return graph_text(self.before)

    @property
    def after_text(self) -> str:
        """:attr:`after` by :func:`graph_text`."""
        return graph_text(self.after)


class _Keep(CustomGraphPass):  # type: ignore[misc]
    def __init__(self) -> None:
        self.graphs: list[Graph] = []

    def __call__(self, graph: Graph) -> None:
        """Keep a copy."""
        copy = Graph()
        copy.output(copy.graph_copy(graph, {}))
        self.graphs.append(copy)

    def uuid(self) -> None:
        """Nothing is cached while this runs."""
        return None


def rewrite(
    fn: Callable[..., Any],
    *args: Any,
    dynamic: bool | None = None,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Rewrite:
    """Compile a function or module with this backend, up to the kernels, and run it.

    Args:
        fn: what to compile; must give one graph, without breaks.
        *args: what it is called with.
        dynamic: as in ``torch.compile``.
        options: as in ``torch.compile(backend="quark")``.
        **kwargs: what it is called with.

    Returns:
        The graphs before and after the rules, what each rule did, and the output.

    Raises:
        QuarkInductorError: there is no graph, or more than one.
        OptionError: an unknown option.
        NotFusedError: ``quark.strict`` is set and a quantized Linear was not fused.
    """
    own, theirs = split_options(None, options)
    before, after = _Keep(), _Keep()
    patches = {**theirs, BEFORE: [*users_passes(theirs, BEFORE), before]}

    def interpret(gm: GraphModule, example_inputs: Any, **unused: Any) -> GraphModule:
        after(gm.graph)
        return gm

    def backend(gm: GraphModule, example_inputs: Any) -> Any:
        return compile_graph(gm, example_inputs, own, patches, inner_compile=interpret)

    torch._dynamo.reset()
    with torch.no_grad(), graphs_not_cached(), collect_results() as results:
        with unwrapped_errors():
            output = torch.compile(fn, backend=backend, fullgraph=True, dynamic=dynamic)(*args, **kwargs)
    if len(results) != 1:
        raise QuarkInductorError(
            f"the function gave {len(results)} graphs, expected one: does it compute with tensors?"
        )
    return Rewrite(output, before.graphs[0], after.graphs[0], results[0])


def assert_fused(done: Rewrite, **matches: int) -> None:
    """Every quantized Linear was fused, and each named rule matched so many times.

    Args:
        done: of :func:`rewrite`.
        **matches: rule name -> expected number of matches; rules that are not named may match or not.

    Raises:
        AssertionError: with the reasons, and the graph as it was left.
    """
    problems = [f"{r.layer or 'a quantized Linear'} was left to the emulation: {r.reason}" for r in done.refusals]
    if not done.matches:
        problems.append("no rule matched anything")
    problems += [
        f"rule {rule} matched {done.matches.get(rule, 0)} times, expected {expected}"
        for rule, expected in matches.items()
        if done.matches.get(rule, 0) != expected
    ]
    if problems:
        raise AssertionError("\n".join([*problems, "the graph after the rules:", done.after_text]))


def assert_not_fused(done: Rewrite, reason: str = "") -> Refusal:
    """Some quantized Linear was left to the emulation, for a reason.

    Args:
        done: of :func:`rewrite`.
        reason: a regular expression found in the refusal's reason.

    Returns:
        That refusal.

    Raises:
        AssertionError: with the reasons there are, and the graph as it was left.
    """
    for refusal in done.refusals:
        if re.search(reason, refusal.reason):
            return refusal
    found = [f"refused: {r.reason}" for r in done.refusals] or ["every quantized Linear was fused, or there is none"]
    wanted = f"no refusal says {reason!r}" if done.refusals else "expected a refusal"
    raise AssertionError("\n".join([wanted, *found, "the graph after the rules:", done.after_text]))


def graph_text(graph: Graph) -> str:
    """A graph as text that is the same from run to run: for golden tests.

    One line a node, ``%3 = aten.mm(%1, %2) : bfloat16[5, 48]``: nodes are numbered in order, the overload ``default``
    is left out, a symbolic size is printed as its symbol.
    """
    names: dict[Node, str] = {}
    lines = []

    def shown(value: Any) -> str:
        if isinstance(value, Node):
            return names[value]
        if isinstance(value, list | tuple):
            return f"[{', '.join(map(shown, value))}]"
        return dtype_name(value) if isinstance(value, torch.dtype) else repr(value)

    for node in graph.nodes:
        arguments = [*map(shown, node.args), *(f"{key}={shown(value)}" for key, value in node.kwargs.items())]
        if node.op == "output":
            lines.append(f"return {', '.join(shown(value) for value in _flat(node.args[0]))}")
            continue
        names[node] = f"%{len(names)}"
        called = node.op if node.op == "placeholder" else f"{node.op} {node.target}"
        if node.op == "call_function":
            # An op's name without its default overload; else a Python function.
            op = isinstance(node.target, torch._ops.OpOverload)
            called = str(node.target).removesuffix(".default") if op else node.target.__name__
        line = f"{names[node]} = {called}"
        lines.append(f"{line}({', '.join(arguments)}){_type(node.meta.get('val'))}")
    return "\n".join(lines) + "\n"


def _flat(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f" : {dtype_name(value.dtype)}[{', '.join(map(str, value.shape))}]"
    return ""
