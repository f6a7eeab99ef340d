"""MXFP4 weights with FP8 activations. ``test_exported.py`` has amd-quark's own numbers."""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from quark_inductor.schemes import registry  # noqa: F401
from quark_inductor.schemes.base import QuarkLinear
from quark_inductor.schemes.errors import CheckpointError
from quark_inductor.schemes.spec import PRESETS
from quark_inductor.schemes.w4a8_mxfp4_fp8 import QuarkW4A8_MXFP4_FP8

Make = Callable[..., Any]
OWN = ["mxfp4_fp8", "mxfp4_fp8_dynamic", "mxfp4_fp8_token"]
CODES = {"weight": ((64, 48), torch.uint8), "weight_scale": ((64, 3), torch.uint8)}


@pytest.mark.parametrize(
    ("preset", "widths", "more"),
    [
        ("mxfp4_fp8", [64], {"input_scale": ((), torch.float16)}),
        ("mxfp4_fp8", [48, 16], {"input_scale": ((2,), torch.float16)}),
        ("mxfp4_fp8_dynamic", [64], {}),
        ("mxfp4_fp8_token", [64], {}),
    ],
)
def test_create_weights_has_the_checkpoints_layout(
    layout: Make, preset: str, widths: list[int], more: dict[str, Any]
) -> None:
    assert layout(preset, widths, 96) == CODES | more


def test_it_takes_its_presets_and_says_what_others_lack() -> None:
    for preset in PRESETS:
        reason = QuarkW4A8_MXFP4_FP8.refuses(PRESETS[preset])
        assert (reason is None) == (preset in OWN), preset
    assert QuarkW4A8_MXFP4_FP8.refuses(PRESETS["mxfp6_e2m3"]) == "takes MXFP4 weights with an FP8 input"
    assert QuarkW4A8_MXFP4_FP8.refuses(PRESETS["mxfp4"]) == "takes fp8_e4m3 or fp8_e5m2 of one stage"
    assert QuarkW4A8_MXFP4_FP8.refuses(PRESETS["mxfp4_weight_only"]) == "takes MXFP4 weights with an FP8 input"


@pytest.mark.parametrize("preset", OWN)
def test_the_activation_is_numpys(linear: Make, preset: str) -> None:
    layer = linear(preset)
    x = torch.randn(6, 128, generator=torch.Generator().manual_seed(1)) * torch.logspace(-2, 2, 6)[:, None]
    amax = {"mxfp4_fp8": np.float32(4.0), "mxfp4_fp8_dynamic": np.abs(x.numpy()).max()}
    scale = amax.get(preset, np.abs(x.numpy()).max(-1, keepdims=True)) / np.float32(448)
    if preset == "mxfp4_fp8":
        scale = layer.input_scale.numpy()
        assert scale == np.float32(4 / 448)
    codes = np.clip(x.numpy() / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(layer.scheme.fake_quantize_input(layer, x).numpy(), codes.astype(np.float32) * scale)


def test_fused_shards_take_the_largest_input_scale(linear: Make) -> None:
    parts = [linear("mxfp4_fp8", n, seed=n) for n in (48, 16)]
    parts[1].input_scale.data.fill_(0.5)
    fused = QuarkLinear.fuse(parts)
    assert (fused.input_scale.shape, fused.input_scale.item()) == ((), 0.5)
    weights = [m.scheme.dequantize_weight(m, torch.float32) for m in parts]
    assert torch.equal(fused.scheme.dequantize_weight(fused, torch.float32), torch.cat(weights))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0, 0.0])
def test_a_damaged_input_scale_is_refused_after_loading(linear: Make, bad: float) -> None:
    layer = linear("mxfp4_fp8")
    layer.input_scale.data.fill_(bad)
    with pytest.raises(CheckpointError, match=r"^input_scale holds a"):
        layer.scheme.process_weights_after_loading(layer)
