"""``(x * x_scale) @ (weight * weight_scale).T (+ bias)`` of FP8 codes becomes one GEMM on the codes."""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.fx import Node

from quark_inductor.patterns._inductor import Match, statically_known_true
from quark_inductor.patterns.base import (
    FLOAT_DTYPES,
    Options,
    Rule,
    Variant,
    fused_call,
    refuse_unless_provided,
    register_rule,
    value,
    with_and_without_bias,
)
from quark_inductor.schemes import ops
from quark_inductor.schemes.numerics import fp8


def weight_examples(n: int, k: int, dtype: torch.dtype) -> Iterable[dict[str, torch.Tensor]]:
    """FP8 weights ``[N, K]`` to trace with, one per graph that a kind of scale makes: per channel, per tensor."""
    for shape in ((n,), ()):
        yield {"weight": torch.zeros(n, k, dtype=fp8.DTYPE), "weight_scale": torch.zeros(shape, dtype=dtype)}


@register_rule
class Fp8Gemm(Rule):
    """Its leaves are the quantized tensors: the quantize stays outside and is shared by q, k and v."""

    name = "fp8_gemm"

    def variants(self) -> Iterable[Variant]:
        """Every result dtype and kind of weight scale, with and without bias."""
        m, n, k = 3, 5, 64
        for dtype in FLOAT_DTYPES:
            x = {"x": torch.zeros(m, k, dtype=fp8.DTYPE), "x_scale": torch.zeros((), dtype=dtype)}
            for weight in weight_examples(n, k, dtype):
                name = ops.dtype_name(dtype)
                search = functools.partial(ops.fp8_gemm, out_dtype=name)
                scale_ndim = weight["weight_scale"].ndim
                yield from with_and_without_bias(
                    search, x | weight, n, dtype, out_dtype=name, weight_scale_ndim=scale_ndim
                )

    def check(self, match: Match, facts: Mapping[str, Any], options: Options) -> str | None:
        """Codes are E4M3, scales have a shape the op knows, and a provider can run it."""
        x, x_scale, weight, weight_scale = (value(match.kwargs[k]) for k in ("x", "x_scale", "weight", "weight_scale"))
        if x.dtype != fp8.DTYPE or weight.dtype != fp8.DTYPE:
            return f"the operands are {x.dtype} and {weight.dtype}, expected two {fp8.DTYPE}"
        rows = x_scale.ndim == 2 and statically_known_true(x_scale.shape[0] == x.shape[0]) and x_scale.shape[1] == 1
        if x_scale.ndim != 0 and not rows:
            return f"the activation's scale has shape {tuple(x_scale.shape)}, expected [] or [M, 1]"
        # The form of the graph says along which dimension a scale runs: [K] may be as long as [N].
        channels = weight_scale.ndim == 1 and weight_scale.shape[0] == weight.shape[0]
        if weight_scale.ndim != facts["weight_scale_ndim"] or not (weight_scale.ndim == 0 or channels):
            return f"the weight's scale has shape {tuple(weight_scale.shape)}, expected [] or [N]"
        return refuse_unless_provided(self.name, match, options, k=weight.shape[1])

    def rewrite(self, match: Match, facts: Mapping[str, Any]) -> Node:
        """One ``fp8_gemm``."""
        return fused_call(match, torch.ops.quark_inductor.fp8_gemm.default, facts)
