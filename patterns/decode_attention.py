"""Attention of one query token on CPU as sums that Inductor fuses, instead of torch's kernel for many.

That kernel (``_scaled_dot_product_flash_attention_for_cpu``) cuts queries into blocks and packs keys and values for
matrix products. Of one token there is nothing to cut: reading the keys and values once is all that is to be done, and
heads that share them need no copies. Measured in ``benchmarks/cpu_llm.md``.
"""

import operator
from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import Graph, Node

from quark_inductor.patterns.base import same_shape, value
from quark_inductor.patterns.late_decomposition import PlainGraphs, replace_by

_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def attend(query: Tensor, key: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention ``[B, H, 1, D]`` of a query of that shape to keys and values ``[B, H, S, D]``, in float32.

    Args:
        query: floating point.
        key: of its dtype.
        values: of its dtype.
        mask: floating point, added to the scores; broadcast to ``[B, H, 1, S]``. A row that is all ``-inf`` gives
            zeros, as torch's kernel has it.
        scale: of the scores.
    """
    scores = (query.float() * key.float()).sum(-1) * scale
    if mask is not None:
        scores = scores + mask.float().squeeze(-2)
    largest = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - torch.where(largest == -torch.inf, 0.0, largest))
    total = weights.sum(-1, keepdim=True)
    weights = weights / torch.where(total == 0, 1.0, total)
    return (weights.unsqueeze(-1) * values.float()).sum(-2).unsqueeze(-2).to(query.dtype)


def decode_attention(graph: Graph) -> int:
    """Rewrite every attention of one query token in a graph, in place; returns how many there were."""
    found = [node for node in graph.find_nodes(op="call_function", target=_attention) if _is_of_one_token(node)]
    plain = PlainGraphs()
    for node in found:
        query, key, values, *_ = node.args
        mask, scale = node.kwargs.get("attn_mask"), node.kwargs.get("scale")
        tensors = [t for t in (query, key, values, mask) if isinstance(t, Node)]
        factor = value(tensors[0]).shape[-1] ** -0.5 if scale is None else float(scale)
        (output,) = node.users
        replace_by(output, plain.of(_attend_by(factor), factor, tensors), tensors)
        graph.erase_node(node)
    return len(found)


def _attend_by(scale: float) -> Callable[..., Tensor]:
    def call(query: Tensor, key: Tensor, values: Tensor, *mask: Tensor) -> Tensor:
        return attend(query, key, values, mask[0] if mask else None, scale)

    return call


def _is_of_one_token(node: Node) -> bool:
    """On CPU, without dropout or a causal mask, and nobody reads its logarithms of sums."""
    query, key, _, dropout, causal = (*node.args, 0.0, False)[:5]
    assert isinstance(query, Node)
    assert isinstance(key, Node)
    q, k = value(query), value(key)
    users = list(node.users)
    return (
        q.device.type == "cpu"
        and q.ndim == 4
        and same_shape(q.shape[2:3], (1,))
        and same_shape(q.shape[:2], k.shape[:2])
        and not dropout
        and not causal
        and [(user.target, user.args[1]) for user in users] == [(operator.getitem, 0)]
    )
