"""Eight 4-bit integers to an int32.

Source: amd-quark 0.13, ``quark/torch/utils/pack.py: Pack_4_bits``.
"""

import torch
from torch import Tensor

from quark_inductor.schemes.numerics import integer

# Nibble i of an int32 (bits 4i to 4i + 3) holds element ORDERS[method][i] of its eight. "reorder" is AWQ's order.
ORDERS = {"reorder": (0, 2, 4, 6, 1, 3, 5, 7), "order": (0, 1, 2, 3, 4, 5, 6, 7)}


def pack(codes: Tensor, pack_method: str) -> Tensor:
    """Codes ``[..., C]``, int8 -8..7 or uint8 0..15, to int32 ``[..., ceil(C / 8)]``; the last nibbles may stay 0."""
    nibbles = codes.to(torch.int32) & 15
    padded = torch.nn.functional.pad(nibbles, (0, -nibbles.shape[-1] % 8)).unflatten(-1, (-1, 8))
    packed = torch.zeros(padded.shape[:-1], dtype=torch.int32, device=codes.device)
    for i, element in enumerate(ORDERS[pack_method]):
        packed = packed | (padded[..., element] << (4 * i))
    return packed


# What a packed tensor's elements are: name -> (signed: -8..7, else 0..15; order in an int32).
FORMATS = {
    "int4": (True, "reorder"),
    "uint4": (False, "reorder"),
    "int4_order": (True, "order"),
    "uint4_order": (False, "order"),
}


def check(format: str) -> None:
    """Refuse a format that is not known.

    Raises:
        ValueError: names it and the known ones.
    """
    if format not in FORMATS:
        raise ValueError(f"there is no 4-bit format {format!r}; expected one of {', '.join(FORMATS)}")


def format_of(dtype: str, pack_method: str) -> str:
    """The name in :data:`FORMATS` of ``"int4"`` or ``"uint4"`` packed by a method."""
    return next(name for name, known in FORMATS.items() if known == (dtype == "int4", pack_method))


def unpack(packed: Tensor, format: str) -> Tensor:
    """int32 ``[..., C / 8]`` to codes ``[..., C]``, int32, of a format of :data:`FORMATS`.

    Raises:
        ValueError: an unknown format.
    """
    check(format)
    signed, method = FORMATS[format]
    order = ORDERS[method]
    nibbles = [(packed >> (4 * order.index(element))) & 15 for element in range(8)]
    codes = torch.stack(nibbles, dim=-1).flatten(-2)
    return codes - ((codes & 8) << 1) if signed else codes


def dequantize_weight(packed: Tensor, scale: Tensor, zero_point: Tensor, format: str, dtype: torch.dtype) -> Tensor:
    """A weight's values ``[N, K]``, ``(code - zero_point) * scale`` in float32, then one cast.

    Args:
        packed: int32 ``[N, K/8]`` or, by groups, transposed: ``[K, N/8]``.
        scale: floating point ``[N]``, or by groups ``[K/G, N]``.
        zero_point: int32 ``[N/8]`` or ``[K/G, N/8]``.
        format: of :data:`FORMATS`.
        dtype: dtype of the result.
    """
    unpack_op = torch.ops.quark_inductor.int4_unpack
    codes, zero = unpack_op(packed, format), unpack_op(zero_point, format)
    if scale.ndim == 1:
        return integer.dequantize(codes, scale.unsqueeze(-1), zero.unsqueeze(-1), dtype)
    return integer.dequantize_groups(codes.t(), scale.t(), zero.t(), dtype)


def dequantize_two_stages(
    packed: Tensor, scale: Tensor, scale_2: Tensor, zero_point: Tensor, format: str, dtype: torch.dtype
) -> Tensor:
    """The values ``[N, K]`` of INT4 codes that stand for FP8 codes: ``((code - zero_point) * scale_2) * scale``.

    Args:
        packed: int32 ``[N, K/8]``.
        scale: float32 ``[]``, the FP8 stage's.
        scale_2: float32 ``[N]``, the INT4 stage's.
        zero_point: int32 ``[N/8]``.
        format: of :data:`FORMATS`.
        dtype: dtype of the result, cast to once, from float32.
    """
    return (dequantize_weight(packed, scale_2, zero_point, format, torch.float32) * scale).to(dtype)
