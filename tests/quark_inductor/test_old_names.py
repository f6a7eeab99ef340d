"""The tensor names of amd-quark 0.11 under transformers 5, which are those of its modules."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quark_inductor as qi
from quark_inductor import files
from quark_inductor.errors import CheckpointError

FIXTURES = Path(__file__).parents[1] / "fixtures"
CopyOf = Callable[[str], Any]
DOWN = "model.layers.0.mlp.down_proj"
ONE_STAGE = ["mxfp4", "fp8", "ptpc_fp8", "int8", "int8_perchannel_asym", "int4_wo_32", "fp8_kv_fp8"]
TWO_STAGES = ["nvfp4", "nvfp4_weight_only", "int4_fp8"]


def old(name: str, stages: int) -> str:
    """``a.weight_scale`` -> ``a.weight_quantizer.scale``; of two stages ``.0.scale``, and ``.1.scale`` for ``_2``."""
    match = re.fullmatch(r"(.*)\.(weight|input|output)_(scale|zero_point)(_2)?", name)
    if match is None:
        return name
    stage = "" if stages == 1 else "1." if match[4] else "0."
    return f"{match[1]}.{match[2]}_quantizer.{stage}{match[3]}"


def state(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.state_dict())


@pytest.mark.parametrize(("name", "stages"), [*((n, 1) for n in ONE_STAGE), *((n, 2) for n in TWO_STAGES)])
def test_old_names_are_read(name: str, stages: int, copy_of: CopyOf) -> None:
    copy = copy_of(name)
    with copy.tensors() as tensors:
        renamed = {old(n, stages): tensors.pop(n) for n in list(tensors)}
        tensors.update(renamed)
    assert sum("_quantizer." in n for n in renamed) >= 7
    ours, expected = state(qi.load(copy.path)), state(qi.load(FIXTURES / name))
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[n].view(torch.uint8), expected[n].view(torch.uint8)) for n in ours if ours[n].ndim)
    assert all(torch.equal(ours[n], expected[n]) for n in ours if not ours[n].ndim)


def test_old_names_in_several_files_are_read(copy_of: CopyOf) -> None:
    copy = copy_of("mxfp4_sharded")
    for i in (1, 2, 3):
        with copy.tensors(f"model-0000{i}-of-00003.safetensors") as tensors:
            renamed = {old(n, 1): tensors.pop(n) for n in list(tensors)}
            tensors.update(renamed)
    with copy.json("model.safetensors.index.json") as index:
        index["weight_map"] = {old(n, 1): file for n, file in index["weight_map"].items()}
    ours, expected = state(qi.load(copy.path)), state(qi.load(FIXTURES / "mxfp4"))
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[n], expected[n]) for n in ours)


@pytest.mark.parametrize(
    ("name", "key", "stages"),
    [
        ("fp8", "weight_scale", 1),
        ("fp8", "input_scale", 1),
        ("int8", "weight_zero_point", 1),
        ("nvfp4", "weight_scale", 2),
        ("nvfp4", "weight_scale_2", 2),
        ("nvfp4", "input_scale_2", 2),
    ],
)
def test_a_tensor_under_both_names_is_refused(name: str, key: str, stages: int, copy_of: CopyOf) -> None:
    copy, new = copy_of(name), f"{DOWN}.{key}"
    with copy.tensors() as tensors:
        tensors[old(new, stages)] = tensors[new].clone()
    with pytest.raises(CheckpointError) as caught:
        qi.load(copy.path)
    assert f"{old(new, stages)} is the old name of {new}, and the checkpoint has both" in str(caught.value)


def test_two_old_names_of_one_tensor_are_refused(copy_of: CopyOf) -> None:
    copy, new = copy_of("fp8"), f"{DOWN}.weight_scale"
    with copy.tensors() as tensors:
        tensors[old(new, 1)] = tensors[new].clone()
        tensors[old(new, 2)] = tensors.pop(new)
    with pytest.raises(CheckpointError, match=r"down_proj\.weight_quantizer\.(0\.)?scale is the old name of"):
        qi.load(copy.path)


@pytest.mark.parametrize(
    "name",
    [
        "a.weight_scale",
        "a.weight",
        "weight_quantizer.scale",
        "a.weight_quantizer.2.scale",
        "a.weight_quantizer.scale.x",
        "a.bias_quantizer.scale",
        "a.weight_quantizer.scales",
        "a.weight_quantizer.0",
    ],
)
def test_any_other_name_stays(name: str) -> None:
    tensor = files.StoredTensor(Path("x"), name, (), torch.float32)
    assert files.canonical_names({name: tensor}) == {name: tensor}


def test_a_tensor_keeps_the_name_it_has_in_its_file() -> None:
    tensor = files.StoredTensor(Path("x"), "a.weight_quantizer.1.scale", (), torch.float32)
    assert files.canonical_names({tensor.name: tensor}) == {"a.weight_scale_2": tensor}
