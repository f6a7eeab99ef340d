"""E5M3 against exact fractions: ml_dtypes does not have it. The values follow from the definition, bias 15."""

import itertools
import math
from bisect import bisect_left
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quark_inductor.schemes.numerics import e5m3

# The same examples in every run, and no time limit for one: the machine may be busy.
repeatable = settings(derandomize=True, database=None, deadline=None)


def value(code: int) -> Fraction:
    exponent, mantissa = divmod(code, 8)
    if exponent == 0:
        return Fraction(mantissa, 8) * Fraction(2) ** -14
    return (1 + Fraction(mantissa, 8)) * Fraction(2) ** (exponent - 15)


VALUES = [value(code) for code in range(255)]


def encoded(number: float) -> int:
    """The nearest code, by exact comparison; a tie goes to the even one."""
    if not math.isfinite(number):
        return 255
    exact = Fraction(number)
    if exact >= VALUES[-1]:
        return 254
    above = bisect_left(VALUES, exact)
    if VALUES[above] == exact:
        return above
    to_low, to_high = exact - VALUES[above - 1], VALUES[above] - exact
    if to_low == to_high:
        return above - above % 2
    return above - 1 if to_low < to_high else above


def test_the_ends_of_the_range() -> None:
    assert (VALUES[0], VALUES[1], VALUES[254]) == (0, Fraction(1, 2**17), 114688)
    assert e5m3.MAX == 114688.0
    assert VALUES == sorted(VALUES)


def test_decode_of_every_code_is_exact() -> None:
    values = e5m3.decode(torch.arange(256, dtype=torch.uint8))
    assert values.dtype == torch.float32
    assert [Fraction(v) for v in values[:255].tolist()] == VALUES
    assert values[255].isnan()
    assert math.copysign(1, values[0].item()) == 1


def test_every_value_encodes_to_its_own_code() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(e5m3.encode(e5m3.decode(codes)), codes)


def test_encode_of_every_positive_bfloat16() -> None:
    """Also every subnormal, infinity and the NaNs."""
    every = np.arange(1 << 15, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    codes = e5m3.encode(torch.from_numpy(every))
    assert codes.dtype == torch.uint8
    expected = [encoded(v) for v in every.tolist()]
    assert set(expected) == set(range(256))
    assert codes.tolist() == expected


def test_every_tie_goes_to_the_even_code_and_the_next_float_to_the_nearer() -> None:
    for code, (low, high) in enumerate(itertools.pairwise(VALUES)):
        tie = np.float32((low + high) / 2)
        assert Fraction(float(tie)) == (low + high) / 2
        around = np.array([np.nextafter(tie, np.float32(0)), tie, np.nextafter(tie, np.float32(math.inf))])
        assert e5m3.encode(torch.from_numpy(around)).tolist() == [code, code + code % 2, code + 1]


@repeatable
@given(st.lists(st.floats(0, width=32, allow_infinity=False), min_size=1))
def test_encode_of_any_float32(numbers: list[float]) -> None:
    assert e5m3.encode(torch.tensor(numbers, dtype=torch.float32)).tolist() == [encoded(v) for v in numbers]


@repeatable
@given(st.lists(st.floats(2.0**-19, 114688.0, width=32), min_size=1))
def test_encode_of_any_float32_in_its_range(numbers: list[float]) -> None:
    assert e5m3.encode(torch.tensor(numbers, dtype=torch.float32)).tolist() == [encoded(v) for v in numbers]


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (0.0, 0),
        (2.0**-149, 0),
        (2.0**-18, 0),  # half of the smallest: to even
        (2.0**-18 * (1 + 2.0**-23), 1),
        (3 * 2.0**-18, 2),  # between 1 and 2
        (2.0**-14, 8),  # the smallest normal
        (7.5 * 2.0**-17, 8),  # between the largest subnormal and it
        (1.0, 120),
        (114688.0, 254),
        (114689.0, 254),
        (122880.0, 254),
        (131072.0, 254),
        (3.4e38, 254),
        (math.inf, 255),
        (math.nan, 255),
    ],
)
def test_codes_of_chosen_values(number: float, code: int) -> None:
    assert e5m3.encode(torch.tensor([[number]])).tolist() == [[code]]
