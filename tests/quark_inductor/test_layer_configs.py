"""Which layer of a checkpoint is quantized how: by type, by name, excluded, KV cache, tied; what nobody can read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import quark_inductor as qi
from quark_inductor.errors import CheckpointError, ConfigError
from quark_inductor.schemes.base import QuarkLinear
from quark_inductor.schemes.spec import PRESETS, LinearSpec, TensorSpec

FIXTURES = Path(__file__).parents[1] / "fixtures"
CopyOf = Callable[[str], Any]
ATTENTION = [f"model.layers.0.self_attn.{p}_proj" for p in "qkvo"]
MLP = [f"model.layers.0.mlp.{p}_proj" for p in ("gate", "up", "down")]
FP8_OUTPUT = TensorSpec(dtype="fp8_e4m3", qscheme="per_tensor")
IDS = torch.arange(12)[None] % 16


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(IDS).logits
    return result


def specs(model: nn.Module) -> dict[str, LinearSpec]:
    return {n: m.scheme.spec for n, m in model.named_modules() if isinstance(m, QuarkLinear)}


def by_name(attention: str, mlp: str) -> dict[str, LinearSpec]:
    return dict.fromkeys(ATTENTION, PRESETS[attention]) | dict.fromkeys(MLP, PRESETS[mlp])


def of(name: str) -> dict[str, Any]:
    """amd-quark's config of a Linear of this scheme."""
    config = json.loads((FIXTURES / name / "config.json").read_text())
    found: dict[str, Any] = config["quantization_config"]["global_quant_config"]
    return found


# --- by type, by name


def test_layers_by_type_where_no_pattern_names_them() -> None:
    """Not the global FP8."""
    assert specs(qi.load(FIXTURES / "mxfp4_layer_type")) == by_name("ptpc_fp8", "mxfp4")


def test_layers_by_name() -> None:
    assert specs(qi.load(FIXTURES / "mxfp4_attn_ptpc")) == by_name("ptpc_fp8", "mxfp4")


def test_a_type_that_is_null_is_not_quantized(copy_of: CopyOf) -> None:
    copy = copy_of("mxfp4_layer_type")
    base = load_file(FIXTURES / "base" / "model.safetensors")
    with copy.json() as config:
        config["quantization_config"]["layer_type_quant_config"] = {"Linear": None}
    with copy.tensors() as tensors:
        for name in ATTENTION:
            tensors[f"{name}.weight"] = base[f"{name}.weight"].bfloat16()
            del tensors[f"{name}.weight_scale"]
    model = qi.load(copy.path)
    assert specs(model) == dict.fromkeys(MLP, PRESETS["mxfp4"])
    assert all(type(model.get_submodule(n)) is nn.Linear for n in ATTENTION)


@pytest.mark.parametrize(
    ("patterns", "scheme"),
    [
        ([("*self_attn*", "ptpc_fp8"), ("*q_proj", "mxfp4_lmhead")], "ptpc_fp8"),
        ([("*q_proj", "ptpc_fp8"), ("*self_attn*", "ptpc_fp8"), ("*", "mxfp4_lmhead")], "ptpc_fp8"),
        ([("*_proj", "mxfp4_lmhead"), ("model.layers.0.self_attn.q_proj", "ptpc_fp8")], "mxfp4"),
    ],
)
def test_the_first_pattern_in_the_file_wins(patterns: list[tuple[str, str]], scheme: str, copy_of: CopyOf) -> None:
    """The order is that of the JSON text: not the longest pattern, nor the alphabet."""
    copy = copy_of("mxfp4_attn_ptpc" if scheme == "ptpc_fp8" else "mxfp4_lmhead")
    with copy.json() as config:
        config["quantization_config"]["layer_quant_config"] = {pattern: of(name) for pattern, name in patterns}
    assert specs(qi.load(copy.path))[ATTENTION[0]] == PRESETS[scheme]


def test_another_order_of_the_same_patterns_is_another_model(copy_of: CopyOf) -> None:
    copy = copy_of("mxfp4_attn_ptpc")
    with copy.json() as config:
        config["quantization_config"]["layer_quant_config"] = {"*q_proj": of("mxfp4"), "*self_attn*": of("ptpc_fp8")}
    with pytest.raises(CheckpointError, match=r"self_attn\.q_proj\.weight"):
        qi.load(copy.path)


# --- excluded


@pytest.mark.parametrize(
    "exclude",
    [
        ["lm_head", "*o_proj", "*down_proj"],
        ["lm_head", "re:.*(o|down)_proj$"],
        ["re:lm_head|.*\\.(o|down)_proj"],
        ["lm_hea?", "model.layers.[0-9].self_attn.o_proj", "re:model\\.layers\\.\\d+\\.mlp\\.d"],
    ],
)
def test_excluded_layers_are_float(exclude: list[str], copy_of: CopyOf) -> None:
    copy, expected = copy_of("int4_wa_64"), qi.load(FIXTURES / "int4_wa_64")
    with copy.json() as config:
        config["quantization_config"]["exclude"] = exclude
    model = qi.load(copy.path)
    assert specs(model) == specs(expected)
    assert sum(type(m) is nn.Linear for m in model.modules()) == 3
    assert torch.equal(logits(model), logits(expected))


@pytest.mark.parametrize(
    ("exclude", "named"),
    [
        (["lm_head", "*o_proj"], "mlp.down_proj"),
        (["lm_head", "o_proj", "*down_proj"], "self_attn.o_proj"),
        (["lm_head", "re:o_proj", "*down_proj"], "self_attn.o_proj"),  # not at the start of the name
        (["*o_proj", "*down_proj"], "lm_head"),
        (["lm_head", "*o_proj", "*down_proj", "*up_proj"], "mlp.up_proj"),
    ],
)
def test_what_is_not_as_the_config_says_is_refused(exclude: list[str], named: str, copy_of: CopyOf) -> None:
    copy = copy_of("int4_wo_32" if named == "lm_head" else "int4_wa_64")
    with copy.json() as config:
        config["quantization_config"]["exclude"] = exclude
    if named == "lm_head":
        with copy.json() as config:
            config["quantization_config"]["exclude"] = []
    with pytest.raises((CheckpointError, qi.errors.ShapeError), match=named.replace(".", r"\.")):
        qi.load(copy.path)


# --- the KV cache


@pytest.mark.parametrize(
    ("name", "outputs", "weights"),
    [
        ("fp8_kv_fp8", "kv", "qkvo"),
        ("fp8_attn_fp8", "qkv", "qkvo"),
        ("mxfp4_kv_fp8", "kv", "qkvo"),
        ("mxfp4_kv_excluded", "kv", "qo"),
    ],
)
def test_outputs_are_quantized_where_the_config_says(name: str, outputs: str, weights: str) -> None:
    model = qi.load(FIXTURES / name)
    found = specs(model)
    assert {n for n, s in found.items() if s.output is not None} == {ATTENTION["qkvo".index(p)] for p in outputs}
    assert {s.output for s in found.values()} == {None, FP8_OUTPUT}
    assert {n for n, s in found.items() if s.weight is not None} == {ATTENTION["qkvo".index(p)] for p in weights} | set(
        MLP
    )
    scales = {n for n in model.state_dict() if n.endswith("output_scale")}
    assert scales == {f"{ATTENTION['qkvo'.index(p)]}.output_scale" for p in outputs}


@pytest.mark.parametrize("name", ["fp8_kv_fp8", "fp8_attn_fp8", "mxfp4_kv_fp8", "mxfp4_kv_excluded"])
def test_a_missing_output_scale_is_refused(name: str, copy_of: CopyOf) -> None:
    copy, key = copy_of(name), f"{ATTENTION[1]}.output_scale"
    with copy.tensors() as tensors:
        del tensors[key]
    with pytest.raises(CheckpointError, match=rf"missing.*{key}"):
        qi.load(copy.path)


@pytest.mark.parametrize("name", ["fp8_kv_fp8", "mxfp4_kv_fp8", "mxfp4_kv_excluded"])
def test_an_output_scale_that_no_config_asks_for_is_refused(name: str, copy_of: CopyOf) -> None:
    copy = copy_of(name)
    with copy.json() as config:
        config["quantization_config"].update(kv_cache_quant_config={}, layer_quant_config={})
        config["quantization_config"]["export"]["kv_cache_group"] = []
    with pytest.raises(CheckpointError, match=r"k_proj\.output_scale"):
        qi.load(copy.path)


@pytest.mark.parametrize("name", ["fp8_kv_fp8", "fp8_attn_fp8", "mxfp4_kv_fp8", "mxfp4_kv_excluded"])
def test_quantized_outputs_come_back_from_a_save(name: str, tmp_path: Path) -> None:
    model = qi.load(FIXTURES / name)
    qi.save(model, tmp_path)
    loaded = qi.load(tmp_path)
    assert specs(loaded) == specs(model)
    ours, theirs = load_file(tmp_path / "model.safetensors"), load_file(FIXTURES / name / "model.safetensors")
    assert {n: (t.dtype, t.shape) for n, t in ours.items()} == {n: (t.dtype, t.shape) for n, t in theirs.items()}
    assert torch.equal(logits(loaded), logits(model))


# --- tied


def test_tied_embeddings_of_amd_quarks_are_one_tensor() -> None:
    model: Any = qi.load(FIXTURES / "mxfp4_tied")
    assert "lm_head.weight" not in load_file(FIXTURES / "mxfp4_tied" / "model.safetensors")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert specs(model) == dict.fromkeys([*ATTENTION, *MLP], PRESETS["mxfp4"])


def test_a_quantized_lm_head_is_read() -> None:
    model: Any = qi.load(FIXTURES / "mxfp4_lmhead")
    assert specs(model) == dict.fromkeys([*ATTENTION, *MLP, "lm_head"], PRESETS["mxfp4"])


# --- what nobody can read


def test_amdfp4_under_a_global_scale_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError) as caught:
        qi.load(FIXTURES / "amdfp4_global16")
    for text in ("model.layers.0.self_attn.q_proj", "fp8_e5m3", "integers modulo 256, which nobody can read"):
        assert text in str(caught.value)


def test_uint4_from_file_to_file_is_refused_with_the_reason() -> None:
    with pytest.raises(CheckpointError) as caught:
        qi.load(FIXTURES / "f2f_uint4_wo_32")
    for text in ("weight_zero_point", "direct_quantize_checkpoint", "another order", "export_safetensors"):
        assert text in str(caught.value)
