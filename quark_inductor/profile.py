"""Where the time goes that a model takes to compile: by phase, pass, rule and kernel, cold and warm."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from quark_inductor import __version__, machine
from quark_inductor.backend import unwrapped_errors
from quark_inductor.documents import known_fields, read_document, rounded
from quark_inductor.recorder import FIRST_RUN, Break, Cache, Kernel, Kernels, Node, Recorder, Span
from quark_inductor.schemes.errors import DocumentError, OptionError

KIND, SCHEMA = "profile", 1
BACKENDS = ("quark", "inductor")


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One compilation and the first call of what it made.

    Attributes:
        wall_s: seconds on the clock.
        unattributed_s: of these, seconds in which torch timed nothing.
        phases: seconds in each phase, exclusive: with ``unattributed_s`` they are ``wall_s``.
        tree: what was timed in the thread that compiles, as a tree.
        graphs: how many graphs Dynamo made.
        kernels: what became of kernels.
        graph_breaks: where Dynamo ended a graph, and why.
        recompiles: frames that were compiled again, and why.
        caches: graphs that were looked up in caches.
        peak_memory_bytes: the most memory that this process had meanwhile, the model's own included; ``None`` where the
            system does not say. Compilers are processes of their own.
        peak_gpu_memory_bytes: the most memory that torch had on the GPU; ``None`` without one.
        spans: everything that was timed in any thread: the timeline.
    """

    wall_s: float
    unattributed_s: float
    phases: Mapping[str, float]
    tree: tuple[Node, ...]
    graphs: int
    kernels: Kernels
    graph_breaks: tuple[Break, ...] = ()
    recompiles: tuple[Break, ...] = ()
    caches: tuple[Cache, ...] = ()
    peak_memory_bytes: int | None = None
    peak_gpu_memory_bytes: int | None = None
    spans: tuple[Span, ...] = ()

    @classmethod
    def of(cls, recorder: Recorder) -> "Run":
        """What a recorder recorded."""
        return cls(
            wall_s=recorder.wall_s,
            unattributed_s=recorder.unattributed_s,
            phases=recorder.phases(),
            tree=tuple(recorder.root.children),
            graphs=recorder.graphs,
            kernels=recorder.kernels(),
            graph_breaks=recorder.graph_breaks,
            recompiles=recorder.recompiles,
            caches=recorder.caches(),
            peak_memory_bytes=recorder.peak_bytes,
            peak_gpu_memory_bytes=recorder.peak_gpu_bytes,
            spans=tuple(recorder.spans),
        )

    def seconds(self, event: str) -> float:
        """Seconds in all events of a name, such as ``"quark.block_weight"``; 0 where there was none."""
        return sum(node.s for top in self.tree for node in top.walk() if node.name == event)

    def to_dict(self) -> dict[str, Any]:
        """What is written as JSON. Times are rounded to a microsecond."""
        raw = asdict(self)
        raw["phases"] = [{"name": name, "s": s} for name, s in self.phases.items()]
        written: dict[str, Any] = rounded(raw)
        return written

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "Run":
        """The run that was written. What an older version did not write has its default."""

        def node(raw: Mapping[str, Any]) -> Node:
            return Node(**{**known_fields(Node, raw), "children": [node(child) for child in raw["children"]]})

        def caches() -> Iterator[Cache]:
            for one in raw.get("caches", ()):
                yield Cache(**{**known_fields(Cache, one), "reasons": tuple(one["reasons"])})

        kernels = raw["kernels"]
        return cls(
            **{
                **known_fields(cls, raw),
                "phases": {phase["name"]: phase["s"] for phase in raw["phases"]},
                "tree": tuple(node(one) for one in raw["tree"]),
                "kernels": Kernels(
                    **{
                        **known_fields(Kernels, kernels),
                        "built": tuple(Kernel(**known_fields(Kernel, one)) for one in kernels["built"]),
                    }
                ),
                "graph_breaks": tuple(Break(**known_fields(Break, one)) for one in raw.get("graph_breaks", ())),
                "recompiles": tuple(Break(**known_fields(Break, one)) for one in raw.get("recompiles", ())),
                "caches": tuple(caches()),
                "spans": tuple(Span(**known_fields(Span, one)) for one in raw.get("spans", ())),
            }
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """What :func:`profile_compile` measured. ``print`` it, or take one of its other forms.

    Attributes:
        model: the class of the model.
        backend: ``"quark"`` or ``"inductor"``.
        options: as they were given.
        versions: of torch and what else matters.
        cpu: the processor's name.
        cold: with empty caches.
        warm: once more, with what the cold run left in them on disk.
    """

    model: str
    backend: str
    options: Mapping[str, Any]
    versions: Mapping[str, str]
    cpu: str
    cold: Run
    warm: Run

    @property
    def runs(self) -> dict[str, Run]:
        """Both, by name."""
        return {"cold": self.cold, "warm": self.warm}

    def to_json(self) -> str:
        """This profile, as ``quark_inductor/schemas/profile.json`` describes it."""
        head = {
            "schema": SCHEMA,
            "kind": KIND,
            "model": self.model,
            "backend": self.backend,
            "options": {k: v if isinstance(v, str | int | float | None) else repr(v) for k, v in self.options.items()},
            "versions": dict(self.versions),
            "cpu": self.cpu,
        }
        return json.dumps({**head, **{name: run.to_dict() for name, run in self.runs.items()}}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Profile":
        """The profile that :meth:`to_json` wrote, of this version or an older one.

        Raises:
            DocumentError: it is no JSON, of another kind, of a newer schema, or not whole.
        """
        raw = read_document(text, KIND, SCHEMA)
        try:
            runs = {name: Run.from_dict(raw[name]) for name in ("cold", "warm")}
            return cls(**{"options": {}, "versions": {}, "cpu": "", **known_fields(cls, raw), **runs})
        except (KeyError, TypeError, AttributeError) as e:
            raise DocumentError(f"this profile is not whole ({e!r}): measure again") from e

    def to_chrome_trace(self) -> str:
        """Both runs as a chromium trace, for Perfetto and chrome://tracing: a process a run, a thread a lane."""
        events: list[dict[str, Any]] = []
        for pid, (name, run) in enumerate(self.runs.items(), 1):
            events.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}})
            for lane in sorted({span.lane for span in run.spans}):
                thread = {"name": f"compiler {lane}" if lane else "compiles"}
                events.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": lane, "args": thread})
            for span in run.spans:
                us = {"ts": round(span.start_s * 1e6, 1), "dur": round((span.end_s - span.start_s) * 1e6, 1)}
                events.append({"ph": "X", "name": span.name, "cat": span.phase, "pid": pid, "tid": span.lane, **us})
        return json.dumps({"displayTimeUnit": "ms", "traceEvents": events})

    def to_html(self) -> str:
        """A page for a browser: the timeline and the tables."""
        from quark_inductor.page import page

        runs = {name: run.to_dict() for name, run in self.runs.items()}
        return page(f"Compilation of {self.model} by {self.backend}", self.summary, runs=runs)

    @property
    def summary(self) -> str:
        """A line a run."""
        return "\n".join(f"{name}: {_sentence(run)}" for name, run in self.runs.items())

    def table(self) -> str:
        """For a terminal: summary, phases, the tree of the cold run down to 1 % of it, kernels, and what went wrong."""
        from quark_inductor.profile_table import table

        return table(self)

    def __str__(self) -> str:
        return self.table()

    def compare(self, base: "Profile") -> "Comparison":
        """What this profile differs in from another: see :class:`Comparison`."""
        return Comparison(base, self)


def _sentence(run: Run) -> str:
    kernels = run.kernels
    parts = [
        f"{run.wall_s:.2f} s on the clock, {run.unattributed_s / run.wall_s:.1%} not attributed",
        f"{run.graphs} graph{'s' * (run.graphs != 1)}",
        f"{kernels.distinct} kernels, {kernels.compiled} compiled",
    ]
    if run.graph_breaks:
        parts.append(f"{sum(b.count for b in run.graph_breaks)} graph breaks")
    if run.recompiles:
        parts.append(f"{len(run.recompiles)} recompiles")
    if bypasses := sum(cache.bypasses for cache in run.caches):
        parts.append(f"{bypasses} cache bypasses")
    if run.peak_memory_bytes is not None:
        parts.append(f"peak {run.peak_memory_bytes / 1e6:.0f} MB")
    if run.peak_gpu_memory_bytes is not None:
        parts.append(f"on the GPU {run.peak_gpu_memory_bytes / 1e6:.0f} MB")
    return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class Delta:
    """One figure in two profiles.

    Attributes:
        run: ``"cold"`` or ``"warm"``.
        name: a phase, ``"wall"``, ``"unattributed"``, or a count such as ``"graph breaks"``.
        base: in the one compared with.
        now: in this one.
        unit: ``"s"``, ``"MB"`` or ``""``.
        worse: grown by more than a tenth, and for seconds by more than a tenth of a second too.
    """

    run: str
    name: str
    base: float
    now: float
    unit: str
    worse: bool


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two profiles of one model, figure by figure: phases and events of ours, counts, memory.

    Attributes:
        base: what is compared with.
        now: what is looked at.
    """

    base: Profile
    now: Profile

    @property
    def deltas(self) -> tuple[Delta, ...]:
        """Every figure that one of the two has."""
        return tuple(
            delta for name in self.now.runs for delta in _deltas(name, self.base.runs[name], self.now.runs[name])
        )

    def to_json(self) -> str:
        """``{"schema": 1, "kind": "comparison", "base": {...}, "now": {...}, "deltas": [{"run", "name", ...}]}``."""
        heads = {
            side: {"model": p.model, "backend": p.backend, "versions": dict(p.versions), "cpu": p.cpu}
            for side, p in (("base", self.base), ("now", self.now))
        }
        deltas = [asdict(delta) for delta in self.deltas]
        return json.dumps({"schema": 1, "kind": "comparison", **heads, "deltas": rounded(deltas)}, indent=1)

    def __str__(self) -> str:
        from quark_inductor.profile_table import comparison

        return comparison(self)


def _figures(run: Run) -> Iterator[tuple[str, float, str]]:
    yield "wall", run.wall_s, "s"
    for phase, s in run.phases.items():
        yield phase, s, "s"
    yield "unattributed", run.unattributed_s, "s"
    ours = {n.name for top in run.tree for n in top.walk() if n.name.startswith("quark.") and n.name != FIRST_RUN}
    for name in sorted(ours):
        yield name, run.seconds(name), "s"
    yield "graphs", run.graphs, ""
    yield "graph breaks", sum(b.count for b in run.graph_breaks), ""
    yield "recompiles", len(run.recompiles), ""
    yield "kernels", run.kernels.distinct, ""
    yield "kernels compiled", run.kernels.compiled, ""
    yield "cache bypasses", sum(cache.bypasses for cache in run.caches), ""
    for label, size in (("peak memory", run.peak_memory_bytes), ("peak GPU memory", run.peak_gpu_memory_bytes)):
        if size is not None:
            yield label, size / 1e6, "MB"


def _deltas(name: str, base: Run, now: Run) -> Iterator[Delta]:
    figures = {label: (value, unit) for label, value, unit in _figures(base)}
    found = {label: (value, unit) for label, value, unit in _figures(now)}
    for label in dict.fromkeys([*found, *figures]):
        (before, unit), (after, _) = (
            figures.get(label, (0.0, found.get(label, (0, "s"))[1])),
            found.get(label, (0.0, "")),
        )
        grown = after - before
        yield Delta(name, label, before, after, unit, grown > before / 10 and (unit != "s" or grown > 0.1))


def profile_compile(
    model: Any,
    *args: Any,
    backend: str = "quark",
    dynamic: bool | None = None,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Profile:
    """Compile a model twice and say where the time went: with empty caches, and with what that left in them.

    Both runs have a folder of their own for caches; those of the user are neither read nor written. The warm run stands
    for a second process: Dynamo starts anew, and all that Inductor has in memory is forgotten. What a process does once
    (imports, a check of the compiler) is in the cold run only if this process has not done it yet: to compare two
    profiles, make each in a process of its own, as ``quark-inductor profile --stock`` does.

    Args:
        model: a module or function; one that is compiled already is compiled again.
        *args: what it is called with.
        backend: ``"quark"``, or ``"inductor"`` for Inductor alone, to compare with.
        dynamic: as in ``torch.compile``.
        options: as in ``torch.compile(backend=...)``.
        **kwargs: what it is called with.

    Raises:
        OptionError: an unknown backend or option.
    """
    from quark_inductor.patterns._inductor import clear_caches, fresh_cache

    model = getattr(model, "_orig_mod", model)
    compiler = compiler_of(backend, options)
    runs = []
    with fresh_cache():
        for _ in range(2):
            torch._dynamo.reset()
            clear_caches()
            runs.append(_run(model, args, kwargs, compiler, dynamic))
    torch._dynamo.reset()
    packages = ("torch", "triton", "transformers")
    return Profile(
        model=type(model).__name__ if isinstance(model, torch.nn.Module) else getattr(model, "__name__", str(model)),
        backend=backend,
        options=dict(options or {}),
        versions={"quark-inductor": __version__, **{p: v for p in packages if (v := machine.version_of(p))}},
        cpu=machine.cpu_model(),
        cold=runs[0],
        warm=runs[1],
    )


def compiler_of(backend: str, options: Mapping[str, Any] | None) -> Callable[[Any, Any], Any]:
    """What compiles a graph of Dynamo's for its inputs.

    Raises:
        OptionError: an unknown backend or option.
    """
    from quark_inductor.backend import compile_graph, split_options
    from quark_inductor.patterns._inductor import compile_fx

    if backend not in BACKENDS:
        raise OptionError(f"there is no backend {backend!r} to profile; expected one of {', '.join(BACKENDS)}")
    own, theirs = split_options(None, options)
    if backend == "quark":
        return lambda graph, inputs: compile_graph(graph, inputs, own, theirs)
    return lambda graph, inputs: compile_fx(graph, inputs, config_patches=theirs)


def _run(model: Any, args: Any, kwargs: Any, compiler: Callable[[Any, Any], Any], dynamic: bool | None) -> Run:
    with Recorder() as recorder, torch.no_grad(), unwrapped_errors():
        torch.compile(model, backend=recorded(compiler, recorder), dynamic=dynamic)(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return Run.of(recorder)


def recorded(compiler: Callable[[Any, Any], Any], recorder: Recorder) -> Callable[[Any, Any], Any]:
    """A backend that tells a recorder of each graph, and times the first run of what becomes of it."""

    def backend(graph: Any, inputs: Any) -> Any:
        from quark_inductor.patterns._inductor import dynamo_timed

        recorder.saw(graph)
        compiled = compiler(graph, inputs)

        def run(*args: Any) -> Any:
            with dynamo_timed(FIRST_RUN):
                return compiled(*args)

        return run

    return backend
