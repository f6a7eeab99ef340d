"""E8M0: a block scale that is a bare exponent. The byte ``b`` means ``2**(b - 127)``; 255 means NaN.

Source: OCP Microscaling Formats (MX) v1.0, section 5.4.1; the rules "even", "floor" and "ceil" as amd-quark 0.13
computes them (``quantization/utils.py: even_round``, ``quantization/observer/observer.py: get_scale``), "rceil" as
vLLM's ``Mxfp8OnlineLinearMethod`` (``layers/quantization/utils/mxfp8_utils.py`` in 0.33) and torchao know it.
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


def encode_log2(amax: Tensor, round_up: bool, max_exponent: int, dtype: torch.dtype) -> Tensor:
    """The shared scale of a block by rule "floor" or "ceil": ``2**(floor(log2(amax)) - max_exponent)``.

    The logarithm is rounded to the dtype of the tensor first, as amd-quark takes it: in bfloat16 the floor of
    log2(127.5) is 7.

    Args:
        amax: float32 >= 0, any shape, exact in ``dtype``.
        round_up: "ceil" instead of "floor".
        max_exponent: exponent of the largest normal of the element format.
        dtype: the tensor's dtype.

    Returns:
        uint8 of the same shape. amax 0 gives ``2**-23`` (code 104), infinity and NaN give 255. A scale that would be
        below ``2**-127`` is ``2**-127`` (code 0), where amd-quark goes on with what its dtype can still hold.
    """
    log = round_to(torch.log2(amax), dtype)
    exponent = (torch.ceil(log) if round_up else torch.floor(log)) - max_exponent
    code = (exponent.clamp(-BIAS, BIAS) + BIAS).to(torch.int32)
    code = torch.where(amax == 0, BIAS - 23, code)
    return torch.where(torch.isfinite(amax), code, NAN_CODE).to(torch.uint8)


def encode_rceil(amax: Tensor, max_value: float) -> Tensor:
    """The shared scale of a block by rule "rceil": ``2**ceil(log2(amax / max_value))``, so that nothing saturates.

    Args:
        amax: float32 >= 0, any shape: the largest magnitude of each block.
        max_value: largest magnitude of the element format (FP8 E4M3: 448).

    Returns:
        uint8 of the same shape: at least code 0, also for amax 0; infinity and NaN give 255.
    """
    quotient = amax / max_value
    bits = quotient.view(torch.int32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(torch.int32)
    code = torch.where(quotient <= 2.0**-BIAS, 0, exponent).clamp(max=NAN_CODE - 1)
    return torch.where(torch.isfinite(amax), code, NAN_CODE).to(torch.uint8)


def round_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 rounded half to even to what ``dtype`` can hold (bfloat16, else the cast there and back), still float32.

    Written on bits: a compiler that keeps bfloat16 numbers in float32 registers would drop a pair of casts.
    """
    if dtype != torch.bfloat16:
        return x.to(dtype).to(torch.float32)
    bits = x.view(torch.int32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).view(torch.float32)
    return torch.where(torch.isnan(x), x, rounded)
