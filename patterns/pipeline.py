"""The passes in running order, what they did, and what the caches must know of them."""

import contextlib
import functools
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph, Node

from quark_inductor.lowering import target as targets
from quark_inductor.lowering.base import provider_names
from quark_inductor.patterns import registry  # noqa: F401
from quark_inductor.patterns._inductor import CustomGraphPass, dynamo_timed, remove_noop_ops, trace_structured
from quark_inductor.patterns.base import PRODUCTS, Options, PassResult, Refusal, layer_of, registered_rules
from quark_inductor.patterns.canonicalize import cse, hoist_views
from quark_inductor.patterns.late_decomposition import late_decomposition
from quark_inductor.patterns.nearest import nearest
from quark_inductor.schemes.errors import NotFusedError

log = logging.getLogger(__name__)
aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class GraphResult:
    """What the passes did to one graph: each pass's result, and the layers left to the emulation with the reasons."""

    passes: tuple[PassResult, ...]
    unfused: tuple[Refusal, ...]

    def matches(self, rule: str) -> int:
        """How often a rule was applied."""
        return sum(p.matches for p in self.passes if p.name == rule)


_collector: ContextVar[list[GraphResult] | None] = ContextVar("quark_inductor_results", default=None)


@contextlib.contextmanager
def collect_results() -> Iterator[list[GraphResult]]:
    """Collect a result per graph compiled inside. A graph that comes from a cache runs no pass and leaves none."""
    results: list[GraphResult] = []
    token = _collector.set(results)
    try:
        yield results
    finally:
        _collector.reset(token)


def _timed(name: str, run: Callable[[Graph], int], graph: Graph) -> PassResult:
    start = time.perf_counter()
    return PassResult(name, run(graph), (), (time.perf_counter() - start) * 1e3)


def _comes_from_codes(operand: Any) -> bool:
    """Whether a tensor is computed from stored integers or FP8, and from nothing that another GEMM computed."""
    seen: set[Node] = set()
    todo, codes = [operand], False
    while todo:
        node = todo.pop()
        if not isinstance(node, Node) or node in seen:
            continue
        seen.add(node)
        if node.target in PRODUCTS:
            return False
        val = node.meta.get("val")
        if not node.all_input_nodes and isinstance(val, torch.Tensor):
            codes |= (val.dtype.itemsize == 1 and val.dtype != torch.bool) or val.dtype == torch.int32
        todo += node.all_input_nodes
    return codes


def unfused_gemms(graph: Graph) -> list[Node]:
    """The GEMMs whose second operand is dequantized from codes: what the rules left to the emulation."""
    found = []
    for target, index in ((aten.mm.default, 1), (aten.addmm.default, 2)):
        for node in graph.find_nodes(op="call_function", target=target):
            if _comes_from_codes(node.args[index]):
                found.append(node)
    return found


def run_rules(graph: Graph, options: Options) -> GraphResult:
    """Canonicalize a graph and apply every rule to it, in place.

    Raises:
        NotFusedError: ``options.strict`` and a quantized Linear was left to the emulation.
    """
    remove_noop_ops(graph)  # the form in which the patterns were traced
    passes = [_timed("hoist_views", hoist_views, graph), _timed("cse", cse, graph)]
    for rule in registered_rules():
        with dynamo_timed(f"quark.{rule.name}", log_pt2_compile_event=True):
            passes.append(rule.apply(graph, options))
    graph.eliminate_dead_code()
    graph.lint()
    reasons = {r.layer: r for p in passes for r in p.refusals}
    unfused: list[Refusal] = []
    known: dict[Any, str] = {}
    for node in unfused_gemms(graph):
        layer = layer_of(node)
        unfused.append(reasons.get(layer) or Refusal(nearest(node, known), layer))
    result = GraphResult(tuple(passes), tuple(unfused))
    _report(result)
    if unfused and options.strict:
        lines = "".join(f"\n  {r.layer or '(unnamed layer)'}: {r.reason}" for r in unfused)
        raise NotFusedError(
            f"{len(unfused)} quantized Linears were not fused, and quark.strict asks for all of them:{lines}"
        )
    return result


def _report(result: GraphResult) -> None:
    for p in result.passes:
        log.debug("%s: %d matches, %d refusals, %.1f ms", p.name, p.matches, len(p.refusals), p.ms)
    for refusal in result.unfused:
        log.warning("%s runs as emulation: %s", refusal.layer or "a quantized Linear", refusal.reason)
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "quark_passes", "encoding": "json"},
        payload_fn=lambda: json.dumps(asdict(result)),
    )
    if (results := _collector.get()) is not None:
        results.append(result)


@functools.cache
def source_hash() -> str:
    """Hash of every source file of the three lower floors.

    Inductor's cache key knows the passes only by their uuid, and the lowerings and templates not at all: a changed
    byte in any of them must change it. By package, because an editable install does not nest them under
    ``quark_inductor``.
    """
    digest = hashlib.sha256()
    for floor in ("schemes", "lowering", "patterns"):
        root = Path(str(import_module(f"quark_inductor.{floor}").__file__)).parent
        for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".h", ".json")):
            digest.update(f"{floor}/{path.relative_to(root).as_posix()}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


class _Pass(CustomGraphPass):  # type: ignore[misc]
    def __init__(self, options: Options) -> None:
        self.options = options

    def uuid(self) -> Any:
        """What a cached graph depends on: this package's source, its options, what else is registered, the target."""
        registered = tuple(rule.name for rule in registered_rules()), provider_names()
        target = str(targets.current("cuda" if torch.cuda.is_available() else "cpu")), str(targets.current("cpu"))
        return type(self).__name__, source_hash(), torch.__version__, str(self.options), registered, target


class RulesPass(_Pass):
    """Runs the rules where Inductor has neither padded a GEMM nor folded a constant yet."""

    def __call__(self, graph: Graph) -> None:
        """Run on an inference graph, in place."""
        if any(n.name.startswith("tangents") for n in graph.find_nodes(op="placeholder")):
            log.warning("a training graph: no rule runs, the quantized Linears stay emulated")
            return
        run_rules(graph, self.options)


class LateDecompositionPass(_Pass):
    """Runs after Inductor's own passes, just before the lowerings."""

    def __call__(self, graph: Graph) -> None:
        """Run on any graph, in place."""
        count = late_decomposition(graph)
        graph.lint()
        log.debug("late_decomposition: %d", count)
