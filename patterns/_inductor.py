"""Every private Inductor name the passes and the backend use, and what differs between torch 2.11 and 2.13."""

import contextlib
import inspect
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch._dynamo import utils as dynamo_utils
from torch._dynamo.utils import counters, dynamo_timed, get_chromium_event_logger
from torch._functorch import config as functorch_config
from torch._functorch._aot_autograd.autograd_cache import AOTAutogradCache
from torch._guards import detect_fake_mode
from torch._inductor import async_compile, config, cpp_builder, custom_graph_pass, list_mode_options
from torch._inductor.codecache import FxGraphCache
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.compile_fx import compile_fx
from torch._inductor.cpu_vec_isa import VecISA
from torch._inductor.cudagraph_trees import reset_cudagraph_trees
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.fx_passes.post_grad import remove_noop_ops
from torch._inductor.pattern_matcher import (
    MULTIPLE,
    CallFunction,
    FailedMatch,
    Ignored,
    KeywordArg,
    Match,
    MatchContext,
    PatternExpr,
    _TargetExpr,
    fwd_only,
    fx_to_pattern,
)
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch._inductor.utils import clear_caches, fresh_cache
from torch._logging import trace_structured
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import statically_known_true

from quark_inductor.patterns.cse import cse
from quark_inductor.schemes.ops import NAMESPACE

__all__ = [
    "CallFunction",
    "CompileEvent",
    "CustomGraphPass",
    "Ignored",
    "KeywordArg",
    "Match",
    "PatternExpr",
    "Sizes",
    "atomic_builds",
    "attempt",
    "clear_caches",
    "compile_events",
    "compile_fx",
    "compiled_frames",
    "config",
    "counters",
    "default_cache_dir",
    "detect_fake_mode",
    "dynamo_timed",
    "fresh_cache",
    "fwd_only",
    "graphs_not_cached",
    "list_mode_options",
    "pass_list",
    "remove_noop_ops",
    "reset_cudagraph_trees",
    "statically_known_true",
    "trace_structured",
    "traced_pattern",
    "unset_fake_temporarily",
]


# Arguments that are sizes: a pattern takes any, its rule checks what matters by the shapes of what it matched.
_SIZES: dict[Any, int] = {
    torch.ops.aten.view.default: 1,
    torch.ops.aten.reshape.default: 1,
    torch.ops.aten.expand.default: 1,
    torch.ops.aten.full.default: 0,
    torch.ops.aten.slice.Tensor: 3,
}


def traced_pattern(search: Callable[..., Any], example: Mapping[str, torch.Tensor]) -> tuple[CallFunction, torch.dtype]:
    """The pattern of a function, as this torch's Inductor decomposes it, and the dtype of what it computes.

    It is exact on constants and dtypes, but for sizes of views, and for devices. A constant argument of an op of this
    package is not compared but captured, under the argument's name: one pattern serves every format.

    ``register_replacement`` would turn ints, floats and dtypes into wildcards, and refuse intermediates with several
    users: here every intermediate may have any number of users.

    Args:
        search: what to trace, called with keyword arguments.
        example: its arguments. Their names are those of the matched nodes; their sizes do not matter.
    """
    names = list(example)

    def positional(*tensors: torch.Tensor) -> Any:
        return search(**dict(zip(names, tensors, strict=True)))

    gm = fwd_only(positional, list(example.values()))
    cse(gm.graph)  # as the graph it is looked for in: what is written twice there is one node
    (result,) = gm.graph.output_node().all_input_nodes
    return _relaxed(fx_to_pattern(gm, ignore_types=(), argnames=names), {}), result.meta["val"].dtype


class Sizes(Ignored):  # type: ignore[misc]
    """So many sizes, whichever. As a list in a pattern they would have the matcher flatten all arguments, slowly."""

    def __init__(self, count: int) -> None:
        self.count = count

    def _match(self, node: Any, ctx: MatchContext) -> Any:
        if isinstance(node, list | tuple) and len(node) == self.count:
            return Match(ctx, self)
        return FailedMatch("args_structure {} {}", node, self.count)


def _relaxed(pattern: Any, known: dict[int, Any]) -> Any:
    if isinstance(pattern, list | tuple):
        return type(pattern)(_relaxed(p, known) for p in pattern)
    if isinstance(pattern, torch.device):
        return Ignored()
    if not isinstance(pattern, CallFunction):
        return pattern
    if id(pattern) not in known:
        (target, *_), args = pattern.fns, list(pattern.args)
        if (i := _SIZES.get(target)) is not None and i < len(args):
            args[i] = Sizes(len(args[i])) if isinstance(args[i], list | tuple) else Ignored()
        if isinstance(target, torch._ops.OpOverload) and target.namespace == NAMESPACE:
            for i, argument in enumerate(target._schema.arguments[: len(args)]):
                args[i] = args[i] if isinstance(args[i], PatternExpr) else KeywordArg(argument.name)
        kwargs = {name: _relaxed(value, known) for name, value in pattern.kwargs.items()}
        known[id(pattern)] = CallFunction(pattern.fns, *_relaxed(args, known), _users=MULTIPLE, **kwargs)
    return known[id(pattern)]


def attempt(pattern: PatternExpr, node: torch.fx.Node) -> Match | tuple[tuple[int, int], FailedMatch]:
    """A match, or how near it is and where it fails.

    Near is how many calls of the pattern were found where they should be, then how many with all their arguments.
    """
    context = MatchContext([pattern], graph=node.graph)
    try:
        result = context.match(pattern, node)
    except FailedMatch as e:
        result = e
    if isinstance(result, Match):
        return result
    begun = [n for p, n in context.pattern_to_node.items() if isinstance(p, _TargetExpr)]
    missed = result.format_string.startswith("function_mismatch")
    return (len(begun) - missed, sum(n is not None for n in begun)), result


@contextlib.contextmanager
def graphs_not_cached() -> Iterator[None]:
    """Inside, no graph comes from a cache: every pass runs."""
    with config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False):
        yield


@contextlib.contextmanager
def atomic_builds() -> Iterator[None]:
    """Inside, a library is in the cache all at once, when it is complete.

    Inductor (torch 2.11 to 2.13) has the compiler write it where every later process looks for it, and none builds
    again what it finds: a process that is killed while it links leaves a file that cannot be loaded, for ever.
    """
    build = cpp_builder.run_compile_cmd

    def run_compile_cmd(cmd_line: str, cwd: str) -> None:
        output = re.search(r"(?<= -o )\S+\.so(?=\s|$)", cmd_line)
        if output is None:
            build(cmd_line, cwd)
            return
        partial = f"{output[0]}.{os.getpid()}.{threading.get_ident()}.tmp"
        build(cmd_line[: output.start()] + partial + cmd_line[output.end() :], cwd)
        os.replace(Path(cwd, partial), Path(cwd, output[0]))

    with patch.object(cpp_builder, "run_compile_cmd", run_compile_cmd):
        yield


@dataclass(frozen=True, slots=True)
class CompileEvent:
    """Something that happened while compiling, as torch's chromium trace has it.

    Attributes:
        kind: ``"B"``, something begins; ``"E"``, it ends; ``"i"``, it has no duration.
        name: what.
        ns: nanoseconds since the epoch.
        thread: which thread it is in, as :func:`threading.get_ident` says.
        args: all else that is known.
    """

    kind: str
    name: str
    ns: int
    thread: int
    args: Mapping[str, Any]


# What torch times no more exactly than with all around it: looks into caches, and what vector instructions g++ can do.
_UNTIMED: tuple[tuple[Any, str, str], ...] = (
    (AOTAutogradCache, "try_load", "quark.cache.aot_autograd_look_up"),
    (AOTAutogradCache, "save", "quark.cache.aot_autograd_save"),
    (FxGraphCache, "prepare_key", "quark.cache.fx_graph_key"),
    (FxGraphCache, "load_with_key", "quark.cache.fx_graph_look_up"),
    (FxGraphCache, "_save_graph", "quark.cache.fx_graph_save"),
    (VecISA, "check_build", "quark.instruction_set_check"),
)


@contextlib.contextmanager
def compile_events(tell: Callable[[CompileEvent], None]) -> Iterator[None]:
    """Inside, ``tell`` is called for each event of torch's chromium trace, in the thread in which it happens.

    The trace has these more meanwhile: looks into caches; checks of the compiler; ``quark.build``, a compiler that
    runs, of a ``source``; and as instants ``quark.kernel_defined`` (a kernel's ``name`` and ``source``),
    ``quark.kernel_called`` (a call in generated code, by ``name``), ``quark.kernel_loaded`` (a kernel that code needs,
    from a cache or not), ``quark.kernel_queued`` (one that is to be built) and ``quark.kernel_built`` (by Triton: its
    ``name``, and ``info`` with ``compile_time_us``).
    """
    logger = get_chromium_event_logger()
    log_timed, log_instant = logger._log_timed_event, logger.log_instant_event

    def timed(name: str, ns: int, kind: str, metadata: Any = None) -> Any:
        tell(CompileEvent(kind, name, ns, threading.get_ident(), dict(metadata or {})))
        return log_timed(name, ns, kind, metadata)

    def instant(name: str, ns: int, metadata: Any = None, *args: Any, **kwargs: Any) -> None:
        tell(CompileEvent("i", name, ns, threading.get_ident(), dict(metadata or {})))
        log_instant(name, ns, metadata, *args, **kwargs)

    def in_event(function: Callable[..., Any], name: str) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            with dynamo_timed(name):
                return function(*args, **kwargs)

        return run

    def told(owner: Any, function_name: str, event: str, /, **places: int) -> Any:
        function = getattr(owner, function_name)

        def run(*args: Any, **kwargs: Any) -> Any:
            named = {key: args[place] for key, place in places.items()}
            tell(CompileEvent("i", event, time.time_ns(), threading.get_ident(), named))
            return function(*args, **kwargs)

        plain = not inspect.ismethod(function)  # else it is bound to its class already
        return patch.object(owner, function_name, run if plain else staticmethod(run))

    build = cpp_builder.run_compile_cmd

    def run_compile_cmd(cmd_line: str, cwd: str) -> None:
        sources = re.findall(r"\S+\.(?:cpp|cu|i|s)(?=\s|$)", cmd_line)
        with dynamo_timed("quark.build", metadata={"source": str(Path(cwd, sources[0])) if sources else ""}):
            build(cmd_line, cwd)

    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(logger, "_log_timed_event", timed))
        stack.enter_context(patch.object(logger, "log_instant_event", instant))
        stack.enter_context(patch.object(cpp_builder, "run_compile_cmd", run_compile_cmd))
        for owner, method, name in _UNTIMED:
            timed_method = in_event(getattr(owner, method), name)
            static = isinstance(vars(owner)[method], staticmethod)
            stack.enter_context(patch.object(owner, method, staticmethod(timed_method) if static else timed_method))
        wrapper, loader = PythonWrapperCodegen, async_compile.AsyncCompile
        stack.enter_context(told(wrapper, "define_kernel", "quark.kernel_defined", name=1, source=2))
        stack.enter_context(told(wrapper, "generate_kernel_call", "quark.kernel_called", name=1))
        stack.enter_context(told(loader, "cpp_pybinding", "quark.kernel_loaded"))
        stack.enter_context(told(loader, "triton", "quark.kernel_loaded"))
        stack.enter_context(told(loader, "triton", "quark.kernel_queued"))
        stack.enter_context(told(loader, "submit", "quark.kernel_queued"))
        stack.enter_context(told(async_compile, "_add_triton_kernel_info", "quark.kernel_built", name=0, info=1))
        yield


@contextlib.contextmanager
def compiled_frames() -> Iterator[Callable[[], list[Any]]]:
    """Inside, what is given tells what Dynamo has compiled since: a ``CompilationMetrics`` for each frame."""
    kept = dynamo_utils._compilation_metrics.maxlen or dynamo_utils.DEFAULT_COMPILATION_METRICS_LIMIT
    before = dynamo_utils.get_compilation_metrics()
    known = {id(metrics) for metrics in before}
    dynamo_utils.set_compilation_metrics_limit(100_000)  # by default it forgets all but the last 64
    try:
        yield lambda: [metrics for metrics in dynamo_utils.get_compilation_metrics() if id(metrics) not in known]
    finally:
        dynamo_utils.set_compilation_metrics_limit(kept)


def pass_list(passes: list[Any]) -> Any:
    """A list of custom graph passes as Inductor takes it: torch 2.11 knows only a single pass."""
    if hasattr(custom_graph_pass, "get_custom_graph_passes") or len(passes) == 1:
        return passes if len(passes) > 1 else passes[0]
    return _Chain(passes)


class _Chain(CustomGraphPass):  # type: ignore[misc]
    def __init__(self, passes: list[Any]) -> None:
        self.passes = passes

    def __call__(self, graph: torch.fx.Graph) -> None:
        for p in self.passes:
            p(graph)

    def uuid(self) -> Any | None:
        ids = [p.uuid() if isinstance(p, CustomGraphPass) else None for p in self.passes]
        return None if None in ids else tuple(ids)
