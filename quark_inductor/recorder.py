"""What torch does while it compiles, as it says itself: a tree of timed events that adds up to the time on the clock.

Torch times its phases with ``dynamo_timed``, which writes a chromium trace (what ``TORCH_TRACE`` and tlparse show).
So do the passes, lowerings and templates of this package, under names that begin with ``quark.``. A :class:`Recorder`
reads these events as they come; it writes nothing and needs no log files.
"""

import fnmatch
import functools
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from quark_inductor import machine

FIRST_RUN = "quark.first_run"
# Which phase an event is in, by its name; the first that fits. One that is not here is in that of the event around it.
PHASES: Mapping[str, tuple[str, ...]] = {
    "dynamo": (
        "dynamo",
        "entire_frame_compile",
        "compile_attempt_*",
        "bytecode_*",
        "build_guards",
        "gc",
        "insert_deferred_runtime_asserts",
        "pgo.*",
    ),
    "cache": ("quark.cache.*", "inductor_codecache_torch_key", "CacheBase.*", "AOTAutogradCache.*", "TritonBundler.*"),
    "aot_autograd": ("backend_compile", "create_aot_dispatcher_function", "aot_*", "compile_fx.<locals>.*"),
    "inductor_passes": ("_recursive_*_passes", "pass.*", "additional_fake_tensor_prop", "fx.bucketing.*"),
    "lowering": ("GraphLowering.run", "inductor_compile", "fx_codegen_and_compile", "quark.lower.*"),
    "templates": ("quark.render.*",),
    "codegen": ("GraphLowering.*", "Scheduler.*", "*WrapperCodegen.*", "code_gen", "generate_kernel_code_from_nodes"),
    "autotuning": ("*autotun*", "select_algorithm*", "*benchmark*", "CachingAutotuner.*"),
    "kernel_compile": (
        "quark.build",
        "quark.instruction_set_check",
        "compile_file",
        "async_compile.*",
        "PyCodeCache.*",
        "*precompile*",
        "*triton*",
    ),
    "first_run": (FIRST_RUN,),
    "quark_passes": ("quark.*",),
}
OTHER = "other"
# Names of torch's instants: graphs it looked up in a cache.
_CACHES = {"fx_graph_cache": "fx_graph", "autograd_cache": "aot_autograd"}


@functools.cache
def phase_of(event: str) -> str | None:
    """The phase an event is in; ``None``: that of what is around it."""
    for phase, patterns in PHASES.items():
        if any(fnmatch.fnmatchcase(event, pattern) for pattern in patterns):
            return phase
    return None


@dataclass(slots=True)
class Span:
    """Something that took time. Times are in seconds since the recording began.

    Attributes:
        name: what, and of what.
        phase: which of :data:`PHASES`.
        start_s: when it began.
        end_s: when it ended.
        lane: 0: the thread that compiles; 1 and more: others, which build kernels beside it.
        depth: in how many others of its lane it is.
    """

    name: str
    phase: str
    start_s: float
    end_s: float
    lane: int
    depth: int


@dataclass(slots=True)
class Node:
    """Events of one name inside one other.

    Attributes:
        name: what.
        phase: which of :data:`PHASES`.
        s: seconds.
        self_s: seconds that are in no child.
        count: how many events.
        children: what was inside, in order of its first beginning.
    """

    name: str
    phase: str
    s: float = 0.0
    self_s: float = 0.0
    count: int = 0
    children: "list[Node]" = field(default_factory=list)

    def child(self, name: str, phase: str) -> "Node":
        """The child of a name, made where there is none."""
        for node in self.children:
            if node.name == name:
                return node
        self.children.append(Node(name, phase))
        return self.children[-1]

    def walk(self) -> "Iterator[Node]":
        """This and all below it."""
        yield self
        for node in self.children:
            yield from node.walk()


@dataclass(frozen=True, slots=True)
class Cache:
    """Graphs looked up in one cache of torch's.

    Attributes:
        cache: ``"fx_graph"`` (Inductor's) or ``"aot_autograd"`` (which holds the former's graphs, and is asked first).
        hits: found.
        misses: not found, and put there.
        bypasses: not looked up, and not put there.
        disabled: the cache is off.
        reasons: why, for bypasses.
    """

    cache: str
    hits: int
    misses: int
    bypasses: int
    disabled: int
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel that was built.

    Attributes:
        name: as generated code calls it; a source of no kernel, such as a check of the compiler, by what is in it.
        compiler: ``"g++"`` or ``"triton"``.
        s: seconds that the compiler ran.
        calls: calls in generated code; ``None``: not known.
    """

    name: str
    compiler: str
    s: float
    calls: int | None


@dataclass(frozen=True, slots=True)
class Kernels:
    """What became of kernels.

    Attributes:
        calls: calls of kernels in generated code; ``None``: the code came from a cache.
        distinct: kernels that the code needs, each once.
        deduplicated: calls of a kernel that another call has made; ``None``: not known.
        compiled: kernels that a compiler built.
        reused: kernels that were in a cache.
        built: each that a compiler built, the slowest first, and what else it built.
    """

    calls: int | None
    distinct: int
    deduplicated: int | None
    compiled: int
    reused: int
    built: tuple[Kernel, ...]


@dataclass(frozen=True, slots=True)
class Break:
    """Where Dynamo ended a graph, or compiled a frame again.

    Attributes:
        reason: why, in torch's words.
        where: ``"file:line"`` of the user's code, or the function's name and where it begins; ``""``: not known.
        count: how often.
    """

    reason: str
    where: str
    count: int


class _Open:
    """An event that has begun."""

    __slots__ = ("children_ns", "name", "node", "ns", "phase", "span")

    def __init__(self, name: str, phase: str, ns: int, node: Node | None, span: Span) -> None:
        self.name, self.phase, self.ns, self.node, self.span, self.children_ns = name, phase, ns, node, span, 0


class Recorder:
    """Records what happens inside of ``with``, in this thread and in those that build kernels for it.

    Attributes:
        root: the tree of what this thread did; its ``s`` is the time on the clock, its ``self_s`` what no event covers.
        spans: all events of all threads, in the order in which they began.
        peak_bytes: most memory of this process, ``None`` where the system does not say.
        peak_gpu_bytes: most memory that torch had on the GPU, ``None`` without one.
        graphs: how many graphs the backend was given.
        graph_breaks: where Dynamo ended a graph, and why.
        recompiles: frames that were compiled again, and why.
    """

    def __init__(self) -> None:
        self.root = Node("", OTHER)
        self.spans: list[Span] = []
        self.peak_bytes: int | None = None
        self.peak_gpu_bytes: int | None = None
        self.graphs = 0
        self.graph_breaks: tuple[Break, ...] = ()
        self.recompiles: tuple[Break, ...] = ()
        self._places: dict[str, Counter[str]] = {}
        self._lock = threading.Lock()
        self._stacks: dict[int, list[_Open]] = {}
        self._caches: Counter[tuple[str, str]] = Counter()
        self._reasons: dict[str, dict[str, None]] = {}
        self._defined: dict[str, str] = {}
        self._called: Counter[str] = Counter()
        self._loaded = 0
        self._built: list[tuple[str, str, float]] = []
        self._stack = ExitStack()

    def __enter__(self) -> "Recorder":
        from quark_inductor.patterns._inductor import compile_events, compiled_frames, counters

        self._memory = machine.PeakMemory()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._main = threading.get_ident()
        self._breaks_before = Counter(counters["graph_break"])
        self._frames = self._stack.enter_context(compiled_frames())
        self._stack.enter_context(compile_events(self._tell))
        self._start = time.time_ns()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        from quark_inductor.patterns._inductor import counters

        end = time.time_ns()
        frames = self._frames()
        self._stack.close()
        self.recompiles = tuple(
            Break(m.recompile_reason, f"{m.co_name} ({m.co_filename}:{m.co_firstlineno})", 1)
            for m in frames
            if m.recompile_reason
        )
        self.graph_breaks = tuple(self._graph_breaks(Counter(counters["graph_break"]) - self._breaks_before))
        self.peak_bytes = self._memory.peak()
        self.peak_gpu_bytes = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        self.root.s = (end - self._start) / 1e9
        self.root.self_s = self.root.s - sum(node.s for node in self.root.children)

    def saw(self, graph: Any) -> None:
        """Be told of a graph that Dynamo gives to the backend."""
        self.graphs += 1
        ended = getattr(graph, "compile_subgraph_reason", None)
        if ended is not None and ended.graph_break:
            place = ended.user_stack[-1] if ended.user_stack else None
            where = f"{place.filename}:{place.lineno}" if place else ""
            self._places.setdefault(ended.reason, Counter())[where] += 1

    def _graph_breaks(self, counted: Mapping[str, int]) -> Iterator[Break]:
        # Dynamo counts reasons, of graphs without an operation too, and tells a graph where it ended.
        for reason, count in counted.items():
            places = self._places.pop(reason, Counter())
            yield from (Break(reason, where, n) for where, n in places.items())
            if (rest := count - places.total()) > 0:
                yield Break(reason, "", rest)
        for reason, places in self._places.items():
            yield from (Break(reason, where, n) for where, n in places.items())

    @property
    def wall_s(self) -> float:
        """Seconds on the clock."""
        return self.root.s

    @property
    def unattributed_s(self) -> float:
        """Seconds on the clock in which nothing was timed."""
        return self.root.self_s

    def phases(self) -> dict[str, float]:
        """Seconds of this thread in each phase, exclusive: with those not attributed they are those on the clock."""
        seconds = dict.fromkeys((*PHASES, OTHER), 0.0)
        for node in self.root.walk():
            if node is not self.root:
                seconds[node.phase] += node.self_s
        return {phase: s for phase, s in seconds.items() if s}

    def caches(self) -> tuple[Cache, ...]:
        """What was looked up in caches."""

        def count(cache: str, state: str) -> int:
            return self._caches[cache, state]

        return tuple(
            Cache(
                cache=cache,
                hits=count(cache, "hit"),
                misses=count(cache, "miss"),
                bypasses=count(cache, "bypass"),
                disabled=count(cache, "disabled"),
                reasons=tuple(self._reasons.get(cache, ())),
            )
            for cache in _CACHES.values()
            if any(name == cache for name, _ in self._caches)
        )

    def kernels(self) -> Kernels:
        """What became of kernels."""
        calls = sum(self._called.values()) if self._called else None
        built = [
            Kernel(name, compiler, s, self._called[name] if name in self._called else None)
            for name, compiler, s in sorted(self._built, key=lambda kernel: -kernel[2])
        ]
        # Generated code calls every C++ kernel "kernel": one whose name is not known comes from cached code.
        compiled = min(sum(k.name in self._defined or k.name == "kernel" for k in built), self._loaded)
        return Kernels(
            calls=calls,
            distinct=self._loaded,
            deduplicated=None if calls is None else calls - len(self._called),
            compiled=compiled,
            reused=self._loaded - compiled,
            built=tuple(built),
        )

    def _tell(self, event: Any) -> None:
        with self._lock:
            if event.kind == "B":
                self._begin(event)
            elif event.kind == "E":
                self._end(event)
            else:
                self._instant(event.name, event.args)

    def _begin(self, event: Any) -> None:
        stack = self._stacks.setdefault(event.thread, [])
        around = stack[-1] if stack else None
        phase = phase_of(event.name) or (around.phase if around else OTHER)
        node = None
        if event.thread == self._main:
            parent = around.node if around else self.root
            assert parent is not None
            node = parent.child(event.name, phase)
        name = event.name if event.name != "quark.build" else f"g++ {self._of_source(event.args['source'])}"
        lane = 0 if event.thread == self._main else 1 + [t for t in self._stacks if t != self._main].index(event.thread)
        start = (event.ns - self._start) / 1e9
        span = Span(name, phase, start, start, lane, len(stack))
        self.spans.append(span)
        stack.append(_Open(event.name, phase, event.ns, node, span))

    def _end(self, event: Any) -> None:
        stack = self._stacks.get(event.thread, [])
        if not any(one.name == event.name for one in stack):
            return  # it began before the recording
        # What an exception left open ends with what is around it.
        while stack:
            ended = stack.pop()
            ns = event.ns - ended.ns
            ended.span.end_s = (event.ns - self._start) / 1e9
            if ended.node is not None:
                ended.node.s += ns / 1e9
                ended.node.self_s += (ns - ended.children_ns) / 1e9
                ended.node.count += 1
            if stack:
                stack[-1].children_ns += ns
            if ended.name == "quark.build":
                self._built.append((ended.span.name.removeprefix("g++ "), "g++", ns / 1e9))
            if ended.name == event.name:
                break

    def _instant(self, name: str, args: Mapping[str, Any]) -> None:
        prefix, _, state = name.rpartition("_")
        if prefix in _CACHES:
            self._caches[_CACHES[prefix], state] += 1
            if reason := args.get("cache_bypass_reason"):
                self._reasons.setdefault(_CACHES[prefix], {})[str(reason)] = None
        elif name == "quark.kernel_defined":
            self._defined[args["name"]] = _kernel_text(args["source"])
        elif name == "quark.kernel_called":
            self._called[args["name"]] += 1
        elif name == "quark.kernel_loaded":
            self._loaded += 1
        elif name == "quark.kernel_built":
            self._built.append((args["name"], "triton", args["info"].get("compile_time_us", 0) / 1e6))

    def _of_source(self, path: str) -> str:
        """The kernel that a file is the source of, or else what is in it."""
        try:
            text = Path(path).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return Path(path).name or "a header"
        for name, source in self._defined.items():
            if source and source in text:
                return name
        functions = re.findall(r'extern "C"[^;{(]*?(\w+)\s*\(', text)
        return functions[-1] if functions else Path(path).name


def _kernel_text(definition: str) -> str:
    """The C++ source in the Python code that defines a kernel."""
    return definition.partition("r'''")[2].rpartition("''')")[0].strip()
