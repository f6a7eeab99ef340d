"""Other ways to a fused GEMM than one kernel, as choices that ``max_autotune`` measures beside kernels.

Each is a graph of its own, which Inductor compiles: the activation quantized by a kernel before the GEMM, or a GEMM
that splits K, with the kernel that adds up.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from quark_inductor.lowering._inductor import subgraph_choice
from quark_inductor.lowering.base import GemmProblem
from quark_inductor.lowering.quantize import quantizes
from quark_inductor.lowering.target import Target
from quark_inductor.schemes import operands
from quark_inductor.schemes.numerics.block import BLOCK_FORMATS

_ops = torch.ops.quark_inductor
_TENSORS = (
    "x",
    "x_scale",
    "x_scale_2",
    "x_zero_point",
    "weight",
    "weight_scale",
    "weight_scale_2",
    "weight_zero_point",
)


def choices(target: Target, problem: GemmProblem, nodes: Mapping[str, Any], layout: Any, splits: bool) -> list[Any]:
    """Choices for a GEMM with a prologue.

    Args:
        target: where it will run.
        problem: what to compute.
        nodes: Inductor IR of the tensors, by the op's names; ``"bias"``, if there is one, expanded to ``[M, N]``.
        layout: of the result.
        splits: whether several programs would share a tile.
    """
    rules = (problem.x_format, problem.scale_rule, problem.group_size, problem.weight_format)

    def tensors(values: tuple[Tensor, ...]) -> list[Tensor | None]:
        given = dict(zip(nodes, values, strict=True))
        bias = given.get("bias")
        return [*(given.get(name) for name in _TENSORS), None if bias is None else bias[0]]

    def whole(*values: Tensor) -> Tensor:
        y: Tensor = _ops.prologue_gemm(*tensors(values), *rules)
        return y

    def apart(*values: Tensor) -> Tensor:
        x, scale, scale_2, zero_point, *by_weight = tensors(values)
        assert x is not None
        if problem.x_format in BLOCK_FORMATS and (
            quantizes(target, problem.x_format, problem.scale_rule, problem.dtype, problem.k) is None
        ):
            codes, scale = _ops.block_quantize(x, problem.x_format, problem.scale_rule, scale_2)
        else:
            codes, scale, zero_point = operands.quantize_activation(x, scale, scale_2, zero_point, *rules[:3])
        formats = problem.x_format, problem.weight_format, problem.dtype
        y: Tensor = _ops.quantized_gemm(codes, scale, scale_2, zero_point, *by_weight, *formats)
        return y

    found: list[tuple[str, Callable[..., Tensor]]] = [("quantize_then_gemm", apart)]
    if splits:
        found.append(("split_k", whole))
    return [subgraph_choice(f"quark_{name}", list(nodes.values()), layout, function) for name, function in found]
