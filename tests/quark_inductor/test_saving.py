"""``save``: what was loaded or quantized comes back from its files bit by bit, in the form amd-quark gives them."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import quark_inductor as qi
from quark_inductor.errors import CheckpointError, ConfigError
from quark_inductor.schemes.base import QuarkLinear
from quark_inductor.schemes.spec import PRESETS

FIXTURES = Path(__file__).parents[1] / "fixtures"
CHECKPOINTS = ["mxfp4", "fp8", "ptpc_fp8", "mxfp4_fp32", "fp8_fp32", "ptpc_fp8_fp32"]
MIXED = {"*self_attn*": "ptpc_fp8", "*.0.mlp*": "mxfp4", "*up_proj": "fp8_dynamic"}
Llama = Callable[..., Any]


def raw_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def contents(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {name: (t.dtype, tuple(t.shape), raw_bytes(t)) for name, t in tensors.items()}


def specs(model: nn.Module) -> dict[str, Any]:
    return {n: m.scheme.spec for n, m in model.named_modules() if isinstance(m, QuarkLinear)}


def check_round_trip(model: Any, ids: Tensor, path: Path) -> Any:
    """Save and load, and compare everything."""
    qi.save(model, path)
    loaded: Any = qi.load(path)
    assert specs(loaded) == specs(model) != {}
    assert contents(loaded.state_dict()) == contents(model.state_dict())
    with torch.no_grad():
        expected, logits = model(ids).logits, loaded(ids).logits
    assert logits.dtype == expected.dtype
    assert torch.equal(logits, expected)
    return loaded


# --- back again


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_loaded_checkpoint_is_saved_as_amd_quark_wrote_it(name: str, tmp_path: Path) -> None:
    """The same tensors byte by byte, and the same JSON without an exception."""
    qi.save(qi.load(FIXTURES / name), tmp_path)
    assert contents(load_file(tmp_path / "model.safetensors")) == contents(
        load_file(FIXTURES / name / "model.safetensors")
    )
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    ours, theirs = (json.loads((path / "config.json").read_text()) for path in (tmp_path, FIXTURES / name))
    assert ours["quantization_config"] == theirs["quantization_config"]
    if theirs["transformers_version"] == transformers.__version__:  # another release may write other keys
        assert ours == theirs
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]
    ours, theirs = (json.loads((path / "generation_config.json").read_text()) for path in (tmp_path, FIXTURES / name))
    assert ours | {"transformers_version": ""} == theirs | {"transformers_version": ""}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scheme", ["mxfp4", "ptpc_fp8", "fp8_dynamic", MIXED], ids=str)
def test_a_quantized_model_comes_back(
    scheme: Any, dtype: torch.dtype, llama: Llama, ids: Tensor, tmp_path: Path
) -> None:
    check_round_trip(qi.quantize_(llama(dtype), scheme), ids, tmp_path / "new" / "directory")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scheme", PRESETS)
def test_every_scheme_comes_back(scheme: str, dtype: torch.dtype, llama: Llama, ids: Tensor, tmp_path: Path) -> None:
    """Calibrated where it must be."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 80, "num_hidden_layers": 1, "head_dim": 64}
    model = qi.quantize_(llama(dtype, **sizes, num_attention_heads=4, num_key_value_heads=2), scheme, calibration=[ids])
    loaded = check_round_trip(model, ids, tmp_path)
    assert set(specs(loaded).values()) == {PRESETS[scheme]}
    assert len(specs(loaded)) == 7


def test_a_mixed_model_has_what_it_was_given(llama: Llama, ids: Tensor, tmp_path: Path) -> None:
    loaded = check_round_trip(qi.quantize_(llama(), MIXED), ids, tmp_path)
    assert len(set(specs(loaded).values())) == 3
    plain = {n for n, m in loaded.named_modules() if type(m) is nn.Linear}
    assert plain == {"lm_head", "model.layers.1.mlp.gate_proj", "model.layers.1.mlp.down_proj"}
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert set(written["exclude"]) == plain
    assert set(written["layer_quant_config"]) == {n for n in specs(loaded) if "self_attn" not in n}  # 8 of 12 are


def test_a_quantized_lm_head_comes_back(llama: Llama, ids: Tensor, tmp_path: Path) -> None:
    loaded = check_round_trip(qi.quantize_(llama(), "mxfp4", exclude=[]), ids, tmp_path)
    assert "lm_head" in specs(loaded)


def test_a_path_may_be_a_string(llama: Llama, ids: Tensor, tmp_path: Path) -> None:
    qi.save(qi.quantize_(llama(), "mxfp4"), str(tmp_path / "x"))
    assert (tmp_path / "x" / "config.json").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_model_that_was_cast_at_load_comes_back(
    dtype: torch.dtype, reference: Callable[[str], dict[str, Tensor]], tmp_path: Path
) -> None:
    loaded = check_round_trip(qi.load(FIXTURES / "fp8", dtype=dtype), reference("fp8")["ids"], tmp_path)
    assert loaded.dtype == dtype


@pytest.mark.parametrize("given", [None, torch.float32])
@pytest.mark.parametrize("cast", [None, torch.bfloat16])
def test_the_dtype_is_that_of_the_tensors_whatever_the_config_says(
    given: torch.dtype | None, cast: torch.dtype | None, llama: Llama, ids: Tensor, tmp_path: Path
) -> None:
    """A config made by hand says none, and a cast does not change it."""
    model = llama(torch.float32)
    model.config.dtype = given
    for parameter in model.parameters():  # not model.to(): no file holds the rotary frequencies, which it would round
        parameter.data = parameter.data.to(cast or parameter.dtype)
    loaded = check_round_trip(qi.quantize_(model, "mxfp4"), ids, tmp_path)
    assert loaded.dtype == (cast or torch.float32)


def test_a_model_in_several_files_comes_back(
    llama: Llama, ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_shards = functools.partial(huggingface_hub.save_torch_state_dict, max_shard_size=30_000)
    monkeypatch.setattr(huggingface_hub, "save_torch_state_dict", in_shards)
    check_round_trip(qi.quantize_(llama(), "ptpc_fp8"), ids, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2


def test_tied_embeddings_are_stored_once(llama: Llama, ids: Tensor, tmp_path: Path) -> None:
    check_round_trip(qi.quantize_(llama(tie_word_embeddings=True), "ptpc_fp8"), ids, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize("scheme", ["mxfp4", "ptpc_fp8", "fp8_dynamic"])
def test_a_quantized_lm_head_is_no_longer_tied(scheme: str, llama: Llama, ids: Tensor, tmp_path: Path) -> None:
    model = qi.quantize_(llama(tie_word_embeddings=True), scheme, exclude=[])
    check_round_trip(model, ids, tmp_path)


def test_a_model_is_not_changed_by_saving_it(llama: Llama, ids: Tensor, tmp_path: Path) -> None:
    model = qi.quantize_(llama(), MIXED)
    before, config = contents(model.state_dict()), model.config.to_dict()
    qi.save(model, tmp_path)
    assert contents(model.state_dict()) == before
    assert model.config.to_dict() == config


# --- the form


@pytest.mark.parametrize(
    ("scheme", "fixture"),
    [("mxfp4", "mxfp4"), ("ptpc_fp8", "ptpc_fp8"), ("fp8_dynamic", "fp8")],
)
def test_the_config_is_amd_quarks(scheme: str, fixture: str, llama: Llama, tmp_path: Path) -> None:
    qi.save(qi.quantize_(llama(), scheme), tmp_path)
    ours, theirs = (json.loads((path / "config.json").read_text()) for path in (tmp_path, FIXTURES / fixture))
    expected = theirs["quantization_config"]
    if scheme == "fp8_dynamic":  # amd-quark has no file of this one; it is fp8 with one value changed
        expected["global_quant_config"]["input_tensors"]["is_dynamic"] = True
    assert ours["quantization_config"] == expected
    assert ours["architectures"] == theirs["architectures"] == ["LlamaForCausalLM"]
    assert ours["dtype"] == "bfloat16"
    names = {name.split(".", 3)[-1] for name in load_file(tmp_path / "model.safetensors") if ".layers." in name}
    stored = load_file(FIXTURES / fixture / "model.safetensors")
    assert names == {name.split(".", 3)[-1] for name in stored if ".layers." in name and "input_scale" not in name}


# --- what is refused


def test_a_model_without_a_quantized_linear_is_refused(llama: Llama, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no quantized Linear.*save_pretrained"):
        qi.save(llama(), tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("taken", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_a_directory_that_holds_a_checkpoint_is_refused(taken: str, llama: Llama, tmp_path: Path) -> None:
    (tmp_path / taken).write_text("precious")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError) as caught:
        qi.save(qi.quantize_(llama(), "mxfp4"), tmp_path)
    assert f"{tmp_path} already holds {taken}" in str(caught.value)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {taken: "precious", "tokenizer.json": "{}"}


def test_a_directory_with_other_files_is_not(llama: Llama, ids: Tensor, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    check_round_trip(qi.quantize_(llama(), "mxfp4"), ids, tmp_path)
    assert (tmp_path / "tokenizer.json").read_text() == "{}"


def test_the_same_model_is_not_saved_twice(llama: Llama, tmp_path: Path) -> None:
    model = qi.quantize_(llama(), "mxfp4")
    qi.save(model, tmp_path)
    with pytest.raises(CheckpointError, match="already holds"):
        qi.save(model, tmp_path)
