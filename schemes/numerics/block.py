"""Block formats: blocks of 32 or 16 along the last dimension share a scale of 8 bits.

``x[..., B*i + j] ~= element[..., B*i + j] * scale[..., i]``, for a format with a global scale (float32, one per tensor)
times that. Formats:

=================  =======  =========  ===================  ============
name               block B  element    scale                global scale
=================  =======  =========  ===================  ============
``mxfp4``          32       FP4 E2M1   E8M0                 no
``mxfp6_e2m3``     32       FP6 E2M3   E8M0                 no
``mxfp6_e3m2``     32       FP6 E3M2   E8M0                 no
``mxfp8_e4m3``     32       FP8 E4M3   E8M0                 no
``mxfp8_e5m2``     32       FP8 E5M2   E8M0                 no
``nvfp4``          16       FP4 E2M1   FP8 E4M3             yes
``amdfp4_g16``     16       FP4 E2M1   E5M3                 no
``amdfp4_g32``     32       FP4 E2M1   E5M3                 no
=================  =======  =========  ===================  ============

Source: OCP Microscaling Formats (MX) v1.0, section 5; amd-quark 0.13, ``observer.py: get_scale`` (scale rules),
``hw_emulation_interface.py: fake_quantize_fp4_fp6_per_group_with_scale, fake_quantize_fp8_per_group_with_scale`` and
``export/nn/modules/realquantizer.py: SequentialRealQuantizer`` (global scales).
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from quark_inductor.schemes.numerics import e5m3, e8m0, fp4, fp6


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockFormat:
    """What a block format is made of.

    Attributes:
        size: elements a block.
        element: ``"fp4"``, ``"fp6_e2m3"``, ``"fp6_e3m2"``, ``"fp8_e4m3"`` or ``"fp8_e5m2"``.
        scale: ``"e8m0"``, ``"e4m3"`` or ``"e5m3"``.
        has_global_scale: a float32 scale of the whole tensor multiplies the blocks' scales.
    """

    size: int
    element: str
    scale: str
    has_global_scale: bool = False

    @property
    def codes_dtype(self) -> torch.dtype:
        """Dtype of a tensor of codes: the FP8 dtype, or uint8 for packed codes."""
        return _FP8.get(self.element, torch.uint8)

    @property
    def scales_dtype(self) -> torch.dtype:
        """Dtype of a tensor of block scales."""
        return torch.float8_e4m3fn if self.scale == "e4m3" else torch.uint8

    @property
    def scale_rules(self) -> tuple[str, ...]:
        """The rules by which a scale follows from its block, the default first."""
        if self.scale == "e8m0":
            return ("even", "floor", "ceil", "rceil") if self.element == "fp8_e4m3" else ("even", "floor", "ceil")
        return ("combined", "sequential") if self.has_global_scale else ("nearest",)

    def global_scale(self, amax: Tensor) -> Tensor:
        """float32 ``[]``: the global scale of a tensor with this largest magnitude, ``2**-23`` if that is 0.

        One division, by the largest element times the largest block scale (6 * 448).
        """
        scale = amax.float() / (fp4.MAX * torch.finfo(torch.float8_e4m3fn).max)
        return torch.where(scale == 0, torch.finfo(torch.float32).eps, scale)

    def packed(self, k: int) -> int:
        """Entries of a tensor of codes for K elements."""
        return k * _BITS[self.element] // 8

    def unpacked(self, entries: int) -> int:
        """K, from the entries of a tensor of codes."""
        return entries * 8 // _BITS[self.element]


_FP8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
_BITS = {"fp4": 4, "fp6_e2m3": 6, "fp6_e3m2": 6, "fp8_e4m3": 8, "fp8_e5m2": 8}
# Explicit mantissa bits and largest exponent of an element format: what the OCP scale rules need to know.
_SHAPE = {"fp4": (1, 2), "fp6_e2m3": (3, 2), "fp6_e3m2": (2, 4), "fp8_e4m3": (3, 8), "fp8_e5m2": (2, 15)}

BLOCK_FORMATS: dict[str, BlockFormat] = {
    "mxfp4": BlockFormat(size=32, element="fp4", scale="e8m0"),
    "mxfp6_e2m3": BlockFormat(size=32, element="fp6_e2m3", scale="e8m0"),
    "mxfp6_e3m2": BlockFormat(size=32, element="fp6_e3m2", scale="e8m0"),
    "mxfp8_e4m3": BlockFormat(size=32, element="fp8_e4m3", scale="e8m0"),
    "mxfp8_e5m2": BlockFormat(size=32, element="fp8_e5m2", scale="e8m0"),
    "nvfp4": BlockFormat(size=16, element="fp4", scale="e4m3", has_global_scale=True),
    "amdfp4_g16": BlockFormat(size=16, element="fp4", scale="e5m3"),
    "amdfp4_g32": BlockFormat(size=32, element="fp4", scale="e5m3"),
}


def named(name: str) -> BlockFormat:
    """The format of a name.

    Raises:
        ValueError: there is none; names the known ones.
    """
    if name not in BLOCK_FORMATS:
        raise ValueError(f"there is no block format {name!r}; expected one of {', '.join(BLOCK_FORMATS)}")
    return BLOCK_FORMATS[name]


def check(name: str, *, scale_rule: str | None = None, global_scale: object = None) -> BlockFormat:
    """The format of a name, used with a scale rule and a global scale.

    Raises:
        ValueError: an unknown format or rule, a global scale too few or too many.
    """
    format = named(name)
    if scale_rule is not None and scale_rule not in format.scale_rules:
        raise ValueError(
            f"there is no scale rule {scale_rule!r} for {name}; expected one of {', '.join(format.scale_rules)}"
        )
    if (global_scale is not None) != format.has_global_scale:
        raise ValueError(f"{name} {'needs a' if format.has_global_scale else 'has no'} global scale")
    return format


def quantize(x: Tensor, name: str, scale_rule: str, global_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantize to a block format, in float32.

    Args:
        x: floating point ``[..., K]``, K a multiple of the block.
        name: the format.
        scale_rule: for E8M0 ``"even"``, ``"floor"``, ``"ceil"`` or ``"rceil"`` (see :mod:`.e8m0`). For E5M3
            ``"nearest"``: ``amax / 6`` in the dtype of ``x``, rounded. With a global scale ``"sequential"``, as
            amd-quark quantizes activations, ``(amax / 6) / global_scale``, or ``"combined"``, as it quantizes weights,
            ``amax / (global_scale * 6)``, where a scale that rounds to 0 becomes 1.
        global_scale: float32 ``[]``, for the formats that have one; a multiplier.

    Returns:
        ``(codes, scales)``: codes ``[..., packed(K)]`` (uint8, two FP4 codes a byte with element 2i low, or four FP6
        codes in three bytes; or FP8), scales ``[..., K / B]``. Elements round half to even and saturate. A block with
        a NaN has a NaN scale, so all of it is NaN. A block with an infinity has the largest scale with rule "even", and
        dequantizes to infinity there; with every other rule it has a NaN scale. A block whose scale rounds to 0 has the
        codes of ``x * 2**23``, as amd-quark computes them.
    """
    format = check(name, scale_rule=scale_rule, global_scale=global_scale)
    blocks = x.float().unflatten(-1, (-1, format.size))
    scales = _block_scales(blocks.abs().amax(-1), format, scale_rule, global_scale, x.dtype)
    # eps: what amd-quark divides by where a scale is 0.
    multiplier = _multipliers(scales, format, global_scale, torch.finfo(torch.float32).eps)
    codes = _encode(blocks / multiplier.unsqueeze(-1), format.element)
    return _pack(codes.flatten(-2), format.element), scales


def dequantize(
    codes: Tensor,
    scales: Tensor,
    name: str,
    dtype: torch.dtype,
    global_scale: Tensor | None = None,
    zero_scale: float = 0.0,
) -> Tensor:
    """The values of a quantized tensor: ``element * scale`` in float32, then one cast (exact in bfloat16 for MX).

    Args:
        codes: ``[..., packed(K)]`` as :func:`quantize` makes them.
        scales: ``[..., K / B]``.
        name: the format.
        dtype: dtype of the result.
        global_scale: float32 ``[]``, for the formats that have one.
        zero_scale: what a block scale of 0 stands for. amd-quark computes an AMDFP4 activation with ``2**-23`` there.

    Returns:
        ``[..., K]`` in ``dtype``. A NaN scale (E8M0 and E5M3 code 255, E4M3 NaN) makes its block NaN.
    """
    format = check(name, global_scale=global_scale)
    elements = _decode(_unpack(codes, format.element), format.element)
    return _scaled(elements, scales, format, dtype, global_scale, zero_scale)


# Elements that are dequantized together: what lies between codes and result is several times as large as both, and
# memory that is new each time is slow.
_AT_ONCE = 1 << 18


@functools.cache
def _byte_values(device: torch.device) -> Tensor:
    """float32 ``[256, 2]``: the two FP4 values of every byte."""
    return fp4.decode(fp4.unpack(torch.arange(256, dtype=torch.uint8, device=device).unsqueeze(-1)))


def dequantize_by_table(
    codes: Tensor,
    scales: Tensor,
    name: str,
    dtype: torch.dtype,
    global_scale: Tensor | None = None,
    zero_scale: float = 0.0,
) -> Tensor:
    """:func:`dequantize`, faster when run eagerly, and of no use in a graph, where tables do not vectorize."""
    format = check(name, global_scale=global_scale)
    if format.element != "fp4":
        return dequantize(codes, scales, name, dtype, global_scale, zero_scale)
    values, k = _byte_values(codes.device), 2 * codes.shape[-1]
    result = torch.empty(*codes.shape[:-1], k, dtype=dtype, device=codes.device)
    n, rows = math.prod(codes.shape[:-1]), max(1, _AT_ONCE // max(1, k))
    parts = (t.reshape(n, t.shape[-1]).split(rows) for t in (codes, scales, result))
    for some_codes, some_scales, part in zip(*parts, strict=True):
        elements = F.embedding(some_codes.to(torch.int32), values).flatten(-2)
        part.copy_(_scaled(elements, some_scales, format, dtype, global_scale, zero_scale))
    return result


def _scaled(
    elements: Tensor, scales: Tensor, format: BlockFormat, dtype: torch.dtype, global_scale: Tensor | None, zero: float
) -> Tensor:
    multiplier = _multipliers(scales, format, global_scale, zero)
    return (elements.unflatten(-1, (-1, format.size)) * multiplier.unsqueeze(-1)).flatten(-2).to(dtype)


def _block_scales(
    amax: Tensor, format: BlockFormat, rule: str, global_scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    mantissa_bits, max_exponent = _SHAPE[format.element]
    if rule == "even":
        return e8m0.encode_even(amax, mantissa_bits, max_exponent)
    if rule == "rceil":
        return e8m0.encode_rceil(amax, torch.finfo(_FP8[format.element]).max)
    if rule in ("floor", "ceil"):
        return e8m0.encode_log2(amax, rule == "ceil", max_exponent, dtype)
    if global_scale is None:
        return e5m3.encode(e8m0.round_to(amax / fp4.MAX, dtype))
    scale = amax / fp4.MAX / global_scale if rule == "sequential" else amax / (global_scale * fp4.MAX)
    # What is finite saturates, even where the quotient overflows; no infinity in E4M3.
    largest = torch.finfo(torch.float8_e4m3fn).max
    codes = torch.where(torch.isfinite(amax), scale.clamp(max=largest), torch.nan).to(torch.float8_e4m3fn)
    if rule == "combined":
        codes = torch.where(codes.float() == 0, 1.0, codes.float()).to(torch.float8_e4m3fn)
    return codes


def _multipliers(scales: Tensor, format: BlockFormat, global_scale: Tensor | None, zero: float) -> Tensor:
    """What each block's elements are multiplied by, float32; ``zero`` where that would be 0."""
    if format.scale == "e8m0":
        return e8m0.decode(scales)
    multiplier = scales.float() if format.scale == "e4m3" else e5m3.decode(scales)
    if global_scale is not None:
        multiplier = multiplier * global_scale
    return torch.where(multiplier == 0, zero, multiplier) if zero else multiplier


def _encode(x: Tensor, element: str) -> Tensor:
    if element == "fp4":
        return fp4.encode(x)
    if element in _FP8:
        limits = torch.finfo(_FP8[element])
        return x.clamp(limits.min, limits.max).to(_FP8[element])
    return fp6.encode(x, _SHAPE[element][0])


def _decode(codes: Tensor, element: str) -> Tensor:
    if element == "fp4":
        return fp4.decode(codes)
    return codes.float() if element in _FP8 else fp6.decode(codes, _SHAPE[element][0])


def _pack(codes: Tensor, element: str) -> Tensor:
    return fp4.pack(codes) if element == "fp4" else codes if element in _FP8 else fp6.pack(codes)


def _unpack(codes: Tensor, element: str) -> Tensor:
    return fp4.unpack(codes) if element == "fp4" else codes if element in _FP8 else fp6.unpack(codes)
