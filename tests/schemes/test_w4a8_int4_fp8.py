"""INT4 weights under an FP8 scale. ``test_exported.py`` has amd-quark's own numbers."""

import dataclasses
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from quark_inductor.schemes import registry  # noqa: F401
from quark_inductor.schemes.base import QuarkLinear, scheme_for, set_parameters
from quark_inductor.schemes.errors import CheckpointError, ShapeError
from quark_inductor.schemes.spec import PRESETS, LinearSpec
from quark_inductor.schemes.w4a8_int4_fp8 import QuarkW4A8_INT4_FP8

Make = Callable[..., Any]
I32, F32 = torch.int32, torch.float32
SPEC = PRESETS["int4_fp8"]
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # element at nibble i


@pytest.mark.parametrize(("widths", "scale"), [([64], ()), ([48, 16], (2,))])
def test_create_weights_has_the_checkpoints_layout(layout: Make, widths: list[int], scale: tuple[int, ...]) -> None:
    assert layout("int4_fp8", widths, 128) == {
        "weight": ((64, 16), I32),
        "weight_scale": (scale, F32),
        "weight_scale_2": ((64,), F32),
        "weight_zero_point_2": ((8,), I32),
    }


@pytest.mark.parametrize(("n", "k"), [(60, 128), (64, 132), ([60, 4], 128)])
def test_sizes_that_do_not_fit_are_refused(n: Any, k: int) -> None:
    with pytest.raises(ShapeError, match=rf"N = \d+, K = {k}: int4 needs multiples of 8; exclude this layer"):
        QuarkLinear(k, n, scheme_for(SPEC), bias=False, dtype=torch.bfloat16)


def test_its_own_spec_is_taken_and_others_refused_with_a_reason() -> None:
    for preset in PRESETS.keys() - {"int4_fp8"}:
        assert QuarkW4A8_INT4_FP8.refuses(PRESETS[preset]) == (
            "takes two-stage weights, FP8 per tensor and INT4 per channel"
        )
    assert QuarkW4A8_INT4_FP8.refuses(SPEC) is None
    assert QuarkW4A8_INT4_FP8.refuses(LinearSpec(weight=SPEC.weight)) is None
    for changes in ({"dtype": "int8"}, {"qscheme": "per_tensor"}, {"is_dynamic": True}):
        second = dataclasses.replace(SPEC.weight.second, **changes)
        spec = dataclasses.replace(SPEC, weight=dataclasses.replace(SPEC.weight, second=second))
        assert QuarkW4A8_INT4_FP8.refuses(spec) == "takes static INT4 per channel as the second stage"
    spec = dataclasses.replace(SPEC, input=PRESETS["int8"].input)
    assert QuarkW4A8_INT4_FP8.refuses(spec) == "takes fp8_e4m3 or fp8_e5m2 of one stage"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_stored_and_how_near_it_is(dtype: torch.dtype) -> None:
    """Both stages by numpy, in float32; half a step of INT4 on what FP8 made of the weight."""
    weight = torch.randn(24, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    layer = QuarkLinear(128, 24, scheme_for(SPEC), bias=False, dtype=dtype)
    for name, tensor in layer.scheme.quantize_weight(weight).items():
        empty = getattr(layer, name)
        assert (tensor.shape, tensor.dtype) == (empty.shape, empty.dtype)
        set_parameters(layer, **{name: tensor})
    number = ml_dtypes.bfloat16 if dtype == torch.bfloat16 else np.float32
    w = weight.float().numpy()
    scale = np.abs(w).max() / np.float32(448)
    assert layer.weight_scale.item() == scale
    quotient = np.clip((w / scale).astype(number).astype(np.float32), -448, 448)
    stage = quotient.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    scale_2 = (np.abs(stage).max(-1) / np.float32(7.5)).astype(number).astype(np.float32)
    np.testing.assert_array_equal(layer.weight_scale_2.numpy(), scale_2)
    assert (layer.weight_zero_point_2 == 0).all()

    words, codes = layer.weight.numpy().astype(np.int64) & 0xFFFFFFFF, np.empty((24, 128), np.int64)
    for place, element in enumerate(ORDER):
        codes[:, element::8] = words >> 4 * place & 15
    codes = np.where(codes > 7, codes - 16, codes).astype(np.float32)
    unit = float(torch.finfo(dtype).eps)
    assert (np.abs(codes * scale_2[:, None] - stage) <= scale_2[:, None] * (0.5 + 24 * unit)).all()
    values = codes * scale_2[:, None] * scale
    assert torch.equal(layer.scheme.dequantize_weight(layer, F32), torch.from_numpy(values))
    assert torch.equal(layer.scheme.dequantize_weight(layer, dtype), torch.from_numpy(values).to(dtype))


def test_fused_shards_keep_their_values_under_the_largest_scale(linear: Make) -> None:
    """Up to three roundings of a float32: what a shard's scale lacks goes into its channels' scales."""
    parts = [linear("int4_fp8", n, seed=n, size=float(n)) for n in (16, 48, 8)]
    fused = QuarkLinear.fuse(parts)
    assert fused.weight_scale.shape == ()
    assert fused.weight_scale.item() == parts[1].weight_scale.item()
    assert torch.equal(fused.weight, torch.cat([m.weight for m in parts]))
    assert torch.equal(fused.weight_scale_2[16:64], parts[1].weight_scale_2)
    weights = torch.cat([m.scheme.dequantize_weight(m, torch.float64) for m in parts])
    found = fused.scheme.dequantize_weight(fused, torch.float64)
    assert torch.equal(found[16:64], weights[16:64])
    assert ((found - weights).abs() <= 4 * 2.0**-24 * weights.abs()).all()


def test_fused_shards_of_one_scale_are_the_separate_linears(linear: Make) -> None:
    parts = [linear("int4_fp8", n, seed=n) for n in (16, 48)]
    parts[1].weight_scale.data.copy_(parts[0].weight_scale.data)
    fused = QuarkLinear.fuse(parts)
    weights = torch.cat([m.scheme.dequantize_weight(m, F32) for m in parts])
    assert torch.equal(fused.scheme.dequantize_weight(fused, F32), weights)


def test_the_activations_scale_is_float32(linear: Make) -> None:
    layer = linear("int4_fp8", dtype=torch.bfloat16)
    x = torch.randn(6, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    scale = np.abs(x.float().numpy()).max() / np.float32(448)
    quotient = (x.float().numpy() / scale).astype(ml_dtypes.bfloat16).astype(np.float32)
    codes = np.clip(quotient, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    values = (codes * scale).astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(layer.scheme.fake_quantize_input(layer, x).float().numpy(), values)


@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_2"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0, 0.0])
def test_damaged_scales_are_refused_after_loading(linear: Make, name: str, bad: float) -> None:
    layer = linear("int4_fp8")
    getattr(layer, name).data.view(-1)[-1] = bad
    with pytest.raises(CheckpointError, match=rf"^{name} holds a"):
        layer.scheme.process_weights_after_loading(layer)
