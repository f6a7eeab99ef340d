"""FP6, E2M3 (largest 7.5) and E3M2 (largest 28): sign, exponent, mantissa; four codes to three bytes.

Source: OCP Microscaling Formats (MX) v1.0, section 5.3.2; rounding as in amd-quark 0.13
(``kernel/hw_emulation/csrc/mx/funcs.cuh: fake_quantize_element``), packing as in ``utils/pack.py: Pack_fp6``.
"""

import torch
from torch import Tensor

from quark_inductor.schemes.numerics import minifloat


def _smallest_exponent(mantissa_bits: int) -> int:
    return 2 - (1 << (4 - mantissa_bits))  # five bits of exponent and mantissa: a bias of 1 (E2M3) or 3 (E3M2)


def max_value(mantissa_bits: int) -> float:
    """The largest magnitude: 7.5 with 3 mantissa bits (E2M3), 28 with 2 (E3M2)."""
    return 7.5 if mantissa_bits == 3 else 28.0


def encode(x: Tensor, mantissa_bits: int) -> Tensor:
    """Round to the nearest FP6 code.

    Args:
        x: float32, any shape, already divided by its scale.
        mantissa_bits: 3 for E2M3, 2 for E3M2.

    Returns:
        int32 codes 0..63 of the same shape, ``sign << 5 | exponent << mantissa_bits | mantissa``. Round half to even;
        magnitudes above the largest and infinity saturate to it; whatever rounds to zero becomes +0 (code 0, never
        32). FP6 has no NaN: a NaN gives an unspecified int32, its block's scale must carry it.
    """
    magnitude = x.abs().clamp(max=max_value(mantissa_bits))
    code = minifloat.encode(magnitude, mantissa_bits, _smallest_exponent(mantissa_bits))
    return torch.where((x < 0) & (code > 0), code + 32, code)


def decode(codes: Tensor, mantissa_bits: int) -> Tensor:
    """FP6 codes to their values.

    Args:
        codes: int32 0..63, any shape.
        mantissa_bits: 3 for E2M3, 2 for E3M2.

    Returns:
        float32 of the same shape. Code 32 is -0.0.
    """
    magnitude = minifloat.decode(codes & 31, mantissa_bits, _smallest_exponent(mantissa_bits))
    return torch.where((codes & 32) != 0, -magnitude, magnitude)


def pack(codes: Tensor) -> Tensor:
    """int32 codes ``[..., K]`` to uint8 ``[..., 3 K / 4]``: elements 4i to 4i + 3 as 24 bits, the first lowest."""
    v = codes.unflatten(-1, (-1, 4))
    bits = v[..., 0] + (v[..., 1] << 6) + (v[..., 2] << 12) + (v[..., 3] << 18)
    return torch.stack((bits & 255, (bits >> 8) & 255, bits >> 16), dim=-1).flatten(-2).to(torch.uint8)


def unpack(packed: Tensor) -> Tensor:
    """uint8 ``[..., 3 K / 4]`` to int32 codes ``[..., K]``, the inverse of :func:`pack`."""
    b = packed.to(torch.int32).unflatten(-1, (-1, 3))
    bits = b[..., 0] + (b[..., 1] << 8) + (b[..., 2] << 16)
    return torch.stack((bits & 63, (bits >> 6) & 63, (bits >> 12) & 63, bits >> 18), dim=-1).flatten(-2)
