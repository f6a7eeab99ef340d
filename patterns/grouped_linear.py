"""A Linear of each of E experts as one grouped GEMM: what the rules make of one expert's, for all of them."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from quark_inductor.patterns._inductor import remove_noop_ops, statically_known_true
from quark_inductor.patterns.base import (
    History,
    PassResult,
    Refusal,
    arguments,
    call,
    layer_of,
    registered_rules,
    value,
)
from quark_inductor.patterns.canonicalize import hoist_views
from quark_inductor.patterns.cse import cse
from quark_inductor.patterns.late_decomposition import PlainGraphs
from quark_inductor.schemes import experts  # noqa: F401  its op
from quark_inductor.schemes.base import linear

NAME = "grouped_linear"
_op = torch.ops.quark_inductor.grouped_linear.default


def grouped_linear(graph: Graph, history: History) -> PassResult:
    """Rewrite every ``grouped_linear`` in a graph, in place, as far as the rules know what one expert computes.

    One expert's Linear is traced, and the rules run on that graph. Each step of theirs is taken, so that a provider
    that has no kernel for the last may have one for an earlier.
    """
    start = time.perf_counter()
    matches, refusals = 0, []
    plain, known = PlainGraphs(), dict[Graph, _OfOne]()
    for node in list(graph.find_nodes(op="call_function", target=_op)):
        x, _, tensors, plan = node.args
        traced = plain.of(_of_one(str(plan)), (NAME, plan), [x, *tensors])  # type: ignore[list-item, misc]
        if traced not in known:
            known[traced] = _OfOne(traced)
        if known[traced].rewrite(node, history):
            matches += 1
        else:
            history.refused[node] = Refusal(known[traced].reason, layer_of(node), NAME)
            refusals.append(history.refused[node])
    return PassResult(NAME, matches, tuple(refusals), (time.perf_counter() - start) * 1e3)


def _of_one(plan: str) -> Callable[..., Tensor]:
    def compute(x: Tensor, *tensors: Tensor) -> Tensor:
        return linear(x, [t[0] for t in tensors], plan)

    return compute


class _OfOne:
    """The graph of one expert's Linear after the rules.

    Attributes:
        steps: the fused GEMMs that the rules made of it, one of the other, and the rules' names.
        reason: why there are none.
    """

    def __init__(self, graph: Graph) -> None:
        remove_noop_ops(graph)
        hoist_views(graph)
        cse(graph)
        history = History()
        for rule in registered_rules():
            rule.apply(graph, history)
        (node,) = graph.output_node().all_input_nodes
        self.x, *self.tensors = graph.find_nodes(op="placeholder")
        self.steps: list[tuple[Node, str]] = []
        while node in history.replaced:
            before, name = history.replaced[node]
            self.steps.insert(0, (node, name))
            node = before
        refused = history.refused.get(node)
        self.reason = refused.reason if refused is not None else "no rule knows what one expert computes"

    def rewrite(self, node: Node, history: History) -> bool:
        """Put the last step that can be taken for all experts in the place of a ``grouped_linear``."""
        x, offsets, tensors, _ = node.args
        copies: dict[Node, Any] = {self.x: x}
        stacked = dict(zip(self.tensors, tensors, strict=True))  # type: ignore[arg-type]
        before, rules = node, list[str]()
        for step, rule in self.steps:
            rules.append(rule)
            with node.graph.inserting_before(node):
                named = {n: self._for_all(v, node, stacked, copies) for n, v in arguments(step).items()}
                if any(v is _OF_EACH for v in named.values()):
                    continue
                new = call(node.graph, step.target, {**named, "offsets": offsets})  # type: ignore[arg-type]
            new.meta.update(node.meta)
            before.replace_all_uses_with(new)
            history.replaced[new] = before, ", ".join(rules)
            before, rules = new, []
        if before is node and self.steps:
            self.reason = "what one expert computes of the activation is not the same for all"
        return before is not node

    def _for_all(self, argument: Any, node: Node, stacked: Mapping[Node, Node], copies: dict[Node, Any]) -> Any:
        """An argument of one expert's GEMM for all: a tensor with those of all, or what is computed from ``x``."""
        if not isinstance(argument, Node):
            return argument
        of_all = argument.args[0] if argument.target is torch.ops.aten.select.int else None
        if isinstance(of_all, Node) and of_all in stacked:
            return stacked[of_all]
        return self._copied(argument, node, copies)

    def _copied(self, inner: Node, node: Node, copies: dict[Node, Any]) -> Any:
        if inner not in copies:
            inputs = [self._copied(n, node, copies) for n in inner.all_input_nodes]
            if inner.op != "call_function" or any(n is _OF_EACH for n in inputs) or self._mixes_rows(inner):
                copies[inner] = _OF_EACH
            else:
                copies[inner] = node.graph.node_copy(inner, lambda n: copies[n])
                about = {n: v for n, v in node.meta.items() if n not in ("val", "tensor_meta", "eager_input_vals")}
                copies[inner].meta.update(about)
        return copies[inner]

    def _mixes_rows(self, inner: Node) -> bool:
        """Whether it computes one number of rows that may be those of several experts, such as their maximum."""
        computed, rows = value(inner), value(self.x).shape[0]
        tensors = [computed] if isinstance(computed, Tensor) else computed
        return bool(inner.all_input_nodes) and not all(
            t.ndim > 0 and statically_known_true(t.shape[0] == rows) for t in tensors
        )


_OF_EACH = object()  # in the place of what is computed from tensors or rows of one expert
