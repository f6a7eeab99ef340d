"""FP8 E4M3 (OCP "fn" variant: no infinity, largest finite value 448), scaled per tensor, token or channel.

``x ~= code * scale``. All steps are in the dtype of ``x``, as amd-quark 0.13 does them: in bfloat16 the quotient and
the product are rounded to bfloat16 (``hw_emulation_interface.py: fake_quantize_fp8_per_tensor_with_scale``).
"""

import torch
from torch import Tensor

DTYPE = torch.float8_e4m3fn


GRANULARITIES = ("per_tensor", "per_token", "per_channel")


def check_granularity(granularity: str) -> None:
    """Refuse a granularity that is not known.

    Raises:
        ValueError: names it and the known ones.
    """
    if granularity not in GRANULARITIES:
        raise ValueError(f"there is no granularity {granularity!r}; expected one of {', '.join(GRANULARITIES)}")


def dynamic_scale(x: Tensor, granularity: str) -> Tensor:
    """``amax / 448`` in the dtype of ``x``.

    Args:
        x: floating point ``[M, K]``.
        granularity: ``"per_tensor"``, or ``"per_token"`` / ``"per_channel"`` (one scale a row: a token of an
            activation, an output channel of a weight).

    Returns:
        The scale in the dtype of ``x``: ``[]`` per tensor, ``[M, 1]`` a row. A zero scale (of zeros, or by underflow)
        becomes ``2**-23``, as in amd-quark (``observer.py: eps``); a NaN
        or an infinity in the input makes its scale NaN or infinite.
    """
    check_granularity(granularity)
    if x.numel() == 0 and granularity == "per_tensor":
        return x.new_ones(())  # of nothing, any scale: amax has none
    amax = x.abs().amax() if granularity == "per_tensor" else x.abs().amax(-1, keepdim=True)
    # Constants through finfo: Dynamo would make a module's float a symbolic input of a graph with dynamic=True.
    scale = amax / torch.finfo(DTYPE).max
    # A sum, not torch.where: its scalar would become a tensor constant of one device in every traced graph.
    return scale + (scale == 0).to(scale.dtype) * torch.finfo(torch.float32).eps


def quantize(x: Tensor, scale: Tensor) -> Tensor:
    """``clamp(x / scale, -448, 448)`` to E4M3.

    Args:
        x: floating point ``[M, K]``.
        scale: ``[]`` or ``[M, 1]``, in the dtype of ``x``.

    Returns:
        float8_e4m3fn ``[M, K]``. The quotient is rounded to the dtype of ``x``, saturated to +-448 (infinity too), then
        rounded half to even; NaN stays NaN; the smallest magnitude is the subnormal ``2**-9``.
    """
    limits = torch.finfo(DTYPE)
    return (x / scale).clamp(limits.min, limits.max).to(DTYPE)


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """An activation's values, ``code * scale`` in ``dtype`` (in bfloat16: one rounding, of the product).

    Args:
        codes: float8_e4m3fn ``[M, K]``.
        scale: ``[]`` or ``[M, 1]`` in ``dtype``.
        dtype: dtype of the result.

    Returns:
        ``[M, K]`` in ``dtype``; NaN codes and NaN scales give NaN.
    """
    return codes.to(dtype) * scale


def dequantize_weight(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight's values, ``code * scale`` in float32, then one cast.

    Args:
        codes: float8_e4m3fn ``[N, K]``.
        scale: ``[]`` (per tensor) or ``[N]`` (per channel), floating point.
        dtype: dtype of the result.

    Returns:
        ``[N, K]`` in ``dtype``; NaN codes and NaN scales give NaN.
    """
    multiplier = scale.float()
    if multiplier.ndim == 1:
        multiplier = multiplier.unsqueeze(-1)
    return (codes.float() * multiplier).to(dtype)
