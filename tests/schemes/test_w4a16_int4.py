"""INT4 and UINT4 weights in int32. ``test_exported.py`` has amd-quark's own numbers."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from quark_inductor.schemes import registry  # noqa: F401
from quark_inductor.schemes.base import QuarkLinear, scheme_for, set_parameters
from quark_inductor.schemes.errors import CheckpointError, ShapeError
from quark_inductor.schemes.spec import PRESETS, LinearSpec
from quark_inductor.schemes.w4a16_int4 import QuarkW4A16Int4

Make = Callable[..., Any]
I32, F16 = torch.int32, torch.float16
GROUPS = [32, 64, 128]
OWN = [f"{dtype}_wo_{group}" for dtype in ("int4", "uint4") for group in (*GROUPS, "per_channel")] + ["int4_wa_64"]
# Element at nibble i, lowest first.
ORDERS = {"reorder": [0, 2, 4, 6, 1, 3, 5, 7], "order": [0, 1, 2, 3, 4, 5, 6, 7]}


@pytest.mark.parametrize("preset", OWN)
@pytest.mark.parametrize("widths", [[64], [48, 16]])
def test_create_weights_has_the_checkpoints_layout(layout: Make, preset: str, widths: list[int]) -> None:
    group = preset.split("_")[2]
    if group == "per":
        shapes = ((64, 32), (64,), (8,))
    else:  # transposed
        shapes = ((256, 8), (256 // int(group), 64), (256 // int(group), 8))
    names = ("weight", "weight_scale", "weight_zero_point")
    expected = {n: (s, F16 if n == "weight_scale" else I32) for n, s in zip(names, shapes, strict=True)}
    assert layout(preset, widths, 256) == expected


@pytest.mark.parametrize("preset", OWN)
def test_sizes_that_do_not_fit_are_refused(preset: str) -> None:
    scheme = scheme_for(PRESETS[preset])
    with pytest.raises(ShapeError, match=r"N = 60 output features: u?int4 needs a multiple of 8; exclude this layer"):
        QuarkLinear(128, 60, scheme, bias=False, dtype=torch.bfloat16)
    with pytest.raises(ShapeError, match=r"N = 64 output features: u?int4 needs a multiple of 8; exclude this layer"):
        QuarkLinear(128, [60, 4], scheme, bias=False, dtype=torch.bfloat16)
    with pytest.raises(ShapeError, match=r"K = 132 input features: .*needs a multiple of (8|32|64|128); exclude"):
        QuarkLinear(132, 64, scheme, bias=False, dtype=torch.bfloat16)


def test_its_own_specs_are_taken_and_others_refused_with_a_reason(spec_with: Make) -> None:
    for preset in PRESETS:
        assert QuarkW4A16Int4.refuses(PRESETS[preset]) == (None if preset in OWN else "takes int4 or uint4 weights")
    spec = PRESETS["int4_wa_64"]
    for changes in ({"is_dynamic": True}, {"qscheme": "per_tensor"}, {"qscheme": "per_block"}):
        assert QuarkW4A16Int4.refuses(spec_with(spec, changes)) == "takes static weights per channel or per group"
    for changes in ({"dtype": "int8"}, {"dtype": "fp8_e4m3"}, {"is_dynamic": False}):
        assert QuarkW4A16Int4.refuses(spec_with(spec, None, changes)) == "takes dynamic int4 or uint4 inputs"


def nibbles(packed: torch.Tensor, method: str, signed: bool) -> np.ndarray:
    words = packed.numpy().astype(np.int64) & 0xFFFFFFFF
    codes = np.empty((*packed.shape[:-1], packed.shape[-1] * 8), np.int64)
    for place, element in enumerate(ORDERS[method]):
        codes[..., element::8] = words >> 4 * place & 15
    return np.where(signed & (codes > 7), codes - 16, codes)


@pytest.mark.parametrize("method", ORDERS)
@pytest.mark.parametrize("preset", OWN)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_is_stored_and_how_near_it_is(preset: str, method: str, dtype: torch.dtype) -> None:
    """Unpacked by numpy: ``(code - zero_point) * scale`` is what we dequantize, and within a step of the weight."""
    spec = dataclasses.replace(PRESETS[preset], pack_method=method)
    n, k, group, signed = 24, 256, spec.weight.group_size or 256, spec.weight.dtype == "int4"
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(1)).to(dtype)
    layer = QuarkLinear(k, n, scheme_for(spec), bias=False, dtype=dtype)
    for name, tensor in layer.scheme.quantize_weight(weight).items():
        empty = getattr(layer, name)
        assert (tensor.shape, tensor.dtype) == (empty.shape, empty.dtype)
        set_parameters(layer, **{name: tensor})
    codes, zero_points = (nibbles(t, method, signed) for t in (layer.weight, layer.weight_zero_point))
    scales = layer.weight_scale.float().numpy()
    if spec.weight.group_size is None:
        scales, zero_points = scales[:, None], zero_points[:, None]
    else:
        codes, scales, zero_points = codes.T, scales.T, zero_points.T
    scales = scales.repeat(group, 1)
    values = ((codes - zero_points.repeat(group, 1)).astype(np.float32) * scales).astype(np.float32)
    assert torch.equal(layer.scheme.dequantize_weight(layer, torch.float32), torch.from_numpy(values))
    assert torch.equal(layer.scheme.dequantize_weight(layer, dtype), torch.from_numpy(values).to(dtype))
    assert len(np.unique(codes)) == 16
    assert (zero_points != 0).any() != signed
    step = 0.5 if signed else 1.0
    error = np.abs(values - weight.float().numpy())
    assert (error <= scales * (step + 1.5 * 15 * 2 * torch.finfo(dtype).eps)).all()


@pytest.mark.parametrize("preset", OWN)
def test_fused_shards_are_the_separate_linears(linear: Make, preset: str) -> None:
    parts = [linear(preset, n, 128, seed=n, size=float(n)) for n in (48, 16, 8)]
    fused = QuarkLinear.fuse(parts)
    weights = [m.scheme.dequantize_weight(m, torch.float32) for m in parts]
    assert torch.equal(fused.scheme.dequantize_weight(fused, torch.float32), torch.cat(weights))


def test_the_activation_is_quantized_by_groups(linear: Make) -> None:
    """Of 64: scale amax / 7.5, in float32."""
    layer = linear("int4_wa_64")
    x = torch.randn(6, 128, generator=torch.Generator().manual_seed(1)) * torch.logspace(-2, 2, 6)[:, None]
    groups = x.numpy().reshape(6, 2, 64)
    scale = np.abs(groups).max(-1, keepdims=True) / np.float32(7.5)
    codes = np.clip(np.rint(groups * (np.float32(1) / scale)), -8, 7)
    np.testing.assert_array_equal(layer.scheme.fake_quantize_input(layer, x).numpy(), (codes * scale).reshape(6, 128))


@pytest.mark.parametrize("preset", ["int4_wo_32", "uint4_wo_per_channel"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0, 0.0])
def test_damaged_scales_are_refused_after_loading(linear: Make, preset: str, bad: float) -> None:
    layer = linear(preset)
    layer.weight_scale.data.view(-1)[-1] = bad
    with pytest.raises(CheckpointError, match=r"^weight_scale holds a"):
        layer.scheme.process_weights_after_loading(layer)


def test_any_word_is_a_number(linear: Make) -> None:
    layer = linear("uint4_wo_32")
    layer.weight.data.fill_(-1)
    layer.weight_zero_point.data.fill_(255)  # elements 0 and 2 have zero point 15
    layer.scheme.process_weights_after_loading(layer)
    rows = layer.scheme.dequantize_weight(layer, torch.float32)
    assert (rows.view(6, 8, 128)[:, [0, 2]] == 0).all()
    assert torch.equal(rows[1], 15 * layer.weight_scale.t()[1].repeat_interleave(32))


def test_an_input_that_is_not_quantized_stays(linear: Make) -> None:
    layer, x = linear("int4_wo_32"), torch.randn(3, 128)
    assert layer.scheme.fake_quantize_input(layer, x) is x
    assert layer.scheme.spec == LinearSpec(weight=PRESETS["int4_wo_32"].weight)
