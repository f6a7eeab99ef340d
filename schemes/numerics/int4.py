"""Eight 4-bit integers to an int32.

Source: amd-quark 0.13, ``quark/torch/utils/pack.py: Pack_4_bits``.
"""

import torch
from torch import Tensor

# Nibble i of an int32 (bits 4i to 4i + 3) holds element ORDERS[method][i] of its eight. "reorder" is AWQ's order.
ORDERS = {"reorder": (0, 2, 4, 6, 1, 3, 5, 7), "order": (0, 1, 2, 3, 4, 5, 6, 7)}


def pack(codes: Tensor, pack_method: str) -> Tensor:
    """Codes ``[..., C]``, int8 -8..7 or uint8 0..15, to int32 ``[..., ceil(C / 8)]``; the last nibbles may stay 0."""
    nibbles = codes.to(torch.int32) & 15
    padded = torch.nn.functional.pad(nibbles, (0, -nibbles.shape[-1] % 8)).unflatten(-1, (-1, 8))
    packed = torch.zeros(padded.shape[:-1], dtype=torch.int32, device=codes.device)
    for i, element in enumerate(ORDERS[pack_method]):
        packed = packed | (padded[..., element] << (4 * i))
    return packed


def unpack(packed: Tensor, pack_method: str, signed: bool, size: int) -> Tensor:
    """int32 ``[..., ceil(size / 8)]`` to codes ``[..., size]``, int32: -8..7 if ``signed``, else 0..15."""
    order = ORDERS[pack_method]
    nibbles = [(packed >> (4 * order.index(element))) & 15 for element in range(8)]
    codes = torch.stack(nibbles, dim=-1).flatten(-2)[..., :size]
    return codes - ((codes & 8) << 1) if signed else codes
