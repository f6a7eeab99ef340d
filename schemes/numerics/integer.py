"""Integers of 8 and 4 bits with a scale and a zero point: ``x ~= (code - zero_point) * scale``.

Source: amd-quark 0.13, ``observer.py: calculate_int_quant_params`` (scales and zero points, in the dtype of the
tensor), ``hw_emulation_interface.py: fake_quantize_int_*, real_quantize_int_*, dequantize_int_*`` (float32).
"""

import torch
from torch import Tensor

# Smallest and largest code.
BOUNDS = {"int8": (-128, 127), "uint8": (0, 255), "int4": (-8, 7), "uint4": (0, 15)}


def codes_dtype(dtype: str) -> torch.dtype:
    """In which torch dtype codes are held, unpacked: uint8 for unsigned, int8 for signed ones."""
    return torch.uint8 if dtype.startswith("u") else torch.int8


def parameters(x: Tensor, dtype: str, symmetric: bool, axis: int | None) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a tensor.

    Args:
        x: floating point.
        dtype: ``"int8"``, ``"uint8"``, ``"int4"`` or ``"uint4"``.
        symmetric: scale ``amax / 127.5`` (half the number of steps) and zero point 0; else scale ``(max - min) / 255``,
            the range widened to hold 0, and the zero point that puts 0 on a code.
        axis: what to reduce over (kept as a dimension of 1), or ``None`` for the whole tensor.

    Returns:
        ``(scale, zero_point)``, scale in the dtype of ``x`` (float32 for a whole tensor, as amd-quark has it), at least
        ``2**-23``; zero point int32, rounded half to even. NaN gives a NaN scale.
    """
    low, high = BOUNDS[dtype]
    if axis is None:
        if x.numel() == 0:
            return x.new_ones((), dtype=torch.float32), x.new_zeros((), dtype=torch.int32)
        smallest, largest = x.amin().clamp(max=0), x.amax().clamp(min=0)
    else:
        smallest, largest = x.amin(axis, keepdim=True).clamp(max=0), x.amax(axis, keepdim=True).clamp(min=0)
    steps = high - low
    scale = torch.maximum(-smallest, largest) / (steps / 2) if symmetric else (largest - smallest) / steps
    if axis is None:
        scale = scale.to(torch.float32)
    scale = scale.clamp(min=torch.finfo(torch.float32).eps)
    if symmetric:
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    zero_point = low - torch.round(smallest / scale)
    return scale, zero_point.clamp(low, high).to(torch.int32)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, dtype: str) -> Tensor:
    """``clamp(round(x / scale) + zero_point)``, in float32, of an activation.

    Args:
        x: floating point.
        scale: floating point, broadcast to ``x``.
        zero_point: integer, broadcast to ``x``.
        dtype: ``"int8"``, ...

    Returns:
        Codes in :func:`codes_dtype`. ``x`` is multiplied by the float32 reciprocal of the scale and rounded half to
        even; infinity saturates; NaN gives an unspecified code.
    """
    low, high = BOUNDS[dtype]
    quotient = torch.round(x.float() * (1.0 / scale.float()))
    return (quotient + zero_point.to(torch.float32)).clamp(low, high).to(codes_dtype(dtype))


def quantize_groups(x: Tensor, group_size: int, dtype: str, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize an activation with a scale and zero point for each group of neighbours along K.

    Args:
        x: floating point ``[M, K]``, K a multiple of ``group_size``.
        group_size: elements a group.
        dtype: ``"int8"``, ...
        symmetric: as in :func:`parameters`.

    Returns:
        Codes ``[M, K]``, scales and zero points ``[M, K / group_size]``.
    """
    groups = x.unflatten(-1, (-1, group_size))
    scale, zero_point = parameters(groups, dtype, symmetric, -1)
    codes = quantize(groups, scale, zero_point, dtype).flatten(-2)
    return codes, scale.squeeze(-1), zero_point.squeeze(-1)


def quantize_weight(weight: Tensor, scale: Tensor, zero_point: Tensor, dtype: str) -> Tensor:
    """:func:`quantize` as amd-quark does it to a weight: twice.

    It freezes the model, which rounds the weights to their dequantized values in the model's dtype, and quantizes those
    again when it exports them, adding the zero point before it rounds (``real_quantize_int_*``). In bfloat16 an
    asymmetric 8-bit code may move by one.
    """
    low, high = BOUNDS[dtype]
    frozen = dequantize(quantize(weight, scale, zero_point, dtype), scale, zero_point, weight.dtype)
    quotient = torch.round(frozen.float() * (1.0 / scale.float()) + zero_point.to(torch.float32))
    return quotient.clamp(low, high).to(codes_dtype(dtype))


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, dtype: torch.dtype) -> Tensor:
    """``(code - zero_point) * scale`` in float32, then one cast.

    Args:
        codes: integers.
        scale: floating point, broadcast to ``codes``.
        zero_point: integer, broadcast to ``codes``.
        dtype: dtype of the result.
    """
    return ((codes.to(torch.float32) - zero_point.to(torch.float32)) * scale.float()).to(dtype)


def dequantize_groups(codes: Tensor, scale: Tensor, zero_point: Tensor, dtype: torch.dtype) -> Tensor:
    """:func:`dequantize` of codes ``[N, K]`` with scales and zero points ``[N, K/G]``."""
    groups = codes.unflatten(-1, (scale.shape[-1], -1))
    return dequantize(groups, scale.unsqueeze(-1), zero_point.unsqueeze(-1), dtype).flatten(-2)


def dequantize_weight(codes: Tensor, scale: Tensor, zero_point: Tensor, dtype: torch.dtype) -> Tensor:
    """:func:`dequantize` of codes ``[N, K]`` with scales and zero points ``[]``, ``[N]`` or ``[N, K/G]``."""
    if scale.ndim == 2:
        return dequantize_groups(codes, scale, zero_point, dtype)
    if scale.ndim == 1:
        scale, zero_point = scale.unsqueeze(-1), zero_point.unsqueeze(-1)
    return dequantize(codes, scale, zero_point, dtype)


def quantized_weight(
    weight: Tensor, dtype: str, symmetric: bool, per_tensor: bool = False, group_size: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zero points of a weight by :func:`parameters` and :func:`quantize_weight`.

    Args:
        weight: float ``[N, K]``.
        dtype: ``"int8"``, ...
        symmetric: the zero points are 0.
        per_tensor: one scale for all, else one a row or
        group_size: one for so many neighbours in a row.

    Returns:
        Codes ``[N, K]``; scales and zero points ``[]``, ``[N]`` or ``[N, K/G]``, zero points int32.
    """
    blocks = weight if group_size is None else weight.unflatten(-1, (-1, group_size))
    scale, zero_point = parameters(blocks, dtype, symmetric, None if per_tensor else -1)
    codes = quantize_weight(blocks, scale, zero_point, dtype).view(weight.shape)
    return (codes, scale, zero_point) if per_tensor else (codes, scale.squeeze(-1), zero_point.squeeze(-1))
