"""``inspect``: what is in a checkpoint, from its headers alone, and all that loading it would refuse."""

import json
import re
import struct
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from safetensors.torch import load_file

import quark_inductor as qi
from quark_inductor import files
from quark_inductor.errors import CheckpointError, ConfigError, QuarkInductorError
from quark_inductor.inspection import PHASES, Group, Inspection, collapsed, inspect

FIXTURES = Path(__file__).parents[1] / "fixtures"
SCHEMA = json.loads((resources.files("quark_inductor") / "schemas" / "inspection.json").read_text(encoding="utf-8"))
CopyOf = Callable[[str], Any]


@pytest.fixture(autouse=True)
def no_tensor_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file that is opened nothing is given but names, shapes and dtypes."""
    safe_open = files.safe_open

    class Headers:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.file = safe_open(*args, **kwargs)

        def __enter__(self) -> "Headers":
            self.opened = self.file.__enter__()
            return self

        def __exit__(self, *args: Any) -> None:
            self.file.__exit__(*args)

        def keys(self) -> Any:
            return self.opened.keys()

        def get_slice(self, name: str) -> Any:
            view = self.opened.get_slice(name)
            return type("View", (), {"get_shape": view.get_shape, "get_dtype": view.get_dtype})

    monkeypatch.setattr(files, "safe_open", Headers)


def validated(found: Inspection) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(found.to_json())
    jsonschema.Draft202012Validator(SCHEMA).validate(content)
    return content


def by_name(found: Inspection) -> dict[str, Group]:
    groups = {group.name: group for group in found.groups}
    assert len(groups) == len(found.groups)
    return groups


def test_what_a_checkpoint_holds() -> None:
    found = inspect(FIXTURES / "mxfp4")
    tensors = load_file(FIXTURES / "mxfp4" / "model.safetensors")
    assert (found.architecture, found.layers, found.dtype, found.quark) == ("LlamaForCausalLM", 2, "bfloat16", "0.13")
    assert (found.tensors, found.files, found.problems) == (len(tensors), 1, ())
    assert found.total == sum(t.nbytes for t in tensors.values())
    groups = by_name(found)
    attention = {f"model.layers.{{0-1}}.self_attn.{p}_proj": p for p in "qkvo"}
    mlp = {f"model.layers.{{0-1}}.mlp.{p}_proj": p for p in ("gate", "up", "down")}
    assert groups.keys() == {*attention, *mlp, "lm_head"}
    for name, group in groups.items():
        first = group.names[0]
        assert (len(group.names), group.scheme) == ((1, "float") if name == "lm_head" else (2, "w4a4_mxfp4"))
        assert group.codes == tensors[f"{first}.weight"].nbytes
        assert group.scales == (tensors[f"{first}.weight_scale"].nbytes if group.quantized else 0)
        assert group.bias is (name in attention)
        assert group.other == (tensors[f"{first}.bias"].nbytes if group.bias else 0)
    rest = {n: t for n, t in tensors.items() if "_proj" not in n and "lm_head" not in n}
    assert found.rest == sum(t.nbytes for t in rest.values())
    up, head = groups["model.layers.{0-1}.mlp.up_proj"], groups["lm_head"]
    assert (up.shape, head.shape) == ((256, 128), (64, 128))
    assert up.runs["cpu"].keys() == PHASES.keys()
    assert {(r.provider, r.op, r.fused) for r in up.runs["cpu"].values()} == {("cpp", "prologue_gemm", True)}
    assert {r.provider for r in head.runs["cpu"].values()} == {"inductor"}


def test_the_text_and_the_json() -> None:
    found = inspect(FIXTURES / "mxfp4")
    text = str(found)
    assert len(text.splitlines()) == 4 + 2 + len(found.groups)
    line = next(line for line in text.splitlines() if line.startswith("model.layers.{0-1}.mlp.up_proj"))
    assert re.sub(" +", " ", line) == "model.layers.{0-1}.mlp.up_proj 2 w4a4_mxfp4 256 x 128 17.4 kB cpp prologue_gemm"
    every = found.text(all=True)
    assert "model.layers.1.mlp.up_proj" in every
    assert "{" not in every
    content = validated(found)
    assert content["groups"][0]["name"] == found.groups[0].name
    assert not jsonschema.Draft202012Validator(SCHEMA).is_valid({**content, "total": -1})


def test_experts() -> None:
    found = inspect(FIXTURES / "moe_qwen3_mxfp4")
    validated(found)
    groups = by_name(found)
    gate = groups["model.layers.0.mlp.experts.{0-5}.gate_proj"]
    assert (gate.experts, gate.projection, gate.shape, len(gate.names)) == (True, "gate_up_proj", (64, 128), 6)
    assert groups["model.layers.0.mlp.experts.{0-5}.down_proj"].projection == "down_proj"
    assert {r.provider for r in gate.runs["cpu"].values()} == {"cpp"}
    assert found.problems == ()


def test_experts_that_stay_float() -> None:
    found = inspect(FIXTURES / "mixtral_mxfp4")
    validated(found)
    down = by_name(found)["model.layers.{0-1}.mlp.experts.down_proj"]
    tensors = load_file(FIXTURES / "mixtral_mxfp4" / "model.safetensors")
    stored = next(t for n, t in tensors.items() if n.endswith("experts.down_proj"))
    assert (down.scheme, down.experts, down.codes) == ("float", True, stored.nbytes)
    assert found.total == sum(t.nbytes for t in tensors.values())


@pytest.mark.parametrize(("name", "scheme"), [("mxfp4_kv_fp8", "w4a4_mxfp4"), ("mxfp4_kv_excluded", "unquantized")])
def test_a_quantized_kv_cache(name: str, scheme: str) -> None:
    found = inspect(FIXTURES / name)
    validated(found)
    cached = [f"model.layers.0.self_attn.{p}_proj" for p in "kv"]
    assert found.quantized_outputs == dict.fromkeys(cached, "fp8_e4m3 per_tensor static")
    assert {by_name(found)[name].scheme for name in cached} == {scheme}
    assert "2 quantized outputs (fp8_e4m3 per_tensor static): model.layers.0.self_attn.k_proj, " in str(found)


def huge(folder: Path) -> int:
    """A checkpoint of 70 billion weights that takes no room, a header and a hole; returns the bytes of its tensors."""
    h, i, layers, vocabulary = 8192, 28672, 80, 128256
    config = json.loads((FIXTURES / "mxfp4" / "config.json").read_text(encoding="utf-8"))
    sizes = {"hidden_size": h, "intermediate_size": i, "num_hidden_layers": layers, "vocab_size": vocabulary}
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "attention_bias": False}
    (folder / "config.json").write_text(json.dumps({**config, **sizes, **heads}), encoding="utf-8")
    tensors: dict[str, tuple[str, list[int]]] = {}
    for layer in range(layers):
        linears = {f"self_attn.{p}_proj": (h if p in "qo" else 1024, h) for p in "qkvo"}
        linears |= {"mlp.gate_proj": (i, h), "mlp.up_proj": (i, h), "mlp.down_proj": (h, i)}
        for name, (n, k) in linears.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = "U8", [n, k // 2]
            tensors[f"model.layers.{layer}.{name}.weight_scale"] = "U8", [n, k // 32]
        for norm in ("input", "post_attention"):
            tensors[f"model.layers.{layer}.{norm}_layernorm.weight"] = "BF16", [h]
    tensors |= {name: ("BF16", [vocabulary, h]) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    tensors["model.norm.weight"] = "BF16", [h]
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + (2 if dtype == "BF16" else 1) * torch.Size(shape).numel()
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return end


def test_a_model_larger_than_memory(tmp_path: Path) -> None:
    total = huge(tmp_path)
    if (tmp_path / "model.safetensors").stat().st_blocks * 512 > 1e9:
        pytest.skip("this file system has no files with holes")
    found = inspect(tmp_path)
    assert total > 35e9
    assert (found.total, found.problems) == (total, ())
    assert by_name(found)["model.layers.{0-79}.mlp.down_proj"].runs["cpu"]["decode"].provider == "cpp"


# --- problems


def missing(copy: Any) -> None:
    with copy.tensors() as tensors:
        del tensors["model.layers.0.mlp.up_proj.weight_scale"], tensors["model.norm.weight"]


def unexpected(copy: Any) -> None:
    with copy.tensors() as tensors:
        tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2)


def misshapen(copy: Any) -> None:
    with copy.tensors() as tensors:
        for name in ("q", "k"):
            weight = tensors[f"model.layers.1.self_attn.{name}_proj.weight"]
            tensors[f"model.layers.1.self_attn.{name}_proj.weight"] = weight[:-1].clone()


def of_another_dtype(copy: Any) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    with copy.tensors() as tensors:
        tensors[name] = tensors[name].int()


def unknown_scheme(copy: Any) -> None:
    with copy.json() as config:
        config["quantization_config"]["global_quant_config"]["weight"]["scale_format"] = "float32"
        config["quantization_config"]["global_quant_config"]["weight"]["scale_calculation_mode"] = None


def unknown_key(copy: Any) -> None:
    with copy.json() as config:
        config["quantization_config"]["of_the_future"] = 1


def unknown_model(copy: Any) -> None:
    with copy.json() as config:
        config["model_type"] = "nobody"


def odd_sizes(copy: Any) -> None:
    with copy.json() as config:
        config["intermediate_size"] = 240


DAMAGES = {
    missing: 1,
    unexpected: 1,
    misshapen: 2,
    of_another_dtype: 1,
    unknown_scheme: 14,
    unknown_key: 1,
    unknown_model: 1,
    odd_sizes: 2,
}


def loads_error(path: Path) -> str:
    with pytest.raises(QuarkInductorError) as caught:
        qi.load(path)
    return str(caught.value)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_what_load_refuses_is_a_problem(damage: Callable[[Any], None], copy_of: CopyOf) -> None:
    copy = copy_of("mxfp4")
    damage(copy)
    found = inspect(copy.path)
    validated(found)
    assert found.problems[0] == loads_error(copy.path)
    assert len(found.problems) == DAMAGES[damage]
    assert found.total == sum(t.nbytes for t in load_file(copy / "model.safetensors").values())
    assert f"qi.load would refuse it: {len(found.problems)} problem" in str(found)


def test_several_problems_at_once(copy_of: CopyOf) -> None:
    copy = copy_of("mxfp4")
    for damage in (missing, unexpected, misshapen):
        damage(copy)
    said = "\n".join(inspect(copy.path).problems)
    for part in ("model.layers.7.mlp.up_proj.weight", "2 tensors are missing", "q_proj.weight has shape [127, 64]"):
        assert part in said


@pytest.mark.parametrize("name", ["f2f_fp8", "amdfp4_global16", "f2f_uint4_wo_32"])
def test_real_checkpoints_that_load_refuses(name: str) -> None:
    found = inspect(FIXTURES / name)
    validated(found)
    assert found.problems[0] == loads_error(FIXTURES / name)
    assert len(found.problems) >= 7
    assert str(found).count("more like it; --all shows them)") == 1
    assert "more like it" not in found.text(all=True)


def test_a_linear_without_a_scheme_is_refused_by_name(copy_of: CopyOf) -> None:
    copy = copy_of("mxfp4")
    odd_sizes(copy)
    groups = by_name(inspect(copy.path))
    assert groups["model.layers.{0-1}.mlp.down_proj"].scheme == "refused"
    assert groups["model.layers.{0-1}.mlp.down_proj"].runs == {}
    assert groups["model.layers.{0-1}.self_attn.q_proj"].scheme == "w4a4_mxfp4"


def test_what_is_no_checkpoint_is_an_error(tmp_path: Path, copy_of: CopyOf) -> None:
    with pytest.raises(CheckpointError, match="is not a directory"):
        inspect(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"cannot read .*config\.json"):
        inspect(tmp_path)
    with pytest.raises(ConfigError, match="the checkpoint is not quantized"):
        inspect(FIXTURES / "base")
    copy = copy_of("mxfp4")
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="it is not a safetensors checkpoint"):
        inspect(copy.path)


@pytest.mark.parametrize(
    ("names", "one"),
    [
        (["lm_head"], "lm_head"),
        (["a.0.b", "a.1.b", "a.2.b", "a.5.b"], "a.{0-2,5}.b"),
        (["a.0.e.0.b", "a.0.e.1.b", "a.2.e.0.b", "a.2.e.1.b"], "a.{0,2}.e.{0-1}.b"),
        (["a.9.b", "a.10.b"], "a.{9-10}.b"),
    ],
)
def test_many_names_in_one(names: list[str], one: str) -> None:
    assert collapsed(names) == one
