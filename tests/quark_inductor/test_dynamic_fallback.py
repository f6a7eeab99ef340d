"""A checkpoint whose config says static scales that no file has: an error, or ``dynamic_fallback``."""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quark_inductor as qi
from quark_inductor.errors import CheckpointError
from quark_inductor.schemes.base import QuarkLinear

FIXTURES = Path(__file__).parents[1] / "fixtures"
CopyOf = Callable[[str], Any]
# What is missing, and the divisor of the largest input that gives it.
MISSING = {"f2f_fp8": ("input_scale", 448.0), "f2f_nvfp4": ("input_scale_2", 448.0 * 6)}
IDS = torch.arange(12)[None] % 16


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(ids).logits
    return result


def linears(model: nn.Module) -> dict[str, QuarkLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, QuarkLinear)}


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_scale_is_named_with_what_to_do(name: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        qi.load(FIXTURES / name)
    for text in (
        f"model.layers.0.self_attn.q_proj.{MISSING[name][0]} is missing",
        "never calibrated",
        "direct_quantize_checkpoint",
        "calibration data",
        "dynamic_fallback=True",
    ):
        assert text in str(caught.value)


@pytest.mark.parametrize("name", MISSING)
def test_each_layer_that_falls_back_is_logged(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="quark_inductor"):
        model = qi.load(FIXTURES / name, dynamic_fallback=True)
    assert [r.getMessage() for r in caplog.records] == [
        f"{layer}.{MISSING[name][0]} is missing: it is computed at run time" for layer in linears(model)
    ]
    assert len(caplog.records) == 7


@pytest.mark.parametrize("name", MISSING)
def test_the_scale_is_the_one_that_calibration_with_this_input_gives(name: str, copy_of: CopyOf) -> None:
    """The scales that each call computes are put into the file: then nothing falls back, and nothing changes."""
    scale, divisor = MISSING[name]
    fallback = qi.load(FIXTURES / name, dynamic_fallback=True)
    assert not [n for n in fallback.state_dict() if "_proj.input_" in n]
    found: dict[str, Tensor] = {}
    for layer, module in linears(fallback).items():

        def write(module: nn.Module, args: tuple[Tensor], layer: str = layer) -> None:
            amax = args[0].abs().max().float()
            found[f"{layer}.{scale}"] = (amax / divisor).to(args[0].dtype if scale == "input_scale" else torch.float32)

        module.register_forward_pre_hook(write)
    expected = logits(fallback)
    copy = copy_of(name)
    (copy / "model.safetensors.index.json").unlink()
    with copy.tensors() as tensors:
        tensors.update(found)
    calibrated = qi.load(copy.path)
    assert all(m.scheme.spec.input.is_dynamic is (name == "f2f_nvfp4") for m in linears(calibrated).values())
    assert torch.equal(logits(calibrated), expected)
    assert not torch.equal(logits(calibrated, IDS.flip(1) // 2), logits(fallback, IDS.flip(1) // 2))  # of another input


def test_fp8_falls_back_to_what_amd_quark_exports_as_dynamic(copy_of: CopyOf) -> None:
    """The spec is that of its dynamic export, the numbers those of the same file whose config says "dynamic"."""
    fallback = qi.load(FIXTURES / "f2f_fp8", dynamic_fallback=True)
    exported = linears(qi.load(FIXTURES / "f2f_fp8_dynamic"))
    assert {n: m.scheme.spec for n, m in linears(fallback).items()} == {n: m.scheme.spec for n, m in exported.items()}
    copy = copy_of("f2f_fp8")
    with copy.json() as config:
        config["quantization_config"]["global_quant_config"]["input_tensors"]["is_dynamic"] = True
    assert torch.equal(logits(fallback), logits(qi.load(copy.path)))


def test_nvfp4_falls_back_in_its_second_stage_only() -> None:
    static, fallback = qi.load(FIXTURES / "nvfp4"), qi.load(FIXTURES / "f2f_nvfp4", dynamic_fallback=True)
    for name, module in linears(fallback).items():
        spec = linears(static)[name].scheme.spec.input
        assert spec is not None
        assert spec.second is not None
        dynamic = dataclasses.replace(spec, second=dataclasses.replace(spec.second, is_dynamic=True))
        assert module.scheme.spec == dataclasses.replace(linears(static)[name].scheme.spec, input=dynamic)


@pytest.mark.parametrize("name", ["fp8", "nvfp4", "int8", "mxfp4_fp8", "mxfp4"])
def test_a_checkpoint_that_lacks_nothing_is_loaded_as_it_is(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="quark_inductor"):
        loaded, plain = qi.load(FIXTURES / name, dynamic_fallback=True), qi.load(FIXTURES / name)
    assert caplog.records == []
    assert [m.scheme.spec for m in linears(loaded).values()] == [m.scheme.spec for m in linears(plain).values()]
    assert torch.equal(logits(loaded), logits(plain))


@pytest.mark.parametrize(
    ("name", "scale"), [("int8", "input_scale"), ("fp8", "input_scale"), ("nvfp4", "input_scale_2")]
)
def test_one_layer_alone_falls_back(name: str, scale: str, copy_of: CopyOf) -> None:
    layer, copy = "model.layers.0.mlp.down_proj", copy_of(name)
    with copy.tensors() as tensors:
        tensors.pop(f"{layer}.{scale}")
        tensors.pop(f"{layer}.input_zero_point", None)
    with pytest.raises(CheckpointError, match=rf"{layer}\.{scale} is missing"):
        qi.load(copy.path)
    whole, fallback = linears(qi.load(FIXTURES / name)), linears(qi.load(copy.path, dynamic_fallback=True))
    assert [n for n in whole if whole[n].scheme.spec != fallback[n].scheme.spec] == [layer]


def test_a_missing_weight_scale_is_no_calibration(copy_of: CopyOf) -> None:
    copy, name = copy_of("f2f_fp8"), "model.layers.0.mlp.down_proj.weight_scale"
    (copy / "model.safetensors.index.json").unlink()
    with copy.tensors() as tensors:
        del tensors[name]
    with pytest.raises(CheckpointError, match=rf"missing.*{name}"):
        qi.load(copy.path, dynamic_fallback=True)


@pytest.mark.parametrize("name", MISSING)
def test_what_fell_back_is_saved_as_dynamic(name: str, tmp_path: Path) -> None:
    fallback = qi.load(FIXTURES / name, dynamic_fallback=True)
    qi.save(fallback, tmp_path)
    assert torch.equal(logits(qi.load(tmp_path)), logits(fallback))


def test_int8_zero_point_without_its_scale_is_refused(copy_of: CopyOf) -> None:
    layer, copy = "model.layers.0.mlp.down_proj", copy_of("int8")
    with copy.tensors() as tensors:
        tensors.pop(f"{layer}.input_scale")
    with pytest.raises(CheckpointError, match=rf"{layer}\.input_zero_point"):
        qi.load(copy.path, dynamic_fallback=True)
