"""FP8 E4M3 against amd-quark's own numbers and against numpy with ml_dtypes. Everything is bit-exact.

Where a bfloat16 quotient or product is expected, numpy computes it in float32 and ml_dtypes rounds it: float32 has more
than twice the bits of a bfloat16 plus two, so the two roundings are as good as one.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


# --- both formats, groups, blocks, fnuz

# Largest value, mantissa bits, exponent of the smallest normal.
FORMATS = {
    torch.float8_e4m3fn: (448.0, 3, -6, ml_dtypes.float8_e4m3fn),
    torch.float8_e5m2: (57344.0, 2, -14, ml_dtypes.float8_e5m2),
    torch.float8_e4m3fnuz: (224.0, 3, -7, ml_dtypes.float8_e4m3fnuz),  # it reaches 240: 224 has the code of 448
}
NAMES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
Floats = Callable[[int, int, int, str], np.ndarray]


def rounded(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """To the nearest FP8 number, half to even, saturated: all steps are exact in double precision."""
    largest, mantissa_bits, smallest_exponent, _ = FORMATS[dtype]
    x = x.astype(np.float64)
    exponent = np.maximum(np.frexp(x)[1] - 1, smallest_exponent)
    step = np.ldexp(1.0, exponent - mantissa_bits)
    return np.clip(np.rint(x / step) * step, -largest, largest)


def same_numbers(ours: Tensor, expected: np.ndarray) -> None:
    """Bit by bit, by ml_dtypes' reading of the bytes; a negative zero only where the expected number is one."""
    number = FORMATS[ours.dtype][-1]
    found = ours.view(torch.uint8).numpy().view(number).astype(np.float64)
    np.testing.assert_array_equal(found, expected)
    if ours.dtype != torch.float8_e4m3fnuz:
        np.testing.assert_array_equal(np.signbit(found), np.signbit(expected))


def numpy_scale(amax: np.ndarray, dtype: torch.dtype, number: Any) -> np.ndarray:
    with np.errstate(under="ignore"):
        scale = (amax.astype(np.float32) / np.float32(FORMATS[dtype][0])).astype(number).astype(np.float32)
    return np.where(scale == 0, np.float32(2.0**-23), scale)


def check_against_reference(x: np.ndarray, dtype: torch.dtype, name: str) -> None:
    """Scales and codes per tensor, per token and by groups of 16, from the docstrings."""
    tensor, number = torch.from_numpy(x).to(NAMES[name]), NUMPY[NAMES[name]]
    for granularity, axis in (("per_tensor", None), ("per_token", -1)):
        scale = fp8.dynamic_scale(tensor, granularity, dtype)
        expected = numpy_scale(np.abs(x).max(axis, keepdims=axis is not None), dtype, number)
        np.testing.assert_array_equal(scale.float().numpy(), expected)
        with np.errstate(over="ignore", under="ignore"):
            quotient = (x / expected).astype(number).astype(np.float64)
        codes = fp8.quantize(tensor, scale, dtype)
        same_numbers(codes, rounded(quotient, dtype))
        with np.errstate(over="ignore", under="ignore"):
            values = (rounded(quotient, dtype).astype(np.float32) * expected).astype(number)
        assert torch.equal(fp8.dequantize(codes, scale, tensor.dtype), from_numpy(values))
    codes, scales = fp8.quantize_groups(tensor, 16, dtype)
    groups = x.reshape(len(x), -1, 16)
    expected = numpy_scale(np.abs(groups).max(-1), dtype, number)
    np.testing.assert_array_equal(scales.float().numpy(), expected)
    with np.errstate(over="ignore", under="ignore"):
        elements = rounded(groups / expected[..., None], dtype)
        values = (elements.astype(np.float32) * expected[..., None]).astype(number).reshape(x.shape)
    same_numbers(codes, elements.reshape(x.shape))
    assert torch.equal(fp8.dequantize_groups(codes, scales, tensor.dtype), from_numpy(values))


every_format = pytest.mark.parametrize("dtype", FORMATS, ids=["e4m3", "e5m2", "fnuz"])
some_floats = given(seed=st.integers(0, 2**32), name=st.sampled_from(sorted(NAMES)))


@every_format
@settings(repeatable, max_examples=12)
@some_floats
def test_random_rows_of_every_magnitude(floats: Floats, dtype: torch.dtype, seed: int, name: str) -> None:
    """12 times 64 rows and 128 groups, and 12 tensors, of each format."""
    check_against_reference(floats(seed, 64, 32, name), dtype, name)


@pytest.mark.slow
@every_format
@settings(repeatable, max_examples=50)
@some_floats
def test_many_random_rows_of_every_magnitude(floats: Floats, dtype: torch.dtype, seed: int, name: str) -> None:
    """50 times 512 rows and 1024 groups, and 50 tensors, of each format."""
    check_against_reference(floats(seed, 512, 32, name), dtype, name)


@every_format
def test_every_bfloat16_by_one(dtype: torch.dtype) -> None:
    x = every(torch.bfloat16)
    x = x[~x.isnan()]
    codes = fp8.quantize(x, torch.ones((), dtype=x.dtype), dtype)
    largest = FORMATS[dtype][0]
    same_numbers(codes, rounded(np.clip(x.double().numpy(), -largest, largest), dtype))
    assert len(set(codes_of(codes).tolist())) == {448.0: 254, 57344.0: 248, 224.0: 253}[largest]


@every_format
def test_the_largest_value(dtype: torch.dtype) -> None:
    assert fp8.max_value(dtype) == FORMATS[dtype][0]


@every_format
def test_what_is_not_finite(dtype: torch.dtype) -> None:
    """Infinity becomes the largest value, never an infinity of E5M2; NaN stays, and takes its group."""
    x = torch.tensor([[math.inf, -math.inf, math.nan, 1.0]])
    values = fp8.quantize(x, torch.ones(()), dtype).float()
    assert values[0, :2].tolist() == [FORMATS[dtype][0], -FORMATS[dtype][0]]
    assert values.isnan().tolist() == [[False, False, True, False]]
    codes, scales = fp8.quantize_groups(torch.cat((x, torch.ones(1, 4)), -1), 4, dtype)
    assert scales.isnan().tolist() == [[True, False]]
    assert fp8.dequantize_groups(codes, scales, torch.float32).isnan().tolist() == [[True] * 4 + [False] * 4]


@pytest.mark.parametrize("name", NAMES)
def test_a_scale_of_another_dtype_is_divided_in_it(name: str) -> None:
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(2)).to(NAMES[name])
    scale = fp8.dynamic_scale(x, "per_tensor", scale_dtype=torch.float32)
    assert scale.dtype == torch.float32
    assert scale.item() == np.float32(x.abs().amax().item()) / np.float32(448)
    assert fp8.dynamic_scale(x[:0], "per_tensor", scale_dtype=torch.float32).item() == 1.0


@pytest.mark.parametrize(("n", "k"), [(8, 16), (9, 17), (7, 15), (1, 1), (20, 40)])
@every_format
def test_blocks_are_numpys_one_by_one(n: int, k: int, dtype: torch.dtype) -> None:
    """Whole ones and such as are cut off at the edges, of 8 rows and 16 columns; one is of zeros."""
    generator = torch.Generator().manual_seed(n)
    weight = torch.randn(n, k, generator=generator) * torch.logspace(-3, 3, n)[:, None]
    weight[-1, -1] = 0.0
    weight[8:16, 16:32] = 0.0
    codes, scales = fp8.quantize_blocks(weight.bfloat16(), (8, 16), dtype)
    assert scales.dtype == torch.float32
    assert scales.shape == (math.ceil(n / 8), math.ceil(k / 16))
    w = weight.bfloat16().float().numpy()
    values = np.empty_like(w)
    for i in range(len(scales)):
        for j in range(scales.shape[1]):
            at = np.s_[8 * i : 8 * i + 8, 16 * j : 16 * j + 16]
            scale = numpy_scale(np.abs(w[at]).max(), dtype, np.float32)
            assert scales[i, j].item() == scale
            elements = rounded(w[at] / scale, dtype)
            same_numbers(codes[at].contiguous(), elements)
            values[at] = elements.astype(np.float32) * scale
    for out in NAMES.values():
        ours = fp8.dequantize_weight(codes, scales, out, (8, 16))
        assert torch.equal(bits(ours), bits(torch.from_numpy(values + 0.0).to(out))) or torch.equal(
            ours, torch.from_numpy(values).to(out)
        )


def test_fnuz_codes_have_half_the_value() -> None:
    """Of every E4M3 code but -0, which fnuz does not have: its byte is NaN there."""
    every_code = np.arange(256, dtype=np.uint8)
    codes = torch.from_numpy(every_code).view(torch.float8_e4m3fn)
    ours = fp8.to_fnuz(codes)
    assert ours.dtype == torch.float8_e4m3fnuz
    found = codes_of(ours)
    np.testing.assert_array_equal(found, np.where(every_code == 0x80, 0, every_code))
    expected = every_code.view(ml_dtypes.float8_e4m3fn).astype(np.float32) / 2
    numbers = ~np.isnan(expected)  # 0x7f and 0xff are NaN in E4M3 only: the loader has refused them
    half = found.view(ml_dtypes.float8_e4m3fnuz).astype(np.float32)
    np.testing.assert_array_equal(half[numbers], expected[numbers])
    assert numbers.sum() == 254
    assert half[0x80] == 0
    assert math.copysign(1, half[0x80]) == 1


@settings(repeatable, max_examples=12)
@given(seed=st.integers(0, 2**32), name=st.sampled_from(sorted(NAMES)))
def test_twice_the_scale_gives_the_same_fnuz_codes(floats: Floats, seed: int, name: str) -> None:
    """Doubling is exact, so the quotients are halves; and half a step of E4M3 is one of fnuz."""
    x = torch.from_numpy(floats(seed, 64, 32, name)).to(NAMES[name])
    for granularity in ("per_token", "per_tensor"):
        scale = fp8.dynamic_scale(x, granularity)
        assert (scale * 2).isfinite().all()
        codes, halves = fp8.quantize(x, scale), fp8.quantize(x, scale * 2, fp8.FNUZ)
        expected = np.where(codes_of(codes) == 0x80, 0, codes_of(codes))
        np.testing.assert_array_equal(codes_of(halves), expected)
        # A dynamic scale is made so, unless it is subnormal or stands for zero.
        normal = (scale > torch.finfo(x.dtype).smallest_normal) & (scale != 2.0**-23)
        assert torch.equal(fp8.dynamic_scale(x, granularity, fp8.FNUZ)[normal], scale[normal] * 2)


@pytest.mark.parametrize("checkpoint", ["fp8_e5m2", "fp8_float32_scale", "mxfp4_fp8_token", "fp8_block"])
def test_activations_of_the_other_checkpoints_are_those_of_amd_quark(checkpoint: str) -> None:
    recorded = load_file(FIXTURES / checkpoint / "reference.safetensors")
    stored = load_file(FIXTURES / checkpoint / "model.safetensors")
    modules = [key.removesuffix(".input_qdq") for key in recorded if key.endswith("_proj.input_qdq")]
    assert modules
    dtype = torch.float8_e5m2 if checkpoint == "fp8_e5m2" else torch.float8_e4m3fn
    for module in [*modules, "special"]:
        x = recorded[f"{module}.input"].flatten(0, 1)
        static = f"{'model.layers.0.self_attn.q_proj' if module == 'special' else module}.input_scale"
        if checkpoint == "fp8_block":
            ours = fp8.dequantize_groups(*fp8.quantize_groups(x, 64, dtype), x.dtype)
        else:
            scale = stored[static] if static in stored else fp8.dynamic_scale(x, "per_token", dtype)
            ours = fp8.dequantize(fp8.quantize(x, scale, dtype), scale, x.dtype)
        expected = recorded[f"{module}.input_qdq"].flatten(0, 1)
        same = bits(ours) == bits(expected)
        assert same.all(), (module, (~same).nonzero()[:5].tolist(), ours[~same][:5], expected[~same][:5])
