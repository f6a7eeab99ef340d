"""A GEMM of an activation that was just quantized to FP8: the GEMM quantizes it in its own prologue.

The quantize is ``clamp(x / scale)`` and a cast, by a scale that is given or computed from the activation.
"""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from quark_inductor.patterns.base import FLOAT_DTYPES, Found, Variant, arguments, register_rule, value
from quark_inductor.patterns.operands import K, M, PrologueRule, dtypes_and_scales, gemm_of, some_weight
from quark_inductor.schemes.numerics import fp8
from quark_inductor.schemes.operands import FP8_FORMATS


def _by_groups(x: Tensor, *, format: str, **weight: Tensor) -> Tensor:
    codes, scales = fp8.quantize_groups(x, K // 4, FP8_FORMATS[format])
    return gemm_of(codes, scales, None, None, format, x.dtype, **weight)


def _by_tokens(x: Tensor, *, format: str, **weight: Tensor) -> Tensor:
    scale = fp8.dynamic_scale(x, "per_token", FP8_FORMATS[format])
    return gemm_of(fp8.quantize(x, scale, FP8_FORMATS[format]), scale, None, None, format, x.dtype, **weight)


def _given(x: Tensor, x_scale: Tensor, *, format: str, **weight: Tensor) -> Tensor:
    return gemm_of(fp8.quantize(x, x_scale, FP8_FORMATS[format]), x_scale, None, None, format, x.dtype, **weight)


def _given_unpromoted(x: Tensor, x_scale: Tensor, *, format: str, **weight: Tensor) -> Tensor:
    # Of no dimension, a float32 scale does not promote: the quotient is rounded once, as that of fp8.quantize.
    limit = fp8.max_value(FP8_FORMATS[format])
    codes = (x / x_scale).clamp(-limit, limit).to(FP8_FORMATS[format])
    return gemm_of(codes, x_scale, None, None, format, x.dtype, **weight)


@register_rule
class Fp8Prologue(PrologueRule):
    """A scale that is computed in a form not known here is given: only the quantize is in the prologue then."""

    name = "fp8_prologue"

    def variants(self) -> Iterable[Variant]:
        """The scales that are computed before the scale that is given, whose pattern takes any."""
        for format in FP8_FORMATS:
            for dtype in FLOAT_DTYPES:
                x = {**some_weight(), "x": torch.zeros(M, K, dtype=dtype)}
                for search, by in ((_by_tokens, "token"), (_by_groups, "group")):
                    yield Variant(functools.partial(search, format=format), x, {"by": by, "read": format}, dtype)
            for dtype, scale_dtype in dtypes_and_scales():
                example = {
                    **some_weight(),
                    "x": torch.zeros(M, K, dtype=dtype),
                    "x_scale": torch.zeros((), dtype=scale_dtype),
                }
                facts = {"by": "given", "read": format}
                yield Variant(functools.partial(_given, format=format), example, facts, dtype)
                if scale_dtype != dtype:
                    yield Variant(functools.partial(_given_unpromoted, format=format), example, facts, dtype)

    def operands(self, found: Found) -> dict[str, Any] | str:
        """The scale is one the op knows."""
        if found["by"] == "given":
            scale = found.value("x_scale")
            if scale.ndim and scale.shape[-1] != 1:
                return f"the activation is divided by a scale of shape {tuple(scale.shape)}, expected [] or [M, 1]"
            return {"x_scale": found["x_scale"], "scale_rule": "given"}
        if found["by"] == "token":
            return {"scale_rule": "amax"}
        groups = value(arguments(found.node)["x_scale"]).shape[-1]
        return {"scale_rule": "amax", "group_size": int(found.value("x").shape[-1]) // int(groups)}
