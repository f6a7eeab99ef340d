"""Who runs what the rules made; what nobody can run becomes the graph again that it was."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from quark_inductor.lowering import target as targets
from quark_inductor.lowering.base import EMULATION, GemmProblem, gemm_problem, select
from quark_inductor.patterns._inductor import config
from quark_inductor.patterns.base import arguments, layer_of, value
from quark_inductor.schemes.ops import FUSED_OPS, NAMESPACE, dtype_name


@dataclass(frozen=True, slots=True)
class LinearResult:
    """What became of one GEMM of a quantized weight.

    Attributes:
        layer: the module it comes from, as the model names it; ``""`` if unknown.
        provider: who runs it; ``"emulation"``: nobody but Inductor, which compiles the graph as it was.
        rules: names of the rules that made what runs, in the order they ran.
        shape: ``(N, K)``; -1: not known when compiling.
        problem: the GEMM that runs, or that nobody could run; ``None`` if no rule knows the weight.
        refusals: why it is no more than that: who refused a better form, and why.
        partly: the provider runs the GEMM, but the activation is quantized and dequantized by the emulation before.
    """

    layer: str
    provider: str
    rules: tuple[str, ...]
    shape: tuple[int, int]
    problem: GemmProblem | None
    refusals: tuple[str, ...]
    partly: bool = False

    @property
    def fused(self) -> bool:
        """Whether some provider runs all of it."""
        return self.provider != EMULATION and not self.partly


def problem_of(node: Node) -> GemmProblem:
    """The problem of a fused op in a graph."""
    assert isinstance(node.target, torch._ops.OpOverload)
    op = node.target._schema.name.partition("::")[2]

    def shape(tensor: Node) -> list[int | None]:
        return [size if isinstance(size, int) else None for size in value(tensor).shape]

    rounds = bool(config.emulate_precision_casts)
    return gemm_problem(op, arguments(node), shape, lambda tensor: dtype_name(value(tensor).dtype), rounds)


def is_fused(node: Node) -> bool:
    """Whether a node calls a fused op of this package."""
    return (
        isinstance(node.target, torch._ops.OpOverload)
        and node.target.namespace == NAMESPACE
        and node.target._schema.name.partition("::")[2] in FUSED_OPS
    )


def select_providers(
    graph: Graph, replaced: Mapping[Node, tuple[Node, str]], forced: str | None
) -> dict[Node, LinearResult]:
    """Leave each fused op to a provider, or put back what a rule replaced until some provider can run it.

    Args:
        graph: changed in place; every node in ``replaced`` is still in it.
        replaced: of each node that a rule made, the node it replaced and the rule's name.
        forced: the only provider that may be asked.

    Returns:
        What became of each, by the node that computes it now.
    """
    results: dict[Node, LinearResult] = {}
    for first in list(graph.nodes):
        if not first.users or not is_fused(first) or first in results:
            continue
        node, problems = first, list[GemmProblem]()
        refusals: dict[str, list[str]] = {}
        provider = EMULATION
        while is_fused(node):
            problems.append(problem_of(node))
            selection = select(targets.current(value(node).device.type), problems[-1], forced)
            if selection.provider is not None:
                provider = selection.provider.name
                break
            for refusal in selection.refusals:
                refusals.setdefault(refusal, []).append(problems[-1].op)
            if node not in replaced:
                break  # made by somebody else: its lowering says that there is no kernel
            before, _ = replaced[node]
            node.replace_all_uses_with(before)
            node = before
        problem = problems[0] if provider == EMULATION else problems[-1]
        results[node] = LinearResult(
            layer=layer_of(node),
            provider=provider,
            rules=_rules(node, replaced),
            shape=(problem.n, problem.k),
            problem=problem,
            refusals=tuple(f"{', '.join(ops)}: {refusal}" for refusal, ops in refusals.items()),
        )
    return results


def _rules(node: Node, replaced: Mapping[Node, tuple[Node, str]]) -> tuple[str, ...]:
    names: list[str] = []
    current: Any = node
    while current in replaced:
        current, rules = replaced[current]
        names = [*rules.split(", "), *names]
    return tuple(names)
