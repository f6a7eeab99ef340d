"""MX block formats against amd-quark's own numbers and against numpy with ml_dtypes. Everything is bit-exact.

No tolerance is needed: a scale is a power of two, so the only rounding is that of the elements, and a quotient too
small for a normal float32 becomes zero either way.
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

from quark_inductor.schemes.numerics import e8m0, mx

# The same examples in every run, and no time limit for one: the machine may be busy.
repeatable = settings(derandomize=True, database=None, deadline=None)
FIXTURES = Path(__file__).parents[2] / "fixtures"
CHECKPOINTS = ["mxfp4", "mxfp4_fp32"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(x: Tensor) -> Tensor:
    """The numbers of a floating-point tensor as integers, all NaNs as one: equal means equal bit by bit."""
    return torch.where(x.isnan(), torch.full_like(x, math.nan), x).view(INTEGERS[x.element_size()])


def quantize_dequantize(x: Tensor) -> Tensor:
    return mx.dequantize(*mx.quantize(x, "mxfp4", "even"), "mxfp4", x.dtype)


def numpy_quantize(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """MXFP4 of finite float32 ``[..., K]``: codes one by one and E8M0 bytes, in double precision and by ml_dtypes."""
    blocks = x.astype(np.float64).reshape(*x.shape[:-1], -1, 32)
    amax = np.abs(blocks).max(-1)
    exponent = np.frexp(amax)[1] - 1
    exponent = np.frexp(amax + np.ldexp(1.0, exponent - 2))[1] - 1
    scales = np.where(amax == 0, 0, np.where(exponent > 127, 254, np.clip(exponent - 2 + 127, 0, None)))
    quotient = blocks / np.ldexp(1.0, scales - 127)[..., None]
    codes = quotient.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    return np.where(codes == 8, 0, codes).reshape(x.shape), scales.astype(np.uint8)


def every_byte_with_every_scale() -> tuple[Tensor, Tensor]:
    """Codes ``[256, 256]``, each row all the bytes, and scales ``[256, 16]``: row i has scale code i."""
    every = torch.arange(256, dtype=torch.uint8)
    return every.expand(256, 256).contiguous(), every.unsqueeze(-1).expand(256, 16).contiguous()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_edge_cases_are_those_of_amd_quark(name: str) -> None:
    reference = load_file(FIXTURES / name / "reference.safetensors")
    x = reference["special.input"]
    codes, scales = mx.quantize(x, "mxfp4", "even")
    assert x[0].isnan().any(-1).nonzero().flatten().tolist() == [1]  # the file has what this is about
    assert torch.equal(bits(e8m0.decode(scales[0])), bits(reference["special.input_scale"]))
    expected = reference["special.input_qdq"]
    assert torch.equal(bits(mx.dequantize(codes, scales, "mxfp4", x.dtype)), bits(expected))  # the sign of zero too
    assert torch.equal(bits(mx.dequantize_by_table(codes, scales, "mxfp4", x.dtype)), bits(expected))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_activations_are_those_of_amd_quark(name: str) -> None:
    reference = load_file(FIXTURES / name / "reference.safetensors")
    modules = [key.removesuffix(".input") for key in reference if key.endswith("_proj.input")]
    assert len(modules) >= 2
    for module in modules:
        assert torch.equal(
            bits(quantize_dequantize(reference[f"{module}.input"])), bits(reference[f"{module}.input_qdq"])
        )


@repeatable
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=32, max_size=32))
def test_quantize_is_numpys_for_one_block(values: list[float]) -> None:
    check_against_numpy(np.array(values, np.float32))


@pytest.mark.parametrize("exponent", [-140, -126, -60, 0, 60, 120])
def test_quantize_is_numpys_for_many_blocks(exponent: int) -> None:
    generator = np.random.default_rng(exponent + 200)
    magnitudes = np.ldexp(generator.standard_normal((64, 256)), exponent + generator.integers(-6, 7, (64, 256)))
    check_against_numpy(magnitudes.astype(np.float32))


def check_against_numpy(x: np.ndarray) -> None:
    codes, scales = numpy_quantize(x)
    packed, ours = mx.quantize(torch.from_numpy(x), "mxfp4", "even")
    assert (packed.dtype, ours.dtype) == (torch.uint8, torch.uint8)
    np.testing.assert_array_equal(ours.numpy(), scales)
    np.testing.assert_array_equal(packed.numpy(), codes[..., 0::2] + 16 * codes[..., 1::2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_of_every_byte_with_every_scale(dtype: torch.dtype) -> None:
    codes, scales = every_byte_with_every_scale()
    nibbles = np.stack([codes.numpy() & 15, codes.numpy() >> 4], axis=-1).reshape(256, 512)
    elements = nibbles.astype(np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    multiplier = np.repeat(scales.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float64), 32, axis=-1)
    # A double holds every product, and the conversion to ``dtype`` rounds once (to infinity where it must).
    expected = torch.from_numpy(elements * multiplier).to(dtype)
    values = mx.dequantize(codes, scales, "mxfp4", dtype)
    assert values.dtype == dtype
    if dtype == torch.float64:  # computed in float32: 4 * 2**127 and 6 * 2**127 are not there
        expected = expected.float().double()
    assert torch.equal(bits(values), bits(expected))
    assert values.isnan().all(-1).nonzero().flatten().tolist() == [255]


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_by_table_is_dequantize(dtype: torch.dtype) -> None:
    codes, scales = every_byte_with_every_scale()
    assert torch.equal(
        bits(mx.dequantize_by_table(codes, scales, "mxfp4", dtype)), bits(mx.dequantize(codes, scales, "mxfp4", dtype))
    )


@repeatable
@given(st.lists(st.floats(width=16, allow_nan=False), min_size=64, max_size=64), st.integers(-130, 110))
def test_quantizing_what_was_dequantized_changes_nothing(values: list[float], exponent: int) -> None:
    x = torch.tensor(values, dtype=torch.float64).mul(2.0**exponent).to(torch.bfloat16)
    codes, scales = mx.quantize(x, "mxfp4", "even")
    again = mx.quantize(mx.dequantize(codes, scales, "mxfp4", torch.bfloat16), "mxfp4", "even")
    assert torch.equal(again[0], codes)
    assert torch.equal(again[1], scales)


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_block_of_zeros_has_the_smallest_scale_and_no_sign(zero: float) -> None:
    codes, scales = mx.quantize(torch.full((32,), zero), "mxfp4", "even")
    assert codes.tolist() == [0] * 16
    assert scales.tolist() == [0]


def test_a_nan_takes_its_block_and_no_other() -> None:
    x = torch.ones(2, 64)
    x[0, 40] = math.nan
    codes, scales = mx.quantize(x, "mxfp4", "even")
    assert scales.tolist() == [[125, 255], [125, 125]]  # 1 / 2**-2 = 4
    values = mx.dequantize(codes, scales, "mxfp4", torch.float32)
    assert values[0, 32:].isnan().all()
    assert torch.equal(values[0, :32], torch.ones(32))
    assert torch.equal(values[1], torch.ones(64))


@pytest.mark.parametrize("infinity", [math.inf, -math.inf])
def test_an_infinity_stays_and_rounds_ordinary_neighbours_to_zero(infinity: float) -> None:
    x = torch.ones(32)
    x[3] = infinity
    codes, scales = mx.quantize(x, "mxfp4", "even")
    assert scales.tolist() == [254]
    values = mx.dequantize(codes, scales, "mxfp4", torch.float32)
    assert values[3] == infinity
    assert values.count_nonzero() == 1


@pytest.mark.parametrize("shape", [(32,), (3, 64), (2, 3, 96), (0, 64), (2, 0, 32)])
def test_shapes(shape: tuple[int, ...]) -> None:
    *rows, k = shape
    codes, scales = mx.quantize(torch.zeros(shape, dtype=torch.bfloat16), "mxfp4", "even")
    assert codes.shape == (*rows, k // 2)
    assert scales.shape == (*rows, k // 32)
    assert mx.dequantize(codes, scales, "mxfp4", torch.bfloat16).shape == shape
    assert mx.dequantize_by_table(codes, scales, "mxfp4", torch.bfloat16).shape == shape


def test_blocks_run_along_the_last_dimension() -> None:
    x = torch.ones(2, 64)
    x[0, 32:] = 4.0
    x[1] = 1024.0
    scales = mx.quantize(x, "mxfp4", "even")[1]
    assert scales.tolist() == [[125, 127], [135, 135]]


def test_a_non_contiguous_input_is_read_by_its_strides() -> None:
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0)).T
    for ours, expected in zip(
        mx.quantize(x, "mxfp4", "even"), mx.quantize(x.contiguous(), "mxfp4", "even"), strict=True
    ):
        assert torch.equal(ours, expected)
