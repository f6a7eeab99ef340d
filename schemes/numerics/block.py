"""Block formats of the OCP MX family: blocks of 32 along the last dimension, one E8M0 scale each.

``x[..., 32*i + j] ~= element[..., 32*i + j] * 2**(scale[..., i] - 127)``. Formats: ``mxfp4`` (FP4 E2M1 elements).
Source: OCP Microscaling Formats (MX) v1.0, section 5; amd-quark 0.13, ``observer.py: get_scale`` (scale rules) and
``hw_emulation_interface.py: fake_quantize_fp4_fp6_per_group_with_scale``.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from quark_inductor.schemes.numerics import e8m0, fp4

BLOCK = 32
FORMATS = ("mxfp4",)
SCALE_RULES = ("even",)


def check_names(*formats: str, scale_rule: str = "even") -> None:
    """Refuse a format or a scale rule that is not known.

    Raises:
        ValueError: names it and the known ones.
    """
    if unknown := [f for f in formats if f not in FORMATS]:
        raise ValueError(f"there is no block format {unknown[0]!r}; expected one of {', '.join(FORMATS)}")
    if scale_rule not in SCALE_RULES:
        raise ValueError(f"there is no scale rule {scale_rule!r}; expected one of {', '.join(SCALE_RULES)}")


def quantize(x: Tensor, format: str, scale_rule: str) -> tuple[Tensor, Tensor]:
    """Quantize to a block format, in float32.

    Args:
        x: floating point ``[..., K]``, K a multiple of 32.
        format: ``"mxfp4"``.
        scale_rule: ``"even"``, see :func:`e8m0.encode_even`.

    Returns:
        ``(codes, scales)``: uint8 ``[..., K / 2]`` (two FP4 codes a byte, element 2i low) and uint8 E8M0
        ``[..., K / 32]``. Elements round half to even and saturate. A zero block has scale code 0; a block with a NaN
        has scale code 255, so all of it is NaN; a block with an infinity has scale code 254, and dequantizes to
        infinity there.
    """
    check_names(format, scale_rule=scale_rule)
    blocks = x.float().unflatten(-1, (-1, BLOCK))
    scales = e8m0.encode_even(blocks.abs().amax(-1), fp4.MANTISSA_BITS, fp4.MAX_EXPONENT)
    codes = fp4.encode(blocks / e8m0.decode(scales).unsqueeze(-1))
    return fp4.pack(codes.flatten(-2)), scales


def dequantize(codes: Tensor, scales: Tensor, format: str, dtype: torch.dtype) -> Tensor:
    """The values of a quantized tensor: ``element * scale`` in float32, then one cast (exact in bfloat16).

    Args:
        codes: uint8 ``[..., K / 2]``.
        scales: uint8 E8M0 ``[..., K / 32]``; a power of two biased by 127.
        format: ``"mxfp4"``.
        dtype: dtype of the result.

    Returns:
        ``[..., K]`` in ``dtype``. A scale code 255 makes its block NaN; 254 with an element >= 2 is infinite.
    """
    check_names(format)
    elements = fp4.decode(fp4.unpack(codes)).unflatten(-1, (-1, BLOCK))
    return (elements * e8m0.decode(scales).unsqueeze(-1)).flatten(-2).to(dtype)


@functools.cache
def _byte_values(device: torch.device) -> Tensor:
    """float32 ``[256, 2]``: the two FP4 values of every byte."""
    return fp4.decode(fp4.unpack(torch.arange(256, dtype=torch.uint8, device=device).unsqueeze(-1)))


def dequantize_by_table(codes: Tensor, scales: Tensor, format: str, dtype: torch.dtype) -> Tensor:
    """:func:`dequantize`, faster when run eagerly, and of no use in a graph, where tables do not vectorize."""
    check_names(format)
    elements = F.embedding(codes.to(torch.int32), _byte_values(codes.device)).flatten(-2).unflatten(-1, (-1, BLOCK))
    return (elements * e8m0.decode(scales).unsqueeze(-1)).flatten(-2).to(dtype)
