"""Bring a graph into the form the rules are written for. Keeps its meaning; safe on any graph."""

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


def _hoist(graph: Graph, view: Node) -> Node | None:
    if view._erased or view.target not in VIEWS or not value(view).ndim:
        return None
    source = view.args[0]
    assert isinstance(source, Node)
    last, rows = value(view).shape[-1], value(view).shape[:-1]
    reduction = source.target in _REDUCTIONS and source.args[1:] == ([-1], True)
    if source.op != "call_function" or not (reduction or source.target in _ROW_PRESERVING):
        return None
    before = value(source)
    if not before.ndim or not isinstance(last, int) or not statically_known_true(before.shape[-1] == last):
        return None
    own = source.target is torch.ops.quark_inductor.block_dequantize.default

    def movable(arg: Any) -> bool:
        if not isinstance(arg, Node) or not isinstance(arg.meta.get("val"), torch.Tensor) or value(arg).ndim == 0:
            return True
        # A view there and back is one of groups, of which there is one: what quantizes by groups expects it.
        back = arg.args[0] if arg.target in VIEWS else None
        if isinstance(back, Node) and same_shape(value(back).shape, [*rows, value(arg).shape[-1]]):
            return False
        same_rows = same_shape(value(arg).shape[:-1], before.shape[:-1])
        width = value(arg).shape[-1]
        return same_rows and (own or reduction or any(statically_known_true(width == w) for w in (last, 1)))

    if not all(movable(a) for a in source.args):
        return None
    shape = view.args[1]
    assert isinstance(shape, list | tuple)

    def reshaped(arg: Any) -> Any:
        if not isinstance(arg, Node) or not isinstance(arg.meta.get("val"), torch.Tensor) or not value(arg).ndim:
            return arg
        wanted = [*rows, value(arg).shape[-1]]
        flat = graph.call_function(aten.reshape.default, (arg, [*shape[:-1], wanted[-1]]))
        flat.meta = {**arg.meta, "val": value(arg).reshape(wanted)}
        return flat

    with graph.inserting_before(view):
        assert callable(source.target)
        new = graph.call_function(source.target, tuple(reshaped(a) for a in source.args), source.kwargs)
    new.meta = {**source.meta, "val": value(view)}
    view.replace_all_uses_with(new)
    graph.erase_node(view)
    if not source.users:
        graph.erase_node(source)
    return new
