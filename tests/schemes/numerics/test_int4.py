"""Packing of 4-bit integers against Python's own arithmetic."""

import numpy as np
import pytest
import torch

from quark_inductor.schemes.numerics import int4

# Element at nibble i (bits 4i to 4i + 3), as amd-quark's Pack_4_bits and AutoAWQ have it.
ORDERS = {"reorder": [0, 2, 4, 6, 1, 3, 5, 7], "order": [0, 1, 2, 3, 4, 5, 6, 7]}
methods = pytest.mark.parametrize("method", ORDERS)


def python_pack(row: list[int], method: str) -> list[int]:
    row = row + [0] * (-len(row) % 8)
    words = []
    for i in range(0, len(row), 8):
        word = sum((row[i + element] & 15) << 4 * place for place, element in enumerate(ORDERS[method]))
        words.append(word - (1 << 32) if word >= 1 << 31 else word)
    return words


@methods
def test_nibbles_of_one_word(method: str) -> None:
    packed = int4.pack(torch.arange(8, dtype=torch.uint8), method)
    assert (packed.dtype, packed.shape) == (torch.int32, (1,))
    assert f"{packed.item():08x}" == {"order": "76543210", "reorder": "75316420"}[method]


@methods
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("size", [1, 7, 8, 9, 64, 100])
def test_packing_is_pythons_arithmetic(method: str, signed: bool, size: int) -> None:
    low, high = (-8, 8) if signed else (0, 16)
    codes = np.random.default_rng(size).integers(low, high, (6, size)).astype(np.int8 if signed else np.uint8)
    packed = int4.pack(torch.from_numpy(codes), method)
    assert packed.tolist() == [python_pack(row, method) for row in codes.tolist()]
    unpacked = int4.unpack(packed, method, signed, size)
    assert unpacked.dtype == torch.int32
    assert unpacked.tolist() == codes.tolist()


@methods
def test_every_code_at_every_place(method: str) -> None:
    for signed, numbers in ((True, range(-8, 8)), (False, range(16))):
        codes = torch.tensor([[c if p == place else 0 for p in range(8)] for c in numbers for place in range(8)])
        assert torch.equal(int4.unpack(int4.pack(codes, method), method, signed, 8), codes)


@methods
def test_every_word_survives_unpack_and_pack(method: str) -> None:
    """Also those with the top bit, whose shift to the right is arithmetic."""
    words = torch.from_numpy(np.random.default_rng(1).integers(-(1 << 31), 1 << 31, (4, 500)).astype(np.int32))
    words[0, :4] = torch.tensor([-1, 0, -(1 << 31), (1 << 31) - 1])
    for signed in (True, False):
        assert torch.equal(int4.pack(int4.unpack(words, method, signed, 4000), method), words)


@methods
def test_a_non_contiguous_tensor_is_read_by_its_strides(method: str) -> None:
    codes = torch.randint(-8, 8, (16, 5), generator=torch.Generator().manual_seed(2), dtype=torch.int8)
    assert torch.equal(int4.pack(codes.t(), method), int4.pack(codes.t().contiguous(), method))
