"""Bring a graph into the form the rules are written for. Keeps its meaning; safe on any graph."""

import math
import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from quark_inductor.patterns.base import value

aten, prims = torch.ops.aten, torch.ops.prims

# f(a, scalar): a reshape that keeps the last dimension may move from the result to the operands.
_ROW_PRESERVING = {prims.convert_element_type.default, aten.mul.Tensor, aten.div.Tensor}


def _frozen(arg: Any) -> Any:
    if isinstance(arg, list | tuple):
        return tuple(_frozen(a) for a in arg)
    if isinstance(arg, dict):
        return tuple((k, _frozen(v)) for k, v in sorted(arg.items()))
    # 1, 1.0 and True are equal keys, but not equal arguments; nor are 0.0 and -0.0.
    return type(arg), arg, math.copysign(1.0, arg) if isinstance(arg, float) else 0


def _is_pure(node: Node) -> bool:
    if node.op != "call_function" or node.is_impure():
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        unstable = torch.Tag.nondeterministic_seeded in node.target.tags or node.target is aten.empty.memory_format
        return not node.target._schema.is_mutable and not unstable
    return node.target is operator.getitem


def _memory_of_outputs(graph: Graph) -> set[Node]:
    found: set[Node] = set()
    todo = list(graph.output_node().all_input_nodes)
    while todo:
        node = todo.pop()
        if node in found:
            continue
        found.add(node)
        if isinstance(node.target, torch._ops.OpOverload) and any(r.alias_info for r in node.target._schema.returns):
            todo += node.all_input_nodes  # a view of them
        elif node.target in (operator.getitem, aten.reshape.default):
            todo += node.all_input_nodes  # may be one
    return found


def cse(graph: Graph) -> int:
    """Common subexpression elimination, in place; returns how many nodes went.

    AOTAutograd does none for inference, so q, k and v would each quantize their common input. What two outputs of the
    graph are, or are views of, is never merged: the caller may write into one of them.
    """
    seen: dict[Any, Node] = {}
    outputs = _memory_of_outputs(graph)
    removed = 0
    for node in list(graph.nodes):
        if node in outputs or not _is_pure(node):
            continue
        try:
            first = seen.setdefault((node.target, _frozen(node.args), _frozen(node.kwargs)), node)
        except TypeError:  # an argument that has no hash (a symbolic size)
            continue
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
            removed += 1
    return removed


def hoist_views(graph: Graph) -> int:
    """``reshape(f(a, scalar))`` before a GEMM becomes ``f(reshape(a), scalar)``; returns how many views moved.

    A 3-D ``F.linear`` flattens between the dequantize and the GEMM, where no pattern expects a view.
    """
    moved = 0
    work = [n.args[0] for n in graph.find_nodes(op="call_function", target=aten.mm.default)]
    work += [n.args[1] for n in graph.find_nodes(op="call_function", target=aten.addmm.default)]
    while work:
        view = work.pop()
        if isinstance(view, Node) and (hoisted := _hoist(graph, view)) is not None:
            moved += 1
            work += hoisted.all_input_nodes
    return moved


def _hoist(graph: Graph, view: Node) -> Node | None:
    if view._erased or view.target not in (aten.reshape.default, aten.view.default):
        return None
    source = view.args[0]
    assert isinstance(source, Node)
    last = value(view).shape[-1]
    dequantize = source.target is torch.ops.quark_inductor.block_dequantize.default
    if source.op != "call_function" or not (dequantize or source.target in _ROW_PRESERVING):
        return None
    before = value(source)
    if not before.ndim or not isinstance(last, int) or before.shape[-1] != last:
        return None
    rows = value(view).shape[:-1]

    def movable(arg: Any) -> bool:
        if not isinstance(arg, Node) or not isinstance(arg.meta.get("val"), torch.Tensor) or value(arg).ndim == 0:
            return True
        return value(arg).shape[:-1] == before.shape[:-1] and (dequantize or value(arg).shape[-1] in (last, 1))

    if not all(movable(a) for a in source.args):
        return None
    shape = view.args[1]
    assert isinstance(shape, list | tuple)
    with graph.inserting_before(view):
        args: list[Any] = []
        for arg in source.args:
            if isinstance(arg, Node) and isinstance(arg.meta.get("val"), torch.Tensor) and value(arg).ndim:
                width = value(arg).shape[-1]
                flat = graph.call_function(aten.reshape.default, (arg, [*shape[:-1], width]))
                flat.meta = {**arg.meta, "val": value(arg).reshape([*rows, width])}
                args.append(flat)
            else:
                args.append(arg)
        assert callable(source.target)
        new = graph.call_function(source.target, tuple(args), source.kwargs)
    new.meta = {**source.meta, "val": value(view)}
    view.replace_all_uses_with(new)
    graph.erase_node(view)
    if not source.users:
        graph.erase_node(source)
    return new
