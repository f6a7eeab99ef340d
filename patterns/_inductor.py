"""Every private Inductor name the passes and the backend use, and what differs between torch 2.11 and 2.13."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch._dynamo.utils import counters, dynamo_timed
from torch._functorch import config as functorch_config
from torch._inductor import config, custom_graph_pass, list_mode_options
from torch._inductor.compile_fx import compile_fx
from torch._inductor.cudagraph_trees import reset_cudagraph_trees
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.fx_passes.post_grad import remove_noop_ops
from torch._inductor.pattern_matcher import (
    MULTIPLE,
    CallFunctionVarArgs,
    FailedMatch,
    Match,
    MatchContext,
    PatternExpr,
    PatternMatcherPass,
    _TargetExpr,
    fwd_only,
    fx_to_pattern,
    register_graph_pattern,
)
from torch._logging import trace_structured
from torch.fx.experimental.symbolic_shapes import statically_known_true

__all__ = [
    "CallFunctionVarArgs",
    "CustomGraphPass",
    "Match",
    "PatternExpr",
    "PatternMatcherPass",
    "attempt",
    "compile_fx",
    "config",
    "counters",
    "dynamo_timed",
    "graphs_not_cached",
    "list_mode_options",
    "pass_list",
    "register_graph_pattern",
    "remove_noop_ops",
    "reset_cudagraph_trees",
    "statically_known_true",
    "trace_structured",
    "traced_pattern",
]


def traced_pattern(search: Callable[..., Any], example: Mapping[str, torch.Tensor]) -> PatternExpr:
    """The pattern of a function, as this torch's Inductor decomposes it: exact on constants and dtypes.

    ``register_replacement`` would turn ints, floats and dtypes into wildcards, and refuse intermediates with several
    users: here every intermediate may have any number of users.

    Args:
        search: what to trace, called with keyword arguments.
        example: its arguments. Their names are those of the matched nodes; their sizes must not matter.
    """
    names = list(example)

    def positional(*tensors: torch.Tensor) -> Any:
        return search(**dict(zip(names, tensors, strict=True)))

    pattern = fx_to_pattern(fwd_only(positional, list(example.values())), ignore_types=(), argnames=names)
    todo, seen = [pattern], set()
    while todo:
        expr = todo.pop()
        if id(expr) in seen:
            continue
        seen.add(id(expr))
        if isinstance(expr, _TargetExpr):
            expr.users = MULTIPLE
        todo += [a for a in getattr(expr, "flat_args_kwargs", ((),))[0] if isinstance(a, PatternExpr)]
    return pattern


def attempt(pattern: PatternExpr, node: torch.fx.Node) -> tuple[int, FailedMatch]:
    """How many calls of a pattern that does not match a node are there, and where it fails."""
    context = MatchContext([pattern], graph=node.graph)
    try:
        result = context.match(pattern, node)
    except FailedMatch as e:
        result = e
    assert isinstance(result, FailedMatch), "a pattern that matches has a rule that refuses"
    found = [p for p, n in context.pattern_to_node.items() if n is not None and isinstance(p, _TargetExpr)]
    return len(found), result


@contextlib.contextmanager
def graphs_not_cached() -> Iterator[None]:
    """Inside, no graph comes from a cache: every pass runs."""
    with config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False):
        yield


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
