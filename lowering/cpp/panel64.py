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

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from quark_inductor.schemes import memory
from quark_inductor.schemes.layout import Layout, Stored, register_layout
from quark_inductor.schemes.numerics import fp4, fp6, int4
from quark_inductor.schemes.numerics.block import BLOCK_FORMATS
from quark_inductor.schemes.operands import features, fp8_weight

ROWS, COLUMNS = 64, 32
NAME = "panel64"
# Scale bytes from here on stand for 2^64 and more; kernels add exponents and would wrap around.
_LARGEST_E8M0 = 190
_AT_ONCE = 16


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
            padded = pad(codes, (0, -k % COLUMNS, 0, -len(codes) % ROWS), value=_zero(stored.format))
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
        if stored.format in BLOCK_FORMATS and bits(stored.format) == 4:
            tensors = [_fp4_in_order(packed[:, :, scales:])[:n, : k // 2]]
        else:
            tensors = [_stored_codes(_in_order(packed[:, :, scales:], stored.format)[:n, :k], stored)]
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


def _codes(weight: Tensor, stored: Stored, begin: int, end: int) -> Tensor:
    """uint8 ``[N, K]``, one code an entry, of the channels from ``begin`` to ``end``."""
    format = stored.format
    if not stored.transposed:
        weight = weight[begin:end]
    elif bits(format) == 4:
        weight = weight[:, begin // 8 : -(-end // 8)]
    else:
        weight = weight[:, begin:end]
    if format in BLOCK_FORMATS:
        element = BLOCK_FORMATS[format].element
        if element == "fp4":
            return fp4.unpack(weight).to(torch.uint8)
        return fp6.unpack(weight).to(torch.uint8) if "fp6" in element else weight.view(torch.uint8)
    if bits(format) == 4:
        codes = int4.unpack(weight, _packing(format)).to(torch.uint8) & 15
    else:
        codes = weight.contiguous().view(torch.uint8)
        codes = codes ^ 128 if format == "int8" else codes
    return codes.t() if stored.transposed else codes


def _packing(format: str) -> str:
    return "int4" if format == "int4_fp8" else format


def _stored_codes(codes: Tensor, stored: Stored) -> Tensor:
    """The inverse of :func:`_codes`."""
    format = stored.format
    if format in BLOCK_FORMATS:
        f = BLOCK_FORMATS[format]
        if f.element == "fp4":
            return fp4.pack(codes.to(torch.int32))
        return fp6.pack(codes.to(torch.int32)) if "fp6" in f.element else codes.contiguous().view(f.codes_dtype)
    codes = codes.t() if stored.transposed else codes
    if bits(format) == 4:
        return int4.pack(codes, int4.FORMATS[_packing(format)][1])
    if format in ("int8", "uint8"):
        return (codes ^ 128).contiguous().view(torch.int8) if format == "int8" else codes.contiguous()
    of_fp8 = fp8_weight(format)
    assert of_fp8 is not None
    return codes.contiguous().view(of_fp8[0])


def _arranged(codes: Tensor, format: str) -> Tensor:
    """uint8 ``[N, K]`` to ``[N / 64, K / 32, bytes]``."""
    panels, tiles = codes.shape[0] // ROWS, codes.shape[1] // COLUMNS
    # panel, group of 16 channels, channel, tile, chunk, k
    chunks = codes.reshape(panels, 4, 16, tiles, 4, 8).permute(0, 3, 1, 4, 2, 5)
    if bits(format) == 4:
        # k is 4 a + 2 b + c: nibble b of byte 2 c + a
        nibbles = chunks.unflatten(-1, (2, 2, 2)).permute(0, 1, 2, 3, 4, 7, 5, 6)
        return (nibbles[..., 0] | (nibbles[..., 1] << 4)).reshape(panels, tiles, -1)
    quads = chunks.unflatten(-1, (2, 4)).transpose(4, 5)  # panel, tile, group, chunk, half, channel, k
    if format in ("int8", "uint8"):
        return quads.reshape(panels, tiles, -1)
    pairs = quads.unflatten(-1, (2, 2)).unflatten(5, (4, 4)).permute(0, 1, 2, 3, 4, 5, 7, 6, 8)
    ordered = pairs.reshape(panels, tiles, -1)
    return fp6.pack(ordered.to(torch.int32)) if bits(format) == 6 else ordered


def _fp4_in_order(packed: Tensor) -> Tensor:
    """The inverse of :func:`_arranged` of two codes a byte, without taking them apart: uint8 ``[N, K / 2]``."""
    panels, tiles = packed.shape[:2]
    even, odd = packed.reshape(panels, tiles, 4, 4, 16, 2, 2).unbind(5)
    both = torch.stack(((even & 15) | (odd << 4), (even >> 4) | (odd & 240)), -1)
    return both.permute(0, 2, 4, 1, 3, 5, 6).reshape(panels * ROWS, tiles * COLUMNS // 2)


def _in_order(packed: Tensor, format: str) -> Tensor:
    """The inverse of :func:`_arranged`."""
    panels, tiles = packed.shape[:2]
    if bits(format) == 4:
        bytes_ = packed.to(torch.int32).view(panels, tiles, 4, 4, 16, 2, 2)
        nibbles = torch.stack((bytes_ & 15, bytes_ >> 4), -1)  # ..., c, a, b
        chunks = nibbles.permute(0, 1, 2, 3, 4, 6, 7, 5).to(torch.uint8).flatten(5)
    elif format in ("int8", "uint8"):
        chunks = packed.reshape(panels, tiles, 4, 4, 2, 16, 4).transpose(4, 5).flatten(5)
    else:
        ordered = fp6.unpack(packed).to(torch.uint8) if bits(format) == 6 else packed
        pairs = ordered.reshape(panels, tiles, 4, 4, 2, 4, 2, 4, 2).permute(0, 1, 2, 3, 5, 7, 4, 6, 8)
        chunks = pairs.reshape(panels, tiles, 4, 4, 16, 8)
    return chunks.permute(0, 2, 4, 1, 3, 5).reshape(panels * ROWS, tiles * COLUMNS)
