"""What no rule consumed becomes plain aten again, so that Inductor compiles the emulation like any other code."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from quark_inductor.patterns._inductor import CallFunctionVarArgs, Match, PatternMatcherPass, register_graph_pattern
from quark_inductor.schemes import ops
from quark_inductor.schemes.numerics import block


def _dequantize(codes: torch.Tensor, scales: torch.Tensor, format: str, out_dtype: str, *more: Any) -> torch.Tensor:
    return block.dequantize(codes, scales, format, ops.dtype_of(out_dtype), *more)


_PLAIN: dict[Any, Callable[..., Any]] = {
    torch.ops.quark_inductor.block_quantize.default: block.quantize,
    torch.ops.quark_inductor.block_dequantize.default: _dequantize,
}


@functools.cache
def _matcher() -> PatternMatcherPass:
    matcher = PatternMatcherPass(pass_name="quark_late_decomposition")
    for op, plain in _PLAIN.items():

        def decompose(match: Match, *args: Any, plain: Callable[..., Any] = plain, **kwargs: Any) -> None:
            assert not kwargs, "quantize and dequantize nodes are made with positional arguments"
            tensors = [a for a in args if isinstance(a, Node)]

            def call(*values: torch.Tensor) -> Any:
                given = iter(values)
                return plain(*(next(given) if isinstance(a, Node) else a for a in args))

            match.replace_by_example(call, tensors)

        register_graph_pattern(CallFunctionVarArgs(op), pass_dict=matcher)(decompose)
    return matcher


def late_decomposition(graph: Graph) -> int:
    """Decompose every block quantize and dequantize left in a graph; returns how many there were."""
    return int(_matcher().apply(graph))
