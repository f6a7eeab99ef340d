"""Experts of transformers' models: loaded, quantized, saved, and every tensor of theirs accounted for."""

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import quark_inductor as qi
from quark_inductor import checkpoint
from quark_inductor.errors import CheckpointError, ConfigError, ShapeError
from quark_inductor.schemes.base import QuarkLinear
from quark_inductor.schemes.experts import QuarkExperts
from quark_inductor.schemes.spec import PRESETS

FIXTURES = Path(__file__).parents[1] / "fixtures"
NAMES = sorted(path.name for path in FIXTURES.glob("moe_*"))
IDS = torch.arange(12)[None] % 16
EXPERTS = "model.layers.1.mlp.experts"  # of those below, DeepSeek-V3's first layer having none
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
MODELS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 64, "head_dim": 16},
    "GptOss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 3,
        "head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "DeepseekV3": {
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 64,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        "qk_nope_head_dim": 16,
    },
}
CopyOf = Callable[[str], Any]


def float_model(kind: str, dtype: torch.dtype = torch.bfloat16, **sizes: Any) -> Any:
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **MODELS[kind], **sizes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(5)
    for name, p in model.named_parameters():
        p.data = (torch.randn(p.shape, generator=generator) * 0.12 + ("norm" in name)).to(dtype)
    for module in model.modules():  # as transformers loads it
        if hasattr(module, "e_score_correction_bias"):
            module.e_score_correction_bias = torch.linspace(0.9, 1.1, 8)
    return model


def raw_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def contents(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {name: (t.dtype, tuple(t.shape), raw_bytes(t)) for name, t in tensors.items()}


def state(model: nn.Module) -> dict[str, Any]:
    return contents(dict(model.state_dict()))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    result: Tensor = model(IDS).logits
    return result


def modules_of_experts(model: nn.Module) -> dict[str, QuarkExperts]:
    return {name: m for name, m in model.named_modules() if isinstance(m, QuarkExperts)}


def quantized(model: nn.Module) -> set[str]:
    return {name for name, m in model.named_modules() if isinstance(m, QuarkLinear)}


# --- what amd-quark exported


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_of_the_file_is_in_the_model(name: str) -> None:
    model: Any = qi.load(FIXTURES / name)
    assert state(model) == contents(load_file(FIXTURES / name / "model.safetensors"))
    found = modules_of_experts(model)
    layers = 2 if "gpt_oss" in name else 1
    assert list(found) == [f"model.layers.{layer}.mlp.experts" for layer in range(layers)]
    for module in found.values():
        assert module.count == (6 if "qwen3" in name else 4)
        assert (module.grouped, module.refusal) == (("gate_up_proj", "down_proj"), "")
        assert module.sums is (torch.float32 if "gpt_oss" in name else None)
        router: Any = model.get_submodule(f"model.layers.0.mlp.{'router' if 'gpt_oss' in name else 'gate'}")
        assert router.weight.dtype == torch.bfloat16
        assert not quantized(router)
        # The model's own module is there for its gate, and holds no number.
        assert not list(module.original.parameters())
    assert not any(t.requires_grad or t.is_meta for t in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("name", NAMES)
def test_saved_as_amd_quark_wrote_it(name: str, tmp_path: Path) -> None:
    qi.save(qi.load(FIXTURES / name), tmp_path)
    files = [load_file(path / "model.safetensors") for path in (tmp_path, FIXTURES / name)]
    assert contents(files[0]) == contents(files[1])
    ours, theirs = (
        checkpoint.parse(json.loads((path / "config.json").read_text())["quantization_config"])
        for path in (tmp_path, FIXTURES / name)
    )
    # amd-quark made a Linear of a router, which is none here, and says that it excluded it.
    assert set(ours.exclude) == {n for n in theirs.exclude if not n.endswith((".gate", ".router"))}
    assert dataclasses.replace(ours, exclude=()) == dataclasses.replace(theirs, exclude=())


DAMAGE: dict[str, tuple[str, Callable[[Tensor], Tensor | None], str]] = {
    "missing": ("2.up_proj.weight_scale", lambda t: None, "1 tensors are missing"),
    "missing codes": ("3.down_proj.weight", lambda t: None, "1 tensors are missing"),
    "shape": ("1.down_proj.weight", lambda t: t[:, :16].clone(), "has shape [128, 16], expected [128, 32]"),
    "rows": ("0.gate_proj.weight", lambda t: t[:32].clone(), "has shape [32, 64], expected [64, 64]"),
    "dtype": ("2.gate_proj.weight_scale", lambda t: t.bfloat16(), "has dtype bfloat16, expected uint8"),
    "nan": ("1.up_proj.weight_scale", lambda t: t.fill_(255), "weight_scale holds a NaN or an infinity"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_tensor_is_named(what: str, copy_of: CopyOf) -> None:
    part, change, message = DAMAGE[what]
    name, copied = f"model.layers.0.mlp.experts.{part}", copy_of("moe_mixtral_mxfp4")
    with copied.tensors() as tensors:
        changed = change(tensors.pop(name))
        if changed is not None:
            tensors[name] = changed
    with pytest.raises(CheckpointError) as caught:
        qi.load(copied.path)
    assert name.rpartition(".")[0] in str(caught.value)
    assert what == "nan" or name in str(caught.value)
    assert message in str(caught.value)


def test_an_expert_too_many_or_too_few_is_named(copy_of: CopyOf) -> None:
    copied, experts = copy_of("moe_qwen3_mxfp4"), "model.layers.0.mlp.experts"
    with copied.tensors() as tensors:
        of_last = {n: t for n, t in tensors.items() if n.startswith(f"{experts}.5.")}
        tensors.update({n.replace(".5.", ".6."): t.clone() for n, t in of_last.items()})
    assert len(of_last) == 6
    with pytest.raises(CheckpointError) as caught:
        qi.load(copied.path)
    assert str(caught.value) == (
        f"6 tensors of the checkpoint have no place in the model, the first is {experts}.6.down_proj.weight; "
        "pass strict=False to leave them out"
    )
    assert state(qi.load(copied.path, strict=False)) == state(qi.load(FIXTURES / "moe_qwen3_mxfp4"))
    with copied.tensors() as tensors:
        for n in [n for n in tensors if n.startswith((f"{experts}.5.", f"{experts}.6."))]:
            del tensors[n]
    with pytest.raises(CheckpointError, match=rf"6 tensors are missing.*{experts}\.5\.down_proj\.weight"):
        qi.load(copied.path)


def test_a_layer_without_experts_is_named(copy_of: CopyOf) -> None:
    copied = copy_of("moe_gpt_oss_mxfp4")
    with copied.tensors() as tensors:
        for n in [n for n in tensors if n.startswith("model.layers.1.mlp.experts.")]:
            del tensors[n]
    with pytest.raises(CheckpointError, match=r"missing from the checkpoint.*model\.layers\.1\.mlp\.experts"):
        qi.load(copied.path)


def test_another_projection_is_named(copy_of: CopyOf) -> None:
    """Gate and up as one Linear, as GPT-OSS has them, are not Mixtral's."""
    copied = copy_of("moe_mixtral_mxfp4")
    with copied.tensors() as tensors:
        for n in [n for n in tensors if ".experts.1.gate_proj." in n]:
            tensors[n.replace("gate_proj", "gate_up_proj")] = tensors.pop(n)
    with pytest.raises(CheckpointError, match=r"no place.*experts\.1\.gate_up_proj\.weight"):
        qi.load(copied.path)


OLD = {".mlp.": ".block_sparse_moe.", ".gate_proj.": ".w1.", ".down_proj.": ".w2.", ".up_proj.": ".w3."}


@pytest.mark.parametrize("name", ["moe_mixtral_mxfp4", "moe_mixtral_fp8", "moe_mixtral_int8"])
def test_mixtrals_old_names(name: str, copy_of: CopyOf) -> None:
    """Those of transformers before 5."""
    copied = copy_of(name)
    with copied.tensors() as tensors:
        for n in [n for n in tensors if ".mlp." in n]:
            old = n
            for new, former in OLD.items():
                old = old.replace(new, former)
            tensors[old] = tensors.pop(n)
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight_scale" in tensors
    assert "model.layers.0.block_sparse_moe.gate.weight" in tensors
    assert not any(".mlp." in n for n in tensors)
    assert state(qi.load(copied.path)) == state(qi.load(FIXTURES / name))
    with copied.tensors() as tensors:
        del tensors["model.layers.0.block_sparse_moe.experts.3.w2.weight_scale"]
    with pytest.raises(CheckpointError, match=r"mlp\.experts\.3\.down_proj\.weight_scale"):
        qi.load(copied.path)


# --- what is quantized, and what is not


@pytest.mark.parametrize("scheme", ["mxfp4", "ptpc_fp8", "int4_wo_32"])
@pytest.mark.parametrize("kind", MODELS)
def test_an_experts_linear_is_quantized_like_any_other(kind: str, scheme: str) -> None:
    """Its rows cut out of the parameter here, transposed back where they are; bias and all."""
    model = float_model(kind)
    own = copy.deepcopy(model.get_submodule(EXPERTS))
    linears, i = nn.ModuleDict(), 64
    for e in range(own.num_experts):
        both, down = own.gate_up_proj.data[e], own.down_proj.data[e]
        if kind == "GptOss":
            parts = {
                "gate_up_proj": (both.t(), own.gate_up_proj_bias.data[e]),
                "down_proj": (down.t(), own.down_proj_bias.data[e]),
            }
        else:
            parts = {"gate_proj": (both[:i], None), "up_proj": (both[i:], None), "down_proj": (down, None)}
        linears[str(e)] = nn.ModuleDict()
        for name, (weight, bias) in parts.items():
            n, k = weight.shape
            linear = nn.Linear(k, n, bias=bias is not None, dtype=weight.dtype)
            linear.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
            linears[str(e)][name] = linear
    qi.quantize_(model, scheme)
    assert state(model.get_submodule(EXPERTS)) == state(qi.quantize_(linears, scheme))
    assert modules_of_experts(model)[EXPERTS].grouped == ("gate_up_proj", "down_proj")
    assert not any(p.requires_grad for p in model.parameters())


def per_expert(tensors: dict[str, Tensor], transposed: bool) -> dict[str, Tensor]:
    """Parameters of all experts as Linears of each, as amd-quark names them."""
    found = {}
    for name, t in tensors.items():
        path, _, own = name.rpartition(".")
        if not path.endswith(".experts"):
            found[name] = t
            continue
        kind, linear = ("bias", own.removesuffix("_bias")) if own.endswith("_bias") else ("weight", own)
        for e, part in enumerate(t):
            rows = part.t() if transposed and kind == "weight" else part
            if linear == "gate_up_proj" and not transposed:
                parts = dict(zip(("gate_proj", "up_proj"), rows.chunk(2), strict=True))
            else:
                parts = {linear: rows}
            for projection, p in parts.items():
                found[f"{path}.{e}.{projection}.{kind}"] = p.clone(memory_format=torch.contiguous_format)
    return found


@pytest.mark.parametrize("kind", MODELS)
def test_a_float_checkpoint_is_quantized_in_every_form(kind: str, tmp_path: Path) -> None:
    """As transformers saves it, as the model holds it, and with a Linear for each expert's projection."""
    model = float_model(kind)
    model.save_pretrained(tmp_path / "own")
    held = {n: t.clone() for n, t in model.state_dict().items()}
    forms = {"parameters": held, "linears": per_expert(held, kind == "GptOss")}
    for form, tensors in forms.items():
        (tmp_path / form).mkdir()
        save_file(tensors, tmp_path / form / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / form / "config.json").write_text((tmp_path / "own" / "config.json").read_text())
    # Whatever transformers writes, both are read.
    saved = load_file(tmp_path / "own" / "model.safetensors")
    assert (f"{EXPERTS}.gate_up_proj" in saved) == (kind == "GptOss")
    assert any("block_sparse_moe.experts.0.w1" in n for n in saved) == (kind == "Mixtral")
    qi.quantize_(model, "mxfp4")
    expected = logits(model)
    for form in ("own", *forms):
        loaded = qi.load(tmp_path / form, scheme="mxfp4")
        assert state(loaded) == state(model), form
        assert modules_of_experts(loaded).keys() == modules_of_experts(model).keys() != set()
        assert torch.equal(logits(loaded), expected), form


def test_routers_attention_and_shared_experts_may_be_excluded(tmp_path: Path) -> None:
    model = float_model("DeepseekV3")
    exclude = ["lm_head", "*self_attn*", "*.gate", "*shared_experts*"]
    model.save_pretrained(tmp_path / "float")
    qi.quantize_(model, "mxfp4", exclude=exclude)
    dense = {f"model.layers.0.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
    parts = {f"{EXPERTS}.{e}.{name}" for e in range(8) for name in ("gate_proj", "up_proj", "down_proj")}
    assert quantized(model) == dense | parts
    shared: Any = model.get_submodule("model.layers.1.mlp.shared_experts")
    assert {type(m) for m in shared.children()} - {type(shared.act_fn)} == {nn.Linear}
    assert type(model.get_submodule("model.layers.1.mlp.gate")).__name__ == "DeepseekV3TopkRouter"
    assert state(qi.load(tmp_path / "float", scheme="mxfp4", exclude=exclude)) == state(model)
    qi.save(model, tmp_path / "quantized")
    loaded = qi.load(tmp_path / "quantized")
    assert quantized(loaded) == quantized(model)
    assert state(loaded) == state(model)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_routers_bias_is_float32(stored: torch.dtype, tmp_path: Path) -> None:
    """DeepSeek-V3's is so in its checkpoints, and transformers keeps it so."""
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    float_model("DeepseekV3").save_pretrained(tmp_path / "float")
    tensors = {n: t.clone() for n, t in load_file(tmp_path / "float" / "model.safetensors").items()}
    tensors[name] = (torch.randn(8, generator=torch.Generator().manual_seed(0)) * 1e-3 + 1).to(stored)
    save_file(tensors, tmp_path / "float" / "model.safetensors", metadata={"format": "pt"})
    own = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype=torch.bfloat16).eval()
    assert own.state_dict()[name].dtype == torch.float32
    quantized = qi.quantize_(own, "mxfp4")
    loaded = qi.load(tmp_path / "float", scheme="mxfp4")
    assert state(loaded) == state(quantized)
    assert torch.equal(loaded.state_dict()[name], tensors[name].float())
    qi.save(loaded, tmp_path / "quantized")
    again = qi.load(tmp_path / "quantized")
    assert state(again) == state(loaded)
    assert torch.equal(logits(again), logits(quantized))


@pytest.mark.parametrize("kind", MODELS)
def test_experts_that_are_excluded_as_a_whole(kind: str, tmp_path: Path) -> None:
    """Are the model's own module again, also where the file has Linears, and give the numbers they gave."""
    model = float_model(kind)
    float_experts = {n: t.clone() for n, t in model.get_submodule(EXPERTS).state_dict().items()}
    qi.quantize_(model, "ptpc_fp8", exclude=("lm_head", "*.experts.*"))
    assert not modules_of_experts(model)
    qi.save(model, tmp_path / "held")
    (tmp_path / "linears").mkdir()
    tensors = per_expert(load_file(tmp_path / "held" / "model.safetensors"), kind == "GptOss")
    save_file(tensors, tmp_path / "linears" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "linears" / "config.json").write_text((tmp_path / "held" / "config.json").read_text())
    with (tmp_path / "linears" / "config.json").open() as file:
        config = json.load(file)
    config["quantization_config"]["exclude"].append("*.experts.*")
    for form in ("held", "linears"):
        (tmp_path / form / "config.json").write_text(json.dumps(config))
        loaded: Any = qi.load(tmp_path / form)
        own: Any = loaded.get_submodule(EXPERTS)
        assert type(own) is type(model.get_submodule(EXPERTS))
        assert contents(dict(own.state_dict())) == contents(float_experts)
        assert state(loaded) == state(model)
        assert torch.equal(logits(loaded), logits(model))


def test_one_projection_that_is_excluded(tmp_path: Path) -> None:
    """Linears that stay float are beside those that are not; there is nothing to group."""
    model = float_model("Qwen3Moe")
    model.save_pretrained(tmp_path / "float")
    exclude = ("lm_head", "*.experts.*.down_proj", "*.experts.2.*")
    qi.quantize_(model, "mxfp4", exclude=exclude)
    module = modules_of_experts(model)[EXPERTS]
    assert quantized(module) == {f"{e}.{name}" for e in (0, 1, 3) for name in ("gate_proj", "up_proj")}
    assert (module.grouped, module.refusal) == ((), "some of their Linears are not quantized")
    expected = logits(model)
    loaded = qi.load(tmp_path / "float", scheme="mxfp4", exclude=exclude)
    assert state(loaded) == state(model)
    assert torch.equal(logits(loaded), expected)
    qi.save(model, tmp_path / "quantized")
    again = qi.load(tmp_path / "quantized")
    assert state(again) == state(model)
    assert torch.equal(logits(again), expected)


def test_schemes_by_pattern(tmp_path: Path) -> None:
    """Gate and up of two schemes are two projections, quantized and grouped each."""
    model = float_model("Mixtral")
    qi.quantize_(model, {"*gate_proj": "mxfp4", "*.experts.*": "ptpc_fp8"})
    module = modules_of_experts(model)[EXPERTS]
    assert module.grouped == ("gate_proj", "up_proj", "down_proj")
    expected = logits(model)
    qi.save(model, tmp_path)
    loaded = qi.load(tmp_path)
    assert state(loaded) == state(model)
    assert torch.equal(logits(loaded), expected)


# --- what is refused, and changes nothing


def check_unchanged(model: Any, before: dict[str, Any], parameters: dict[str, int], expected: Tensor) -> None:
    assert state(model) == before
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert not modules_of_experts(model)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])
def test_what_is_refused_leaves_the_model_as_it_was(kind: str) -> None:
    model = float_model(kind, intermediate_size=48)
    before, parameters = state(model), {name: id(p) for name, p in model.named_parameters()}
    expected = logits(model)
    with pytest.raises(ShapeError, match=r"model\.layers\.0\.mlp\.experts\.0\.down_proj: .*48.*32.*exclude this layer"):
        qi.quantize_(model, "mxfp4")
    check_unchanged(model, before, parameters, expected)
    with pytest.raises(ConfigError, match=r"static activation scales.*calibration="):
        qi.quantize_(model, "fp8")
    check_unchanged(model, before, parameters, expected)
    # One token, of two or three experts: the others see none.
    with pytest.raises(ConfigError, match=r"mlp\.experts\.\d\.\w+: the calibration data never reached it"):
        qi.quantize_(model, "fp8", calibration=[IDS[:, :1]])
    check_unchanged(model, before, parameters, expected)
    model.get_submodule(EXPERTS).down_proj.data[2, 3, 5] = torch.inf
    with pytest.raises(ConfigError, match=rf"{EXPERTS}\.2\.down_proj: the weight holds a NaN or an infinity"):
        qi.quantize_(model, "ptpc_fp8")
    assert not modules_of_experts(model)
    model.get_submodule(EXPERTS).down_proj.data[2, 3, 5] = 0.5
    qi.quantize_(model, "mxfp4", exclude=("lm_head", "*.down_proj"))
    assert modules_of_experts(model)


def test_a_size_that_does_not_fit_a_file(tmp_path: Path) -> None:
    float_model("Qwen3Moe", moe_intermediate_size=48).save_pretrained(tmp_path)
    with pytest.raises(ShapeError, match=r"mlp\.experts\.0\.down_proj: .*48.*32"):
        qi.load(tmp_path, scheme="mxfp4")


# --- saved and calibrated


@pytest.mark.parametrize("kind", ["Qwen3Moe", "GptOss"])
@pytest.mark.parametrize("scheme", ["mxfp4", "nvfp4", "fp8", "ptpc_fp8", "int8", "int4_wo_32"])
def test_round_trip(kind: str, scheme: str, tmp_path: Path) -> None:
    calibration = [torch.randint(0, 32, (2, 30), generator=torch.Generator().manual_seed(1))]
    model = qi.quantize_(float_model(kind), scheme, calibration=calibration)
    expected = logits(model)
    qi.save(model, tmp_path)
    loaded = qi.load(tmp_path)
    assert state(loaded) == state(model) == contents(load_file(tmp_path / "model.safetensors"))
    assert {m.scheme.spec for m in loaded.modules() if isinstance(m, QuarkLinear)} == {PRESETS[scheme]}
    assert [m.grouped for m in modules_of_experts(loaded).values()] == [("gate_up_proj", "down_proj")] * 2
    assert torch.equal(logits(loaded), expected)


def scales(tensors: dict[str, Tensor], which: str, linears: tuple[str, ...]) -> list[list[float]]:
    """Of a layer's experts those of some Linears, expert by expert."""
    names = [n for n in tensors if n.endswith(f".{linears[0]}.{which}") and ".layers.0.mlp.experts." in n]
    return [[tensors[n.replace(linears[0], linear)].item() for linear in linears] for n in sorted(names)]


def check_nvfp4(tensors: dict[str, Tensor]) -> None:
    """One input scale for all gates and ups of a layer, one for all downs; one weight scale for gate and up of each."""
    into = scales(tensors, "input_scale_2", ("gate_proj", "up_proj"))
    assert len({number for pair in into for number in pair}) == 1
    assert len({number for one in scales(tensors, "input_scale_2", ("down_proj",)) for number in one}) == 1
    weights = scales(tensors, "weight_scale_2", ("gate_proj", "up_proj"))
    assert all(gate == up for gate, up in weights)
    assert len({gate for gate, _ in weights}) == len(weights) >= 4


def test_what_nvfp4_shares() -> None:
    check_nvfp4(load_file(FIXTURES / "moe_qwen3_nvfp4" / "model.safetensors"))
    calibration = [torch.randint(0, 32, (2, 30), generator=torch.Generator().manual_seed(1))]
    model = float_model("Qwen3Moe")
    seen: list[Tensor] = []
    first = model.get_submodule("model.layers.0.mlp.experts")
    handle = first.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits_before = model(calibration[0]).logits
    handle.remove()
    assert logits_before.shape == (2, 30, 32)
    state_dict = dict(qi.quantize_(model, "nvfp4", calibration=calibration).state_dict())
    check_nvfp4(state_dict)
    # The largest number that any of them got: every token has some expert.
    expected = seen[0].abs().max().float() / (6 * 448)
    (scale, *_), *_ = scales(state_dict, "input_scale_2", ("gate_proj",))
    assert scale == expected.item()


def test_an_expert_that_calibration_does_not_reach_has_nvfp4s_scale_of_the_others() -> None:
    model = qi.quantize_(float_model("Qwen3Moe"), "nvfp4", calibration=[IDS[:, :1]])
    found = scales(dict(model.state_dict()), "input_scale_2", ("gate_proj", "up_proj"))
    assert len(found) == 4
    assert len({number for pair in found for number in pair}) == 1


@pytest.mark.parametrize("scheme", ["fp8", "int8", "mxfp4_fp8"])
def test_other_static_scales_are_each_experts(scheme: str) -> None:
    """Gate and up read one activation; other experts' tokens are not theirs."""
    calibration = [torch.randint(0, 32, (2, 30), generator=torch.Generator().manual_seed(1))]
    model = qi.quantize_(float_model("Qwen3Moe"), scheme, calibration=calibration)
    found = scales(dict(model.state_dict()), "input_scale", ("gate_proj", "up_proj"))
    assert all(gate == up for gate, up in found)
    assert len({gate for gate, _ in found}) > 1
    stored = load_file(FIXTURES / "moe_mixtral_fp8" / "model.safetensors")
    assert all(gate == up for gate, up in scales(stored, "input_scale", ("gate_proj", "up_proj")))
