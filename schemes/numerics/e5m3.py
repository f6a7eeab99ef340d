"""E5M3: an unsigned 8-bit float, the block scale of AMDFP4: bias 15, largest 114688, smallest ``2**-17``, 255 is NaN.

Source: amd-quark 0.13, ``kernel/float8_e5m3/reference.py`` and ``lookup.py``.
"""

import torch
from torch import Tensor

from quark_inductor.schemes.numerics import minifloat

MAX = 114688.0
MANTISSA_BITS = 3
SMALLEST_EXPONENT = -14
NAN_CODE = 255


def encode(x: Tensor) -> Tensor:
    """Round to the nearest E5M3 code.

    Args:
        x: float32 >= 0, any shape.

    Returns:
        uint8 of the same shape. Round half to even, subnormals included (``2**-18`` and below give 0); above 114688
        saturates to 254; NaN and infinity give 255.
    """
    code = minifloat.encode(x.clamp(max=MAX), MANTISSA_BITS, SMALLEST_EXPONENT)
    return torch.where(torch.isfinite(x), code, NAN_CODE).to(torch.uint8)


def decode(codes: Tensor) -> Tensor:
    """E5M3 codes (uint8, any shape) to their values, exactly, in float32; 255 is NaN."""
    c = codes.to(torch.int32)
    return torch.where(c == NAN_CODE, torch.nan, minifloat.decode(c, MANTISSA_BITS, SMALLEST_EXPONENT))
