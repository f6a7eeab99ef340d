"""The frozen descriptions of tensors and Linears."""

import dataclasses

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
    ],
)
def test_a_spec_reads_as_text(preset: str, text: str) -> None:
    assert str(PRESETS[preset]) == text


def test_an_input_that_is_not_quantized_reads_so() -> None:
    assert str(LinearSpec(weight=TensorSpec(dtype="int8", qscheme="per_channel"), input=None)) == (
        "weight int8 per_channel static, input not quantized"
    )
