"""Matches a pattern in a tenth of the time that Inductor's own matcher takes, which explains what does not match.

A model has hundreds of Linears, each is tried by dozens of patterns, and all but one fail. Inductor's matcher
(:func:`quark_inductor.patterns._inductor.attempt`) is the reference: what matches here matches there.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from quark_inductor.patterns._inductor import CallFunction, Ignored, KeywordArg, Match, PatternExpr, Sizes, attempt


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a pattern: where it is, and what must be there. Calls and arguments are given by their index.

    Attributes:
        parent: the call it is an argument of.
        place: which argument it is.
        target: what is called.
        args: number of positional arguments.
        constants: arguments that have a known value.
        lengths: arguments that are a list of anything, and how long it is.
        names: arguments that are captured, and under which name.
        kwargs: named arguments that have a known value.
    """

    parent: int
    place: int
    target: Any
    args: int
    constants: tuple[tuple[int, Any], ...]
    lengths: tuple[tuple[int, int], ...]
    names: tuple[tuple[int, str], ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Calls:
    """A pattern.

    Attributes:
        calls: outermost first.
        repeated: arguments that are a call of the list, by the call they belong to.
    """

    calls: tuple[Call, ...]
    repeated: tuple[tuple[int, int, int], ...]


def calls_of(pattern: CallFunction) -> Calls | CallFunction:
    """The calls of a pattern that :func:`quark_inductor.patterns._inductor.traced_pattern` made.

    It is returned as it is if it has a list of tensors or a named one: Inductor's matcher knows those.
    """
    calls: list[Call] = []
    repeated: list[tuple[int, int, int]] = []
    index: dict[int, int] = {}
    waiting: list[tuple[int, int, Any]] = [(0, 0, pattern)]
    for parent, place, expr in waiting:
        if id(expr) in index:
            repeated.append((parent, place, index[id(expr)]))
            continue
        index[id(expr)] = len(calls)
        if any(isinstance(part, PatternExpr) for part in _in_lists(expr)):
            return pattern
        args = list(enumerate(expr.args))
        waiting += [(len(calls), i, a) for i, a in args if isinstance(a, CallFunction)]
        calls.append(
            Call(
                parent,
                place,
                expr.fns[0],
                len(args),
                tuple((i, a) for i, a in args if not isinstance(a, PatternExpr)),
                tuple((i, a.count) for i, a in args if isinstance(a, Sizes)),
                tuple((i, a.name) for i, a in args if isinstance(a, KeywordArg)),
                {name: a for name, a in expr.kwargs.items() if not isinstance(a, Ignored)},
            )
        )
    return Calls(tuple(calls), tuple(repeated))


def _in_lists(expr: CallFunction) -> Iterator[Any]:
    """What is in lists and under names among a call's arguments, but for what may be anything."""
    for argument in expr.args:
        if isinstance(argument, list | tuple):
            yield from argument
    for argument in expr.kwargs.values():
        for part in argument if isinstance(argument, list | tuple) else [argument]:
            if not isinstance(part, Ignored):
                yield part


def match(pattern: Calls | CallFunction, end: Node) -> tuple[dict[str, Any], tuple[Node, ...]] | None:
    """What a pattern captured and the nodes of its calls, if the graph that ends in a node is one; else ``None``."""
    if isinstance(pattern, CallFunction):
        found = attempt(pattern, end)
        return (dict(found.kwargs), tuple(found.nodes)) if isinstance(found, Match) else None
    nodes: list[Node] = []
    named: dict[str, Any] = {}
    for call in pattern.calls:
        node = nodes[call.parent].args[call.place] if nodes else end
        if not isinstance(node, Node) or node.target is not call.target or len(node.args) != call.args:
            return None
        for i, constant in call.constants:
            if isinstance(node.args[i], Node) or node.args[i] != constant:
                return None
        for name, constant in call.kwargs.items():
            if node.kwargs.get(name) != constant:
                return None
        for i, length in call.lengths:
            sizes = node.args[i]
            if not isinstance(sizes, list | tuple) or len(sizes) != length:
                return None
        for i, name in call.names:
            if named.setdefault(name, node.args[i]) != node.args[i]:
                return None
        nodes.append(node)
    if any(nodes[call].args[place] is not nodes[same] for call, place, same in pattern.repeated):
        return None
    return named, tuple(nodes)
