"""FP8 against what amd-quark exported and computed, and against numpy with ml_dtypes, bit for bit."""

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from quark_inductor.schemes import registry  # noqa: F401
from quark_inductor.schemes.base import QuarkLinear, scheme_for, set_parameters
from quark_inductor.schemes.errors import CheckpointError
from quark_inductor.schemes.numerics import fp8
from quark_inductor.schemes.spec import PRESETS, LinearSpec
from quark_inductor.schemes.w8a8_fp8 import QuarkW8A8Fp8

CHECKPOINTS = ["fp8", "fp8_fp32", "ptpc_fp8", "ptpc_fp8_fp32"]
FP8 = ["fp8", "fp8_dynamic", "ptpc_fp8"]
Exports = Callable[[str], Any]


def numpy_weight(parameters: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    codes = parameters["weight"].view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    scale = parameters["weight_scale"].float().numpy()
    values = codes * (scale[:, None] if scale.ndim else scale)
    if dtype == torch.bfloat16:
        return torch.from_numpy(values.astype(ml_dtypes.bfloat16).view(np.int16)).view(dtype)
    return torch.from_numpy(values)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_weight_is_amd_quarks(name: str, exported: Exports) -> None:
    checkpoint = exported(name)
    assert len(checkpoint.linears) == 14
    for linear in checkpoint.linears:
        layer = checkpoint.layer(linear)
        weight = fp8.dequantize_weight(layer.weight, layer.weight_scale, checkpoint.dtype)
        assert checkpoint.weight_is_amd_quarks(linear, weight), linear
        assert checkpoint.weight_is_amd_quarks(linear, numpy_weight(checkpoint.parameters(linear), checkpoint.dtype))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_recorded_output_is_amd_quarks(name: str, exported: Exports) -> None:
    exported(name).check_outputs(numpy_weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("preset", FP8)
def test_quantize_weight_is_numpys(preset: str, dtype: torch.dtype) -> None:
    """``scale = amax / 448``, ``code = w / scale``, both quotients rounded to the weight's dtype; row 2 is of zeros."""
    weight = (torch.randn(24, 96, generator=torch.Generator().manual_seed(5)) * torch.logspace(-2, 2, 24)[:, None]).to(
        dtype
    )
    weight[2] = 0.0
    number = ml_dtypes.bfloat16 if dtype == torch.bfloat16 else np.float32
    w = weight.float().numpy()
    amax = np.abs(w).max(-1, keepdims=True) if preset == "ptpc_fp8" else np.abs(w).max()
    scale = (amax / np.float32(448)).astype(number).astype(np.float32)
    scale = np.where(scale == 0, np.float32(2.0**-23), scale)
    codes = np.clip((w / scale).astype(number).astype(np.float32), -448, 448).astype(ml_dtypes.float8_e4m3fn)

    quantized = scheme_for(PRESETS[preset]).quantize_weight(weight)
    assert sorted(quantized) == ["weight", "weight_scale"]
    assert quantized["weight"].dtype == torch.float8_e4m3fn
    assert quantized["weight_scale"].dtype == dtype
    assert quantized["weight_scale"].shape == ((24,) if preset == "ptpc_fp8" else ())
    np.testing.assert_array_equal(quantized["weight_scale"].float().numpy(), scale.squeeze())
    np.testing.assert_array_equal(quantized["weight"].view(torch.uint8).numpy(), codes.view(np.uint8))


def test_a_dynamic_scale_per_tensor_is_that_of_the_whole_input() -> None:
    """Powers of two and small whole numbers: every step is exact, and the expected output is a float64 product."""
    layer = QuarkLinear(32, 8, scheme_for(PRESETS["fp8_dynamic"]), bias=False, dtype=torch.float32)
    generator = torch.Generator().manual_seed(6)
    weight = torch.randint(-8, 9, (8, 32), generator=generator).float()
    set_parameters(layer, weight=weight.to(torch.float8_e4m3fn), weight_scale=torch.tensor(0.5))
    x = torch.randint(-8, 9, (2, 3, 32), generator=generator).float()
    x[1, 2, 4] = 448 * 16.0  # of another row, and it makes the scale 16: steps of 2**-9 * 16 = 1/32
    x[0, 0, 0] = 17 / 64  # between 8/32 and 9/32
    expected = x.double()
    expected[0, 0, 0] = 8 / 32
    assert torch.equal(layer(x).double(), expected @ (weight.double() * 0.5).T)


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("fp8", {"weight": (64, 40), "weight_scale": (), "input_scale": ()}),
        ("fp8_dynamic", {"weight": (64, 40), "weight_scale": ()}),
        ("ptpc_fp8", {"weight": (64, 40), "weight_scale": (64,)}),
    ],
)
def test_create_weights_has_the_checkpoints_layout(preset: str, expected: dict[str, tuple[int, ...]]) -> None:
    layer = torch.nn.Module()
    scheme_for(PRESETS[preset]).create_weights(
        layer, output_partition_sizes=[48, 16], input_size_per_partition=40, params_dtype=torch.float16
    )
    found = dict(layer.named_parameters())
    assert {name: tuple(p.shape) for name, p in found.items()} == expected
    for name, p in found.items():
        assert p.dtype == (torch.float8_e4m3fn if name == "weight" else torch.float16)
        assert not p.requires_grad


def ones(preset: str) -> QuarkLinear:
    """A loaded layer, in whose bias is a NaN: a bias is the model's own, and nobody's to judge."""
    layer = QuarkLinear(32, 4, scheme_for(PRESETS[preset]), bias=True, dtype=torch.bfloat16)
    for name, p in layer.named_parameters():
        p.data = torch.full(p.shape, math.nan if name == "bias" else 1.0).to(p.dtype)
    return layer


@pytest.mark.parametrize("preset", FP8)
@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_nan_code_is_refused_after_loading(preset: str, code: int) -> None:
    layer = ones(preset)
    layer.weight.data.view(torch.uint8)[3, 31] = code - 1  # 448 and -448 are numbers
    layer.scheme.process_weights_after_loading(layer)
    layer.weight.data.view(torch.uint8)[3, 31] = code
    with pytest.raises(CheckpointError, match=r"^weight holds a NaN"):
        layer.scheme.process_weights_after_loading(layer)


@pytest.mark.parametrize(
    ("preset", "scale"),
    [
        ("fp8", "weight_scale"),
        ("fp8", "input_scale"),
        ("fp8_dynamic", "weight_scale"),
        ("ptpc_fp8", "weight_scale"),
    ],
)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_scale_that_is_no_number_is_refused_after_loading(preset: str, scale: str, bad: float) -> None:
    layer = ones(preset)
    layer.scheme.process_weights_after_loading(layer)
    getattr(layer, scale).data.view(-1)[-1] = bad
    with pytest.raises(CheckpointError, match=rf"^{scale} holds a NaN or an infinity"):
        layer.scheme.process_weights_after_loading(layer)


@pytest.mark.parametrize("preset", FP8)
def test_its_own_specs_are_taken(preset: str) -> None:
    assert QuarkW8A8Fp8.refuses(PRESETS[preset]) is None


def test_other_specs_are_refused_with_a_reason() -> None:
    weight_only = LinearSpec(weight=PRESETS["fp8"].weight, input=None)
    for spec in (PRESETS["mxfp4"], weight_only):
        assert "fp8_e4m3 per_channel static" in str(QuarkW8A8Fp8.refuses(spec))
