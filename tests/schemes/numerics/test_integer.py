"""Integers against numpy in double precision, which is exact up to the roundings that the docstrings name.

A quotient of two bfloat16 (or float16) numbers is the same rounded once, or first to float32 or float64 and then again:
those have more than twice the bits.
"""

import math
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from quark_inductor.schemes.numerics import integer

# The same examples in every run, and no time limit for one: the machine may be busy.
repeatable = settings(derandomize=True, database=None, deadline=None)
FIXTURES = Path(__file__).parents[2] / "fixtures"
Floats = Callable[[int, int, int, str], np.ndarray]
BOUNDS = {"int8": (-128, 127), "uint8": (0, 255), "int4": (-8, 7), "uint4": (0, 15)}
NUMPY = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
EPS = 2.0**-23
every_format = pytest.mark.parametrize("dtype", BOUNDS)
symmetric_or_not = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])


def as_float(x: np.ndarray, number: str) -> np.ndarray:
    """Rounded once to a floating-point format, in double precision again."""
    with np.errstate(over="ignore"):
        return x.astype(np.float32).astype(NUMPY[number]).astype(np.float64)


def reference_parameters(
    x: np.ndarray, dtype: str, symmetric: bool, per_row: bool, number: str
) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point of each row, or of everything, in double precision."""
    low, high = BOUNDS[dtype]
    axis = -1 if per_row else None
    x = x.astype(np.float64)
    smallest = np.minimum(x.min(axis, keepdims=per_row), 0)
    largest = np.maximum(x.max(axis, keepdims=per_row), 0)
    if symmetric:
        scale = as_float(np.maximum(-smallest, largest) / ((high - low) / 2), number)
    else:
        scale = as_float(as_float(largest - smallest, number) / (high - low), number)
    scale = np.maximum(scale, EPS)
    if symmetric:
        return scale, np.zeros(scale.shape, int)
    # One scale for everything is float32, and so is what is divided by it.
    quotient = as_float(smallest / scale, number if per_row else "float32")
    return scale, np.clip(low - np.rint(quotient), low, high).astype(int)


def reference_codes(x: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, dtype: str) -> np.ndarray:
    """``clamp(round(x * (1 / scale)) + zero_point)`` with a float32 reciprocal and product."""
    low, high = BOUNDS[dtype]
    with np.errstate(over="ignore", invalid="ignore"):
        reciprocal = (1 / scale).astype(np.float32).astype(np.float64)
        product = (x.astype(np.float64) * reciprocal).astype(np.float32).astype(np.float64)
        return np.clip(np.rint(product) + zero_point, low, high)


def reference_values(codes: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, number: str) -> np.ndarray:
    """``(code - zero_point) * scale`` in float32, then one cast."""
    return as_float((codes - zero_point) * scale, number)


def check_against_reference(x: np.ndarray, dtype: str, symmetric: bool, per_row: bool, number: str) -> None:
    """Parameters, codes and values of finite ``[rows, K]``, all equal; and the values are near ``x``."""
    tensor = torch.from_numpy(x).to(getattr(torch, number))
    np.testing.assert_array_equal(tensor.float().numpy(), x)  # exact in this dtype
    scale, zero_point = integer.parameters(tensor, dtype, symmetric, -1 if per_row else None)
    assert scale.dtype == (tensor.dtype if per_row else torch.float32)
    assert zero_point.dtype == torch.int32
    expected_scale, expected_zero_point = reference_parameters(x, dtype, symmetric, per_row, number)
    np.testing.assert_array_equal(scale.double().numpy(), expected_scale)
    np.testing.assert_array_equal(zero_point.numpy(), expected_zero_point)

    codes = integer.quantize(tensor, scale, zero_point, dtype)
    assert codes.dtype == (torch.uint8 if dtype.startswith("u") else torch.int8)
    expected = reference_codes(x, expected_scale, expected_zero_point, dtype)
    np.testing.assert_array_equal(codes.numpy(), expected)
    values = integer.dequantize(codes, scale, zero_point, tensor.dtype)
    assert values.dtype == tensor.dtype
    expected_values = reference_values(expected, expected_scale, expected_zero_point, number)
    np.testing.assert_array_equal(values.double().numpy(), expected_values)

    frozen = reference_values(expected, expected_scale, expected_zero_point, number)
    reciprocal = (1 / expected_scale).astype(np.float32).astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        product = (frozen * reciprocal).astype(np.float32).astype(np.float64)
        again = np.rint((product + expected_zero_point).astype(np.float32).astype(np.float64))
    np.testing.assert_array_equal(
        integer.quantize_weight(tensor, scale, zero_point, dtype).numpy(), np.clip(again, *BOUNDS[dtype])
    )

    if symmetric and dtype.startswith("u"):
        return  # such a range has no negative codes
    # Half a step for the code; that much again where the zero point was rounded the other way; and the largest code
    # times the rounding of the scale, to a normal number or not, and of the value.
    steps = BOUNDS[dtype][1] - BOUNDS[dtype][0]
    limits = ml_dtypes.finfo(NUMPY[number])
    scale_error = expected_scale * float(limits.eps) + float(limits.smallest_subnormal)
    bound = expected_scale * (0.5 if symmetric else 1.0) + 1.5 * steps * scale_error
    assert (np.abs(expected_values - x.astype(np.float64)) <= bound).all()


some_floats = given(seed=st.integers(0, 2**32), number=st.sampled_from(sorted(NUMPY)), exponent=st.integers(-30, 30))


def of_medium_size(x: np.ndarray, number: str, exponent: int) -> np.ndarray:
    """Scaled into a range where neither a range nor a scale overflows, as far as the dtype allows it."""
    largest = np.abs(x).max()
    if number == "float16" or largest == 0:
        return (x / 4).astype(NUMPY[number]).astype(np.float32)
    with np.errstate(under="ignore"):
        scaled = np.ldexp(x.astype(np.float64), exponent - int(np.frexp(largest)[1]))
    return scaled.astype(np.float32).astype(NUMPY[number]).astype(np.float32)


@every_format
@symmetric_or_not
@settings(repeatable, max_examples=12)
@some_floats
def test_random_rows_of_every_magnitude(
    floats: Floats, dtype: str, symmetric: bool, seed: int, number: str, exponent: int
) -> None:
    """12 times 64 rows, and 12 tensors, of every format."""
    x = of_medium_size(floats(seed, 64, 32, number), number, exponent)
    check_against_reference(x, dtype, symmetric, True, number)
    check_against_reference(x[::8], dtype, symmetric, False, number)


@pytest.mark.slow
@every_format
@symmetric_or_not
@settings(repeatable, max_examples=50)
@some_floats
def test_many_random_rows_of_every_magnitude(
    floats: Floats, dtype: str, symmetric: bool, seed: int, number: str, exponent: int
) -> None:
    """50 times 1024 rows of every format, and 50 tensors."""
    x = of_medium_size(floats(seed, 1024, 32, number), number, exponent)
    check_against_reference(x, dtype, symmetric, True, number)
    check_against_reference(x[::8], dtype, symmetric, False, number)


@every_format
@symmetric_or_not
def test_every_bfloat16_as_the_largest_of_a_row(dtype: str, symmetric: bool) -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    every = every[np.abs(every) < 1e38]
    factors = np.array([1, -0.5, 0.25, 1 / 3, 0, -0.9, 0.75, 0.1], np.float32)
    x = (every[:, None] * factors).astype(ml_dtypes.bfloat16).astype(np.float32)
    check_against_reference(x, dtype, symmetric, True, "bfloat16")


@every_format
@pytest.mark.parametrize("scale", [1.0, 0.25, 3.0])
def test_every_bfloat16_by_one_scale(dtype: str, scale: float) -> None:
    """Infinity saturates; ties go to the even whole number, before the zero point is added."""
    x = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    x = x[~np.isnan(x)]
    low, high = BOUNDS[dtype]
    for zero_point in (0, low, high, 3):
        codes = integer.quantize(torch.from_numpy(x), torch.tensor(scale), torch.tensor(zero_point), dtype)
        expected = reference_codes(x, np.array(scale), np.array(zero_point), dtype)
        np.testing.assert_array_equal(codes.numpy(), expected)
        assert (codes[torch.from_numpy(x == np.inf)] == high).all()
        assert (codes[torch.from_numpy(x == -np.inf)] == low).all()
    if scale < 3:  # thirds of a bfloat16 leave some out
        assert set(codes.tolist()) == set(range(low, high + 1))


def test_ties_of_chosen_values() -> None:
    x, one = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 127.5, -128.5, -129.0]), torch.ones(())
    assert integer.quantize(x, one, torch.tensor(0), "int8").tolist() == [0, 2, 2, 0, -2, -2, 126, 127, -128, -128]
    # An odd zero point does not make them odd: it is added after the rounding ...
    assert integer.quantize(x[:3], one, torch.tensor(1), "int8").tolist() == [1, 3, 3]
    # ... and of a weight the second time before it, when there are no ties any more.
    assert integer.quantize_weight(x[:3], one, torch.tensor(1), "int8").tolist() == [1, 3, 3]


def test_a_symmetric_range_reaches_half_a_step_beyond_its_codes() -> None:
    """The scale is amax / 127.5: both ends are 127.5 steps from zero; -128 is a code, 128 is none."""
    x = torch.tensor([[-255.0, 255.0, 2.0]])
    scale, zero_point = integer.parameters(x, "int8", True, -1)
    assert (scale.tolist(), zero_point.tolist()) == ([[2.0]], [[0]])
    assert integer.quantize(x, scale, zero_point, "int8").tolist() == [[-128, 127, 1]]
    scale, _ = integer.parameters(torch.tensor([-15.0]), "int4", True, None)
    assert scale.item() == 2.0


@every_format
def test_an_asymmetric_range_holds_zero(dtype: str) -> None:
    """All positive, all negative, and both: 0 has a code of its own, and dequantizes to 0."""
    low, high = BOUNDS[dtype]
    x = torch.tensor([[1.0, 15.0], [-15.0, -1.0], [-5.0, 10.0], [0.0, 0.0]]) * 17
    scale, zero_point = integer.parameters(x, dtype, False, -1)
    steps = high - low
    assert scale.flatten().tolist() == [255 / steps, 255 / steps, 255 / steps, EPS]
    assert zero_point.flatten().tolist() == [low, high, low + steps // 3, low]
    zero = integer.quantize(torch.zeros(4, 1), scale, zero_point, dtype)
    assert torch.equal(integer.dequantize(zero, scale, zero_point, torch.float32), torch.zeros(4, 1))


@symmetric_or_not
@every_format
@pytest.mark.parametrize("per_row", [True, False])
def test_a_scale_is_at_least_two_to_the_minus_23(dtype: str, symmetric: bool, per_row: bool) -> None:
    for value in (0.0, -0.0, 2.0**-149, -(2.0**-149), 2.0**-24):
        scale, _ = integer.parameters(torch.full((2, 32), value), dtype, symmetric, -1 if per_row else None)
        assert (scale == EPS).all()
        assert scale.shape == ((2, 1) if per_row else ())


@symmetric_or_not
def test_a_nan_is_in_its_own_scale_only(symmetric: bool) -> None:
    x = torch.ones(3, 32)
    x[1, 4] = math.nan
    scale, zero_point = integer.parameters(x, "int8", symmetric, -1)
    assert scale.isnan().flatten().tolist() == [False, True, False]
    values = integer.dequantize(integer.quantize(x, scale, zero_point, "int8"), scale, zero_point, torch.float32)
    assert values.isnan().all(-1).tolist() == [False, True, False]
    assert not values[[0, 2]].isnan().any()
    assert integer.parameters(x, "int8", symmetric, None)[0].isnan()


def test_of_nothing_there_is_a_scale() -> None:
    scale, zero_point = integer.parameters(torch.zeros(0, 32, dtype=torch.bfloat16), "int8", True, None)
    assert (scale.item(), scale.dtype, zero_point.item(), zero_point.dtype) == (1.0, torch.float32, 0, torch.int32)
    scale, zero_point = integer.parameters(torch.zeros(0, 32), "int8", True, -1)
    assert scale.shape == zero_point.shape == (0, 1)


@every_format
def test_dequantize_of_every_code_is_exact_before_the_cast(dtype: str) -> None:
    low, high = BOUNDS[dtype]
    codes = torch.arange(low, high + 1, dtype=torch.uint8 if dtype.startswith("u") else torch.int8)
    assert codes.dtype == integer.codes_dtype(dtype)
    for zero_point in (low, high, 0):
        for scale in (1.0, 2.0**-23, 0.0123):
            for out in (torch.float32, torch.bfloat16, torch.float16):
                stored = torch.tensor(zero_point, dtype=codes.dtype)  # codes and zero points of 8 bits: 255 - 0 is 255
                values: Tensor = integer.dequantize(codes, torch.tensor(scale), stored, out)
                product = (codes.numpy().astype(np.float64) - zero_point) * float(np.float32(scale))
                assert torch.equal(values, torch.from_numpy(product.astype(np.float32)).to(out))


def test_bounds() -> None:
    assert BOUNDS == integer.BOUNDS


@pytest.mark.parametrize(
    ("checkpoint", "dtype", "symmetric", "group_size"),
    [
        ("int8", "int8", True, None),
        ("int8_perchannel_asym", "int8", False, None),
        ("uint8_static", "uint8", False, None),
        ("int8_dynamic", "int8", True, None),
        ("ptpc_int8", "int8", True, None),
        ("ptpc_int8_fp32", "int8", True, None),
        ("int4_wa_64", "int4", True, 64),
        ("int4_wa_64_fp32", "int4", True, 64),
    ],
)
def test_edge_cases_are_those_of_amd_quark(
    checkpoint: str, dtype: str, symmetric: bool, group_size: int | None
) -> None:
    """Each row went alone: a scale of the tensor is one of the row. A row that is not finite has no code to compare."""
    reference = load_file(FIXTURES / checkpoint / "reference.safetensors")
    stored = load_file(FIXTURES / checkpoint / "model.safetensors")
    x, expected = reference["special.input"][0], reference["special.input_qdq"][0]
    q_proj = "model.layers.0.self_attn.q_proj"
    for row, wanted in zip(x, expected, strict=True):
        groups = row if group_size is None else row.unflatten(-1, (-1, group_size))
        if f"{q_proj}.input_scale" in stored:
            scale, zero_point = stored[f"{q_proj}.input_scale"], stored[f"{q_proj}.input_zero_point"]
        else:
            axis = None if checkpoint == "int8_dynamic" else -1
            scale, zero_point = integer.parameters(groups, dtype, symmetric, axis)
        ours = integer.dequantize(integer.quantize(groups, scale, zero_point, dtype), scale, zero_point, x.dtype)
        comparable = ~(row.isnan() if scale.isfinite().all() else ~wanted.isfinite())
        if row.isfinite().all():
            assert comparable.all()
        assert torch.equal(ours.flatten()[comparable], wanted[comparable])
