"""FP8, scaled per tensor, token, channel, group or block: E4M3 (largest 448), E5M2 (57344) and E4M3 "fnuz".

``x ~= code * scale``. All steps are in the dtype of ``x``, as amd-quark 0.13 does them: in bfloat16 the quotient and
the product are rounded to bfloat16 (``hw_emulation_interface.py: fake_quantize_fp8_per_tensor_with_scale``); those of
groups are in float32 (``fake_quantize_fp8_per_group_with_scale``). E4M3 is the OCP "fn" variant, without infinity; E5M2
has infinities, but nothing is quantized to one; "fnuz" is what the matrix cores of gfx94x read.
"""

import torch
from torch import Tensor

DTYPE = torch.float8_e4m3fn
DTYPES = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
FNUZ = torch.float8_e4m3fnuz

GRANULARITIES = ("per_tensor", "per_token", "per_channel")


def check_granularity(granularity: str) -> None:
    """Refuse a granularity that is not known.

    Raises:
        ValueError: names it and the known ones.
    """
    if granularity not in GRANULARITIES:
        raise ValueError(f"there is no granularity {granularity!r}; expected one of {', '.join(GRANULARITIES)}")


def max_value(dtype: torch.dtype) -> float:
    """What amax is scaled to: 448 (E4M3), 57344 (E5M2), 224 (fnuz: half of E4M3's, so that the codes are the same)."""
    return 224.0 if dtype == FNUZ else torch.finfo(dtype).max


def dynamic_scale(
    x: Tensor, granularity: str, dtype: torch.dtype = DTYPE, scale_dtype: torch.dtype | None = None
) -> Tensor:
    """``amax / max_value(dtype)`` in ``scale_dtype``.

    Args:
        x: floating point ``[M, K]``.
        granularity: ``"per_tensor"``, or ``"per_token"`` / ``"per_channel"`` (one scale a row: a token of an
            activation, an output channel of a weight).
        dtype: the FP8 dtype.
        scale_dtype: in which to divide; the dtype of ``x`` by default.

    Returns:
        The scale: ``[]`` per tensor, ``[M, 1]`` a row. A zero scale (of zeros, or by underflow) becomes ``2**-23``, as
        in amd-quark (``observer.py: eps``); a NaN or an infinity in the input makes its scale NaN or infinite.
    """
    check_granularity(granularity)
    if x.numel() == 0 and granularity == "per_tensor":
        return x.new_ones((), dtype=scale_dtype)  # of nothing, any scale: amax has none
    amax = x.abs().amax() if granularity == "per_tensor" else x.abs().amax(-1, keepdim=True)
    return _of_amax(amax if scale_dtype is None else amax.to(scale_dtype), dtype)


def _of_amax(amax: Tensor, dtype: torch.dtype) -> Tensor:
    # Constants through functions: Dynamo would make a module's float a symbolic input of a graph with dynamic=True.
    scale = amax / max_value(dtype)
    # A sum, not torch.where: its scalar would become a tensor constant of one device in every traced graph.
    return scale + (scale == 0).to(scale.dtype) * torch.finfo(torch.float32).eps


def quantize(x: Tensor, scale: Tensor, dtype: torch.dtype = DTYPE) -> Tensor:
    """``clamp(x / scale)`` to FP8.

    Args:
        x: floating point ``[M, K]``.
        scale: ``[]`` or ``[M, 1]``, in the dtype of ``x``; ``[]`` may be float32.
        dtype: the FP8 dtype.

    Returns:
        FP8 ``[M, K]``. The quotient is rounded to the dtype of ``x``, saturated to the largest finite value
        (infinity too), then rounded half to even; NaN stays NaN; the smallest magnitude of E4M3 is the subnormal
        ``2**-9``.
    """
    limit = max_value(dtype)
    # Written out what eager code does with a float32 scale of no dimension; compilers round the scale first.
    quotient = x / scale if scale.dtype == x.dtype else (x.to(scale.dtype) / scale).to(x.dtype)
    return quotient.clamp(-limit, limit).to(dtype)


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """An activation's values, ``code * scale`` in ``dtype`` (in bfloat16: one rounding, of the product).

    Args:
        codes: FP8 ``[M, K]``.
        scale: ``[]`` or ``[M, 1]`` in ``dtype``; ``[]`` may be float32.
        dtype: dtype of the result.

    Returns:
        ``[M, K]`` in ``dtype``; NaN codes and NaN scales give NaN.
    """
    return codes.to(dtype) * scale if scale.dtype == dtype else (codes.to(scale.dtype) * scale).to(dtype)


def dequantize_weight(
    codes: Tensor, scale: Tensor, dtype: torch.dtype, block_size: tuple[int, int] | None = None
) -> Tensor:
    """A weight's values, ``code * scale`` in float32, then one cast.

    Args:
        codes: FP8 ``[N, K]``.
        scale: ``[]`` (per tensor), ``[N]`` (per channel) or, with a block size ``(R, C)``, ``[ceil(N/R), ceil(K/C)]``.
        dtype: dtype of the result.
        block_size: rows and columns that share a scale.

    Returns:
        ``[N, K]`` in ``dtype``; NaN codes and NaN scales give NaN.
    """
    multiplier = scale.float()
    if block_size is not None:
        multiplier = _spread(multiplier, block_size, codes.shape)
    elif multiplier.ndim == codes.ndim - 1:
        multiplier = multiplier.unsqueeze(-1)
    return (codes.float() * multiplier).to(dtype)


def _spread(scale: Tensor, block_size: tuple[int, int], shape: torch.Size) -> Tensor:
    rows, columns = block_size
    spread = scale.repeat_interleave(rows, 0)[: shape[0]]
    return spread.repeat_interleave(columns, 1)[:, : shape[1]]


def quantize_groups(x: Tensor, group_size: int, dtype: torch.dtype = DTYPE) -> tuple[Tensor, Tensor]:
    """Quantize an activation with a scale for each group of neighbours along K.

    Args:
        x: floating point ``[M, K]``, K a multiple of ``group_size``.
        group_size: elements a group.
        dtype: the FP8 dtype.

    Returns:
        ``(codes [M, K], scales [M, K / group_size])``, the scales ``amax / max_value`` in the dtype of ``x`` (0 becomes
        ``2**-23``); the quotient is float32. NaN and saturation as in :func:`quantize`.
    """
    groups = x.unflatten(-1, (-1, group_size))
    scales = _of_amax(groups.abs().amax(-1), dtype)
    return quantize(groups.float(), scales.float().unsqueeze(-1), dtype).flatten(-2), scales


def dequantize_groups(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of :func:`quantize_groups`, ``code * scale`` in float32, then one cast: ``[M, K]`` in ``dtype``."""
    groups = codes.float().unflatten(-1, (scales.shape[-1], -1))
    return (groups * scales.float().unsqueeze(-1)).flatten(-2).to(dtype)


def quantize_blocks(weight: Tensor, block_size: tuple[int, int], dtype: torch.dtype = DTYPE) -> tuple[Tensor, Tensor]:
    """Quantize a weight with a float32 scale for each block of rows and columns.

    Args:
        weight: floating point ``[N, K]``; the last blocks may be cut off.
        block_size: rows and columns that share a scale.
        dtype: the FP8 dtype.

    Returns:
        ``(codes [N, K], scales [ceil(N/R), ceil(K/C)] float32)``; zero blocks have the scale ``2**-23``.
    """
    (n, k), (rows, columns) = weight.shape, block_size
    padded = torch.nn.functional.pad(weight.float(), (0, -k % columns, 0, -n % rows))
    scales = _of_amax(padded.abs().unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).amax((1, 3)), dtype)
    return quantize(weight.float(), _spread(scales, block_size, weight.shape), dtype), scales


def to_fnuz(codes: Tensor) -> Tensor:
    """E4M3 "fn" codes as "fnuz" codes of half the value: multiply the scale by 2.

    The bits stay; -0.0 (0x80), which is NaN in fnuz, becomes +0.0. Source: vLLM 0.33,
    ``quantization/utils/w8a8_utils.py: normalize_e4m3fn_to_e4m3fnuz``.
    """
    bits = codes.view(torch.uint8)
    return torch.where(bits == 0x80, 0, bits).to(torch.uint8).view(FNUZ)
