"""What codes mean and how activations are quantized, by ml_dtypes and numpy: nothing here is this project's.

Every step is rounded where amd-quark rounds it: float32 arithmetic, and the model's dtype where a step's result is in
it. A module of its own, given to tests by the fixture ``oracle``.
"""

from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

NUMPY: dict[torch.dtype, Any] = {
    torch.bfloat16: ml_dtypes.bfloat16,
    torch.float16: np.float16,
    torch.float32: np.float32,
}
U32 = 2.0**-24
# Half an ulp of 1: what rounding to the dtype may change, relative to the result. Float32 sums are rounded already.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0.0}
EPS = np.float32(2.0**-23)  # what amd-quark puts in place of a zero scale
# Bits, dtype, explicit mantissa bits and largest exponent of an element.
ELEMENTS: dict[str, tuple[int, Any, int, int]] = {
    "fp4": (4, ml_dtypes.float4_e2m1fn, 1, 2),
    "fp6_e2m3": (6, ml_dtypes.float6_e2m3fn, 3, 2),
    "fp6_e3m2": (6, ml_dtypes.float6_e3m2fn, 2, 4),
    "fp8_e4m3": (8, ml_dtypes.float8_e4m3fn, 3, 8),
    "fp8_e5m2": (8, ml_dtypes.float8_e5m2, 2, 15),
}
# Elements a block, element, scale.
BLOCKS = {
    **{f"mx{element}": (32, element, "e8m0") for element in ELEMENTS},
    "nvfp4": (16, "fp4", "e4m3"),
    "amdfp4_g16": (16, "fp4", "e5m3"),
    "amdfp4_g32": (32, "fp4", "e5m3"),
}
BOUNDS = {"int8": (-128, 127), "uint8": (0, 255), "int4": (-8, 7), "uint4": (0, 15)}
# Element at nibble i, bits 4i to 4i + 3 of an int32, as amd-quark's Pack_4_bits has it.
NIBBLES = {"reorder": [0, 2, 4, 6, 1, 3, 5, 7], "order": [0, 1, 2, 3, 4, 5, 6, 7]}


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A tensor of numbers, in float32 or as integers; FP8 by ml_dtypes."""
    if tensor.dtype.itemsize == 1 and tensor.dtype.is_floating_point:
        number = ml_dtypes.float8_e5m2 if tensor.dtype == torch.float8_e5m2 else ml_dtypes.float8_e4m3fn
        return tensor.contiguous().view(torch.uint8).numpy().view(number).astype(np.float32)
    return tensor.detach().float().numpy() if tensor.is_floating_point() else tensor.numpy()


def rounded(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """float32 to the dtype and back."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(x, dtype=np.float32).astype(NUMPY[dtype]).astype(np.float32)


def largest(element: str) -> np.float32:
    """The largest finite value."""
    return np.float32(ml_dtypes.finfo(ELEMENTS[element][1]).max)


def saturated(x: np.ndarray, element: str) -> np.ndarray:
    """The nearest value of an element format, half to even."""
    number = ELEMENTS[element][1]
    with np.errstate(invalid="ignore"):
        if element.startswith("fp8"):
            return np.clip(x, -largest(element), largest(element)).astype(number).astype(np.float32)
        # These have no NaN: that of a block is its scale's.
        finite = np.clip(np.nan_to_num(x, nan=0.0), -largest(element), largest(element))
        return finite.astype(number).astype(np.float32)


def e5m3(codes: np.ndarray) -> np.ndarray:
    """Five exponent and three mantissa bits: a float16 without sign and last bits, but with no infinity."""
    half = (codes.astype(np.uint16) << 7).view(np.float16).astype(np.float32)
    beyond = np.float32(65536.0) * (1 + (codes & 7).astype(np.float32) / 8)
    return np.where(codes == 255, np.float32(np.nan), np.where(codes >> 3 == 31, beyond, half))


def to_e5m3(x: np.ndarray) -> np.ndarray:
    """The nearest value, by looking at all of them; between two the even code."""
    values = e5m3(np.arange(255, dtype=np.uint8)).astype(np.float64)
    above = np.clip(np.searchsorted(values, x), 1, 254)
    low, high = values[above - 1], values[above]
    nearest = np.where((x - low < high - x) | ((x - low == high - x) & (above % 2 == 1)), low, high)
    return np.where(np.isfinite(x), nearest, np.nan).astype(np.float32)


def block_scales(scales: Tensor, kind: str) -> np.ndarray:
    """Values of the scales of blocks."""
    codes = scales.contiguous().view(torch.uint8).numpy()
    if kind == "e5m3":
        return e5m3(codes)
    return codes.view(ml_dtypes.float8_e8m0fnu if kind == "e8m0" else ml_dtypes.float8_e4m3fn).astype(np.float32)


def elements(codes: Tensor, element: str) -> np.ndarray:
    """Values of packed codes: the first of them in the lowest bits."""
    bits, number, *_ = ELEMENTS[element]
    raw = np.unpackbits(codes.contiguous().view(torch.uint8).numpy(), axis=-1, bitorder="little")
    apart = np.packbits(raw.reshape(*codes.shape[:-1], -1, bits), axis=-1, bitorder="little")[..., 0]
    return apart.view(number).astype(np.float32)


def nibbles(packed: Tensor, format: str) -> np.ndarray:
    """int32 ``[..., C / 8]`` to 4-bit integers ``[..., C]``."""
    words = packed.numpy().view(np.uint32)
    method = "order" if format.endswith("_order") else "reorder"
    codes = np.empty((*words.shape, 8), dtype=np.int64)
    for place, element in enumerate(NIBBLES[method]):
        codes[..., element] = words >> (4 * place) & 15
    codes = codes.reshape(*words.shape[:-1], -1)
    return np.where(codes > 7, codes - 16, codes) if format.startswith("int4") else codes


def packed_nibbles(codes: np.ndarray, format: str) -> Tensor:
    """4-bit integers ``[..., C]`` to int32 ``[..., C / 8]``."""
    method = "order" if format.endswith("_order") else "reorder"
    eights = (codes.astype(np.int64) & 15).reshape(*codes.shape[:-1], -1, 8)
    words = sum(eights[..., element] << (4 * place) for place, element in enumerate(NIBBLES[method]))
    return torch.from_numpy(np.asarray(words).astype(np.uint32).view(np.int32))


def packed_elements(values: np.ndarray, element: str) -> Tensor:
    """Codes of values that an element format holds exactly, packed into bytes, the first of them in the lowest bits."""
    bits, number, *_ = ELEMENTS[element]
    raw = np.unpackbits(values.astype(number).view(np.uint8)[..., None], axis=-1, bitorder="little")[..., :bits]
    stream = raw.reshape(*values.shape[:-1], values.shape[-1] * bits)
    return torch.from_numpy(np.packbits(stream, axis=-1, bitorder="little"))


def _of_blocks(codes: Tensor, scale: Tensor, scale_2: Tensor | None, format: str, zero: float) -> np.ndarray:
    size, element, kind = BLOCKS[format]
    multiplier = block_scales(scale, kind)
    if scale_2 is not None:
        multiplier = multiplier * to_numpy(scale_2)
    multiplier = np.where(multiplier == 0, np.float32(zero), multiplier)
    with np.errstate(invalid="ignore", over="ignore"):
        return elements(codes, element) * np.repeat(multiplier, size, -1)


def _zero_scale(format: str) -> float:
    return float(EPS) if format.startswith("amdfp4") else 0.0


def _spread(scale: Tensor | np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A scale or zero point ``[]``, ``[N]``, ``[N, 1]`` or ``[N, K / group]`` for each of ``[N, K]``."""
    spread = (to_numpy(scale) if isinstance(scale, Tensor) else scale).astype(np.float32)
    if spread.ndim == 0:
        return np.broadcast_to(spread, shape)
    spread = spread.reshape(len(spread), -1)
    return np.repeat(spread, shape[1] // spread.shape[1], -1)


def weight_values(
    weight: Tensor,
    scale: Tensor,
    scale_2: Tensor | None,
    zero_point: Tensor | None,
    format: str,
    dtype: torch.dtype,
) -> np.ndarray:
    """A weight's values ``[N, K]``: float32 arithmetic, then one rounding to ``dtype``."""
    if format in BLOCKS:
        return rounded(_of_blocks(weight, scale, scale_2, format, 0.0), dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        if format.startswith("fp8"):
            codes = to_numpy(weight)
            if "x" in format:
                rows, columns = map(int, format.rpartition("_")[2].split("x"))
                spread = np.repeat(np.repeat(to_numpy(scale), rows, 0), columns, 1)[: len(codes), : codes.shape[1]]
            else:
                spread = _spread(scale, codes.shape)
            return rounded(codes * spread, dtype)
        if format in ("int8", "uint8"):
            codes = to_numpy(weight).astype(np.float32)
            offset = np.float32(0) if zero_point is None else _spread(zero_point, codes.shape)
            return rounded((codes - offset) * _spread(scale, codes.shape), dtype)
        assert zero_point is not None
        codes, offset = (nibbles(t, format).astype(np.float32) for t in (weight, zero_point))
        if format == "int4_fp8":
            assert scale_2 is not None
            values = (codes - offset[:, None]) * to_numpy(scale_2)[:, None]
            return rounded(values.astype(np.float32) * to_numpy(scale), dtype)
        if scale.ndim == 1:
            return rounded((codes - offset[:, None]) * to_numpy(scale)[:, None], dtype)
        return rounded((codes.T - _spread(offset.T, codes.T.shape)) * _spread(scale.t(), codes.T.shape), dtype)


def activation_values(
    x: Tensor, scale: Tensor, scale_2: Tensor | None, zero_point: Tensor | None, format: str, dtype: torch.dtype
) -> np.ndarray:
    """The values ``[M, K]`` of an activation that is quantized already, rounded to ``dtype``."""
    if format in BLOCKS:
        return rounded(_of_blocks(x, scale, scale_2, format, _zero_scale(format)), dtype)
    codes = to_numpy(x).astype(np.float32)
    offset = np.float32(0) if zero_point is None else _spread(zero_point, codes.shape)
    with np.errstate(invalid="ignore", over="ignore"):
        return rounded((codes - offset) * _spread(scale, codes.shape), dtype)


def _block_multiplier(amax: np.ndarray, format: str, rule: str, scale_2: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    _, element, kind = BLOCKS[format]
    _, _, mantissa, exponent_max = ELEMENTS[element]
    if kind == "e8m0":
        # Of the number itself ("even": the fraction from which the element's mantissa rounds up), or of its quotient.
        fraction, exponent = np.frexp((amax if rule == "even" else amax / largest(element)).astype(np.float64))
        if rule == "even":
            power = exponent - 1 + (fraction >= 1 - 2.0 ** -(mantissa + 2)) - exponent_max
            # amax rounded up to 2^128 is infinite: those have the largest scale there is.
            limit = (2 - 2.0 ** -(mantissa + 1)) * 2.0**127
            scale = np.exp2(np.where(amax >= limit, 127, np.clip(power, -127, 127)).astype(np.float64))
            return np.where(np.isnan(amax), np.nan, scale).astype(np.float32)
        assert rule == "rceil"
        scale = np.exp2(np.clip(exponent - (fraction == 0.5), -127, 127).astype(np.float64))
        return np.where(np.isfinite(amax), scale, np.nan).astype(np.float32)
    if rule == "nearest":
        return to_e5m3(rounded(amax / np.float32(6), dtype))
    quotient = amax / np.float32(6) / scale_2 if rule == "sequential" else amax / (scale_2 * np.float32(6))
    scale = np.minimum(quotient, np.float32(448)).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    if rule == "combined":
        scale = np.where(scale == 0, np.float32(1), scale)
    return np.where(np.isfinite(amax), scale * scale_2, np.float32(np.nan))


def quantized_values(
    x: Tensor,
    scale: Tensor | None,
    scale_2: Tensor | None,
    zero_point: Tensor | None,
    format: str,
    scale_rule: str,
    group_size: int,
    to: torch.dtype | None = None,
) -> np.ndarray:
    """The values of an activation that is quantized and dequantized, rounded to a dtype: by default its own.

    Whole blocks, groups or rows with a NaN or an infinity come out with some number that is not finite, where a scale
    is computed from them.
    """
    values, dtype, k = to_numpy(x), x.dtype, x.shape[1]
    to = to or dtype
    with np.errstate(all="ignore"):
        if format in BLOCKS:
            size, element, _ = BLOCKS[format]
            blocks = values.reshape(len(values), -1, size)
            amax = np.abs(blocks).max(-1, keepdims=True)
            global_scale = np.float32(1) if scale_2 is None else to_numpy(scale_2)
            multiplier = _block_multiplier(amax, format, scale_rule, global_scale, dtype)
            codes = saturated(blocks / np.where(multiplier == 0, EPS, multiplier), element)
            multiplier = np.where(multiplier == 0, np.float32(_zero_scale(format)), multiplier)
            return rounded(codes * multiplier, to).reshape(values.shape)
        groups = values.reshape(len(values), -1, group_size or k)
        if format.startswith("fp8"):
            if scale is not None:
                divisor = to_numpy(scale)[..., None]
            else:
                divisor = rounded(np.abs(groups).max(-1, keepdims=True) / largest(format), dtype)
                divisor = np.where(divisor == 0, EPS, divisor)
            # By groups the quotient stays in float32.
            quotient = groups / divisor if group_size else rounded(groups / divisor, dtype)
            return rounded(saturated(quotient, format) * divisor, to).reshape(values.shape)
        low, high = BOUNDS[format]
        offset: np.ndarray
        if scale is not None and zero_point is not None:
            divisor, offset = to_numpy(scale)[..., None], to_numpy(zero_point)[..., None].astype(np.float32)
        else:
            smallest = np.minimum(groups.min(-1, keepdims=True), 0)
            greatest = np.maximum(groups.max(-1, keepdims=True), 0)
            if scale_rule == "symmetric":
                divisor = rounded(np.maximum(-smallest, greatest) / np.float32((high - low) / 2), dtype)
            else:
                divisor = rounded(rounded(greatest - smallest, dtype) / np.float32(high - low), dtype)
            divisor = np.maximum(divisor, EPS)
            offset = np.zeros_like(divisor)
            if scale_rule == "asymmetric":
                offset = np.clip(rounded(low - np.rint(rounded(smallest / divisor, dtype)), dtype), low, high)
        codes = np.clip(np.rint(groups * (np.float32(1) / divisor)) + offset, low, high)
        return rounded((codes - offset) * divisor, to).reshape(values.shape)


def check_product(y: Tensor, x: np.ndarray, weight: np.ndarray, bias: Tensor | None, slack: float = 0.0) -> None:
    """``|y - x @ weight.T - bias|`` within what float32 sums of operands exact in the dtype allow.

    A product of two numbers of a dtype is rounded once at most (float32: once, else not at all), then K additions and
    that of the bias in any order: ``gamma_n = n u / (1 - n u)`` for n = K + 2; then the cast to the result's dtype
    (whose subnormals have an absolute error, 2^-25 in float16; in the others the least float32 is far smaller than any
    number in the tests). Where a number of the exact result is not finite, that of ``y`` is not.

    ``slack``: what instructions that sum in fewer bits may lose besides, relative to the sum of magnitudes.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        added = np.zeros(1) if bias is None else bias.double().numpy()
        x, weight = x.astype(np.float64), weight.astype(np.float64)
        exact = x @ weight.T + added
        n = x.shape[1] + 2
        sums = (n * U32 / (1 - n * U32) + slack) * (np.abs(x) @ np.abs(weight.T) + np.abs(added))
        bound = sums + ROUNDING[y.dtype] * (np.abs(exact) + sums) + (2.0**-25 if y.dtype is torch.float16 else 0)
        error = np.abs(y.double().numpy() - exact)
    assert y.shape == exact.shape
    finite = np.isfinite(exact)
    assert np.array_equal(y.isfinite().numpy(), finite)
    assert (error <= bound)[finite].all(), f"{error[finite].max()} where at most {bound[finite].max()} is allowed"
