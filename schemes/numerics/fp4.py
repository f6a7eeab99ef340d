"""FP4 E2M1: the values 0, 0.5, 1, 1.5, 2, 3, 4, 6 with a sign, two codes to a byte.

Source: OCP Microscaling Formats (MX) v1.0, section 5.3.3; rounding as in amd-quark 0.13
(``kernel/hw_emulation/csrc/mx/funcs.cuh: fake_quantize_element``), packing as in ``utils/pack.py: Pack_fp4``.
"""

import torch
from torch import Tensor

MAX = 6.0
MANTISSA_BITS = 1
MAX_EXPONENT = 2


def encode(x: Tensor) -> Tensor:
    """Round to the nearest FP4 code.

    Args:
        x: float32, any shape, already divided by its scale.

    Returns:
        int32 codes 0..15 of the same shape, ``sign << 3 | exponent << 1 | mantissa``. Round half to even
        (0.25 -> 0, 0.75 -> 1, 2.5 -> 2, 5 -> 4); magnitudes above 6 and infinity saturate to 6; whatever rounds to
        zero becomes +0 (code 0, never 8). FP4 has no NaN: a NaN gives an unspecified int32, its block's scale
        must carry it.
    """
    magnitude = x.abs().clamp(max=MAX)
    # The spacing of the codes is 0.5 below 2, 1 below 4 and 2 from there on.
    step = torch.where(magnitude < 2.0, 0.5, torch.where(magnitude < 4.0, 1.0, 2.0))
    rounded = torch.round(magnitude / step) * step
    small, large = rounded * 2.0, rounded * 0.5 + 4.0
    code = torch.where(rounded < 2.0, small, torch.where(rounded < 4.0, rounded + 2.0, large)).to(torch.int32)
    return torch.where((x < 0) & (code > 0), code + 8, code)


def decode(codes: Tensor) -> Tensor:
    """FP4 codes to their values.

    Args:
        codes: int32 0..15, any shape (int32, not uint8: Inductor vectorizes no comparison on bytes).

    Returns:
        float32 of the same shape. Code 8 is -0.0.
    """
    m = (codes & 7).to(torch.float32)
    magnitude = torch.where(m < 4.0, m * 0.5, torch.where(m < 6.0, m - 2.0, m * 2.0 - 8.0))
    return torch.where((codes & 8) != 0, -magnitude, magnitude)


def pack(codes: Tensor) -> Tensor:
    """int32 codes ``[..., K]`` to uint8 ``[..., K / 2]``: element 2i in the low nibble, 2i + 1 in the high one."""
    pairs = codes.unflatten(-1, (-1, 2))
    return (pairs[..., 0] + pairs[..., 1] * 16).to(torch.uint8)


def unpack(packed: Tensor) -> Tensor:
    """uint8 ``[..., K / 2]`` to int32 codes ``[..., K]``, the inverse of :func:`pack`."""
    b = packed.to(torch.int32)
    return torch.stack((b & 15, b >> 4), dim=-1).flatten(-2)
