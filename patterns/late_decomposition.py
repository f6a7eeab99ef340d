"""What no rule consumed becomes plain aten again, so that Inductor compiles the emulation like any other code."""

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from quark_inductor.patterns._inductor import (
    CallFunctionVarArgs,
    Match,
    PatternMatcherPass,
    fwd_only,
    register_graph_pattern,
)
from quark_inductor.schemes import ops
from quark_inductor.schemes.numerics import block, int4


def _dequantize(codes: torch.Tensor, scales: torch.Tensor, format: str, out_dtype: str, *more: Any) -> torch.Tensor:
    return block.dequantize(codes, scales, format, ops.dtype_of(out_dtype), *more)


_PLAIN: dict[Any, Callable[..., Any]] = {
    torch.ops.quark_inductor.block_quantize.default: block.quantize,
    torch.ops.quark_inductor.block_dequantize.default: _dequantize,
    torch.ops.quark_inductor.int4_unpack.default: int4.unpack,
}


def _kind(argument: Any) -> Any:
    """What a traced replacement depends on, of an argument of a call."""
    if not isinstance(argument, Node):
        return argument
    val = argument.meta["val"]
    return str(val.shape), str(val.stride()), val.dtype, val.device


def late_decomposition(graph: Graph) -> int:
    """Decompose every op of ours left in a graph but the fused ones; returns how many there were."""
    # Tracing takes 20 ms; a model's layers are mostly alike. For one graph: its fake tensors are of one mode.
    traced: dict[Any, GraphModule] = {}
    matcher = PatternMatcherPass(pass_name="quark_late_decomposition")
    for op, plain in _PLAIN.items():

        def decompose(match: Match, *args: Any, op: Any = op, plain: Callable[..., Any] = plain, **kwargs: Any) -> None:
            assert not kwargs, "quantize and dequantize nodes are made with positional arguments"

            def call(*values: torch.Tensor) -> Any:
                given = iter(values)
                return plain(*(next(given) if isinstance(a, Node) else a for a in args))

            def trace(function: Any, *values: Any, **unused: Any) -> GraphModule:
                key = op, *map(_kind, args)
                if key not in traced:
                    traced[key] = fwd_only(function, *values)
                return traced[key]

            trace_fn: Any = trace
            match.replace_by_example(call, [a for a in args if isinstance(a, Node)], trace_fn=trace_fn)

        register_graph_pattern(CallFunctionVarArgs(op), pass_dict=matcher)(decompose)
    return int(matcher.apply(graph))
