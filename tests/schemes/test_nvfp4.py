"""NVFP4. ``test_exported.py`` has amd-quark's own numbers."""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from quark_inductor.schemes import registry  # noqa: F401
from quark_inductor.schemes.base import QuarkLinear, scheme_for
from quark_inductor.schemes.errors import CheckpointError, ShapeError
from quark_inductor.schemes.nvfp4 import QuarkNVFP4
from quark_inductor.schemes.spec import PRESETS, LinearSpec, TensorSpec

Make = Callable[..., Any]
U8, E4M3, F32 = torch.uint8, torch.float8_e4m3fn, torch.float32
WEIGHT = {"weight": ((64, 24), U8), "weight_scale": ((64, 3), E4M3)}


@pytest.mark.parametrize(
    ("preset", "widths", "expected"),
    [
        ("nvfp4", [64], WEIGHT | {"weight_scale_2": ((), F32), "input_scale_2": ((), F32)}),
        ("nvfp4", [48, 16], WEIGHT | {"weight_scale_2": ((2,), F32), "input_scale_2": ((2,), F32)}),
        ("nvfp4_weight_only", [64], WEIGHT | {"weight_scale_2": ((), F32)}),
    ],
)
def test_create_weights_has_the_checkpoints_layout(
    layout: Make, preset: str, widths: list[int], expected: dict[str, Any]
) -> None:
    assert layout(preset, widths, 48) == expected


@pytest.mark.parametrize("k", [8, 17, 24])
def test_a_k_of_no_whole_blocks_is_refused(k: int) -> None:
    for preset in ("nvfp4", "nvfp4_weight_only"):
        with pytest.raises(ShapeError, match=rf"K = {k} input features: .*multiple of 16; exclude this layer"):
            QuarkLinear(k, 64, scheme_for(PRESETS[preset]), bias=False, dtype=torch.bfloat16)


def test_its_own_specs_are_taken_and_others_refused_with_a_reason() -> None:
    for preset in PRESETS:
        reason = QuarkNVFP4.refuses(PRESETS[preset])
        assert reason == (None if preset.startswith("nvfp4") else "takes NVFP4 weights (and inputs)")
    mixed = LinearSpec(weight=PRESETS["nvfp4"].weight, input=PRESETS["mxfp4"].input)
    assert QuarkNVFP4.refuses(mixed) == "takes NVFP4 weights (and inputs)"
    e5m3 = TensorSpec(dtype="fp8_e5m3", qscheme="per_tensor", is_scale_quant=True)
    unreadable = LinearSpec(weight=dataclasses.replace(PRESETS["nvfp4"].weight, second=e5m3))
    assert "integers modulo 256" in str(QuarkNVFP4.refuses(unreadable))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_quantize_and_dequantize_are_within_half_a_step(dtype: torch.dtype) -> None:
    """Half a step of FP4, of a block scale that E4M3 rounds by up to 1/16, or by half of its smallest number."""
    weight = (torch.randn(64, 96, generator=torch.Generator().manual_seed(1)) * torch.logspace(-1, 1, 64)[:, None]).to(
        dtype
    )
    layer = QuarkLinear(96, 64, scheme_for(PRESETS["nvfp4_weight_only"]), bias=False, dtype=dtype)
    for name, tensor in layer.scheme.quantize_weight(weight).items():
        assert (tensor.shape, tensor.dtype) == (getattr(layer, name).shape, getattr(layer, name).dtype)
        setattr(layer, name, torch.nn.Parameter(tensor, requires_grad=False))
    w = weight.double()
    error = (layer.scheme.dequantize_weight(layer, torch.float64) - w).abs().unflatten(-1, (-1, 16))
    amax = w.abs().unflatten(-1, (-1, 16)).amax(-1, keepdim=True)
    smallest = layer.weight_scale_2.double() * 2.0**-9
    # 2 is the widest step of FP4, 6 its largest; what is cut off is what the scale was rounded down by.
    bound = (amax / 6 * (1 + 2.0**-4) + smallest / 2) + amax / 16 + 6 * smallest / 2
    assert (error <= bound).all()
    assert error.square().mean().sqrt() < 0.11 * w.square().mean().sqrt()


def test_a_global_scale_for_more_than_one_weight_is_told() -> None:
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    scheme = scheme_for(PRESETS["nvfp4"])
    own, shared = scheme.quantize_weight(weight), scheme.quantize_shared_weight(weight, torch.tensor(20.0))
    assert own["weight_scale_2"].item() == weight.abs().max().numpy() / np.float32(2688)
    assert shared["weight_scale_2"].item() == np.float32(20) / np.float32(2688)
    assert not torch.equal(own["weight_scale"].view(U8), shared["weight_scale"].view(U8))


def test_the_buffers_of_vllms_kernels(linear: Make) -> None:
    layer = linear("nvfp4")
    assert torch.equal(layer.alpha, layer.input_scale_2 * layer.weight_scale_2)
    assert torch.equal(layer.input_global_scale_inv, 1 / layer.input_scale_2)
    assert layer.alpha.item() == np.float32(layer.input_scale_2.item()) * np.float32(layer.weight_scale_2.item())
    assert sorted(layer.state_dict()) == ["bias", "input_scale_2", "weight", "weight_scale", "weight_scale_2"]
    assert not hasattr(linear("nvfp4_weight_only"), "alpha")


def test_shards_of_one_global_scale_are_the_separate_linears(linear: Make, caplog: pytest.LogCaptureFixture) -> None:
    parts = [linear("nvfp4", n, seed=n) for n in (48, 16)]
    for part in parts:
        weight = torch.randn(part.out_features, 128, generator=torch.Generator().manual_seed(3))
        for name, tensor in part.scheme.quantize_shared_weight(weight, torch.tensor(5.0)).items():
            getattr(part, name).data = tensor
    with caplog.at_level(logging.WARNING, logger="quark_inductor"):
        fused = QuarkLinear.fuse(parts)
    assert caplog.records == []
    weights = [m.scheme.dequantize_weight(m, F32) for m in parts]
    assert torch.equal(fused.scheme.dequantize_weight(fused, F32), torch.cat(weights))
    assert fused.weight_scale_2.shape == fused.input_scale_2.shape == fused.alpha.shape == ()


def test_shards_of_unlike_global_scales_take_the_largest_and_say_so_once(
    linear: Make, caplog: pytest.LogCaptureFixture
) -> None:
    large, small = linear("nvfp4", 48, seed=1, size=4.0), linear("nvfp4", 16, seed=2, size=0.3)
    with caplog.at_level(logging.WARNING, logger="quark_inductor"):
        fused = QuarkLinear.fuse([small, large])
    (record,) = caplog.records
    assert "fused shards have unlike global scales" in record.getMessage()
    assert record.levelno == logging.WARNING
    largest = large.weight_scale_2.numpy()
    assert fused.weight_scale_2.item() == largest
    assert torch.equal(fused.weight, torch.cat((small.weight, large.weight)))
    scales = small.weight_scale.view(U8).numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    rounded = (scales * (small.weight_scale_2.numpy() / largest)).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    found = fused.weight_scale.view(U8).numpy()
    np.testing.assert_array_equal(found[:16], rounded)
    np.testing.assert_array_equal(found[16:], large.weight_scale.view(U8).numpy())
    assert fused.alpha.item() == np.float32(fused.input_scale_2.item()) * largest


def test_an_input_scale_that_is_not_stored_is_computed(linear: Make) -> None:
    """The second stage is dynamic too: a Linear quantized without calibration data."""
    x = dataclasses.replace(
        PRESETS["nvfp4"].input, second=dataclasses.replace(PRESETS["nvfp4"].input.second, is_dynamic=True)
    )
    layer = linear(LinearSpec(weight=PRESETS["nvfp4"].weight, input=x))
    assert sorted(layer.state_dict()) == ["bias", "weight", "weight_scale", "weight_scale_2"]
    stored, rows = linear("nvfp4"), torch.randn(5, 128, generator=torch.Generator().manual_seed(2))
    stored.input_scale_2.data = rows.abs().max() / 2688
    assert torch.equal(layer(rows), stored(rows))


@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [
        ("weight_scale", float("nan"), "a NaN"),
        ("weight_scale", -1.0, "a scale that is not positive"),
        ("weight_scale_2", float("nan"), "a NaN"),
        ("weight_scale_2", float("inf"), "a NaN or an infinity"),
        ("weight_scale_2", 0.0, "a scale that is not positive"),
        ("weight_scale_2", -1.0, "a scale that is not positive"),
        ("input_scale_2", float("nan"), "a NaN"),
        ("input_scale_2", -1.0, "a scale that is not positive"),
    ],
)
def test_damaged_numbers_are_refused_after_loading(linear: Make, name: str, bad: float, message: str) -> None:
    layer = linear("nvfp4")
    parameter = getattr(layer, name)
    damaged = parameter.float()
    damaged.view(-1)[-1] = bad
    parameter.data = damaged.to(parameter.dtype)
    with pytest.raises(CheckpointError, match=rf"^{name} holds {message}"):
        layer.scheme.process_weights_after_loading(layer)


def test_a_block_scale_of_zero_is_a_number(linear: Make) -> None:
    layer = linear("nvfp4")
    layer.weight_scale.data.view(U8)[0, 0] = 0
    layer.scheme.process_weights_after_loading(layer)
    assert (layer.scheme.dequantize_weight(layer, F32)[0, :16] == 0).all()
