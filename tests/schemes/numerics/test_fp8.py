"""FP8 E4M3 against amd-quark's own numbers and against numpy with ml_dtypes. Everything is bit-exact.

Where a bfloat16 quotient or product is expected, numpy computes it in float32 and ml_dtypes rounds it: float32 has more
than twice the bits of a bfloat16 plus two, so the two roundings are as good as one.
"""

import math
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from quark_inductor.schemes.numerics import fp8

# The same examples in every run, and no time limit for one: the machine may be busy.
repeatable = settings(derandomize=True, database=None, deadline=None)
FIXTURES = Path(__file__).parents[2] / "fixtures"
STATIC, PER_TOKEN = ["fp8", "fp8_fp32"], ["ptpc_fp8", "ptpc_fp8_fp32"]
NUMPY = {torch.bfloat16: ml_dtypes.bfloat16, torch.float16: np.float16, torch.float32: np.float32}
INTEGERS = {2: torch.int16, 4: torch.int32}


def bits(x: Tensor) -> Tensor:
    """The numbers of a floating-point tensor as integers, all NaNs as one: equal means equal bit by bit."""
    return torch.where(x.isnan(), torch.full_like(x, math.nan), x).view(INTEGERS[x.element_size()])


def to_numpy(x: Tensor) -> np.ndarray:
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return x.numpy()


def from_numpy(x: np.ndarray) -> Tensor:
    if x.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(x.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(x)


def numpy_codes(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """``clamp(x / scale)`` rounded to the dtype of ``x``, then to E4M3, as bytes."""
    with np.errstate(over="ignore"):  # float16 has infinity from 65520 on
        quotient = (x.astype(np.float32) / scale.astype(np.float32)).astype(x.dtype)
    return np.clip(quotient.astype(np.float32), -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


def codes_of(x: Tensor) -> np.ndarray:
    return x.view(torch.uint8).numpy()


def every(dtype: torch.dtype) -> Tensor:
    """Every number of a 16-bit dtype."""
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)


# --- quantize


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_quantize_by_one_is_ml_dtypes_up_to_448(dtype: torch.dtype) -> None:
    x = every(dtype)
    x = x[x.abs() <= 448]
    for values in (x, x.float()):  # float32 has a path of its own in torch
        codes = codes_of(fp8.quantize(values, torch.ones((), dtype=values.dtype)))
        expected = to_numpy(x).astype(np.float32).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
        assert len(set(expected.tolist())) == 254  # all but the two NaNs; 0x80, the negative zero, is one of them
        np.testing.assert_array_equal(codes, expected)


@repeatable
@given(st.lists(st.floats(-448, 448, width=32), min_size=1))
def test_quantize_of_float32_is_ml_dtypes(values: list[float]) -> None:
    codes = codes_of(fp8.quantize(torch.tensor(values, dtype=torch.float32), torch.ones(())))
    expected = np.array(values, np.float32).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    assert codes.tolist() == expected.tolist()


def test_quantize_saturates_every_larger_bfloat16_and_infinity() -> None:
    x = every(torch.bfloat16)
    x = x[x.abs() > 448]
    codes = fp8.quantize(x, torch.ones((), dtype=torch.bfloat16)).float()
    assert x.isinf().sum() == 2
    assert torch.equal(codes, torch.where(x > 0, 448.0, -448.0))


def test_quantize_keeps_nan() -> None:
    x = every(torch.bfloat16)
    codes = fp8.quantize(x, torch.ones((), dtype=torch.bfloat16))
    assert torch.equal(codes.float().isnan(), x.isnan())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("value", "code"),
    [
        (-0.0, 0x80),
        (2.0**-10, 0x00),  # half of the smallest subnormal: to even, which is zero
        (-(2.0**-10), 0x80),
        (2.0**-9, 0x01),
        (3 * 2.0**-10, 0x02),
        (2.0**-6, 0x08),  # the smallest normal
        (17.0, 0x58),  # between 16 and 18
        (19.0, 0x5A),  # between 18 and 20
        (432.0, 0x7E),  # between 416 and 448
        (448.0, 0x7E),
        (500.0, 0x7E),
        (-math.inf, 0xFE),
    ],
)
def test_codes_of_chosen_values(value: float, code: int, dtype: torch.dtype) -> None:
    assert codes_of(fp8.quantize(torch.tensor([[value]], dtype=dtype), torch.ones((), dtype=dtype))).tolist() == [
        [code]
    ]


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("granularity", ["per_tensor", "per_token"])
def test_quantize_by_a_scale_is_numpys(dtype: torch.dtype, granularity: str) -> None:
    generator = torch.Generator().manual_seed(1)
    x = (torch.randn(32, 96, generator=generator) * torch.logspace(-3, 3, 32).unsqueeze(-1)).to(dtype)
    scale = (torch.rand((32, 1) if granularity == "per_token" else (), generator=generator) * 0.1 + 0.01).to(dtype)
    codes = fp8.quantize(x, scale)
    assert codes.dtype == torch.float8_e4m3fn
    np.testing.assert_array_equal(codes_of(codes), numpy_codes(to_numpy(x), to_numpy(scale)))


def test_the_quotient_is_rounded_to_the_dtype_of_the_input() -> None:
    """The exact quotient lies above the tie of two codes, and bfloat16 rounds it to the tie."""
    x, scale = torch.tensor([[1.2890625]], dtype=torch.bfloat16), torch.tensor(1.2109375, dtype=torch.bfloat16)
    exact = x.double() / scale.double()
    assert 1.0625 < exact.item() < 1.0625 + 2.0**-8  # nearer to 1.125, if nothing is rounded before
    assert fp8.quantize(x.float(), scale.float()).float().item() == 1.125
    assert fp8.quantize(x, scale).float().item() == 1.0  # 1.0625 in bfloat16, halfway: to even


# --- scales


@pytest.mark.parametrize("dtype", NUMPY)
def test_dynamic_scale_is_amax_over_448_in_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    x = (torch.randn(16, 64, generator=torch.Generator().manual_seed(2)) * torch.logspace(-3, 3, 16).unsqueeze(-1)).to(
        dtype
    )
    amax = np.abs(to_numpy(x).astype(np.float32)).max(-1, keepdims=True)
    expected = (amax / np.float32(448)).astype(NUMPY[dtype])
    for granularity in ("per_token", "per_channel"):
        scale = fp8.dynamic_scale(x, granularity)
        assert scale.shape == (16, 1)
        assert torch.equal(bits(scale), bits(from_numpy(expected)))
    scale = fp8.dynamic_scale(x, "per_tensor")
    assert scale.shape == ()
    assert torch.equal(scale, from_numpy((amax.max() / np.float32(448)).astype(NUMPY[dtype]).reshape(1))[0])


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("tiniest", [False, True])
def test_a_scale_of_zero_becomes_two_to_the_minus_23(dtype: torch.dtype, tiniest: bool) -> None:
    """Also where amax is there and amax / 448 underflows."""
    x = torch.ones(2, 32, dtype=dtype)
    x[0] = 0.0
    if tiniest:
        x[0, 5] = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the smallest subnormal
        assert x[0, 5] > 0
    assert fp8.dynamic_scale(x, "per_token").flatten().tolist()[0] == 2.0**-23
    assert fp8.dynamic_scale(x[:1], "per_tensor").item() == 2.0**-23
    assert fp8.dynamic_scale(x, "per_tensor").item() != 2.0**-23


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_nan_or_an_infinity_is_in_its_own_scale_only(value: float) -> None:
    x = torch.full((3, 32), 448.0)
    x[1, 7] = value
    scales = fp8.dynamic_scale(x, "per_token").flatten()
    assert scales[[0, 2]].tolist() == [1.0, 1.0]
    for scale in (scales[1], fp8.dynamic_scale(x, "per_tensor")):
        assert scale.isnan() if math.isnan(value) else scale == math.inf


# --- dequantize


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("rows", [True, False])
def test_dequantize_rounds_the_product_once(dtype: torch.dtype, rows: bool) -> None:
    codes = torch.arange(256, dtype=torch.uint8).expand(64, 256).contiguous()
    scale = torch.rand(64, 1, generator=torch.Generator().manual_seed(3)).add(0.5).div(64).to(dtype)
    if not rows:
        scale = scale[0, 0]
    values = codes.numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    expected = from_numpy((values * to_numpy(scale).astype(np.float32)).astype(NUMPY[dtype]))
    ours = fp8.dequantize(codes.view(torch.float8_e4m3fn), scale, dtype)
    assert ours.dtype == dtype
    assert torch.equal(bits(ours), bits(expected))
    assert ours[0].isnan().nonzero().flatten().tolist() == [0x7F, 0xFF]


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(), (64,)])
def test_dequantize_weight_multiplies_in_float32(
    dtype: torch.dtype, scale_dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    codes = torch.arange(256, dtype=torch.uint8).expand(64, 256).contiguous()
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(4)).add(0.5).div(64).to(scale_dtype)
    multiplier = to_numpy(scale).astype(np.float32).reshape((-1, 1) if shape else ())
    product = codes.numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32) * multiplier
    ours = fp8.dequantize_weight(codes.view(torch.float8_e4m3fn), scale, dtype)
    assert torch.equal(bits(ours), bits(from_numpy(product.astype(NUMPY[dtype]))))


@pytest.mark.parametrize("dtype", NUMPY)
def test_a_nan_scale_makes_its_row_nan(dtype: torch.dtype) -> None:
    codes = torch.zeros(2, 32).to(torch.float8_e4m3fn)
    scale = torch.tensor([math.nan, 1.0], dtype=dtype)
    for values in (fp8.dequantize(codes, scale.unsqueeze(-1), dtype), fp8.dequantize_weight(codes, scale, dtype)):
        assert values.isnan().all(-1).tolist() == [True, False]


@repeatable
@given(st.lists(st.floats(-448, 448, width=16), min_size=1), st.integers(-20, 20), st.integers(128, 255))
def test_quantizing_what_was_dequantized_changes_nothing(values: list[float], exponent: int, mantissa: int) -> None:
    scale = torch.tensor(mantissa * 2.0**exponent, dtype=torch.bfloat16)
    codes = torch.tensor(values).to(torch.float8_e4m3fn)
    again = fp8.quantize(fp8.dequantize(codes, scale, torch.bfloat16), scale)
    assert codes_of(again).tolist() == codes_of(codes).tolist()


# --- amd-quark


@pytest.mark.parametrize("name", STATIC + PER_TOKEN)
def test_edge_cases_are_those_of_amd_quark(name: str) -> None:
    reference = load_file(FIXTURES / name / "reference.safetensors")
    x, scale = reference["special.input"][0], reference["special.input_scale"]
    if name in PER_TOKEN:
        ours = fp8.dynamic_scale(x, "per_token")
        assert torch.equal(bits(ours.squeeze(-1)), bits(scale))
        assert scale[0] == 2.0**-23  # the row of zeros
        scale = ours
    expected = reference["special.input_qdq"][0]
    assert expected.isnan().any()  # the file has what this is about
    assert torch.equal(bits(fp8.dequantize(fp8.quantize(x, scale), scale, x.dtype)), bits(expected))


@pytest.mark.parametrize("name", STATIC + PER_TOKEN)
def test_activations_are_those_of_amd_quark(name: str) -> None:
    reference = load_file(FIXTURES / name / "reference.safetensors")
    stored = load_file(FIXTURES / name / "model.safetensors")
    modules = [key.removesuffix(".input") for key in reference if key.endswith("_proj.input")]
    assert len(modules) >= 2
    for module in modules:
        x = reference[f"{module}.input"].flatten(0, 1)
        scale = stored[f"{module}.input_scale"] if name in STATIC else fp8.dynamic_scale(x, "per_token")
        ours = fp8.dequantize(fp8.quantize(x, scale), scale, x.dtype)
        assert torch.equal(bits(ours), bits(reference[f"{module}.input_qdq"].flatten(0, 1)))
