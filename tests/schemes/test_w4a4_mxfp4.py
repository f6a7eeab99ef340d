"""MXFP4 against what amd-quark exported and computed, bit for bit."""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from quark_inductor.schemes import registry  # noqa: F401
from quark_inductor.schemes.base import QuarkLinear, scheme_for, set_parameters
from quark_inductor.schemes.errors import CheckpointError, ShapeError
from quark_inductor.schemes.numerics import block
from quark_inductor.schemes.spec import PRESETS, LinearSpec
from quark_inductor.schemes.w4a4_mxfp4 import QuarkW4A4MXFP4

CHECKPOINTS = ["mxfp4", "mxfp4_fp32"]
Exports = Callable[[str], Any]


def numpy_weight(parameters: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    packed = parameters["weight"].numpy()
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(packed.shape[0], -1)
    scales = parameters["weight_scale"].numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32) * np.repeat(scales, 32, axis=-1)
    return torch.from_numpy(values).to(dtype)  # exact: one bit of mantissa


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_weight_is_amd_quarks(name: str, exported: Exports) -> None:
    checkpoint = exported(name)
    assert len(checkpoint.linears) == 14
    for linear in checkpoint.linears:
        layer = checkpoint.layer(linear)
        weight = block.dequantize(layer.weight, layer.weight_scale, "mxfp4", checkpoint.dtype)
        assert checkpoint.weight_is_amd_quarks(linear, weight), linear
        assert checkpoint.weight_is_amd_quarks(linear, numpy_weight(checkpoint.parameters(linear), checkpoint.dtype))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_recorded_output_is_amd_quarks(name: str, exported: Exports) -> None:
    exported(name).check_outputs(numpy_weight)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_quantizing_amd_quarks_weights_again_gives_its_bytes(name: str, exported: Exports) -> None:
    """Rows and blocks of zeros are among them, which amd-quark stores with scale byte 1."""
    checkpoint = exported(name)
    scheme = scheme_for(PRESETS["mxfp4"])
    for linear in checkpoint.linears:
        stored = checkpoint.parameters(linear)
        quantized = scheme.quantize_weight(numpy_weight(stored, checkpoint.dtype))
        assert sorted(quantized) == ["weight", "weight_scale"]
        for key, tensor in quantized.items():
            assert tensor.dtype == torch.uint8
            assert torch.equal(tensor, stored[key]), (linear, key)
    zeros = checkpoint.parameters("model.layers.0.mlp.up_proj")["weight_scale"]
    assert zeros[17].tolist() == [1, 1, 1, 1]
    assert zeros[18, 1] == 1


def test_create_weights_has_the_checkpoints_layout() -> None:
    layer = torch.nn.Module()
    scheme_for(PRESETS["mxfp4"]).create_weights(
        layer, output_partition_sizes=[48, 16], input_size_per_partition=96, params_dtype=torch.bfloat16
    )
    found = {name: (tuple(p.shape), p.dtype, p.requires_grad) for name, p in layer.named_parameters()}
    assert found == {
        "weight": ((64, 48), torch.uint8, False),
        "weight_scale": ((64, 3), torch.uint8, False),
    }


@pytest.mark.parametrize("k", [16, 33, 48, 100])
def test_a_k_of_no_whole_blocks_is_refused(k: int) -> None:
    with pytest.raises(ShapeError, match=rf"K = {k} .*multiple of 32"):
        QuarkLinear(k, 64, scheme_for(PRESETS["mxfp4"]), bias=False, dtype=torch.bfloat16)


def test_a_nan_scale_is_refused_after_loading() -> None:
    layer = QuarkLinear(64, 4, scheme_for(PRESETS["mxfp4"]), bias=False, dtype=torch.bfloat16)
    scale = torch.full((4, 2), 127, dtype=torch.uint8)
    set_parameters(layer, weight_scale=scale)
    layer.scheme.process_weights_after_loading(layer)
    scale[3, 1] = 255
    with pytest.raises(CheckpointError, match=r"^weight_scale holds a NaN"):
        layer.scheme.process_weights_after_loading(layer)


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "mxfp4"])
def test_other_specs_are_refused_with_a_reason(preset: str) -> None:
    assert "fp4 per_group 32 e8m0 even" in str(QuarkW4A4MXFP4.refuses(PRESETS[preset]))


def test_its_own_spec_is_taken_and_the_weight_only_one_is_not() -> None:
    spec = PRESETS["mxfp4"]
    assert QuarkW4A4MXFP4.refuses(spec) is None
    assert QuarkW4A4MXFP4.refuses(LinearSpec(weight=spec.weight, input=None)) is not None
