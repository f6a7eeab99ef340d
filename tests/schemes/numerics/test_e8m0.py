"""E8M0 against ml_dtypes, and its scale rule against the same rule in double precision, which is exact here.

Everything is compared bit for bit.
"""

import math

import ml_dtypes
import numpy as np
import pytest
import torch

from quark_inductor.schemes.numerics import e8m0

FORMATS = {"fp4_e2m1": (1, 2), "fp6_e3m2": (2, 4), "fp6_e2m3": (3, 2), "fp8_e4m3": (3, 8)}


def even_code(amax: float, mantissa_bits: int, max_exponent: int) -> int:
    """The rule "even" of one block. Every sum and every logarithm is exact: float32 has 24 bits, a double 53."""
    if math.isnan(amax):
        return 255
    if math.isinf(amax):
        return 254
    if amax == 0:
        return 0
    exponent = math.frexp(amax)[1] - 1  # floor(log2(amax))
    half_a_unit = math.ldexp(1.0, exponent - mantissa_bits - 1)
    exponent = math.frexp(amax + half_a_unit)[1] - 1
    return 254 if exponent > 127 else max(exponent - max_exponent + 127, 0)


def positive_bfloat16() -> torch.Tensor:
    """Every bfloat16 without a sign: 0, subnormals, normals, infinity and all NaNs, as float32."""
    return (torch.arange(1 << 15, dtype=torch.int32) << 16).view(torch.float32)


def test_decode_is_ml_dtypes_for_every_code() -> None:
    codes = np.arange(256, dtype=np.uint8)
    expected = codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    values = e8m0.decode(torch.from_numpy(codes))
    assert values.dtype == torch.float32
    assert np.isnan(expected).nonzero()[0].tolist() == [255]  # ml_dtypes agrees that 255 is the one NaN
    np.testing.assert_array_equal(values[:255].numpy().view(np.uint32), expected[:255].view(np.uint32))
    assert values[255].isnan()


@pytest.mark.parametrize(("code", "value"), [(0, 2.0**-127), (1, 2.0**-126), (127, 1.0), (128, 2.0), (254, 2.0**127)])
def test_decode_is_a_biased_power_of_two(code: int, value: float) -> None:
    assert e8m0.decode(torch.tensor([[code]], dtype=torch.uint8)).tolist() == [[value]]


@pytest.mark.parametrize("name", FORMATS)
def test_encode_even_of_every_bfloat16(name: str) -> None:
    amax = positive_bfloat16()
    codes = e8m0.encode_even(amax, *FORMATS[name])
    assert codes.dtype == torch.uint8
    expected = [even_code(value, *FORMATS[name]) for value in amax.tolist()]
    assert codes.tolist() == expected
    assert set(range(1, 253 - FORMATS[name][1])) < set(expected)  # the reference covers the range


def test_encode_even_of_fp4_changes_at_seven_quarters_of_a_power_of_two() -> None:
    thresholds = [1.75 * 2.0**n for n in range(-126, 128)]
    at = torch.tensor(thresholds)
    below = torch.nextafter(at, torch.zeros(()))
    above = torch.nextafter(at, torch.tensor(math.inf))
    for amax in (below, at, above):
        assert e8m0.encode_even(amax, 1, 2).tolist() == [even_code(value, 1, 2) for value in amax.tolist()]
    # In plain numbers: an amax of 1.75 is scaled by 1/2 to 3.5, the float below it by 1/4 to almost 7.
    assert e8m0.decode(e8m0.encode_even(at[126:127], 1, 2)).item() == 0.5
    assert e8m0.decode(e8m0.encode_even(below[126:127], 1, 2)).item() == 0.25


@pytest.mark.parametrize(
    ("amax", "code"),
    [
        (0.0, 0),
        (2.0**-149, 0),  # the smallest subnormal
        (2.0**-126 - 2.0**-149, 0),  # the largest subnormal, which the added half unit makes normal
        (1.75 * 2.0**-126, 0),
        (2.0**-124, 1),
        (6.0, 127),
        (float(np.nextafter(np.float32(1.75 * 2.0**127), np.float32(0))), 252),
        (1.75 * 2.0**127, 254),  # rounds up to 2**128, which no float32 is: not 253
        (3.4028234663852886e38, 254),
        (math.inf, 254),
        (math.nan, 255),
    ],
)
def test_encode_even_at_the_ends_of_the_range(amax: float, code: int) -> None:
    assert e8m0.encode_even(torch.tensor([[amax]]), 1, 2).tolist() == [[code]]
