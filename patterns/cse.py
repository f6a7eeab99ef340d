"""Common subexpression elimination, in place: the one that keeps what a caller may write into apart."""

import math
import operator
from typing import Any

import torch
from torch.fx import Graph, Node

aten = torch.ops.aten


def _frozen(arg: Any) -> Any:
    if isinstance(arg, Node):
        return arg
    if isinstance(arg, list | tuple):
        return tuple(_frozen(a) for a in arg)
    if isinstance(arg, dict):
        return tuple((k, _frozen(v)) for k, v in sorted(arg.items()))
    # 1, 1.0 and True are equal keys, but not equal arguments; nor are 0.0 and -0.0.
    return type(arg), arg, math.copysign(1.0, arg) if isinstance(arg, float) else 0


def _is_pure(node: Node) -> bool:
    """Whether what a node calls gives the same for the same arguments; that depends on what it calls alone."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.target is operator.getitem
    unstable = torch.Tag.nondeterministic_seeded in node.target.tags or node.target is aten.empty.memory_format
    return not node.is_impure() and not node.target._schema.is_mutable and not unstable


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
    pure: dict[Any, bool] = {}
    outputs = _memory_of_outputs(graph)
    removed = 0
    for node in list(graph.nodes):
        if node.target not in pure:
            pure[node.target] = _is_pure(node)
        if not pure[node.target] or node in outputs:
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
