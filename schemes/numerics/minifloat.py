"""Small floats by their bits: what FP6 and E5M3 have in common. Magnitudes only; a sign is the format's affair."""

import torch
from torch import Tensor


def encode(magnitude: Tensor, mantissa_bits: int, smallest_exponent: int) -> Tensor:
    """Round to the nearest code.

    Args:
        magnitude: float32 >= 0, any shape, not above the format's largest number. NaN gives an unspecified code.
        mantissa_bits: explicit mantissa bits.
        smallest_exponent: exponent of the smallest normal number.

    Returns:
        int32 codes of the same shape, ``exponent << mantissa_bits | mantissa``. Round half to even, subnormals too.
    """
    exponent = (magnitude.view(torch.int32) >> 23).clamp(min=127 + smallest_exponent)
    step = ((exponent - mantissa_bits) << 23).view(torch.float32)  # the spacing of the codes at this magnitude
    rounded = torch.round(magnitude / step) * step
    normal = (rounded.view(torch.int32) >> (23 - mantissa_bits)) - ((126 + smallest_exponent) << mantissa_bits)
    subnormal = (rounded * 2.0 ** (mantissa_bits - smallest_exponent)).to(torch.int32)
    return torch.where(rounded < 2.0**smallest_exponent, subnormal, normal)


def decode(codes: Tensor, mantissa_bits: int, smallest_exponent: int) -> Tensor:
    """int32 codes as :func:`encode` makes them to their values, exactly, in float32."""
    normal = ((codes + ((126 + smallest_exponent) << mantissa_bits)) << (23 - mantissa_bits)).view(torch.float32)
    subnormal = codes.to(torch.float32) * 2.0 ** (smallest_exponent - mantissa_bits)
    return torch.where(codes < (1 << mantissa_bits), subnormal, normal)
