"""OCP MX weights with any activation. ``test_exported.py`` has amd-quark's own numbers."""

import dataclasses
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from quark_inductor.schemes import registry  # noqa: F401
from quark_inductor.schemes.base import QuarkLinear, scheme_for
from quark_inductor.schemes.errors import CheckpointError, ShapeError
from quark_inductor.schemes.ocp_mx import QuarkOCP_MX
from quark_inductor.schemes.spec import PRESETS, LinearSpec, TensorSpec

Make = Callable[..., Any]
U8 = torch.uint8
MX = ["mxfp4", "mxfp4_weight_only", "mxfp4_mxfp6_e2m3", "mxfp4_mxfp8", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8"]


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("mxfp4_weight_only", {"weight": ((64, 48), U8), "weight_scale": ((64, 3), U8)}),
        ("mxfp4_mxfp8", {"weight": ((64, 48), U8), "weight_scale": ((64, 3), U8)}),
        ("mxfp6_e2m3", {"weight": ((64, 72), U8), "weight_scale": ((64, 3), U8)}),
        ("mxfp6_e3m2", {"weight": ((64, 72), U8), "weight_scale": ((64, 3), U8)}),
        ("mxfp8", {"weight": ((64, 96), torch.float8_e4m3fn), "weight_scale": ((64, 3), U8)}),
    ],
)
@pytest.mark.parametrize("widths", [[64], [48, 16]])
def test_create_weights_has_the_checkpoints_layout(
    layout: Make, preset: str, expected: dict[str, Any], widths: list[int]
) -> None:
    assert layout(preset, widths, 96) == expected


@pytest.mark.parametrize("preset", MX)
@pytest.mark.parametrize("k", [16, 33, 100])
def test_a_k_of_no_whole_blocks_is_refused(preset: str, k: int) -> None:
    with pytest.raises(ShapeError, match=rf"K = {k} input features: .*multiple of 32; exclude this layer"):
        QuarkLinear(k, 64, scheme_for(PRESETS[preset]), bias=False, dtype=torch.bfloat16)


@pytest.mark.parametrize("preset", [*MX, "mxfp4_fp8", "mxfp4_fp8_dynamic", "mxfp4_fp8_token"])
def test_its_own_specs_are_taken(preset: str) -> None:
    assert QuarkOCP_MX.refuses(PRESETS[preset]) is None
    assert isinstance(scheme_for(PRESETS[preset]), QuarkOCP_MX)


@pytest.mark.parametrize("dtype", ["fp8_e5m2", "fp6_e3m2"])
def test_combinations_without_a_name_are_taken(spec_with: Make, dtype: str) -> None:
    assert type(scheme_for(spec_with(PRESETS["mxfp4_mxfp8"], {"dtype": dtype}))) is QuarkOCP_MX
    assert type(scheme_for(spec_with(PRESETS["mxfp4"], None, {"dtype": dtype}))) is QuarkOCP_MX


INT8 = TensorSpec(dtype="int8", qscheme="per_tensor")


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (PRESETS["nvfp4"], "takes MX weights"),
        (PRESETS["amdfp4"], "takes MX weights"),
        (PRESETS["fp8"], "takes MX weights"),
        (LinearSpec(weight=None, output=PRESETS["fp8"].input), "takes MX weights"),
        (LinearSpec(weight=PRESETS["mxfp4"].input), "takes MX weights"),  # dynamic
        (LinearSpec(weight=PRESETS["mxfp4"].weight, input=INT8), "takes MX or FP8 inputs, FP8 per tensor or per token"),
        (LinearSpec(weight=PRESETS["mxfp4"].weight, input=PRESETS["fp8_block128"].input), "takes MX or FP8 inputs"),
        (LinearSpec(weight=PRESETS["mxfp4"].weight, input=PRESETS["nvfp4"].input), "takes MX or FP8 inputs"),
    ],
)
def test_other_specs_are_refused_with_a_reason(spec: LinearSpec, reason: str) -> None:
    assert str(QuarkOCP_MX.refuses(spec)).startswith(reason)


# The largest relative step below a power of two, and the largest magnitude after scaling by rule "even", of an element.
BOUNDS = {"mxfp4_weight_only": (1 / 2, 6.0, 7.0), "mxfp6_e2m3": (1 / 8, 7.5, 7.75), "mxfp6_e3m2": (1 / 4, 28.0, 31.0)}
BOUNDS |= {"mxfp8": (1 / 8, 448.0, 448.0)}
SMALLEST = {"mxfp4_weight_only": 0.5, "mxfp6_e2m3": 0.125, "mxfp6_e3m2": 0.0625, "mxfp8": 2.0**-9}


@pytest.mark.parametrize("preset", BOUNDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_quantize_and_dequantize_are_within_half_a_step(preset: str, dtype: torch.dtype) -> None:
    """Half a step of the element's binade, or of its smallest number, or what saturates beyond the largest."""
    step, largest, reach = BOUNDS[preset]
    weight = (torch.randn(64, 96, generator=torch.Generator().manual_seed(1)) * torch.logspace(-1, 1, 64)[:, None]).to(
        dtype
    )
    layer = QuarkLinear(96, 64, scheme_for(PRESETS[preset]), bias=False, dtype=dtype)
    for name, tensor in layer.scheme.quantize_weight(weight).items():
        assert (tensor.shape, tensor.dtype) == (getattr(layer, name).shape, getattr(layer, name).dtype)
        setattr(layer, name, torch.nn.Parameter(tensor, requires_grad=False))
    layer.scheme.process_weights_after_loading(layer)
    scales = layer.weight_scale.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float64).repeat(32, 1)
    w = np.abs(weight.double().numpy()) / scales
    error = np.abs(layer.scheme.dequantize_weight(layer, torch.float64).numpy() - weight.double().numpy()) / scales
    assert (w <= reach).all()
    binade = np.exp2(np.floor(np.log2(np.maximum(w, 1e-30))))
    bound = np.maximum(step * binade, SMALLEST[preset]) / 2
    assert (error <= np.maximum(bound, w - largest)).all()
    assert error.max() > 0


@pytest.mark.parametrize("preset", ["mxfp4_weight_only", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8"])
def test_fused_shards_are_the_separate_linears(linear: Make, preset: str) -> None:
    parts = [linear(preset, n, seed=n, size=float(n)) for n in (48, 16, 8)]
    fused = QuarkLinear.fuse(parts)
    assert (fused.logical_widths, fused.out_features) == ([48, 16, 8], 72)
    for name in ("weight", "weight_scale"):
        whole = torch.cat([getattr(m, name).view(U8) for m in parts])
        assert torch.equal(getattr(fused, name).view(U8), whole)
    weights = [m.scheme.dequantize_weight(m, torch.float32) for m in parts]
    assert torch.equal(fused.scheme.dequantize_weight(fused, torch.float32), torch.cat(weights))


@pytest.mark.parametrize("preset", MX)
def test_a_nan_scale_is_refused_after_loading(linear: Make, preset: str) -> None:
    layer = linear(preset)
    layer.weight_scale.data[3, 1] = 254
    layer.scheme.process_weights_after_loading(layer)
    layer.weight_scale.data[3, 1] = 255
    with pytest.raises(CheckpointError, match=r"^weight_scale holds a NaN"):
        layer.scheme.process_weights_after_loading(layer)


def test_a_nan_element_of_mxfp8_is_refused_after_loading(linear: Make) -> None:
    layer = linear("mxfp8")
    layer.weight.data.view(U8)[3, 31] = 0xFF
    with pytest.raises(CheckpointError, match=r"^weight holds a NaN"):
        layer.scheme.process_weights_after_loading(layer)


def test_a_weight_of_zeros_has_scale_byte_one_unless_by_rceil() -> None:
    zeros = torch.zeros(2, 32)
    for preset in ("mxfp4", "mxfp6_e2m3", "mxfp6_e3m2"):
        assert scheme_for(PRESETS[preset]).quantize_weight(zeros)["weight_scale"].tolist() == [[1], [1]]
    assert scheme_for(PRESETS["mxfp8"]).quantize_weight(zeros)["weight_scale"].tolist() == [[0], [0]]


def test_an_output_is_quantized_too(linear: Make) -> None:
    """By a static FP8 scale, as amd-quark's FP8 KV cache has it: after the bias."""
    spec = dataclasses.replace(PRESETS["mxfp4"], output=TensorSpec(dtype="fp8_e4m3", qscheme="per_tensor"))
    with_output, without = linear(spec), linear("mxfp4")
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(2))
    scale = with_output.output_scale.numpy()
    quotient = np.clip(without(x).numpy() / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(with_output(x).numpy(), quotient.astype(np.float32) * scale)
    assert (with_output(x) != without(x)).any()
