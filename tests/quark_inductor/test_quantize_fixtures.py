"""``quantize_`` and ``save`` of the float models of the fixtures: amd-quark's files, byte by byte, of every scheme."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import quark_inductor as qi
from quark_inductor import checkpoint
from quark_inductor.schemes.spec import PRESETS

FIXTURES = Path(__file__).parents[1] / "fixtures"
FloatBase = Callable[..., Any]

# Quantized from the base models as they are, not through an algorithm, and exported by amd-quark as a model.
FIXTURE_NAMES = sorted(
    path.parent.name
    for path in FIXTURES.glob("*/reference.safetensors")
    if path.parent.name.removesuffix("_fp32") not in ("mxfp4", "fp8", "ptpc_fp8")  # those of another base model
    and not path.parent.name.startswith(("f2f_", "qwen3_", "mixtral_", "gpt_oss_", "moe_"))  # but f2f_: of other models
    and not path.parent.name.endswith(("_awq", "_gptq", "_smoothquant", "_rotation"))
    and "_kv_" not in path.parent.name  # no scheme's name quantizes outputs
    and "_attn_fp8" not in path.parent.name
)


def raw_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def contents(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {name: (t.dtype, tuple(t.shape), raw_bytes(t)) for name, t in tensors.items()}


def stored(name: str) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in load_file(FIXTURES / name / "model.safetensors").items()}


def calibration(vocabulary: int = 16) -> list[Tensor]:
    """The data of make_fixtures.py: quantize(), token_ids()."""
    generator = torch.Generator().manual_seed(21)
    return list(torch.randint(0, vocabulary, (8, 12), generator=generator).split(2))


@dataclasses.dataclass
class Float:
    """What a fixture was made of: the model, and the arguments of ``quantize_`` that say what amd-quark was told."""

    model: Any
    scheme: dict[str, str]
    exclude: list[str]


@pytest.fixture
def float_of(float_base: FloatBase, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Float]:
    """Of a fixture's name. A spec that no preset is becomes one for the test."""

    def make(name: str) -> Float:
        raw = json.loads((FIXTURES / name / "config.json").read_text())
        config = checkpoint.parse(raw["quantization_config"])
        names = {spec: key for key, spec in PRESETS.items()}
        scheme = {}
        for pattern, spec in {**config.by_pattern, "*": config.by_type.get("Linear", config.default)}.items():
            assert spec is not None
            if spec not in names:
                names[spec] = f"of {name} {pattern}"
                monkeypatch.setitem(PRESETS, names[spec], spec)
            scheme[pattern] = names[spec]
        base = "base_wide" if raw["hidden_size"] == 256 else "base"
        model = float_base(getattr(torch, raw["dtype"]), base, raw["tie_word_embeddings"])
        return Float(model, scheme, list(config.exclude))

    return make


def without_inputs(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t for n, t in tensors.items() if "_proj.input_" not in n}


# --- every scheme


@pytest.mark.parametrize("name", FIXTURE_NAMES)
def test_what_is_saved_is_amd_quarks_file(name: str, float_of: Callable[[str], Float], tmp_path: Path) -> None:
    """All but calibrated scales, which depend on sums (see below)."""
    if name.removesuffix("_fp32") == "fp8_block":
        pytest.skip("the weights of this fixture are not amd-quark's: see by_hand in make_fixtures.py")
    given = float_of(name)
    # Without data every NVFP4 weight has its own global scale, as in amd-quark when the input is not quantized.
    data = None if "nvfp4_weight_only" in name else calibration()
    qi.quantize_(given.model, given.scheme, given.exclude, calibration=data)
    qi.save(given.model, tmp_path)
    ours, theirs = load_file(tmp_path / "model.safetensors"), stored(name)
    assert {n: (t.dtype, t.shape) for n, t in ours.items()} == {n: (t.dtype, t.shape) for n, t in theirs.items()}
    ours, theirs = without_inputs(ours), without_inputs(theirs)
    assert [n for n in theirs if raw_bytes(ours[n]) != raw_bytes(theirs[n])] == []


def test_what_is_compared_is_nearly_everything() -> None:
    """Presets without a file of amd-quark's here: of a group size in between, MXFP8, and FP8 blocks of 128."""
    assert len(FIXTURE_NAMES) >= 60
    specs = {
        checkpoint.parse(json.loads((FIXTURES / n / "config.json").read_text())["quantization_config"]).default
        for n in FIXTURE_NAMES
    }
    never = {name for name, spec in PRESETS.items() if spec not in specs}
    assert never == {"int4_wo_64", "uint4_wo_64", "mxfp8", "fp8_block128", "ptpc_fp8"}  # the last: other base model


# --- calibration


CALIBRATED = [n for n in FIXTURE_NAMES if any("_proj.input_" in key for key in stored(n))]


@pytest.mark.parametrize("name", CALIBRATED)
def test_calibrated_scales_are_amd_quarks(name: str, float_of: Callable[[str], Float], adds_up_alike: bool) -> None:
    """Bit by bit, if this CPU adds up as the one of the fixtures; else those of q, k and v, before the first GEMM."""
    given = float_of(name)
    qi.quantize_(given.model, given.scheme, given.exclude, calibration=calibration())
    ours, theirs = given.model.state_dict(), stored(name)
    inputs = [
        n for n in theirs if "_proj.input_" in n and (adds_up_alike or ("self_attn.o_" not in n and "mlp" not in n))
    ]
    wrong = {n: (ours[n].item(), theirs[n].item()) for n in inputs if raw_bytes(ours[n]) != raw_bytes(theirs[n])}
    assert wrong == {}
    assert {ours[n].dtype for n in inputs} == {theirs[n].dtype for n in inputs}
