"""AMDFP4. ``test_exported.py`` has amd-quark's own numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from quark_inductor.schemes import registry  # noqa: F401
from quark_inductor.schemes.amdfp4 import QuarkAMDFP4
from quark_inductor.schemes.base import QuarkLinear, scheme_for, set_parameters
from quark_inductor.schemes.errors import CheckpointError, ShapeError
from quark_inductor.schemes.spec import PRESETS, LinearSpec

Make = Callable[..., Any]
U8 = torch.uint8
SIZES = {"amdfp4": 16, "amdfp4_g32": 32}
both = pytest.mark.parametrize("preset", SIZES)


@both
@pytest.mark.parametrize("widths", [[64], [48, 16]])
def test_create_weights_has_the_checkpoints_layout(layout: Make, preset: str, widths: list[int]) -> None:
    expected = {"weight": ((64, 48), U8), "weight_scale": ((64, 96 // SIZES[preset]), U8)}
    assert layout(preset, widths, 96) == expected


@both
def test_a_k_of_no_whole_blocks_is_refused(preset: str) -> None:
    size = SIZES[preset]
    for k in (size // 2, size + 1, size * 3 // 2):
        with pytest.raises(ShapeError, match=rf"K = {k} input features: .*multiple of {size}; exclude this layer"):
            QuarkLinear(k, 64, scheme_for(PRESETS[preset]), bias=False, dtype=torch.bfloat16)


def test_its_own_specs_are_taken_and_others_refused_with_a_reason() -> None:
    for preset in PRESETS:
        assert QuarkAMDFP4.refuses(PRESETS[preset]) == (
            None if preset in SIZES else "takes AMDFP4 weights (and inputs)"
        )
    weight = PRESETS["amdfp4"].weight
    assert QuarkAMDFP4.refuses(LinearSpec(weight=weight)) is None
    assert QuarkAMDFP4.refuses(LinearSpec(weight=weight, input=PRESETS["amdfp4_g32"].input)) is None
    assert QuarkAMDFP4.refuses(LinearSpec(weight=weight, input=PRESETS["mxfp4"].input)) is not None


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_quantize_and_dequantize_are_within_half_a_step(preset: str, dtype: torch.dtype) -> None:
    """Half a step of FP4 under a scale that E5M3 rounds by up to 1/16 of itself."""
    weight = (torch.randn(64, 96, generator=torch.Generator().manual_seed(1)) * torch.logspace(-1, 1, 64)[:, None]).to(
        dtype
    )
    layer = QuarkLinear(96, 64, scheme_for(PRESETS[preset]), bias=False, dtype=dtype)
    for name, tensor in layer.scheme.quantize_weight(weight).items():
        assert (tensor.shape, tensor.dtype) == (getattr(layer, name).shape, getattr(layer, name).dtype)
        set_parameters(layer, **{name: tensor})
    w = weight.double()
    error = (layer.scheme.dequantize_weight(layer, torch.float64) - w).abs().unflatten(-1, (-1, SIZES[preset]))
    amax = w.abs().unflatten(-1, (-1, SIZES[preset])).amax(-1, keepdim=True)
    # 2 is the widest step of FP4, 6 its largest; what is cut off is what the scale was rounded down by.
    assert (error <= amax / 6 * (1 + 2.0**-4) + amax / 16).all()
    assert error.square().mean().sqrt() < 0.12 * w.square().mean().sqrt()


@both
def test_fused_shards_are_the_separate_linears(linear: Make, preset: str) -> None:
    parts = [linear(preset, n, seed=n, size=float(n)) for n in (48, 16, 8)]
    fused = QuarkLinear.fuse(parts)
    weights = [m.scheme.dequantize_weight(m, torch.float32) for m in parts]
    assert torch.equal(fused.scheme.dequantize_weight(fused, torch.float32), torch.cat(weights))
    assert torch.equal(fused.weight_scale, torch.cat([m.weight_scale for m in parts]))


def test_a_tiny_block_is_zero_in_a_weight_and_not_in_an_activation(linear: Make) -> None:
    """Where the scale is 0: an activation is computed with ``2**-23``, as by amd-quark's quantizer."""
    layer = linear("amdfp4")
    tiny = torch.full((1, 128), 2.0**-22)
    quantized = layer.scheme.quantize_weight(tiny.expand(48, 128).contiguous())
    assert (quantized["weight_scale"] == 0).all()
    set_parameters(layer, **quantized)
    assert (layer.scheme.dequantize_weight(layer, torch.float32) == 0).all()
    assert torch.equal(layer.scheme.fake_quantize_input(layer, tiny), tiny)


@both
def test_a_nan_scale_is_refused_after_loading(linear: Make, preset: str) -> None:
    layer = linear(preset)
    layer.weight_scale.data[3, 1], layer.weight_scale.data[3, 0] = 254, 0
    layer.scheme.process_weights_after_loading(layer)
    layer.weight_scale.data[3, 1] = 255
    with pytest.raises(CheckpointError, match=r"^weight_scale holds a NaN"):
        layer.scheme.process_weights_after_loading(layer)
