"""A Linear of each of E experts as one grouped GEMM: what the rules make of one expert's, for all of them."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from quark_inductor.patterns._inductor import detect_fake_mode, remove_noop_ops, statically_known_true
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
from quark_inductor.patterns.late_decomposition import PlainGraphs, about
from quark_inductor.schemes import experts  # noqa: F401  its op
from quark_inductor.schemes.base import linear

NAME = "grouped_linear"
_op = torch.ops.quark_inductor.grouped_linear.default
aten, prims = torch.ops.aten, torch.ops.prims
_REDUCTIONS = (aten.amax.default, aten.amin.default)


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
        self._by_expert = set[Node]()
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
            of_expert = any(n in self._by_expert for n in inputs)
            if inner.op != "call_function" or any(n is _OF_EACH for n in inputs):
                copies[inner] = _OF_EACH
            elif inner.target in _REDUCTIONS and value(inner).ndim == 0:
                copies[inner] = _of_experts(inner.target, inputs[0], node)
                self._by_expert.add(copies[inner])
            elif of_expert and value(inner).ndim == 0:  # computed from such numbers, one by one
                args = [copies[a] if isinstance(a, Node) else a for a in inner.args]
                copies[inner] = _computed(node, inner.target, *args)
                self._by_expert.add(copies[inner])
            elif of_expert or self._mixes_rows(inner):
                copies[inner] = _OF_EACH
            else:
                copies[inner] = node.graph.node_copy(inner, lambda n: copies[n])
                copies[inner].meta.update(about(node))
        return copies[inner]

    def _mixes_rows(self, inner: Node) -> bool:
        """Whether it computes one number of rows that may be those of several experts, such as their maximum."""
        computed, rows = value(inner), value(self.x).shape[0]
        tensors = [computed] if isinstance(computed, Tensor) else computed
        return bool(inner.all_input_nodes) and not all(
            t.ndim > 0 and statically_known_true(t.shape[0] == rows) for t in tensors
        )


def _computed(node: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
    """A call, for the module that ``node`` comes from."""
    new = node.graph.call_function(target, args, kwargs)
    values = [value(a) if isinstance(a, Node) else a for a in args]
    mode = detect_fake_mode([value(node)])
    assert mode is not None, "a graph that is compiled holds fake tensors"
    with mode:  # what it creates is fake, too
        new.meta = {**about(node), "val": target(*values, **kwargs)}
    return new


def _of_experts(reduction: Any, x: Node, node: Node) -> Node:
    """The extremes ``[E]`` of each expert's rows of ``x [S, K]``; of none an infinity, which nobody reads."""
    offsets = node.args[1]
    assert isinstance(offsets, Node)
    count, val, least = int(value(offsets).shape[0]), value(x), reduction is aten.amin.default
    size = val.shape[0] if isinstance(val.shape[0], int) else _computed(node, aten.sym_size.int, x, 0)
    created = {"dtype": torch.int64, "device": val.device}
    row = _computed(node, prims.iota.default, size, start=0, step=1, requires_grad=False, **created)
    expert = _computed(node, aten.searchsorted.Tensor, offsets, row, right=True)
    created = {"dtype": val.dtype, "device": val.device, "pin_memory": False}
    none = _computed(node, aten.full.default, [count + 1], torch.inf if least else -torch.inf, **created)
    of_rows = _computed(node, reduction, x, [-1])
    found = _computed(node, aten.scatter_reduce.two, none, 0, expert, of_rows, "amin" if least else "amax")
    return _computed(node, aten.slice.Tensor, found, 0, 0, count)


_OF_EACH = object()  # in the place of what is computed from tensors or rows of one expert
