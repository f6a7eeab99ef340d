"""What the operand formats of the fused GEMMs mean: codes, scales and zero points to numbers, and activations to codes.

The formats of a weight ``[N, K]``:

=============================  ========================  ============================  =========================
name                           weight                    weight_scale                  also
=============================  ========================  ============================  =========================
of a block format              ``[N, packed(K)]``        ``[N, K/B]``                  ``weight_scale_2 []`` if it
                                                                                       has a global scale
``fp8_e4m3``, ``fp8_e5m2``,    FP8 ``[N, K]``            ``[]`` or ``[N]``
``fp8_e4m3fnuz``
the same with ``_<R>x<C>``     FP8 ``[N, K]``            ``[ceil(N/R), ceil(K/C)]``
``int8``, ``uint8``            ``[N, K]``                ``[]``, ``[N]``, ``[N, K/G]``  ``weight_zero_point``, the
                                                                                       same shape; none: 0
``int4``, ``uint4``            int32 ``[N, K/8]``        ``[N]``                       ``weight_zero_point [N/8]``
the same, by groups            int32 ``[K, N/8]``        ``[K/G, N]``                  ``weight_zero_point [K/G, N/8]``
``int4_fp8``                   int32 ``[N, K/8]``        ``[]``                        ``weight_scale_2 [N]``,
                                                                                       ``weight_zero_point [N/8]``
=============================  ========================  ============================  =========================

A packed weight is one uint8 tensor, which holds a block format's scales too; its layout and the shape of its codes are
then given besides (:mod:`.layout`). Weights in a block format, and FP8 ones with a scale ``[]``, ``[E, N]`` or
``[E, N, 1]``, may be those of E experts, ``[E, N, ...]``: then the activation is ``[E, M, K]``, and so is what is said
of it below. Of a grouped GEMM (``offsets``, see :mod:`.ops`) every tensor of a weight has a first dimension of E.

4-bit integers are packed in the order "reorder"; a name with ``_order`` at its end says "order", see
:data:`.numerics.int4.FORMATS`. The formats of an activation ``[M, K]`` are the block formats, those of FP8, and
``int8``, ``uint8``, ``int4``, ``uint4``, whose codes are not packed; scales and zero points (none: 0) are ``[]``,
``[M, 1]`` or, by groups along K, ``[M, K/G]``.

How an activation's scales follow from its values, ``scale_rule``: of a block format one of its rules; else ``"given"``
(scales, and zero points of integers if they are not 0, are operands), ``"amax"`` (FP8), ``"symmetric"`` or
``"asymmetric"`` (integers). ``group_size`` is how many neighbours along K share one that is computed; 0: a row does.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quark_inductor.schemes.numerics import block, fp8, int4, integer
from quark_inductor.schemes.numerics.block import BLOCK_FORMATS

FP8_FORMATS = {**fp8.DTYPES, "fp8_e4m3fnuz": fp8.FNUZ}
_FP8_WEIGHT = re.compile(r"(fp8_\w+?)(?:_(\d+)x(\d+))?")
_INT4 = tuple(int4.FORMATS)


def fp8_format(dtype: torch.dtype) -> str | None:
    """The name of an FP8 dtype as a format, ``None`` if it is not one."""
    return next((name for name, known in FP8_FORMATS.items() if known == dtype), None)


def fp8_weight(format: str) -> tuple[torch.dtype, tuple[int, int] | None] | None:
    """Dtype and block size of an FP8 weight's format; ``None`` if it is not one."""
    found = _FP8_WEIGHT.fullmatch(format)
    if found is None or found[1] not in FP8_FORMATS:
        return None
    return FP8_FORMATS[found[1]], (int(found[2]), int(found[3])) if found[2] else None


def min_capability(weight_format: str) -> int:
    """CUDA compute capability times ten from which hardware kernels for a weight exist; below it the emulation runs."""
    if weight_format.startswith("fp8") or weight_format == "int4_fp8":
        return 89
    return 75 if weight_format in ("int8", "uint8", "nvfp4") else 70


def check_weight(format: str) -> None:
    """Refuse a weight format that is not known.

    Raises:
        ValueError: names it and the known ones.
    """
    if format not in (*BLOCK_FORMATS, "int8", "uint8", *_INT4, "int4_fp8") and fp8_weight(format) is None:
        known = (*BLOCK_FORMATS, *FP8_FORMATS, "int8", "uint8", *_INT4, "int4_fp8")
        raise ValueError(f"there is no weight format {format!r}; expected one of {', '.join(known)}")


def check_activation(format: str, scale_rule: str | None = None) -> None:
    """Refuse an activation format, or a scale rule, that is not known.

    Raises:
        ValueError: names it and the known ones.
    """
    if format in BLOCK_FORMATS:
        rules: tuple[str, ...] = BLOCK_FORMATS[format].scale_rules
    elif format in FP8_FORMATS:
        rules = ("given", "amax")
    elif format in integer.BOUNDS:
        rules = ("given", "symmetric", "asymmetric")
    else:
        known = (*BLOCK_FORMATS, *FP8_FORMATS, *integer.BOUNDS)
        raise ValueError(f"there is no activation format {format!r}; expected one of {', '.join(known)}")
    if scale_rule is not None and scale_rule not in rules:
        raise ValueError(f"there is no scale rule {scale_rule!r} for {format}; expected one of {', '.join(rules)}")


def codes_dtype(format: str) -> torch.dtype:
    """The dtype of a weight's codes."""
    check_weight(format)
    if format in BLOCK_FORMATS:
        return BLOCK_FORMATS[format].codes_dtype
    if (of_fp8 := fp8_weight(format)) is not None:
        return of_fp8[0]
    return {"int8": torch.int8, "uint8": torch.uint8}.get(format, torch.int32)


def features(weight: Sequence[int], scale_ndim: int, format: str) -> tuple[int, int]:
    """``(N, K)`` of a weight from the shape of its codes and how many dimensions its scale has."""
    *_, rows, entries = weight
    if format in BLOCK_FORMATS:
        return rows, BLOCK_FORMATS[format].unpacked(entries)
    if is_transposed(scale_ndim, format):
        return entries * 8, rows
    return rows, entries * 8 if format in (*_INT4, "int4_fp8") else entries


def is_transposed(scale_ndim: int, format: str) -> bool:
    """Whether a weight's codes are ``[K, N / 8]``: 4-bit integers by groups."""
    return format in _INT4 and scale_ndim == 2


def features_of(args: Mapping[str, Any], shape: Callable[[Any], Sequence[Any]]) -> tuple[int, int]:
    """:func:`features` of the weight in a fused op's arguments by name; ``shape`` gives that of a tensor in them."""
    scale = args["weight_scale"]
    if args.get("weight_layout"):
        codes = [args["weight_rows"], args["weight_columns"]]
    else:
        codes = list(shape(args["weight"]))
    return features(codes, 2 if scale is None else len(shape(scale)), args.get("weight_format", ""))


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T (+ bias)`` in plain torch, for each expert if there are some."""
    if weight.ndim == 2:
        return F.linear(x, weight, bias)
    if bias is not None:
        raise ValueError("a GEMM of experts has no bias")
    return torch.bmm(x, weight.transpose(1, 2))


def dequantize_weight(
    weight: Tensor,
    scale: Tensor,
    scale_2: Tensor | None,
    zero_point: Tensor | None,
    format: str,
    dtype: torch.dtype,
) -> Tensor:
    """A weight's values ``[N, K]`` in ``dtype``, as its scheme emulates them."""
    check_weight(format)
    if format in BLOCK_FORMATS:
        return block.dequantize_by_table(weight, scale, format, dtype, scale_2)
    if (of_fp8 := fp8_weight(format)) is not None:
        return fp8.dequantize_weight(weight, scale, dtype, of_fp8[1])
    if format in ("int8", "uint8"):
        zero_point = torch.zeros_like(scale, dtype=torch.int32) if zero_point is None else zero_point
        return integer.dequantize_weight(weight, scale, zero_point, dtype)
    if zero_point is None or (format == "int4_fp8" and scale_2 is None):
        raise ValueError(f"a weight in {format} has a zero point, and in int4_fp8 a second scale")
    if format == "int4_fp8":
        assert scale_2 is not None
        return int4.dequantize_two_stages(weight, scale, scale_2, zero_point, "int4", dtype)
    return int4.dequantize_weight(weight, scale, zero_point, format, dtype)


def quantize_activation(
    x: Tensor,
    scale: Tensor | None,
    scale_2: Tensor | None,
    zero_point: Tensor | None,
    format: str,
    scale_rule: str,
    group_size: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and zero points of ``x [M, K]``; the latter are computed where the rule is not ``"given"``."""
    check_activation(format, scale_rule)
    if format in BLOCK_FORMATS:
        return *block.quantize(x, format, scale_rule, scale_2), None
    if format in FP8_FORMATS:
        dtype = FP8_FORMATS[format]
        if group_size:
            return *fp8.quantize_groups(x, group_size, dtype), None
        scale = fp8.dynamic_scale(x, "per_token", dtype) if scale is None else scale
        return fp8.quantize(x, scale, dtype), scale, None
    if group_size:
        return integer.quantize_groups(x, group_size, format, scale_rule == "symmetric")
    if scale is None:
        scale, zero_point = integer.parameters(x, format, scale_rule == "symmetric", -1)
    zero_point = torch.zeros_like(scale, dtype=torch.int32) if zero_point is None else zero_point
    return integer.quantize(x, scale, zero_point, format), scale, zero_point


def dequantize_activation(
    x: Tensor, scale: Tensor, scale_2: Tensor | None, zero_point: Tensor | None, format: str, dtype: torch.dtype
) -> Tensor:
    """An activation's values ``[M, K]`` in ``dtype``, as a scheme emulates them."""
    check_activation(format)
    if format in BLOCK_FORMATS:
        return block.dequantize_by_table(x, scale, format, dtype, scale_2, zero_scale(format))
    groups = scale.ndim > 0 and scale.shape[-1] != 1
    if format in FP8_FORMATS:
        return fp8.dequantize_groups(x, scale, dtype) if groups else fp8.dequantize(x, scale, dtype)
    zero_point = torch.zeros_like(scale, dtype=torch.int32) if zero_point is None else zero_point
    return (integer.dequantize_groups if groups else integer.dequantize)(x, scale, zero_point, dtype)


def zero_scale(format: str) -> float:
    """What an activation's block scale of 0 stands for: amd-quark's AMDFP4 quantizer goes on with eps there."""
    # NVFP4's comes out as 0.
    return torch.finfo(torch.float32).eps if BLOCK_FORMATS[format].scale == "e5m3" else 0.0
