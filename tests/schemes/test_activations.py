"""The choice of an activation's quantizer, and what it stores. ``test_exported.py`` has the numbers."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from quark_inductor.schemes.activations import (
    BlockActivation,
    Fp8Activation,
    IntegerActivation,
    activation_quantizer,
)
from quark_inductor.schemes.errors import ConfigError
from quark_inductor.schemes.spec import PRESETS, TensorSpec

F32 = torch.float32
INPUTS = {name: spec.input for name, spec in PRESETS.items() if spec.input is not None}
KINDS = {
    **dict.fromkeys(["fp8", "fp8_dynamic", "ptpc_fp8", "fp8_block128", "fp8_e5m2", "mxfp4_fp8"], Fp8Activation),
    **dict.fromkeys(["mxfp4_fp8_dynamic", "mxfp4_fp8_token", "int4_fp8"], Fp8Activation),
    **dict.fromkeys(["int8", "int8_dynamic", "ptpc_int8", "int4_wa_64"], IntegerActivation),
    **dict.fromkeys(["mxfp4", "mxfp4_mxfp8", "mxfp4_mxfp6_e2m3", "mxfp6_e2m3", "mxfp6_e3m2"], BlockActivation),
    **dict.fromkeys(["mxfp8", "nvfp4", "amdfp4", "amdfp4_g32"], BlockActivation),
}
STATIC_FP8 = INPUTS["fp8"]


@pytest.mark.parametrize("preset", INPUTS)
@pytest.mark.parametrize("role", ["input", "output"])
def test_every_presets_input_has_its_quantizer(preset: str, role: str) -> None:
    quantizer = activation_quantizer(INPUTS[preset], role)
    assert type(quantizer) is KINDS[preset]
    assert (quantizer.spec, quantizer.role) == (INPUTS[preset], role)
    assert quantizer.group_size == (INPUTS[preset].group_size or 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "fp8_e5m3"},
        {"dtype": "fp4"},  # per tensor
        {"qscheme": "per_channel"},  # static
        {"qscheme": "per_group", "group_size": 32},
        {"qscheme": "per_block", "is_dynamic": True},
        {"scale_format": "e8m0", "is_dynamic": True},
        {"second": STATIC_FP8},
        {"dtype": "int8", "qscheme": "per_channel"},
        {"dtype": "int4", "second": STATIC_FP8},
    ],
)
def test_what_nobody_takes_is_refused_with_every_reason(changes: dict[str, Any]) -> None:
    spec = dataclasses.replace(STATIC_FP8, **changes)
    with pytest.raises(ConfigError) as error:
        activation_quantizer(spec, "output")
    message = str(error.value)
    assert message.startswith(f"no quantizer for the output [{spec}]: BlockActivation takes the block formats mxfp4, ")
    for kind in (BlockActivation, Fp8Activation, IntegerActivation):
        assert f"{kind.__name__} {kind.refuses(spec)}" in message


def test_a_static_block_format_is_refused() -> None:
    assert str(BlockActivation.refuses(PRESETS["mxfp4"].weight)).endswith("dynamic")


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (INPUTS["fp8"], {"input_scale": torch.bfloat16}),
        (dataclasses.replace(INPUTS["fp8"], scale_type="float32"), {"input_scale": F32}),
        (INPUTS["int8"], {"input_scale": F32, "input_zero_point": torch.int8}),
        (
            TensorSpec(dtype="uint8", qscheme="per_tensor", symmetric=False),
            {"input_scale": F32, "input_zero_point": torch.uint8},
        ),
        (INPUTS["nvfp4"], {"input_scale_2": F32}),
        *((INPUTS[name], {}) for name in ("fp8_dynamic", "ptpc_fp8", "ptpc_int8", "mxfp4", "amdfp4")),
    ],
)
def test_what_is_stored(spec: TensorSpec, expected: dict[str, torch.dtype]) -> None:
    stored = activation_quantizer(spec, "input").tensors(torch.bfloat16)
    assert {name: (tuple(t.shape), t.dtype) for name, t in stored.items()} == {n: ((), d) for n, d in expected.items()}
    if expected:  # what calibration makes has the same names, shapes and dtypes
        seen = torch.tensor([-3.0, 5.0], dtype=torch.bfloat16)
        made = activation_quantizer(spec, "input").calibrated(*seen)
        assert {n: (t.shape, t.dtype) for n, t in made.items()} == {n: (t.shape, t.dtype) for n, t in stored.items()}


def calibrated(spec: TensorSpec, amin: float, amax: float) -> dict[str, float]:
    made = activation_quantizer(spec, "output").calibrated(torch.tensor(amin), torch.tensor(amax))
    return {name: tensor.item() for name, tensor in made.items()}


def test_calibrated_numbers() -> None:
    """Of the range -6 to 4."""
    six = np.float32(6)
    assert calibrated(INPUTS["fp8"], -6.0, 4.0) == {"output_scale": six / np.float32(448)}
    assert calibrated(INPUTS["fp8_e5m2"], -6.0, 4.0) == {"output_scale": six / np.float32(57344)}
    assert calibrated(INPUTS["int8"], -6.0, 4.0) == {"output_scale": six / np.float32(127.5), "output_zero_point": 0}
    asymmetric = TensorSpec(dtype="uint8", qscheme="per_tensor", symmetric=False)
    expected = {"output_scale": np.float32(10) / np.float32(255), "output_zero_point": 153}  # 6 / 10 * 255
    assert calibrated(asymmetric, -6.0, 4.0) == expected
    assert calibrated(INPUTS["nvfp4"], -6.0, 4.0) == {"output_scale_2": six / np.float32(6 * 448)}
    assert calibrated(INPUTS["nvfp4"], 0.0, 0.0) == {"output_scale_2": 2.0**-23}
    assert calibrated(INPUTS["mxfp4"], -6.0, 4.0) == {}


@pytest.mark.parametrize("preset", INPUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_no_rows_stay_no_rows(preset: str, dtype: torch.dtype) -> None:
    spec = dataclasses.replace(INPUTS[preset], is_dynamic=True)
    if spec.second is not None:
        spec = dataclasses.replace(spec, second=dataclasses.replace(spec.second, is_dynamic=True))
    quantizer = activation_quantizer(spec, "input")
    layer = torch.nn.Linear(1, 1)
    x = torch.zeros(0, 128, dtype=dtype)
    assert quantizer.fake_quantize(layer, x).shape == (0, 128)
    assert quantizer.fake_quantize(layer, x).dtype == dtype
