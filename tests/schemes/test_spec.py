"""The frozen descriptions of tensors and Linears."""

import dataclasses
from typing import Any

import pytest

from quark_inductor.schemes.spec import PRESETS, LinearSpec, TensorSpec


def test_a_spec_is_frozen_and_hashable() -> None:
    spec = PRESETS["mxfp4"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.input = None  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.weight.dtype = "fp8_e4m3"  # type: ignore[misc]
    equal = LinearSpec(weight=dataclasses.replace(spec.weight), input=spec.input)
    assert equal == spec
    assert hash(equal) == hash(spec)
    assert dataclasses.replace(spec.weight, group_size=16) != spec.weight


def test_presets_differ() -> None:
    assert len(set(PRESETS.values())) == len(PRESETS)


@pytest.mark.parametrize(
    ("preset", "text"),
    [
        ("mxfp4", "weight fp4 per_group 32 e8m0 even static, input fp4 per_group 32 e8m0 even dynamic"),
        ("fp8", "weight fp8_e4m3 per_tensor static, input fp8_e4m3 per_tensor static"),
        ("fp8_dynamic", "weight fp8_e4m3 per_tensor static, input fp8_e4m3 per_tensor dynamic"),
        ("ptpc_fp8", "weight fp8_e4m3 per_channel static, input fp8_e4m3 per_channel dynamic"),
        ("mxfp6_e2m3", "weight fp6_e2m3 per_group 32 e8m0 even static, input fp6_e2m3 per_group 32 e8m0 even dynamic"),
        (
            "nvfp4_weight_only",
            "weight fp4 per_group 16 float32 scale float32 static + fp8_e4m3 per_tensor scale float32 of the scales "
            "static, input not quantized",
        ),
        (
            "fp8_block128",
            "weight fp8_e4m3 per_block 128x128 scale float32 static, input fp8_e4m3 per_group 128 dynamic",
        ),
        ("uint4_wo_32", "weight uint4 per_group 32 asymmetric static, input not quantized"),
        (
            "int4_fp8",
            "weight fp8_e4m3 per_tensor scale float32 static + int4 per_channel scale float32 static, "
            "input fp8_e4m3 per_tensor scale float32 dynamic",
        ),
    ],
)
def test_a_spec_reads_as_text(preset: str, text: str) -> None:
    assert str(PRESETS[preset]) == text


def test_an_input_that_is_not_quantized_reads_so() -> None:
    assert str(LinearSpec(weight=TensorSpec(dtype="int8", qscheme="per_channel"), input=None)) == (
        "weight int8 per_channel static, input not quantized"
    )


def test_an_output_and_another_packing_read_so() -> None:
    spec = dataclasses.replace(PRESETS["uint4_wo_32"], pack_method="order", output=PRESETS["fp8"].input)
    assert str(spec) == f"{PRESETS['uint4_wo_32']}, output fp8_e4m3 per_tensor static, packed in order"
    assert str(LinearSpec(weight=None, output=PRESETS["fp8"].input)).startswith("weight not quantized, input not quant")


@pytest.mark.parametrize(
    ("preset", "weight", "x"),
    [
        ("mxfp4", "mxfp4", "mxfp4"),
        ("mxfp4_fp8", "mxfp4", None),
        ("mxfp4_mxfp6_e2m3", "mxfp4", "mxfp6_e2m3"),
        ("mxfp4_mxfp8", "mxfp4", "mxfp8_e4m3"),
        ("mxfp6_e3m2", "mxfp6_e3m2", "mxfp6_e3m2"),
        ("mxfp8", "mxfp8_e4m3", "mxfp8_e4m3"),
        ("nvfp4", "nvfp4", "nvfp4"),
        ("amdfp4", "amdfp4_g16", "amdfp4_g16"),
        ("amdfp4_g32", "amdfp4_g32", "amdfp4_g32"),
        ("fp8", None, None),
        ("fp8_block128", None, None),
        ("int4_wa_64", None, None),
        ("int4_fp8", None, None),
    ],
)
def test_a_block_format_is_known_by_its_parts(preset: str, weight: str | None, x: str | None) -> None:
    spec = PRESETS[preset]
    assert (spec.weight.block_format, spec.input.block_format) == (weight, x)


@pytest.mark.parametrize(
    "changes", [{"group_size": 64}, {"scale_format": None}, {"dtype": "int8"}, {"second": PRESETS["fp8"].weight}]
)
def test_another_combination_is_no_block_format(changes: dict[str, Any]) -> None:
    assert dataclasses.replace(PRESETS["mxfp4"].weight, **changes).block_format is None


def test_a_second_stage_decides_the_block_format() -> None:
    nvfp4 = PRESETS["nvfp4"].weight
    for second in (None, dataclasses.replace(nvfp4.second, dtype="fp8_e5m2")):
        assert dataclasses.replace(nvfp4, second=second).block_format is None
    of_codes = dataclasses.replace(nvfp4.second, is_scale_quant=False)
    assert dataclasses.replace(nvfp4, second=of_codes).block_format is None
