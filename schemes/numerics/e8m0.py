"""E8M0: a block scale that is a bare exponent. The byte ``b`` means ``2**(b - 127)``; 255 means NaN.

Source: OCP Microscaling Formats (MX) v1.0, section 5.4.1; the rule "even" as amd-quark 0.13 computes it
(``quark/torch/quantization/utils.py: even_round``).
"""

import torch
from torch import Tensor

BIAS = 127
NAN_CODE = 255


def decode(codes: Tensor) -> Tensor:
    """E8M0 bytes to their values.

    Args:
        codes: uint8, any shape; a power of two biased by 127.

    Returns:
        float32 of the same shape: ``2**(code - 127)``, exactly. Code 0 is the subnormal ``2**-127``, code 255 is NaN.
    """
    exponent = codes.to(torch.int32)
    bits = exponent << 23
    # Code 0 would shift to +0.0: 2**-127 is a float32 subnormal whose only bit is the top one of the mantissa.
    bits = torch.where(exponent == 0, 0x00400000, bits)
    bits = torch.where(exponent == NAN_CODE, 0x7FC00000, bits)
    return bits.view(torch.float32)


def encode_even(amax: Tensor, mantissa_bits: int, max_exponent: int) -> Tensor:
    """The shared scale of a block by rule "even": round amax to a power of two as the element format would round it.

    ``scale = 2**(floor(log2(r)) - max_exponent)`` where ``r`` is ``amax`` with half a unit of the element's last
    mantissa bit added, so that FP4 rounds the exponent up from ``amax >= 1.75 * 2**n``: a scaled amax then lies in
    [3.5, 7) and values above 6 saturate.

    Args:
        amax: float32 >= 0, any shape: the largest magnitude of each block.
        mantissa_bits: explicit mantissa bits of the element format (FP4 E2M1: 1).
        max_exponent: exponent of the largest normal of the element format (FP4 E2M1: 2).

    Returns:
        uint8 of the same shape, clamped to the codes 0..254. amax 0 or subnormal gives 0 (``2**-127``), infinity
        and anything that rounds up to ``2**128`` give 254 (``2**127``), NaN gives 255.
    """
    bits = amax.view(torch.int32)
    exponent = (bits + (1 << (22 - mantissa_bits))) >> 23  # 255 when the sum overflowed or amax is infinite
    code = torch.where(exponent >= 255, 254, (exponent - max_exponent).clamp(min=0))
    return torch.where(torch.isnan(amax), NAN_CODE, code).to(torch.uint8)
