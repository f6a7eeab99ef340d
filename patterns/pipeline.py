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
from torch.fx import Graph

from quark_inductor.lowering import target as targets
from quark_inductor.lowering.base import provider_keys
from quark_inductor.patterns import registry  # noqa: F401
from quark_inductor.patterns._inductor import CustomGraphPass, dynamo_timed, remove_noop_ops, trace_structured
from quark_inductor.patterns.base import History, Options, PassResult, Refusal, registered_rules
from quark_inductor.patterns.canonicalize import hoist_selects, hoist_views
from quark_inductor.patterns.cse import cse
from quark_inductor.patterns.decode_attention import decode_attention
from quark_inductor.patterns.decode_linear import decode_linear
from quark_inductor.patterns.grouped_linear import grouped_linear
from quark_inductor.patterns.late_decomposition import late_decomposition
from quark_inductor.patterns.leftovers import leftovers
from quark_inductor.patterns.quantize_before_gather import quantize_before_gather
from quark_inductor.patterns.selection import LinearResult, select_providers
from quark_inductor.schemes.errors import NotFusedError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GraphResult:
    """What the passes did to one graph.

    Attributes:
        passes: each pass's result.
        linears: what became of each GEMM of a quantized weight.
        unfused: those that are left to the emulation, all or in part, with the reason.
        left: quantizes, dequantizes and casts to or from 8 bits that stay in the graph, with the reason.
        ms: what all of it took; besides the passes, Inductor's removal of no-ops, that of dead code, and the reasons.
    """

    passes: tuple[PassResult, ...]
    linears: tuple[LinearResult, ...]
    unfused: tuple[Refusal, ...]
    left: tuple[Refusal, ...]
    ms: float

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


@contextlib.contextmanager
def _event(name: str) -> Iterator[None]:
    """What torch's own records of a compilation show under a name of ours."""
    with dynamo_timed(f"quark.{name}", log_pt2_compile_event=True):
        yield


def _timed(name: str, run: Callable[[Graph], int], graph: Graph) -> PassResult:
    start = time.perf_counter()
    with _event(name):
        return PassResult(name, run(graph), (), (time.perf_counter() - start) * 1e3)


def run_rules(graph: Graph, options: Options) -> GraphResult:
    """Canonicalize a graph, apply every rule to it, and give what they made to the providers; in place.

    Raises:
        NotFusedError: ``options.strict`` and a quantized Linear was left to the emulation.
    """
    start = time.perf_counter()
    remove_noop_ops(graph)  # the form in which the patterns were traced
    passes = [
        _timed("hoist_selects", hoist_selects, graph),
        _timed("hoist_views", hoist_views, graph),
        _timed("cse", cse, graph),
        _timed("decode_attention", decode_attention, graph),
        _timed("decode_linear", decode_linear, graph),
    ]
    history = History()
    with _event("grouped_linear"):
        passes.append(grouped_linear(graph, history))
    for rule in registered_rules():
        with _event(rule.name):
            passes.append(rule.apply(graph, history))
    selecting = time.perf_counter()
    with _event("select_providers"):
        linears = select_providers(graph, history.replaced, options.provider)
    passes.append(PassResult("select_providers", len(linears), (), (time.perf_counter() - selecting) * 1e3))
    graph.eliminate_dead_code()
    passes.append(_timed("quantize_before_gather", quantize_before_gather, graph))
    graph.eliminate_dead_code()
    graph.lint()
    with _event("leftovers"):
        all_linears, unfused, left = leftovers(graph, linears, history.refused)
    ms = (time.perf_counter() - start) * 1e3
    result = GraphResult(tuple(passes), tuple(all_linears), tuple(unfused), tuple(left), ms)
    _report(result)
    if result.unfused and options.strict:
        lines = "".join(f"\n  {r.layer or '(unnamed layer)'}: {r.reason}" for r in result.unfused)
        raise NotFusedError(
            f"{len(result.unfused)} quantized Linears were not fused, and quark.strict asks for all of them:{lines}"
        )
    return result


def _report(result: GraphResult) -> None:
    for p in result.passes:
        log.debug("%s: %d matches, %d refusals, %.1f ms", p.name, p.matches, len(p.refusals), p.ms)
        for refusal in p.refusals:
            log.debug("%s refuses %s: %s", p.name, refusal.layer or "a GEMM", refusal.reason)
    for linear in result.linears:
        by = ", ".join((linear.provider, *linear.rules))
        log.debug("%s: %s by %s", linear.layer or "a GEMM", linear.problem, by)
    for refusal in result.left:
        log.debug("left in %s: %s", refusal.layer or "the graph", refusal.reason)
    alike: dict[str, list[str]] = {}
    for refusal in result.unfused:
        alike.setdefault(refusal.reason, []).append(refusal.layer or "a quantized Linear")
    for reason, (first, *others) in alike.items():
        who = f"{first} and {len(others)} more run" if others else f"{first} runs"
        log.warning("%s as emulation: %s", who, reason)
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
        registered = tuple(rule.name for rule in registered_rules()), provider_keys()
        target = str(targets.current("cuda" if torch.cuda.is_available() else "cpu")), str(targets.current("cpu"))
        return type(self).__name__, source_hash(), torch.__version__, str(self.options), registered, target


class RulesPass(_Pass):
    """Runs the rules where Inductor has neither padded a GEMM nor folded a constant yet."""

    def __call__(self, graph: Graph) -> None:
        """Run on an inference graph, in place."""
        if any(n.name.startswith("tangents") for n in graph.find_nodes(op="placeholder")):
            log.warning("a training graph: no rule runs, the quantized Linears stay emulated")
            return
        with _event("passes"):
            run_rules(graph, self.options)


class LateDecompositionPass(_Pass):
    """Runs after Inductor's own passes, just before the lowerings."""

    def __call__(self, graph: Graph) -> None:
        """Run on any graph, in place."""
        with _event("late_decomposition"):
            count = late_decomposition(graph)
            graph.lint()
        log.debug("late_decomposition: %d", count)
