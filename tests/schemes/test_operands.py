"""What the formats of operands mean: names, shapes, and numbers against ml_dtypes and numpy, bit by bit.

Every step of the emulation is rounded where the oracle rounds it, so nothing is tolerated. ``tests/schemes/numerics``
checks each format's own functions; here, that a name comes to the right ones with the right arguments.
"""

from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from quark_inductor.schemes import operands, registry  # noqa: F401
from quark_inductor.schemes.base import scheme_for
from quark_inductor.schemes.numerics.int4 import format_of
from quark_inductor.schemes.spec import PRESETS, LinearSpec

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
FP8 = {
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
    "fp8_e4m3fnuz": torch.float8_e4m3fnuz,
}
BLOCKS = ["mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2", "nvfp4", "amdfp4_g16", "amdfp4_g32"]
INT4 = ["int4", "uint4", "int4_order", "uint4_order"]
WEIGHT_FORMATS = [*BLOCKS, *FP8, "fp8_e4m3_16x48", "fp8_e5m2_128x128", "int8", "uint8", *INT4, "int4_fp8"]
# Rules that take no logarithm; "floor" and "ceil" are in numerics/test_e8m0.py.
RULES = {
    **dict.fromkeys(BLOCKS[:5], ("even",)),
    "mxfp8_e4m3": ("even", "rceil"),
    "nvfp4": ("combined", "sequential"),
    **dict.fromkeys(("amdfp4_g16", "amdfp4_g32"), ("nearest",)),
    **dict.fromkeys(("fp8_e4m3", "fp8_e5m2"), ("given", "amax")),
    **dict.fromkeys(("int8", "uint8", "int4", "uint4"), ("given", "symmetric", "asymmetric")),
}
M, N, K = 6, 40, 96


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- names


@pytest.mark.parametrize("format", WEIGHT_FORMATS)
def test_a_known_weight_format(format: str) -> None:
    operands.check_weight(format)


@pytest.mark.parametrize(
    "format", ["", "mxfp5", "fp8", "fp8_e4m4", "fp8_e4m3_16", "fp8_e4m3_16x", "fp8_e4m3_16x48x2", "int4_fp4", "int16"]
)
def test_an_unknown_weight_format_is_an_error_that_names_the_known(format: str) -> None:
    with pytest.raises(ValueError, match=rf"there is no weight format '{format}'; expected .*mxfp4.*int8.*int4_fp8"):
        operands.check_weight(format)


@pytest.mark.parametrize(("format", "rules"), RULES.items())
def test_a_known_activation_format(format: str, rules: tuple[str, ...]) -> None:
    operands.check_activation(format)
    for rule in ("even", "floor", "ceil", "rceil", "combined", "nearest", "given", "amax", "symmetric", "asymmetric"):
        if rule in rules or (rule in ("floor", "ceil") and format.startswith("mx")):
            operands.check_activation(format, rule)
        else:
            with pytest.raises(ValueError, match=f"no scale rule '{rule}' for {format}; expected one of .*{rules[0]}"):
                operands.check_activation(format, rule)


@pytest.mark.parametrize("format", ["", "fp8_e4m3_16x48", "int4_order", "int4_fp8", "float"])
def test_an_unknown_activation_format_is_an_error_that_names_the_known(format: str) -> None:
    with pytest.raises(
        ValueError, match=rf"there is no activation format '{format}'; expected .*mxfp4.*fp8_e4m3.*int8"
    ):
        operands.check_activation(format)


def test_fp8_formats_are_named_after_their_dtype() -> None:
    for name, dtype in FP8.items():
        assert operands.fp8_format(dtype) == name
        assert operands.fp8_weight(name) == (dtype, None)
        assert operands.fp8_weight(f"{name}_5x128") == (dtype, (5, 128))
    assert operands.fp8_format(torch.int8) is None
    assert operands.fp8_weight("mxfp8_e4m3") is None
    assert operands.fp8_weight("int4_fp8") is None


def weight_format(spec: LinearSpec) -> str:
    """Of a preset's weight."""
    weight = spec.weight
    assert weight is not None
    if weight.block_format is not None:
        return weight.block_format
    if weight.second is not None:
        return "int4_fp8"
    if weight.block_size is not None:
        return "{}_{}x{}".format(weight.dtype, *weight.block_size)
    return format_of(weight.dtype, spec.pack_method) if weight.dtype in ("int4", "uint4") else weight.dtype


@pytest.mark.parametrize("preset", PRESETS)
def test_a_weights_min_capability_is_that_of_its_scheme(preset: str) -> None:
    format = weight_format(PRESETS[preset])
    operands.check_weight(format)
    assert operands.min_capability(format) == scheme_for(PRESETS[preset]).get_min_capability()


# --- shapes


@pytest.mark.parametrize(
    ("weight", "scale_ndim", "format", "expected"),
    [
        ((24, 32), 2, "mxfp4", (24, 64)),
        ((24, 48), 2, "mxfp6_e2m3", (24, 64)),
        ((24, 64), 2, "mxfp8_e5m2", (24, 64)),
        ((24, 32), 2, "nvfp4", (24, 64)),
        ((24, 33), 0, "fp8_e4m3", (24, 33)),
        ((24, 33), 2, "fp8_e4m3_16x48", (24, 33)),
        ((24, 33), 1, "int8", (24, 33)),
        ((24, 33), 2, "uint8", (24, 33)),
        ((24, 8), 1, "int4", (24, 64)),
        ((24, 8), 0, "int4_fp8", (24, 64)),
        ((64, 3), 2, "uint4_order", (24, 64)),
        ((7, 24, 32), 3, "mxfp4", (24, 64)),
        ((7, 24, 33), 2, "fp8_e4m3", (24, 33)),
    ],
)
def test_features(weight: tuple[int, ...], scale_ndim: int, format: str, expected: tuple[int, int]) -> None:
    assert operands.features(weight, scale_ndim, format) == expected


# --- numbers


def codes(oracle: ModuleType, format: str, rows: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Any codes and scales of a block format, but no NaN element; one scale each is 0 and NaN."""
    size, element, scale = oracle.BLOCKS[format]
    generator = random(1)
    bits = oracle.ELEMENTS[element][0]
    held = torch.randint(0, 256, (rows, K * bits // 8), generator=generator, dtype=torch.uint8)
    if bits == 8:
        held = (torch.randn(rows, K, generator=generator) * 9).to(FP8[element])
    scales = torch.randint(100, 126, (rows, K // size), generator=generator, dtype=torch.uint8)
    scales[0, 0] = 0
    scales[1, 0] = 127 if scale == "e4m3" else 255
    if scale == "e4m3":
        return held, scales.view(torch.float8_e4m3fn), torch.tensor(0.0137)
    return held, scales, None


def same(got: Tensor, expected: np.ndarray, dtype: torch.dtype) -> None:
    assert got.dtype == dtype
    np.testing.assert_array_equal(got.float().numpy(), expected)
    assert len(np.unique(expected[np.isfinite(expected)])) > 8


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", BLOCKS)
def test_block_formats_dequantize(oracle: ModuleType, format: str, dtype: torch.dtype) -> None:
    """A scale of 0 is one in a weight, and in an activation of AMDFP4 what amd-quark divides by."""
    held = codes(oracle, format, N)
    expected = oracle.weight_values(*held, None, format, dtype)
    same(operands.dequantize_weight(*held, None, format, dtype), expected, dtype)
    activation = oracle.activation_values(*held, None, format, dtype)
    same(operands.dequantize_activation(*held, None, format, dtype), activation, dtype)
    assert np.array_equal(expected, activation, equal_nan=True) != format.startswith("amdfp4")
    assert operands.zero_scale(format) == (2.0**-23 if format.startswith("amdfp4") else 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("format", "shape"),
    [
        ("fp8_e4m3", ()),
        ("fp8_e5m2", (N,)),
        ("fp8_e4m3_16x40", (3, 3)),  # the last rows and columns are cut off
        ("fp8_e5m2_128x128", (1, 1)),
        ("int8", ()),
        ("int8", (N,)),
        ("uint8", (N, 6)),
    ],
)
def test_weights_of_8_bits_dequantize(
    oracle: ModuleType, format: str, shape: tuple[int, ...], scale_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    generator = random(2)
    scale = (torch.rand(shape, generator=generator) / 50 + 0.001).to(scale_dtype)
    if format.startswith("fp8"):
        weight = (torch.randn(N, K, generator=generator) * 30).to(FP8[format[:8]])
        zero_points: list[Tensor | None] = [None]
    else:
        low, held = (-128, torch.int8) if format == "int8" else (0, torch.uint8)
        weight = torch.randint(low, low + 256, (N, K), generator=generator, dtype=held)
        zero_points = [None, torch.randint(low, low + 256, shape, generator=generator, dtype=held)]
    for zero_point in zero_points:
        expected = oracle.weight_values(weight, scale, None, zero_point, format, dtype)
        same(operands.dequantize_weight(weight, scale, None, zero_point, format, dtype), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", [*INT4, "int4 groups", "uint4_order groups", "int4_fp8"])
def test_packed_weights_dequantize(oracle: ModuleType, format: str, dtype: torch.dtype) -> None:
    generator = random(3)
    format, *groups = format.split()

    def words(*shape: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)

    scale, scale_2 = torch.rand((4, N) if groups else (N,), generator=generator).to(dtype), None
    if format == "int4_fp8":
        scale, scale_2 = torch.tensor(0.0137), torch.rand(N, generator=generator)
    weight, zero_point = (words(K, N // 8), words(4, N // 8)) if groups else (words(N, K // 8), words(N // 8))
    expected = oracle.weight_values(weight, scale, scale_2, zero_point, format, dtype)
    assert expected.shape == (N, K)
    same(operands.dequantize_weight(weight, scale, scale_2, zero_point, format, dtype), expected, dtype)
    missing = [(scale_2, None)] if scale_2 is None else [(scale_2, None), (None, zero_point)]
    for given in missing:
        with pytest.raises(ValueError, match=f"a weight in {format} has a zero point, and in int4_fp8 a second scale"):
            operands.dequantize_weight(weight, scale, *given, format, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", ["fp8_e4m3", "fp8_e5m2", "int8", "uint8", "int4", "uint4"])
@pytest.mark.parametrize(
    ("shape", "scale_dtype"), [((), None), ((), torch.float32), ((M, 1), None), ((M, 4), None), ((M, 4), torch.float32)]
)
def test_activations_dequantize(
    oracle: ModuleType, format: str, shape: tuple[int, ...], scale_dtype: torch.dtype | None, dtype: torch.dtype
) -> None:
    """Scales are in the model's dtype, or in float32, but for that of a token."""
    generator = random(4)
    scale, zero_point = (torch.rand(shape, generator=generator) / 9 + 0.01).to(scale_dtype or dtype), None
    if format.startswith("fp8"):
        x = (torch.randn(M, K, generator=generator) * 30).to(FP8[format])
    else:
        low, high = oracle.BOUNDS[format]
        held = torch.int8 if low < 0 else torch.uint8
        x = torch.randint(low, high + 1, (M, K), generator=generator, dtype=held)
        zero_point = torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int32)
    expected = oracle.activation_values(x, scale, None, zero_point, format, dtype)
    same(operands.dequantize_activation(x, scale, None, zero_point, format, dtype), expected, dtype)


# --- quantizing


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("format", "rule", "group_size", "shape"),
    [
        *((format, rule, 0, None) for format, rules in RULES.items() for rule in rules if rule != "given"),
        *((format, "amax", 24, None) for format in ("fp8_e4m3", "fp8_e5m2")),
        *((format, rule, 24, None) for format in ("int8", "uint4") for rule in ("symmetric", "asymmetric")),
        *((format, "given", 0, shape) for format, rules in RULES.items() for shape in ((), (M, 1)) if "given" in rules),
    ],
)
def test_activations_quantize(
    oracle: ModuleType, format: str, rule: str, group_size: int, shape: tuple[int, ...] | None, dtype: torch.dtype
) -> None:
    """Codes, scales and zero points have their shapes, and dequantize to numpy's values; a row is all zeros."""
    x = (torch.randn(M, K, generator=random(5)) * torch.logspace(-2, 2, M)[:, None]).to(dtype)
    x[0] = 0.0
    scale = scale_2 = zero_point = None
    if rule == "given":
        assert shape is not None
        largest = oracle.BOUNDS[format][1] if "int" in format else float(oracle.largest(format))
        scale = (3 / largest * (torch.rand(shape, generator=random(6)) + 0.5)).to(dtype)
        zero_point = torch.full(shape, 2, dtype=torch.int32) if "int" in format else None
    if format == "nvfp4":
        scale_2 = torch.tensor(100 / (6 * 448))
    held, scales, zero_points = operands.quantize_activation(x, scale, scale_2, zero_point, format, rule, group_size)
    if format in oracle.BLOCKS:
        size, element, _ = oracle.BLOCKS[format]
        assert held.shape == (M, K * oracle.ELEMENTS[element][0] // 8)
        assert scales.shape == (M, K // size)
    else:
        assert held.shape == (M, K)
        assert held.dtype == FP8.get(format, torch.uint8 if format[0] == "u" else torch.int8)
        assert scales.shape == ((M, K // group_size) if group_size else (M, 1) if shape is None else shape)
        assert scales.dtype == dtype
    assert (zero_points is not None) == ("int" in format)
    if zero_points is not None:
        assert zero_points.shape == scales.shape
        assert zero_points.any() == (rule != "symmetric")
    expected = oracle.quantized_values(x, scale, scale_2, zero_point, format, rule, group_size)
    values = operands.dequantize_activation(held, scales, scale_2, zero_points, format, dtype)
    same(values, expected, dtype)
    assert not values[0].any()


def test_no_zero_point_is_zero() -> None:
    """Of an activation in integers: 3.5 rounds to the even 4, and 200 saturates."""
    x, half = torch.tensor([[1.75, -100.0, 100.0]]), torch.tensor(0.5)
    codes, scale, zero_point = operands.quantize_activation(x, half, None, None, "int8", "given", 0)
    assert codes.tolist() == [[4, -128, 127]]
    assert (scale is half, zero_point.item()) == (True, 0)  # type: ignore[union-attr]
    assert operands.dequantize_activation(codes, half, None, None, "int8", torch.float32).tolist() == [
        [2.0, -64.0, 63.5]
    ]
