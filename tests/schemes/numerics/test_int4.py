"""Packing of 4-bit integers, and weights of them, against Python's and numpy's own arithmetic."""

from types import ModuleType

import numpy as np
import pytest
import torch

from quark_inductor.schemes import ops  # noqa: F401  the dequantizes call one
from quark_inductor.schemes.numerics import int4

# Element at nibble i (bits 4i to 4i + 3), as amd-quark's Pack_4_bits and AutoAWQ have it.
ORDERS = {"reorder": [0, 2, 4, 6, 1, 3, 5, 7], "order": [0, 1, 2, 3, 4, 5, 6, 7]}
FORMATS = {
    "int4": (True, "reorder"),
    "uint4": (False, "reorder"),
    "int4_order": (True, "order"),
    "uint4_order": (False, "order"),
}
formats = pytest.mark.parametrize("format", FORMATS)
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


def test_the_formats_are_a_sign_and_an_order() -> None:
    assert FORMATS == int4.FORMATS
    for name, (signed, method) in FORMATS.items():
        assert int4.format_of("int4" if signed else "uint4", method) == name


@formats
@pytest.mark.parametrize("size", [1, 7, 8, 9, 64, 100])
def test_packing_is_pythons_arithmetic(format: str, size: int) -> None:
    signed, method = FORMATS[format]
    low, high = (-8, 8) if signed else (0, 16)
    codes = np.random.default_rng(size).integers(low, high, (6, size)).astype(np.int8 if signed else np.uint8)
    packed = int4.pack(torch.from_numpy(codes), method)
    assert packed.tolist() == [python_pack(row, method) for row in codes.tolist()]
    unpacked = int4.unpack(packed, format)
    assert unpacked.dtype == torch.int32
    assert unpacked[:, :size].tolist() == codes.tolist()
    assert unpacked.shape == (6, -(-size // 8) * 8)
    assert not unpacked[:, size:].any()


@formats
def test_every_code_at_every_place(format: str) -> None:
    signed, method = FORMATS[format]
    numbers = range(-8, 8) if signed else range(16)
    codes = torch.tensor([[c if p == place else 0 for p in range(8)] for c in numbers for place in range(8)])
    assert torch.equal(int4.unpack(int4.pack(codes, method), format), codes.to(torch.int32))


@formats
def test_every_word_survives_unpack_and_pack(format: str) -> None:
    """Also those with the top bit, whose shift to the right is arithmetic."""
    words = torch.from_numpy(np.random.default_rng(1).integers(-(1 << 31), 1 << 31, (4, 500)).astype(np.int32))
    words[0, :4] = torch.tensor([-1, 0, -(1 << 31), (1 << 31) - 1])
    assert torch.equal(int4.pack(int4.unpack(words, format), FORMATS[format][1]), words)


@methods
def test_a_non_contiguous_tensor_is_read_by_its_strides(method: str) -> None:
    codes = torch.randint(-8, 8, (16, 5), generator=torch.Generator().manual_seed(2), dtype=torch.int8)
    assert torch.equal(int4.pack(codes.t(), method), int4.pack(codes.t().contiguous(), method))
    words = int4.pack(codes.t(), method)
    name = int4.format_of("int4", method)
    assert torch.equal(int4.unpack(words.t().contiguous().t(), name), int4.unpack(words, name))


# --- weights


def words(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(-(1 << 31), 1 << 31, shape).astype(np.int32))


@formats
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("groups", [None, 1, 3])
def test_a_weights_values_are_numpys(
    oracle: ModuleType, format: str, dtype: torch.dtype, scale_dtype: torch.dtype, groups: int | None
) -> None:
    """Bit by bit: a difference of codes times a scale in float32, rounded once. Groups are transposed."""
    n, k = 40, 72
    packed, zero_point = (
        (words(1, n, k // 8), words(2, n // 8))
        if groups is None
        else (
            words(1, k, n // 8),
            words(2, groups, n // 8),
        )
    )
    shape = (n,) if groups is None else (groups, n)
    scale = (torch.rand(shape, generator=torch.Generator().manual_seed(3)) + 0.01).to(scale_dtype)
    values = int4.dequantize_weight(packed, scale, zero_point, format, dtype)
    assert values.dtype == dtype
    expected = oracle.weight_values(packed, scale, None, zero_point, format, dtype)
    np.testing.assert_array_equal(values.float().numpy(), expected)
    assert len(np.unique(expected)) > 100


@pytest.mark.parametrize("format", ["int4", "int4_order"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_two_stages_are_numpys(oracle: ModuleType, format: str, dtype: torch.dtype) -> None:
    """The channel's scale first, then the other, both in float32; one rounding to the dtype."""
    n, k = 24, 40
    packed, zero_point = words(4, n, k // 8), words(5, n // 8)
    scale, scale_2 = torch.tensor(0.0173), torch.rand(n, generator=torch.Generator().manual_seed(6)) * 60
    values = int4.dequantize_two_stages(packed, scale, scale_2, zero_point, format, dtype)
    assert values.dtype == dtype
    inner = oracle.weight_values(packed, scale_2, None, zero_point, format, torch.float32)
    np.testing.assert_array_equal(values.float().numpy(), oracle.rounded(inner * scale.numpy(), dtype))
