"""The layout of weights on CPU: panels of 64 output channels, each one stream of bytes in the order kernels read it.

A weight ``[N, K]``, N padded to a multiple of 64 and K to one of 32 with codes of the value 0, becomes
``[N / 64, K / 32, bytes]``: tiles of 64 channels x 32 k, each its block scales (if the format has some: 64 bytes, or
128 for blocks of 16; block h of channel c at ``64 h + c``), then its codes. Those are chunks of 16 channels x 8 k, the
4 chunks along k of the first 16 channels first. Inside a chunk:

* 4 bits: 16 lanes of 32 bits, one a channel. Byte t holds k ``(0, 4, 1, 5)[t]`` low and ``(2, 6, 3, 7)[t]`` high. The
  nibbles of its 16-bit words then are k 0, 2, 4, 6 and 1, 3, 5, 7: pairs for a bf16 dot product, by one shift and one
  look-up each; and its low and its high nibbles are four k for an int8 one.
* FP8 and FP6: k 0 to 3, then 4 to 7, each 64 codes: channel c, k t at ``16 (c / 4) + 8 (t / 2) + 2 (c % 4) + t % 2``,
  so that interleaving the high and low bytes of their bf16 values gives pairs. FP6 codes are 6 bits each, the first
  lowest.
* 8-bit integers: k 0 to 3, then 4 to 7, each 16 lanes of four codes, which is what int8 dot products read. Signed
  codes are stored plus 128.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from quark_inductor.schemes import memory
from quark_inductor.schemes.layout import Layout, Stored, register_layout
from quark_inductor.schemes.numerics import fp6, int4
from quark_inductor.schemes.numerics.block import BLOCK_FORMATS
from quark_inductor.schemes.operands import codes_dtype, features

ROWS, COLUMNS = 64, 32
NAME = "panel64"
# Scale bytes from here on stand for 2^64 and more; kernels add exponents and would wrap around.
_LARGEST_E8M0 = 190
_AT_ONCE = 4


def bits(format: str) -> int:
    """Of a code."""
    if format in BLOCK_FORMATS:
        return {"fp4": 4, "fp6_e2m3": 6, "fp6_e3m2": 6}.get(BLOCK_FORMATS[format].element, 8)
    return 4 if format in (*int4.FORMATS, "int4_fp8") else 8


def scale_bytes(format: str) -> int:
    """Of a channel in a tile."""
    return COLUMNS // BLOCK_FORMATS[format].size if format in BLOCK_FORMATS else 0


def tile_bytes(format: str) -> int:
    """Of 64 channels x 32 k."""
    return ROWS * scale_bytes(format) + ROWS * COLUMNS * bits(format) // 8


@register_layout
class Panel64(Layout):
    """See the module."""

    name = NAME
    device_type = "cpu"
    rows = ROWS

    def refuses(self, tensors: Sequence[Tensor], stored: Stored) -> str | None:
        """No FNUZ codes, which have no CPU kernel, and no block scales of 2^64 and more."""
        if "fnuz" in stored.format:
            return f"{stored.format} is for GPUs"
        of_e8m0 = stored.format in BLOCK_FORMATS and BLOCK_FORMATS[stored.format].scale == "e8m0"
        if of_e8m0 and bool((tensors[1] > _LARGEST_E8M0).any()):
            return f"it has block scales above 2^{_LARGEST_E8M0 - 127}"
        return None

    def pack(self, tensors: Sequence[Tensor], stored: Stored) -> Tensor:
        """``[ceil(N / 64), ceil(K / 32), tile_bytes]``, in huge pages where the system has them."""
        n, k = _features(stored)
        panels, tiles, scales = -(-n // ROWS), -(-k // COLUMNS), ROWS * scale_bytes(stored.format)
        packed = memory.empty(panels, tiles, tile_bytes(stored.format))
        # A few panels at a time: what lies between is larger than the result.
        for first in range(0, panels, _AT_ONCE):
            codes = _codes(tensors[0], stored, first * ROWS, min(n, (first + _AT_ONCE) * ROWS))
            more = tiles * _order(stored.format).tile_bytes - codes.shape[1]
            padded = pad(codes, (0, more, 0, -len(codes) % ROWS), value=_zero(stored.format))
            packed[first : first + _AT_ONCE, :, scales:] = _arranged(padded, stored.format)
        if scales:
            blocks, per_tile = tensors[1].view(torch.uint8), scale_bytes(stored.format)
            padded = pad(blocks, (0, tiles * per_tile - blocks.shape[1], 0, -n % ROWS))
            packed[:, :, :scales] = padded.view(panels, ROWS, tiles, per_tile).permute(0, 2, 3, 1).flatten(2)
        return packed

    def unpack(self, packed: Tensor, stored: Stored) -> list[Tensor]:
        """See :class:`Layout`."""
        n, k = _features(stored)
        scales = ROWS * scale_bytes(stored.format)
        columns = k // 2 if bits(stored.format) == 4 else k
        codes = _in_order(packed[:, :, scales:], stored.format)[:n, :columns]
        tensors = [_stored_codes(codes.contiguous(), stored)]
        if scales:
            f = BLOCK_FORMATS[stored.format]
            blocks = packed[:, :, :scales].unflatten(2, (-1, ROWS)).permute(0, 3, 1, 2).flatten(2).flatten(0, 1)
            tensors.append(blocks[:n, : k // f.size].contiguous().view(f.scales_dtype))
        return tensors


def _features(stored: Stored) -> tuple[int, int]:
    if stored.transposed:
        k, entries = stored.shape
        return entries * (8 if bits(stored.format) == 4 else 1), k
    return features(stored.shape, 1, stored.format)


def _zero(format: str) -> int:
    """The stored code of a weight 0."""
    return 128 if format == "int8" else 0


@dataclass(frozen=True, slots=True)
class _Order:
    """How a tile's codes are ordered, in units of several codes of one channel.

    Attributes:
        unit: an integer as wide as one.
        channels: dimensions of the tile's 64 channels.
        columns: dimensions of a channel's units.
        places: the order of those dimensions in the tile.
    """

    unit: torch.dtype
    channels: tuple[int, ...]
    columns: tuple[int, ...]
    places: tuple[int, ...]

    @property
    def tile_bytes(self) -> int:
        """Of a channel."""
        return math.prod(self.columns) * self.unit.itemsize


_EIGHT_NIBBLES = _Order(torch.int32, (4, 16), (4,), (0, 2, 1))
_FOUR_BYTES = _Order(torch.int32, (4, 16), (4, 2), (0, 2, 3, 1))
_TWO_BYTES = _Order(torch.int16, (4, 4, 4), (4, 2, 2), (0, 3, 4, 1, 5, 2))


def _order(format: str) -> _Order:
    if bits(format) == 4:
        return _EIGHT_NIBBLES
    return _FOUR_BYTES if format in ("int8", "uint8") else _TWO_BYTES


def _codes(weight: Tensor, stored: Stored, begin: int, end: int) -> Tensor:
    """uint8 rows of the channels from ``begin`` to ``end``: a code a byte, or two as :func:`_evens_first` has them."""
    format = stored.format
    if not stored.transposed:
        weight = weight[begin:end]
    elif bits(format) == 4:
        weight = weight[:, begin // 8 : -(-end // 8)]
    else:
        weight = weight[:, begin:end].t()
    if format in BLOCK_FORMATS and "fp6" in BLOCK_FORMATS[format].element:
        return fp6.unpack(weight).to(torch.uint8)
    if bits(format) == 4:
        if stored.transposed:
            words = int4.pack(int4.unpack(weight, _packing(format)).t(), "reorder")
        else:
            words = weight.contiguous().view(torch.int32)
            words = words if _is_evens_first(format) else _evens_first(words)
        return words.view(torch.uint8)
    codes = weight.contiguous().view(torch.uint8)
    return codes ^ 128 if format == "int8" else codes


def _packing(format: str) -> str:
    return "int4" if format == "int4_fp8" else format


def _is_evens_first(format: str) -> bool:
    return format not in BLOCK_FORMATS and int4.FORMATS[_packing(format)][1] == "reorder"


def _stored_codes(codes: Tensor, stored: Stored) -> Tensor:
    """The inverse of :func:`_codes`."""
    format = stored.format
    if format in BLOCK_FORMATS and "fp6" in BLOCK_FORMATS[format].element:
        return fp6.pack(codes.to(torch.int32))
    if bits(format) == 4:
        words = codes.view(torch.int32)
        if stored.transposed:
            # Whether codes have a sign does not matter to their bits.
            return int4.pack(int4.unpack(words, "uint4").t(), int4.FORMATS[_packing(format)][1])
        words = words if _is_evens_first(format) else _in_sequence(words)
        return words.view(torch.uint8) if format in BLOCK_FORMATS else words
    codes = codes ^ 128 if format == "int8" else codes
    codes = codes.t().contiguous() if stored.transposed else codes
    return codes.view(codes_dtype(format))


def _evens_first(words: Tensor) -> Tensor:
    """int32 of eight codes each, the first lowest, to the order 0, 2, 4, 6, 1, 3, 5, 7."""
    return _bytes_swapped(_nibbles_swapped(words))


def _in_sequence(words: Tensor) -> Tensor:
    """The inverse of :func:`_evens_first`."""
    return _nibbles_swapped(_bytes_swapped(words))


def _nibbles_swapped(words: Tensor) -> Tensor:
    """The middle two of every 16 bits."""
    differ = (words ^ (words >> 4)) & 0x00F000F0
    return words ^ differ ^ (differ << 4)


def _bytes_swapped(words: Tensor) -> Tensor:
    """The middle two of every 32 bits."""
    differ = (words ^ (words >> 8)) & 0x0000FF00
    return words ^ differ ^ (differ << 8)


def _arranged(codes: Tensor, format: str) -> Tensor:
    """Rows of codes, of whole tiles, to ``[N / 64, K / 32, bytes]``."""
    order = _order(format)
    units = codes.view(order.unit).unflatten(0, (-1, *order.channels)).unflatten(-1, (-1, *order.columns))
    tile = 1 + len(order.channels)
    ordered = units.permute(0, tile, *(1 + p + (p >= tile - 1) for p in order.places)).flatten(2).view(torch.uint8)
    return fp6.pack(ordered.to(torch.int32)) if bits(format) == 6 else ordered


def _in_order(packed: Tensor, format: str) -> Tensor:
    """The inverse of :func:`_arranged`."""
    order = _order(format)
    ordered = fp6.unpack(packed).to(torch.uint8) if bits(format) == 6 else packed
    sizes = order.channels + order.columns
    units = ordered.view(order.unit).unflatten(2, [sizes[p] for p in order.places])
    back = [2 + order.places.index(p) for p in range(len(sizes))]
    channels = len(order.channels)
    rows = units.permute(0, *back[:channels], 1, *back[channels:]).flatten(channels + 1).flatten(0, channels)
    return rows.view(torch.uint8)
