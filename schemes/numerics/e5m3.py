"""E5M3: an unsigned 8-bit float, the block scale of AMDFP4: bias 15, largest 114688, smallest ``2**-17``, 255 is NaN.

Source: amd-quark 0.13, ``kernel/float8_e5m3/reference.py`` and ``lookup.py``.
"""

import torch
from torch import Tensor

MAX = 114688.0
NAN_CODE = 255


def encode(x: Tensor) -> Tensor:
    """Round to the nearest E5M3 code.

    Args:
        x: float32 >= 0, any shape.

    Returns:
        uint8 of the same shape. Round half to even, subnormals included (``2**-18`` and below give 0); above 114688
        saturates to 254; NaN and infinity give 255.
    """
    magnitude = x.clamp(max=MAX)
    exponent = (magnitude.view(torch.int32) >> 23).clamp(min=113)  # 2**-14, the smallest normal
    step = ((exponent - 3) << 23).view(torch.float32)
    rounded = torch.round(magnitude / step) * step
    normal = (rounded.view(torch.int32) >> 20) - (112 << 3)
    subnormal = (rounded * 2.0**17).to(torch.int32)
    code = torch.where(rounded < 2.0**-14, subnormal, normal)
    return torch.where(torch.isfinite(x), code, NAN_CODE).to(torch.uint8)


def decode(codes: Tensor) -> Tensor:
    """E5M3 codes (uint8, any shape) to their values, exactly, in float32; 255 is NaN."""
    c = codes.to(torch.int32)
    normal = ((c + (112 << 3)) << 20).view(torch.float32)
    magnitude = torch.where(c < 8, c.to(torch.float32) * 2.0**-17, normal)
    return torch.where(c == NAN_CODE, torch.nan, magnitude)
