"""Zero points that a file-to-file export leaves out: those of symmetric 8-bit integers are 0, others are an error."""

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


def without(copy: Any, ending: str) -> int:
    """Remove the tensors of this ending; how many they were."""
    with copy.tensors() as tensors:
        names = [n for n in tensors if n.endswith(ending)]
        for n in names:
            del tensors[n]
    return len(names)


@pytest.mark.parametrize("name", ["int8", "int8_wo_perchannel", "ptpc_int8", "int8_dynamic", "int8_perchannel_static"])
def test_symmetric_int8_needs_none(name: str, copy_of: CopyOf) -> None:
    copy, expected = copy_of(name), qi.load(FIXTURES / name)
    assert without(copy, "zero_point") in (7, 14)
    model = qi.load(copy.path)
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for n, t in theirs.items():
        assert (ours[n].dtype, ours[n].shape) == (t.dtype, t.shape)
        assert torch.equal(ours[n], t)
    zero_points = [t for n, t in ours.items() if n.endswith("zero_point")]
    assert not any(t.count_nonzero() for t in zero_points)
    assert torch.equal(logits(model), logits(expected))


def test_amd_quarks_file_to_file_export_has_none(tmp_path: Path) -> None:
    model = qi.load(FIXTURES / "f2f_int8_wo_perchannel")
    stored = load_file(FIXTURES / "f2f_int8_wo_perchannel" / "model.safetensors")
    added = model.state_dict().keys() - stored.keys()
    assert len(added) == 7
    assert all(n.endswith("weight_zero_point") for n in added)
    qi.save(model, tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == stored.keys() | added
    assert torch.equal(logits(qi.load(tmp_path)), logits(model))


@pytest.mark.parametrize(
    "name",
    ["int4_wo_32", "int4_wo_per_channel", "int4_wa_64", "int4_wo_128", "uint4_wo_32", "uint4_wo_per_channel"],
)
def test_four_bits_without_one_are_refused(name: str, copy_of: CopyOf) -> None:
    """Symmetric, too: files without them are packed in another order than their config says."""
    copy = copy_of(name)
    assert without(copy, "zero_point") >= 5
    with pytest.raises(CheckpointError) as caught:
        qi.load(copy.path)
    for text in ("missing", "weight_zero_point", "direct_quantize_checkpoint", "order", "export_safetensors"):
        assert text in str(caught.value)


@pytest.mark.parametrize("name", ["int8_perchannel_asym", "uint8_static"])
@pytest.mark.parametrize("which", ["weight_zero_point", "input_zero_point"])
def test_asymmetric_integers_without_one_are_refused(name: str, which: str, copy_of: CopyOf) -> None:
    copy = copy_of(name)
    with copy.tensors() as tensors:
        del tensors[f"{DOWN}.{which}"]
    with pytest.raises(CheckpointError, match=rf"missing.*{DOWN}\.{which}"):
        qi.load(copy.path)


def test_a_zero_point_that_is_stored_counts(copy_of: CopyOf) -> None:
    """Whatever the config says: it is amd-quark's own formula."""
    copy, key = copy_of("int8_wo_perchannel"), f"{DOWN}.weight_zero_point"
    with copy.tensors() as tensors:
        tensors[key] = tensors[key] + 3
    model, plain = qi.load(copy.path), qi.load(FIXTURES / "int8_wo_perchannel")
    assert (model.get_parameter(key) == 3).all()
    assert not torch.equal(logits(model), logits(plain))
