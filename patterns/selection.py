"""Who runs what the rules made; what nobody can run becomes the graph again that it was."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from quark_inductor.lowering import target as targets
from quark_inductor.lowering.base import EMULATION, GemmProblem, gemm_problem, select
from quark_inductor.patterns._inductor import config
from quark_inductor.patterns.base import arguments, layer_of, value
from quark_inductor.schemes.ops import FUSED_OPS, NAMESPACE, dtype_name

# In the meta of a GEMM of a quantized weight: the key of what became of it.
KEY = "quark_linear"


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that one call of a GEMM reads and writes; of experts, if every one of them has rows.

    Sizes that are not known before run time are those the graph was traced with; ``None``: those are not known either.

    Attributes:
        tokens: M, of experts all of them together.
        weight: codes, scales and zero points as a kernel reads them, and the bias.
        activation: the same of the activation, if it is quantized before the GEMM, or its values.
        output: what the GEMM computes, before what is fused after it.
    """

    tokens: int | None = None
    weight: int | None = None
    activation: int | None = None
    output: int | None = None


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
        traffic: of the GEMM that runs; of an emulated one only the weight's bytes, as they are stored.
        key: a number that no other has, also in the node's meta as :data:`KEY`.
    """

    layer: str
    provider: str
    rules: tuple[str, ...]
    shape: tuple[int, int]
    problem: GemmProblem | None
    refusals: tuple[str, ...]
    partly: bool = False
    traffic: Traffic = Traffic()
    key: int = -1

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


def traffic_of(node: Node) -> Traffic:
    """The traffic of a fused op in a graph."""
    named = arguments(node)

    def total(names: Iterable[str]) -> int | None:
        sizes = [_bytes(value(named[name])) for name in names if isinstance(named[name], Node)]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    tensors = [name for name in named if name != "offsets"]
    of_x = [name for name in tensors if name == "x" or name.startswith("x_")]
    output = value(node)
    return Traffic(
        tokens=_product(output.shape[:-1]),
        weight=total(name for name in tensors if name not in of_x),
        activation=total(of_x),
        output=_bytes(output),
    )


def _bytes(tensor: Tensor) -> int | None:
    numbers = _product(tensor.shape)
    return None if numbers is None else numbers * tensor.dtype.itemsize


def _product(sizes: Iterable[Any]) -> int | None:
    hints: list[Any] = [size if isinstance(size, int) else getattr(size.node, "hint", None) for size in sizes]
    return None if None in hints else math.prod(hints)


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
        traffic = traffic_of(first if provider == EMULATION else node)
        results[node] = LinearResult(
            layer=layer_of(node),
            provider=provider,
            rules=_rules(node, replaced),
            shape=(problem.n, problem.k),
            problem=problem,
            refusals=tuple(f"{', '.join(ops)}: {refusal}" for refusal, ops in refusals.items()),
            traffic=Traffic(weight=traffic.weight) if provider == EMULATION else traffic,
        )
    return results


def _rules(node: Node, replaced: Mapping[Node, tuple[Node, str]]) -> tuple[str, ...]:
    names: list[str] = []
    current: Any = node
    while current in replaced:
        current, rules = replaced[current]
        names = [*rules.split(", "), *names]
    return tuple(names)
