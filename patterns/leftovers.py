"""What the rules left in a graph, and why: GEMMs of quantized weights, and quantizes, dequantizes and 8-bit casts."""

import dataclasses
import itertools
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Graph, Node

from quark_inductor.lowering.base import EMULATION
from quark_inductor.patterns.base import GEMMS, PRODUCTS, VIEWS, Refusal, arguments, is_byte, layer_of
from quark_inductor.patterns.nearest import nearest
from quark_inductor.patterns.selection import KEY, LinearResult, is_fused
from quark_inductor.schemes.base import features_of_plan
from quark_inductor.schemes.ops import NAMESPACE

aten, prims = torch.ops.aten, torch.ops.prims
_quantize = torch.ops.quark_inductor.block_quantize.default
_grouped_linear = torch.ops.quark_inductor.grouped_linear.default
# What a dequantize is written with, from a cast of codes to a GEMM.
_DEQUANTIZES = frozenset(
    {
        prims.convert_element_type.default,
        aten.add.Tensor,
        aten.div.Tensor,
        aten.mul.Tensor,
        aten.relu.default,  # of none, but near one: the refusal names it
        aten.sub.Tensor,
        *VIEWS,
        aten.unsqueeze.default,
        aten.expand.default,
        aten.clone.default,
        aten.slice.Tensor,
        aten.permute.default,
        torch.ops.quark_inductor.block_dequantize.default,
        torch.ops.quark_inductor.unpack_weight.default,
    }
)
# The places of what is multiplied, and by what. No rule knows the last, but it may read codes.
_OPERANDS: Mapping[Any, tuple[int, int]] = {
    **{gemm: places[:2] for gemm, places in GEMMS.items()},
    aten.baddbmm.default: (1, 2),
}

_keys = itertools.count()


def is_left(node: Node) -> bool:
    """Whether a node quantizes or dequantizes: a block or unpack op of ours, or a cast from or to 8 bits."""
    if node.target is prims.convert_element_type.default:
        return is_byte(node) or is_byte(node.args[0])
    if node.target in (torch.ops.quark_inductor.unpack_weight.default, _grouped_linear):
        return False
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == NAMESPACE and not is_fused(node)


def _comes_from_codes(operand: Any) -> bool:
    """Whether a matrix is computed from stored integers or FP8, and from nothing that another GEMM computed."""
    seen: set[Node] = set()
    todo, codes = [operand], False
    two_dimensional = isinstance(operand, Node) and operand.meta["val"].ndim == 2
    while todo:
        node = todo.pop()
        if not isinstance(node, Node) or node in seen:
            continue
        seen.add(node)
        if node.target in PRODUCTS or is_fused(node):
            return False
        if not node.all_input_nodes:
            val = node.meta.get("val")
            # 4-bit integers are stored in int32. Positions are int32 too, but rotary angles have three dimensions.
            codes |= is_byte(node) or (isinstance(val, torch.Tensor) and val.dtype == torch.int32 and two_dimensional)
        todo += node.all_input_nodes
    return codes


def _dequantize_of(operand: Any) -> list[Node]:
    """The quantizes and dequantizes an operand was computed with, back to the cast to its codes."""
    seen: set[Node] = set()
    todo = [operand]
    while todo:
        node = todo.pop()
        if not isinstance(node, Node) or node in seen:
            continue
        if is_left(node) or node.target in _DEQUANTIZES or node.target is operator.getitem or is_byte(node):
            seen.add(node)
            # What was quantized is not part of it.
            if node.target is not _quantize and not (
                node.target is prims.convert_element_type.default and is_byte(node)
            ):
                todo += node.all_input_nodes
    return [node for node in seen if is_left(node)]


def leftovers(
    graph: Graph, linears: Mapping[Node, LinearResult], refused: Mapping[Node, Refusal]
) -> tuple[list[LinearResult], list[Refusal], list[Refusal]]:
    """What became of every GEMM of a quantized weight, and what is left.

    Args:
        graph: after the rules, the providers and dead code elimination.
        linears: what became of those that some rule knew, by node.
        refused: the last refusal of a rule to replace a node.

    Returns:
        All results in the order of the graph; those left to the emulation, all or in part; the left nodes.
    """
    known: dict[Any, str] = {}
    results, unfused = [], []
    reasons: dict[Node, str] = {}

    def why(gemm: Node) -> str:
        if gemm in refused:
            return refused[gemm].reason
        if gemm in linears and linears[gemm].refusals:
            return "; ".join(linears[gemm].refusals)
        return nearest(gemm, known)

    for node in graph.nodes:
        result = linears.get(node)
        if is_fused(node):
            if result is None:
                continue
            named = arguments(node)
            left = [n for name in ("x", "x_scale", "x_zero_point") for n in _dequantize_of(named.get(name))]
            partly = any(not is_byte(n) for n in left) and named.get("x_format") is None
        elif node.target is _grouped_linear:
            left, partly = [], True
            if result is None:
                result = LinearResult(layer_of(node), EMULATION, (), features_of_plan(node.args[3]), None, ())
        elif node.target in _OPERANDS and _comes_from_codes(node.args[_OPERANDS[node.target][1]]):
            places = _OPERANDS[node.target]
            left = [n for place in places for n in _dequantize_of(node.args[place])]
            partly = True
            if result is None:
                k, n = (s if isinstance(s, int) else -1 for s in node.args[places[1]].meta["val"].shape[-2:])
                result = LinearResult(layer_of(node), EMULATION, (), (n, k), None, ())
        else:
            continue
        if left or partly:
            reason = why(node)
            reasons.update(dict.fromkeys(left, reason))
            if partly:
                rule = refused[node].rule if node in refused else ""
                unfused.append(Refusal(reason, result.layer, rule))
                result = dataclasses.replace(result, refusals=(reason,), partly=result.provider != EMULATION)
        node.meta[KEY] = key = next(_keys)
        results.append(dataclasses.replace(result, key=key))
    everything = [
        Refusal(reasons.get(n, "no GEMM reads it: it is of an output, a cache or an embedding"), layer_of(n))
        for n in graph.nodes
        if n.op == "call_function" and is_left(n)
    ]
    return results, unfused, everything
