"""A product of one row by a float weight on CPU, as sums that Inductor computes at the speed of memory.

torch multiplies a row by a matrix of 16-bit floats with a kernel for matrices. For one row all that counts is how fast
the weight is read: the head of a language model, which stays float, else takes a third of the time of a token.
"""

import torch
from torch import Tensor
from torch.fx import Graph, Node

from quark_inductor.patterns.base import GEMMS, same_shape, value
from quark_inductor.patterns.late_decomposition import PlainGraphs, replace_by

_aten = torch.ops.aten
# Smaller weights are in a cache, where torch's kernel is as fast.
_LEAST = 1 << 20


def multiply(x: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
    """``x [1, K]`` by ``weight [N, K]``, summed in float32, plus ``bias [N]`` if given; in the dtype of ``x``."""
    sums = (x.float() * weight.float()).sum(-1)
    if bias:
        sums = sums + bias[0].float()
    return sums.to(x.dtype).unsqueeze(0)


def decode_linear(graph: Graph) -> int:
    """Rewrite every such product in a graph, in place; returns how many there were."""
    found, plain = 0, PlainGraphs()
    for target in (_aten.mm.default, _aten.addmm.default):
        for node in graph.find_nodes(op="call_function", target=target):
            tensors = _operands(node)
            if tensors is not None:
                replace_by(node, plain.of(multiply, None, tensors), tensors)
                found += 1
    return found


def _operands(node: Node) -> list[Node] | None:
    """The row, the weight ``[N, K]`` and the bias, of a product that is worth it."""
    of_row, of_weight, of_bias = GEMMS[node.target]
    row, transposed = node.args[of_row], node.args[of_weight]
    bias = None if of_bias is None else node.args[of_bias]
    if node.kwargs or not isinstance(row, Node) or not isinstance(transposed, Node):
        return None
    if transposed.target is not _aten.permute.default:
        return None
    weight = transposed.args[0]
    if not isinstance(weight, Node) or weight.op not in ("placeholder", "get_attr"):
        return None
    x, w = value(row), value(weight)
    fits = (
        x.device.type == "cpu"
        and x.dtype in (torch.bfloat16, torch.float16)
        and x.dtype == w.dtype
        and same_shape(x.shape[:1], (1,))
        and all(isinstance(size, int) for size in w.shape)
        and w.is_contiguous()
        and w.numel() >= _LEAST
    )
    if not fits or (isinstance(bias, Node) and not same_shape(value(bias).shape, w.shape[:1])):
        return None
    return [tensor for tensor in (row, weight, bias) if isinstance(tensor, Node)]
