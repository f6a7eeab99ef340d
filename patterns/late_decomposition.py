"""What no rule consumed becomes plain aten again, so that Inductor compiles the emulation like any other code."""

import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from quark_inductor.lowering import target as targets
from quark_inductor.lowering.quantize import quantizes
from quark_inductor.patterns._inductor import detect_fake_mode, fwd_only
from quark_inductor.patterns.base import arguments, value
from quark_inductor.schemes import ops
from quark_inductor.schemes.numerics import block, int4


def _dequantize(codes: torch.Tensor, scales: torch.Tensor, format: str, out_dtype: str, *more: Any) -> torch.Tensor:
    return block.dequantize(codes, scales, format, ops.dtype_of(out_dtype), *more)


_PLAIN: dict[Any, Callable[..., Any]] = {
    torch.ops.quark_inductor.block_quantize.default: block.quantize,
    torch.ops.quark_inductor.block_dequantize.default: _dequantize,
    torch.ops.quark_inductor.int4_unpack.default: int4.unpack,
    torch.ops.quark_inductor.unpack_weight.default: ops.unpack_weight,
}


class PlainGraphs:
    """Functions traced to plain graphs, each once for every kind of tensors: a model's layers are mostly alike.

    Tracing takes 20 ms and more. For the nodes of one graph only, whose fake tensors are of one mode.
    """

    def __init__(self) -> None:
        self._traced: dict[Any, GraphModule] = {}

    def of(self, function: Callable[..., Any], key: Hashable, tensors: Sequence[Node]) -> Graph:
        """The graph of a function of the tensors that these nodes compute; ``key`` says all else that it depends on."""
        values = [value(node) for node in tensors]
        key = key, *((str(v.shape), str(v.stride()), v.dtype, v.device) for v in values)
        if key not in self._traced:
            mode = detect_fake_mode(values)
            assert mode is not None, "a graph that is compiled holds fake tensors"
            with mode:  # what the plain form creates must be fake too
                self._traced[key] = fwd_only(function, values)
        return self._traced[key].graph


def late_decomposition(graph: Graph) -> int:
    """Decompose every op of ours left in a graph but those with kernels; returns how many there were."""
    plain = PlainGraphs()
    found = [node for op in _PLAIN for node in graph.find_nodes(op="call_function", target=op) if not _has_kernel(node)]
    for node in found:
        assert not node.kwargs, "quantize and dequantize nodes are made with positional arguments"
        key = node.target, *(None if isinstance(a, Node) else a for a in node.args)
        tensors = [a for a in node.args if isinstance(a, Node)]
        replace_by(node, plain.of(_plain_call(node), key, tensors), tensors)
    return len(found)


def _has_kernel(node: Node) -> bool:
    """Whether it is a quantize that has a kernel of its own: fused GEMMs are none of :data:`_PLAIN`."""
    if node.target is not torch.ops.quark_inductor.block_quantize.default:
        return False
    named = arguments(node)
    x = value(named["x"])
    k = x.shape[-1] if isinstance(x.shape[-1], int) else None
    target, dtype = targets.current(x.device.type), ops.dtype_name(x.dtype)
    return quantizes(target, named["format"], named["scale_rule"], dtype, k) is None


def _plain_call(node: Node) -> Callable[..., Any]:
    """The plain form of one call, of the tensors among its arguments."""
    plain = _PLAIN[node.target]

    def call(*values: torch.Tensor) -> Any:
        given = iter(values)
        return plain(*(next(given) if isinstance(a, Node) else a for a in node.args))

    return call


def about(node: Node) -> dict[str, Any]:
    """Which module and line a node comes from, without what is about its own arguments and result."""
    return {name: v for name, v in node.meta.items() if name not in ("val", "tensor_meta", "eager_input_vals")}


def replace_by(node: Node, plain: Graph, tensors: Sequence[Node]) -> None:
    """Put a traced graph, called with these tensors, in the place of a node."""
    copies: dict[Node, Node] = dict(zip(plain.find_nodes(op="placeholder"), tensors, strict=True))
    with node.graph.inserting_before(node):
        result: Any = node.graph.graph_copy(plain, copies)
    for inner, copy in copies.items():
        if inner.op == "call_function":
            copy.meta.update(about(node))
    if isinstance(result, Node):
        node.replace_all_uses_with(result)
    else:
        for item in list(node.users):
            assert item.target is operator.getitem
            item.replace_all_uses_with(result[item.args[1]])
            node.graph.erase_node(item)
    node.graph.erase_node(node)
