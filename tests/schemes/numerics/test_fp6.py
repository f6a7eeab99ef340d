"""FP6 against ml_dtypes, bit for bit. One rule differs: here nothing becomes -0, see ``without_negative_zero``."""

import itertools
import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quark_inductor.schemes.numerics import fp6

# The same examples in every run, and no time limit for one: the machine may be busy.
repeatable = settings(derandomize=True, database=None, deadline=None)
# By mantissa bits.
ML_DTYPES = {3: ml_dtypes.float6_e2m3fn, 2: ml_dtypes.float6_e3m2fn}
LARGEST = {3: 7.5, 2: 28.0}
SMALLEST = {3: 0.125, 2: 0.0625}
both = pytest.mark.parametrize("mantissa_bits", [3, 2], ids=["e2m3", "e3m2"])


def without_negative_zero(codes: np.ndarray) -> np.ndarray:
    """ml_dtypes keeps the sign of what rounds to zero (code 32); amd-quark, and we, make all of it +0 (code 0)."""
    return np.where(codes == 32, 0, codes)


def ml_dtypes_codes(values: np.ndarray, mantissa_bits: int) -> np.ndarray:
    return values.astype(ML_DTYPES[mantissa_bits]).view(np.uint8)


def values(mantissa_bits: int) -> list[Fraction]:
    """Of the codes 0..31, from the definition in OCP MX v1.0: exact."""
    bias = {3: 1, 2: 3}[mantissa_bits]
    found = []
    for code in range(32):
        exponent, mantissa = divmod(code, 1 << mantissa_bits)
        significand = Fraction(mantissa, 1 << mantissa_bits) + (1 if exponent else 0)
        found.append(significand * Fraction(2) ** (max(exponent, 1) - bias))
    return found


@both
def test_encode_is_ml_dtypes_for_every_finite_bfloat16(mantissa_bits: int) -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    finite = every[np.isfinite(every)]
    codes = fp6.encode(torch.from_numpy(finite), mantissa_bits)
    assert codes.dtype == torch.int32
    expected = ml_dtypes_codes(finite, mantissa_bits)
    assert set(expected.tolist()) == set(range(64))
    np.testing.assert_array_equal(codes.numpy(), without_negative_zero(expected))


@both
def test_encode_is_ml_dtypes_for_every_finite_float16(mantissa_bits: int) -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    finite = every[np.isfinite(every)]
    expected = without_negative_zero(ml_dtypes_codes(finite, mantissa_bits))
    np.testing.assert_array_equal(fp6.encode(torch.from_numpy(finite), mantissa_bits).numpy(), expected)


@both
@repeatable
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_encode_is_ml_dtypes_for_float32(mantissa_bits: int, numbers: list[float]) -> None:
    codes = fp6.encode(torch.tensor(numbers, dtype=torch.float32), mantissa_bits)
    expected = without_negative_zero(ml_dtypes_codes(np.array(numbers, np.float32), mantissa_bits))
    assert codes.tolist() == expected.tolist()


@both
@pytest.mark.parametrize("sign", [1, -1])
def test_every_tie_goes_to_the_even_code_and_the_next_float_to_the_nearer(mantissa_bits: int, sign: int) -> None:
    """Of all 31 pairs of neighbours, also where a binade ends and where the subnormals do."""
    known = values(mantissa_bits)
    for code, (low, high) in enumerate(itertools.pairwise(known)):
        tie = np.float32((low + high) / 2)
        assert Fraction(float(tie)) == (low + high) / 2  # a float32
        numbers = [np.nextafter(tie, np.float32(0)), tie, np.nextafter(tie, np.float32(math.inf))]
        even = code if code % 2 == 0 else code + 1
        signed = [c + 32 if sign < 0 and c else c for c in (code, even, code + 1)]
        assert fp6.encode(torch.tensor([sign * float(x) for x in numbers]), mantissa_bits).tolist() == signed


@both
def test_large_magnitudes_saturate(mantissa_bits: int) -> None:
    largest = LARGEST[mantissa_bits]
    for value in (
        largest,
        float(np.nextafter(np.float32(largest), np.float32(math.inf))),
        32.0,
        1e30,
        3.4e38,
        math.inf,
    ):
        assert fp6.encode(torch.tensor([value, -value]), mantissa_bits).tolist() == [31, 63]
    assert fp6.max_value(mantissa_bits) == largest


@both
def test_what_rounds_to_zero_has_no_sign(mantissa_bits: int) -> None:
    half = SMALLEST[mantissa_bits] / 2  # of the smallest subnormal: to even, which is zero
    for value in (0.0, 2.0**-149, 2.0**-127, 2.0**-60, half):
        assert fp6.encode(torch.tensor([value, -value]), mantissa_bits).tolist() == [0, 0]
    above = float(np.nextafter(np.float32(half), np.float32(1)))
    assert fp6.encode(torch.tensor([above, -above]), mantissa_bits).tolist() == [1, 33]


@both
def test_decode_is_ml_dtypes_for_every_code(mantissa_bits: int) -> None:
    codes = np.arange(64, dtype=np.uint8)
    expected = codes.view(ML_DTYPES[mantissa_bits]).astype(np.float32)
    assert [Fraction(float(v)) for v in expected[:32]] == values(mantissa_bits)
    assert expected[31] == LARGEST[mantissa_bits]
    assert expected[1] == SMALLEST[mantissa_bits]
    decoded = fp6.decode(torch.from_numpy(codes.astype(np.int32)), mantissa_bits)
    assert decoded.dtype == torch.float32
    np.testing.assert_array_equal(decoded.numpy().view(np.uint32), expected.view(np.uint32))  # also -0.0


@both
def test_every_value_encodes_to_its_own_code(mantissa_bits: int) -> None:
    codes = torch.tensor([c for c in range(64) if c != 32], dtype=torch.int32)
    assert torch.equal(fp6.encode(fp6.decode(codes, mantissa_bits), mantissa_bits), codes)


def test_the_first_element_is_in_the_lowest_bits() -> None:
    codes = torch.tensor([0x01, 0x02, 0x03, 0x3F], dtype=torch.int32)
    number = 0x01 | 0x02 << 6 | 0x03 << 12 | 0x3F << 18
    packed = fp6.pack(codes)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == list(number.to_bytes(3, "little"))
    assert fp6.unpack(packed).tolist() == codes.tolist()


def test_packing_is_pythons_arithmetic_for_random_codes() -> None:
    codes = torch.randint(0, 64, (5, 96), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    packed = fp6.pack(codes)
    assert packed.shape == (5, 72)
    for row, stored in zip(codes.tolist(), packed.tolist(), strict=True):
        assert bytes(stored) == sum(code << 6 * i for i, code in enumerate(row)).to_bytes(72, "little")
    unpacked = fp6.unpack(packed)
    assert unpacked.dtype == torch.int32
    assert torch.equal(unpacked, codes)


def test_every_byte_at_every_place_survives_unpack_and_pack() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    packed = torch.stack((every, every.roll(85), every.roll(170)), -1).reshape(2, -1)
    assert torch.equal(fp6.pack(fp6.unpack(packed)), packed)
