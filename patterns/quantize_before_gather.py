"""Rows that are gathered and then quantized, as codes that are gathered: a row that is taken often is quantized once.

Experts get a token's row once for each expert that it is routed to. Where the GEMM quantizes in its own prologue,
nothing is left to move.
"""

import operator

import torch
from torch.fx import Graph, Node

from quark_inductor.patterns._inductor import statically_known_true
from quark_inductor.patterns.base import value

_aten = torch.ops.aten
_quantize = torch.ops.quark_inductor.block_quantize.default


def quantize_before_gather(graph: Graph) -> int:
    """Rewrite every ``block_quantize(x[rows])`` that has no fewer rows than ``x``, in place; returns how many."""
    moved = 0
    for node in graph.find_nodes(op="call_function", target=_quantize):
        gathered = node.args[0]
        if not isinstance(gathered, Node) or (found := _rows_of(gathered)) is None:
            continue
        x, rows = found
        with graph.inserting_before(node):
            quantized = graph.call_function(_quantize, (x, *node.args[1:]))
            values = tuple(v.new_empty((value(x).shape[0], v.shape[1])) for v in value(node))
            quantized.meta = {**node.meta, "val": values}
            for item in list(node.users):
                part = graph.call_function(operator.getitem, (quantized, item.args[1]))
                part.meta = {**item.meta, "val": values[item.args[1]]}  # type: ignore[index]
                taken = graph.call_function(_aten.index.Tensor, (part, [rows]))
                taken.meta = dict(item.meta)
                item.replace_all_uses_with(taken)
                graph.erase_node(item)
        graph.erase_node(node)
        moved += 1
    return moved


def _rows_of(gathered: Node) -> tuple[Node, Node] | None:
    """``x`` and ``rows`` of ``x[rows]``, if that has as many rows as ``x`` or more."""
    if gathered.target is not _aten.index.Tensor or not isinstance(gathered.args[1], list | tuple):
        return None
    x, indices = gathered.args[0], gathered.args[1]
    if len(indices) != 1 or not isinstance(x, Node) or not isinstance(indices[0], Node):
        return None
    rows = indices[0]
    if value(x).ndim != 2 or value(rows).ndim != 1 or value(rows).dtype not in (torch.int64, torch.int32):
        return None
    return (x, rows) if statically_known_true(value(rows).shape[0] >= value(x).shape[0]) else None
