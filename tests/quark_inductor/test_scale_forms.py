"""Scales in the forms that amd-quark's releases and exporters write: float32 beside bfloat16, ``[1]`` for ``[]``."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import quark_inductor as qi
from quark_inductor.errors import CheckpointError

FIXTURES = Path(__file__).parents[1] / "fixtures"
CopyOf = Callable[[str], Any]
DOWN = "model.layers.0.mlp.down_proj"
IDS = torch.arange(12)[None] % 16


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(IDS).logits
    return result


def stored(name: str) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in load_file(FIXTURES / name / "model.safetensors").items()}


def scales(name: str) -> list[str]:
    """Of a fixture: its scales in bfloat16 or float32."""
    return [n for n, t in stored(name).items() if "_scale" in n and t.dtype in (torch.bfloat16, torch.float32)]


# --- float32


@pytest.mark.parametrize("name", ["fp8", "ptpc_fp8", "int8_wo_perchannel", "int4_wo_32", "fp8_kv_fp8", "fp8_e5m2"])
def test_float32_scales_of_a_bfloat16_model_stay_float32(name: str, copy_of: CopyOf) -> None:
    """Nothing of them is lost: of a third, bfloat16 has 8 bits."""
    copy, expected = copy_of(name), {}
    with copy.tensors() as tensors:
        for key in scales(name):
            tensors[key] = expected[key] = tensors[key].float() * (4 / 3)
    loaded = qi.load(copy.path).state_dict()
    assert len(expected) >= 7
    for key, scale in expected.items():
        assert loaded[key].dtype == torch.float32
        assert torch.equal(loaded[key], scale)
    assert {t.dtype for n, t in loaded.items() if "layernorm" in n} == {torch.bfloat16}


def test_the_weight_of_a_float32_scale_is_its_product_in_float32(copy_of: CopyOf) -> None:
    copy = copy_of("ptpc_fp8")
    with copy.tensors() as tensors:
        key = f"{DOWN}.weight_scale"
        scale = tensors[key] = tensors[key].float() * (4 / 3)
        codes = tensors[f"{DOWN}.weight"]
    layer: Any = qi.load(copy.path).get_submodule(DOWN)
    expected = (codes.float() * scale[:, None]).to(torch.bfloat16)
    assert torch.equal(layer.scheme.dequantize_weight(layer, torch.bfloat16), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_another_dtype_of_the_model_leaves_float32_scales_alone(dtype: torch.dtype) -> None:
    """amd-quark's ``scale_type`` float32, and its file-to-file export, which writes them whatever the config says."""
    for name in ("fp8_float32_scale", "f2f_ptpc_fp8", "int8"):
        wanted = {n for n in scales(name) if stored(name)[n].dtype == torch.float32}
        assert len(wanted) >= 7
        loaded = qi.load(FIXTURES / name, dtype=dtype).state_dict()
        assert {
            n for n in wanted if loaded[n].dtype != torch.float32 or not torch.equal(loaded[n], stored(name)[n])
        } == set()


def test_float32_scales_come_back_from_a_save(tmp_path: Path) -> None:
    model = qi.load(FIXTURES / "f2f_ptpc_fp8")
    qi.save(model, tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(written[n], stored("f2f_ptpc_fp8")[n]) for n in scales("f2f_ptpc_fp8"))
    assert torch.equal(logits(qi.load(tmp_path)), logits(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32])
def test_a_scale_of_any_other_dtype_is_refused(dtype: torch.dtype, copy_of: CopyOf) -> None:
    copy, key = copy_of("ptpc_fp8"), f"{DOWN.replace('.0.', '.1.')}.weight_scale"
    with copy.tensors() as tensors:
        tensors[key] = tensors[key].to(dtype)
    with pytest.raises(CheckpointError, match=rf"{key} has dtype .*expected bfloat16 or float32"):
        qi.load(copy.path)


def test_a_bfloat16_scale_where_the_scheme_has_float32_is_refused(copy_of: CopyOf) -> None:
    copy, key = copy_of("nvfp4"), f"{DOWN}.weight_scale_2"
    with copy.tensors() as tensors:
        tensors[key] = tensors[key].bfloat16()
    with pytest.raises(CheckpointError, match=rf"{key} has dtype bfloat16, expected float32"):
        qi.load(copy.path)


# --- [1]


@pytest.mark.parametrize("name", ["fp8", "fp8_fp32", "fp8_kv_fp8", "int8", "nvfp4", "int4_fp8", "mxfp4_fp8"])
def test_a_scale_per_tensor_may_have_one_dimension(name: str, copy_of: CopyOf) -> None:
    copy, expected = copy_of(name), qi.load(FIXTURES / name)
    changed = 0
    with copy.tensors() as tensors:
        for key in scales(name):
            if tensors[key].ndim == 0:
                tensors[key] = tensors[key].reshape(1)
                changed += 1
    assert changed >= 7
    model = qi.load(copy.path)
    assert {n: t.shape for n, t in model.state_dict().items()} == {n: t.shape for n, t in expected.state_dict().items()}
    assert torch.equal(logits(model), logits(expected))


@pytest.mark.parametrize("shape", [(1, 1), (2,), (0,)])
def test_any_other_shape_of_a_scale_per_tensor_is_refused(shape: tuple[int, ...], copy_of: CopyOf) -> None:
    copy, key = copy_of("nvfp4"), f"{DOWN}.input_scale_2"
    with copy.tensors() as tensors:
        tensors[key] = torch.ones(shape)
    with pytest.raises(CheckpointError) as caught:
        qi.load(copy.path)
    assert f"{key} has shape {list(shape)}, expected []" in str(caught.value)


def test_only_a_scale_may_have_one_dimension_more(copy_of: CopyOf) -> None:
    copy, key = copy_of("int8"), f"{DOWN}.input_zero_point"
    with copy.tensors() as tensors:
        tensors[key] = tensors[key].reshape(1)
    with pytest.raises(CheckpointError, match=rf"{key} has shape \[1\], expected \[\]"):
        qi.load(copy.path)
