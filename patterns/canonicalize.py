"""Bring a graph into the form the rules are written for. Keeps its meaning; safe on any graph."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from quark_inductor.patterns._inductor import statically_known_true
from quark_inductor.patterns.base import GEMMS, VIEWS, is_byte, same_shape, value

aten, prims = torch.ops.aten, torch.ops.prims

# Row by row: a reshape that keeps the last dimension may move from the result to the operands.
_ROW_PRESERVING = frozenset(
    {
        prims.convert_element_type.default,
        aten.abs.default,
        aten.add.Tensor,
        aten.clamp_max.default,
        aten.clamp_min.default,
        aten.div.Tensor,
        aten.eq.Scalar,
        aten.maximum.default,
        aten.mul.Tensor,
        aten.neg.default,
        aten.reciprocal.default,
        aten.round.default,
        aten.sub.Tensor,
        torch.ops.quark_inductor.block_dequantize.default,
    }
)
_REDUCTIONS = frozenset({aten.amax.default, aten.amin.default})
_BY_ROWS = _ROW_PRESERVING | _REDUCTIONS | {aten.squeeze.dim, aten.unsqueeze.default}
# What makes a shape that it is told, and where it is told.
_SIZES: Mapping[Any, int] = {aten.full.default: 0, aten.reshape.default: 1, aten.view.default: 1}


def hoist_views(graph: Graph) -> int:
    """``reshape(f(a, b))`` before a GEMM becomes ``f(reshape(a), reshape(b))``; returns how many views moved.

    A 3-D ``F.linear`` flattens between the dequantize and the GEMM, where no pattern expects a view. The view moves up
    to what was quantized.
    """
    moved = 0
    work: list[Any] = []
    for target, (x, weight, _) in GEMMS.items():
        for node in graph.find_nodes(op="call_function", target=target):
            work += [node.args[i] for i in (x, weight) if _is_dequantized(node.args[i])]
    while work:
        view = work.pop()
        if isinstance(view, Node) and (hoisted := _hoist(graph, view)) is not None:
            moved += 1
            work += hoisted.all_input_nodes
    return moved


def hoist_selects(graph: Graph) -> int:
    """``f(a, b)[i]`` of something dequantized becomes ``f(a[i], b[i])``; returns how many moved.

    A loop over experts takes one's weight out of those of all: what is dequantized is then that one.
    """
    moved = 0
    work = [n for n in graph.find_nodes(op="call_function", target=aten.select.int) if _is_dequantized(n.args[0])]
    while work:
        select = work.pop()
        source = select.args[0]
        tensors = [n for n in source.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor) and value(n).ndim]
        ndim = value(source).ndim
        alike = all(value(t).ndim == ndim and same_shape(value(t).shape[:1], value(source).shape[:1]) for t in tensors)
        if source.target not in _ROW_PRESERVING or select.args[1] != 0 or ndim < 2 or not alike:
            continue
        with graph.inserting_before(select):
            copies = {t: graph.call_function(aten.select.int, (t, *select.args[1:])) for t in tensors}
            for t, copy in copies.items():
                copy.meta = {**t.meta, "val": value(t)[0]}
            args = [copies.get(a, a) if isinstance(a, Node) else a for a in source.args]
            new = graph.call_function(source.target, tuple(args), source.kwargs)
        new.meta = {**source.meta, "val": value(select)}
        select.replace_all_uses_with(new)
        graph.erase_node(select)
        work += copies.values()
        moved += 1
    return moved


def _is_dequantized(node: Any) -> bool:
    """Whether a view is of something computed row by row from codes."""
    todo, seen = [node], set[Any]()
    while todo:
        node = todo.pop()
        if not isinstance(node, Node) or node in seen or not (node.target in VIEWS or node.target in _ROW_PRESERVING):
            continue
        seen.add(node)
        if any(is_byte(source) for source in node.all_input_nodes):
            return True
        todo += node.all_input_nodes
    return False


def _common(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many trailing dimensions two shapes have in common; one of each at least is not."""
    count = 0
    while (
        count < min(len(a), len(b)) - 1
        and isinstance(a[-1 - count], int)
        and statically_known_true(a[-1 - count] == b[-1 - count])
    ):
        count += 1
    return count


def _hoist(graph: Graph, view: Node) -> Node | None:
    """``reshape(f(a))`` as ``f(reshape(a))``, if the view keeps trailing dimensions and ``f`` works row by row."""
    if view._erased or view.target not in VIEWS:
        return None
    source = view.args[0]
    assert isinstance(source, Node)
    if source.op != "call_function" or not isinstance(source.meta.get("val"), torch.Tensor):
        return None
    before, after = value(source).shape, value(view).shape
    kept = _common(before, after)
    leading, rows = before[: len(before) - kept], after[: len(after) - kept]
    sizes = view.args[1]
    assert isinstance(sizes, list | tuple)
    if not kept or not _works_by_rows(source, leading, before[-kept:]) or _of_one_group(source, leading, rows):
        return None

    def shaped(val: torch.Tensor) -> tuple[list[Any], list[Any]]:
        """The shape with the new leading dimensions: of the fake tensor, and as arguments in the graph."""
        tail = list(val.shape[len(leading) :])
        return [*rows, *tail], [*sizes[: len(rows)], *tail]

    def reshaped(arg: Any) -> Any:
        if not isinstance(arg, Node) or not isinstance(arg.meta.get("val"), torch.Tensor) or not value(arg).ndim:
            return arg
        wanted, arguments = shaped(value(arg))
        flat = graph.call_function(aten.reshape.default, (arg, arguments))
        flat.meta = {**arg.meta, "val": value(arg).reshape(wanted)}
        return flat

    with graph.inserting_before(view):
        args = [reshaped(a) for a in source.args]
        if (place := _SIZES.get(source.target)) is not None:
            args[place] = shaped(value(source))[1]
        assert callable(source.target)
        new = graph.call_function(source.target, tuple(args), source.kwargs)
    new.meta = {**source.meta, "val": value(view)}
    view.replace_all_uses_with(new)
    graph.erase_node(view)
    if not source.users:
        graph.erase_node(source)
    return new


def _works_by_rows(source: Node, leading: Sequence[Any], tail: Sequence[Any]) -> bool:
    """Whether a call computes ``[*leading, *tail]`` row by row, from tensors ``[*leading, ...]``."""
    target, tensors = source.target, [n for n in source.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    if target in _ROW_PRESERVING:
        own = target is torch.ops.quark_inductor.block_dequantize.default

        def fits(arg: Node) -> bool:
            width = value(arg).shape[len(leading) :]
            return own or all(
                any(statically_known_true(w == size) for size in (t, 1)) for w, t in zip(width, tail, strict=True)
            )

        if not all(len(value(t).shape) in (0, len(leading) + len(tail)) for t in tensors):
            return False
        tensors = [t for t in tensors if value(t).ndim]
        if not all(map(fits, tensors)):
            return False
    elif target in _REDUCTIONS:
        if source.args[1:] not in (([-1],), ([-1], True)):
            return False
    elif target in (aten.squeeze.dim, aten.unsqueeze.default):
        if source.args[1] != -1:
            return False
    elif target not in _SIZES:
        return False
    return all(same_shape(value(t).shape[: len(leading)], leading) and value(t).ndim > len(leading) for t in tensors)


def _of_one_group(source: Node, leading: Sequence[Any], rows: Sequence[Any]) -> bool:
    """Whether what was ``[*rows, K]`` became ``[*rows, 1, K]``: one group, as what quantizes by groups expects it."""
    if not same_shape(leading, [*rows, 1]):
        return False
    todo, seen = [source], set[Node]()
    while todo:
        node = todo.pop()
        if node in seen or not (node.target in VIEWS or node.target in _BY_ROWS):
            continue
        seen.add(node)
        if node.target in VIEWS and same_shape(value(node.all_input_nodes[0]).shape[:-1], rows):
            return True
        todo += node.all_input_nodes
    return False
