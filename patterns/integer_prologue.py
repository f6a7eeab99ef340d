"""A GEMM of an activation that was just quantized to integers: the GEMM quantizes it in its own prologue.

The quantize is ``clamp(round(x / scale) + zero_point)`` and a cast, by a scale and zero point that are given or
computed from the activation.
"""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from quark_inductor.patterns.base import FLOAT_DTYPES, Found, Variant, arguments, register_rule, value
from quark_inductor.patterns.integer_weight import FORMATS
from quark_inductor.patterns.operands import K, M, PrologueRule, dtypes_and_scales, gemm_of, some_weight
from quark_inductor.schemes.numerics import integer


def _by_groups(x: Tensor, *, format: str, symmetric: bool, **weight: Tensor) -> Tensor:
    codes, scale, zero_point = integer.quantize_groups(x, K // 4, format, symmetric)
    return gemm_of(codes, scale, None, None if symmetric else zero_point, "int8", x.dtype, **weight)


def _by_tokens(x: Tensor, *, format: str, symmetric: bool, **weight: Tensor) -> Tensor:
    scale, zero_point = integer.parameters(x, format, symmetric, -1)
    codes = integer.quantize(x, scale, zero_point, format)
    return gemm_of(codes, scale, None, None if symmetric else zero_point, "int8", x.dtype, **weight)


def _given(x: Tensor, x_scale: Tensor, x_zero_point: Tensor, *, format: str, **weight: Tensor) -> Tensor:
    return gemm_of(
        integer.quantize(x, x_scale, x_zero_point, format), x_scale, None, x_zero_point, "int8", x.dtype, **weight
    )


def _given_symmetric(x: Tensor, x_scale: Tensor, *, format: str, **weight: Tensor) -> Tensor:
    zero_point = torch.zeros_like(x_scale, dtype=torch.int32)
    return gemm_of(integer.quantize(x, x_scale, zero_point, format), x_scale, None, None, "int8", x.dtype, **weight)


@register_rule
class IntegerPrologue(PrologueRule):
    """A scale that is computed in a form not known here is given: only the quantize is in the prologue then."""

    name = "integer_prologue"

    def variants(self) -> Iterable[Variant]:
        """The scales that are computed before the scale that is given, whose pattern takes any."""
        for format in integer.BOUNDS:
            read = FORMATS[integer.codes_dtype(format)]
            for dtype in FLOAT_DTYPES:
                x = {**some_weight(), "x": torch.zeros(M, K, dtype=dtype)}
                for search, by in ((_by_tokens, "token"), (_by_groups, "group")):
                    for rule in ("symmetric", "asymmetric"):
                        facts = {"by": by, "scale_rule": rule, "x_format": format, "read": read}
                        yield Variant(
                            functools.partial(search, format=format, symmetric=rule == "symmetric"), x, facts, dtype
                        )
            for dtype, scale_dtype in dtypes_and_scales():
                example = {
                    **some_weight(),
                    "x": torch.zeros(M, K, dtype=dtype),
                    "x_scale": torch.zeros((), dtype=scale_dtype),
                }
                zero_point = {"x_zero_point": torch.zeros((), dtype=torch.int32)}
                facts = {"by": "given", "scale_rule": "given", "x_format": format, "read": read}
                yield Variant(functools.partial(_given, format=format), {**example, **zero_point}, facts, dtype)
                facts = {**facts, "by": "given symmetric"}
                yield Variant(functools.partial(_given_symmetric, format=format), example, facts, dtype)

    def operands(self, found: Found) -> dict[str, Any] | str:
        """Scale and zero point are those the op knows."""
        named: dict[str, Any] = {"x_format": found["x_format"], "scale_rule": found["scale_rule"]}
        zero_point = arguments(found.node)["x_zero_point"]
        if (found["scale_rule"] == "symmetric" or found["by"] == "given symmetric") and zero_point is not None:
            return "the activation is quantized without a zero point and dequantized with one"
        if found["by"].startswith("given"):
            shape = found.value("x_scale").shape
            if len(shape) and shape[-1] != 1:
                return f"the activation is divided by a scale of shape {tuple(shape)}, expected [] or [M, 1]"
            return {**named, "x_scale": found["x_scale"], "x_zero_point": zero_point}
        if found["by"] == "token":
            return named
        groups = value(arguments(found.node)["x_scale"]).shape[-1]
        return {**named, "group_size": int(found.value("x").shape[-1]) // int(groups)}
