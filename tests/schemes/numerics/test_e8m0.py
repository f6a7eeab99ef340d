"""E8M0 against ml_dtypes, and its scale rule against the same rule in double precision, which is exact here.

Everything is compared bit for bit.
"""

import math

import ml_dtypes
import numpy as np
import pytest
import torch

from quark_inductor.schemes.numerics import e8m0

FORMATS = {"fp4_e2m1": (1, 2), "fp6_e3m2": (2, 4), "fp6_e2m3": (3, 2), "fp8_e4m3": (3, 8), "fp8_e5m2": (2, 15)}


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


# --- the other rules

DTYPES = {torch.bfloat16: ml_dtypes.bfloat16, torch.float16: np.float16, torch.float32: np.float32}


def every_positive(dtype: torch.dtype) -> np.ndarray:
    """Every number of a 16-bit dtype that is not negative, as float64; of float32 a sample of each binade."""
    if dtype == torch.float32:
        patterns = np.random.default_rng(5).integers(0, 0x7F800000, 1 << 16).astype(np.int32)
        return patterns.view(np.float32).astype(np.float64)
    return np.arange(1 << 15, dtype=np.uint16).view(DTYPES[dtype]).astype(np.float64)


def log2_code(amax: np.ndarray, round_up: bool, max_exponent: int, dtype: torch.dtype) -> np.ndarray:
    """The rules "floor" and "ceil", from a logarithm in double precision that is rounded to the dtype."""
    with np.errstate(divide="ignore"):
        log = np.log2(amax).astype(DTYPES[dtype]).astype(np.float64)
    exponent = (np.ceil(log) if round_up else np.floor(log)) - max_exponent
    with np.errstate(invalid="ignore"):
        code = np.clip(exponent, -127, 127) + 127
    return np.where(np.isfinite(amax), np.where(amax == 0, 104, code), 255).astype(np.uint8)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("round_up", [False, True], ids=["floor", "ceil"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_encode_log2_of_every_number(name: str, round_up: bool, dtype: torch.dtype) -> None:
    amax = every_positive(dtype)
    codes = e8m0.encode_log2(torch.from_numpy(amax).float(), round_up, FORMATS[name][1], dtype)
    assert codes.dtype == torch.uint8
    np.testing.assert_array_equal(codes.numpy(), log2_code(amax, round_up, FORMATS[name][1], dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_encode_log2_of_powers_of_two_is_exact(dtype: torch.dtype) -> None:
    exponents = range(-14, 16) if dtype == torch.float16 else range(-126, 128)
    amax = torch.tensor([2.0**n for n in exponents])
    for round_up in (False, True):
        codes = e8m0.encode_log2(amax, round_up, 2, dtype)
        assert codes.tolist() == [max(n - 2 + 127, 0) for n in exponents]


@pytest.mark.parametrize(
    ("amax", "dtype", "floor", "ceil"),
    [
        (127.5, torch.bfloat16, 132, 132),  # log2 is 6.994, in bfloat16 7: 2**(7 - 2)
        (127.5, torch.float32, 131, 132),
        (65.0, torch.bfloat16, 131, 131),  # 6.022, in bfloat16 6.03: its ceil is 7
        (64.0, torch.bfloat16, 131, 131),
        (0.0, torch.bfloat16, 104, 104),  # 2**-23
        (2.0**-125, torch.float32, 0, 0),
        (2.0**-149, torch.float32, 0, 0),
        (math.inf, torch.float32, 255, 255),
        (math.nan, torch.bfloat16, 255, 255),
    ],
)
def test_encode_log2_of_chosen_values(amax: float, dtype: torch.dtype, floor: int, ceil: int) -> None:
    assert e8m0.encode_log2(torch.tensor([[amax]]), False, 2, dtype).tolist() == [[floor]]
    assert e8m0.encode_log2(torch.tensor([[amax]]), True, 2, dtype).tolist() == [[ceil + (amax == 65.0)]]


def rceil_code(amax: float, max_value: float) -> int:
    """The smallest power of two by which nothing saturates, of the float32 quotient."""
    if not math.isfinite(amax):
        return 255
    quotient = float(np.float32(amax) / np.float32(max_value))
    code = 0
    while math.ldexp(1.0, code - 127) < quotient:
        code += 1
    return code


@pytest.mark.parametrize("max_value", [448.0, 57344.0, 6.0])
def test_encode_rceil_of_every_bfloat16(max_value: float) -> None:
    amax = positive_bfloat16()
    codes = e8m0.encode_rceil(amax, max_value)
    assert codes.dtype == torch.uint8
    assert codes.tolist() == [rceil_code(value, max_value) for value in amax.tolist()]


def test_encode_rceil_changes_just_above_a_power_of_two() -> None:
    at = torch.tensor([448.0 * 2.0**n for n in range(-134, 119)])
    above, below = torch.nextafter(at, torch.tensor(math.inf)), torch.nextafter(at, torch.zeros(()))
    for amax in (below, at, above):
        assert e8m0.encode_rceil(amax, 448.0).tolist() == [rceil_code(value, 448.0) for value in amax.tolist()]
    # In plain numbers: 448 is scaled by 1, the float above it by 2.
    assert e8m0.encode_rceil(at[134:135], 448.0).tolist() == [127]
    assert e8m0.encode_rceil(above[134:135], 448.0).tolist() == [128]


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_to_is_numpys(dtype: torch.dtype) -> None:
    """Ties, subnormals, what overflows to infinity, and NaN."""
    patterns = np.random.default_rng(6).integers(0, 1 << 32, 1 << 16, dtype=np.uint64).astype(np.uint32)
    patterns[: 1 << 14] &= 0xFFFF8000  # ties of bfloat16
    patterns[1 << 14 : 1 << 15] &= 0xFFFFF000  # and of float16
    patterns[-8:] = [0, 1 << 31, 1, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0x7FFFFFFF, 0x7F7F8000]
    x = patterns.view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.astype(DTYPES[dtype]).astype(np.float32)
    ours = e8m0.round_to(torch.from_numpy(x), dtype).numpy()
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(x))
    np.testing.assert_array_equal(ours[~np.isnan(x)].view(np.uint32), expected[~np.isnan(x)].view(np.uint32))
