"""FP4 E2M1 against ml_dtypes, bit for bit. One rule differs: here nothing becomes -0, see ``without_negative_zero``."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quark_inductor.schemes.numerics import fp4

# The same examples in every run, and no time limit for one: the machine may be busy.
repeatable = settings(derandomize=True, database=None, deadline=None)
VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def without_negative_zero(codes: np.ndarray) -> np.ndarray:
    """ml_dtypes keeps the sign of what rounds to zero (code 8); amd-quark, and we, make all of it +0 (code 0)."""
    return np.where(codes == 8, 0, codes)


def ml_dtypes_codes(values: np.ndarray) -> np.ndarray:
    return values.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)


def test_encode_is_ml_dtypes_for_every_finite_bfloat16() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    finite = every[np.isfinite(every)]
    codes = fp4.encode(torch.from_numpy(finite))
    assert codes.dtype == torch.int32
    expected = ml_dtypes_codes(finite)
    assert set(expected.tolist()) == set(range(16))
    np.testing.assert_array_equal(codes.numpy(), without_negative_zero(expected))


@repeatable
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_encode_is_ml_dtypes_for_float32(values: list[float]) -> None:
    codes = fp4.encode(torch.tensor(values, dtype=torch.float32))
    expected = without_negative_zero(ml_dtypes_codes(np.array(values, np.float32)))
    assert codes.tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("tie", "even", "odd_side"),
    # Halfway between two values; the even one of their codes; the neighbour on the other side.
    [(0.25, 0, 1), (0.75, 2, 1), (1.25, 2, 3), (1.75, 4, 3), (2.5, 4, 5), (3.5, 6, 5), (5.0, 6, 7)],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_ties_go_to_the_even_code_and_the_next_float_to_the_nearer(
    tie: float, even: int, odd_side: int, sign: int
) -> None:
    toward_odd = math.inf if odd_side > even else -math.inf
    odd = float(np.nextafter(np.float32(tie), np.float32(toward_odd)))
    codes = fp4.encode(torch.tensor([sign * tie, sign * odd]))
    signed = [code + 8 if sign < 0 and code else code for code in (even, odd_side)]
    assert codes.tolist() == signed


@pytest.mark.parametrize("value", [6.0, 6.5, 7.0, 1e30, math.inf])
def test_large_magnitudes_saturate(value: float) -> None:
    assert fp4.encode(torch.tensor([value, -value])).tolist() == [7, 15]


@pytest.mark.parametrize("value", [-0.0, -(2.0**-149), -0.1, -0.25])
def test_negative_values_that_round_to_zero_have_no_sign(value: float) -> None:
    assert fp4.encode(torch.tensor([value])).tolist() == [0]


def test_decode_is_ml_dtypes_for_every_code() -> None:
    codes = np.arange(16, dtype=np.uint8)
    expected = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert expected.tolist() == VALUES + [-v for v in VALUES]
    values = fp4.decode(torch.from_numpy(codes.astype(np.int32)))
    assert values.dtype == torch.float32
    np.testing.assert_array_equal(values.numpy().view(np.uint32), expected.view(np.uint32))  # also -0.0


def test_every_value_encodes_to_its_own_code() -> None:
    codes = torch.tensor([c for c in range(16) if c != 8], dtype=torch.int32)
    assert torch.equal(fp4.encode(fp4.decode(codes)), codes)


def test_every_byte_survives_unpack_and_pack() -> None:
    every = torch.arange(256, dtype=torch.uint8).reshape(4, 64)
    codes = fp4.unpack(every)
    assert codes.dtype == torch.int32
    assert codes.shape == (4, 128)
    packed = fp4.pack(codes)
    assert packed.dtype == torch.uint8
    assert torch.equal(packed, every)


def test_the_first_element_is_in_the_low_nibble() -> None:
    byte = torch.tensor([0xA3], dtype=torch.uint8)
    assert fp4.unpack(byte).tolist() == [0x3, 0xA]
    assert torch.equal(fp4.pack(torch.tensor([0x3, 0xA], dtype=torch.int32)), byte)
    # The same of every byte, by Python's own arithmetic.
    codes = fp4.unpack(torch.arange(256, dtype=torch.uint8)).tolist()
    assert codes == [nibble for byte in range(256) for nibble in (byte % 16, byte // 16)]
