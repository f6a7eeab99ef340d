"""``load(scheme=)``: a float checkpoint is quantized while it loads, to what ``quantize_`` makes of the float model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import quark_inductor as qi
from quark_inductor.errors import CheckpointError, ConfigError, ShapeError
from quark_inductor.schemes.base import QuarkLinear
from quark_inductor.schemes.spec import PRESETS

FIXTURES = Path(__file__).parents[1] / "fixtures"
BASE = FIXTURES / "base"
FloatBase = Callable[..., Any]
STATIC = ["fp8", "fp8_e5m2", "int8", "mxfp4_fp8", "nvfp4"]
NARROW = ("lm_head", "*.o_proj", "*.down_proj")  # groups of 64 or 128 do not fit their 32 inputs
IDS = torch.arange(12)[None] % 16


def raw_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def state(model: nn.Module) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    return {name: (t.dtype, tuple(t.shape), raw_bytes(t)) for name, t in model.state_dict().items()}


def check_same(loaded: Any, quantized: Any) -> None:
    assert state(loaded) == state(quantized)
    assert {n: m.scheme.spec for n, m in loaded.named_modules() if isinstance(m, QuarkLinear)} == {
        n: m.scheme.spec for n, m in quantized.named_modules() if isinstance(m, QuarkLinear)
    }
    assert not any(t.is_meta or t.requires_grad for t in (*loaded.parameters(), *loaded.buffers()))
    assert not any(m.training for m in loaded.modules())
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, quantized(IDS).logits)


@pytest.fixture
def float_copy(tmp_path: Path) -> Callable[..., Path]:
    """``base/`` with some tensors changed, or removed (``None``), and keys of its config."""

    def make(tensors: dict[str, Tensor | None] | None = None, **config: Any) -> Path:
        path = tmp_path / "float"
        path.mkdir()
        stored: dict[str, Any] = {n: t.clone() for n, t in load_file(BASE / "model.safetensors").items()}
        stored |= tensors or {}
        save_file({n: t for n, t in stored.items() if t is not None}, path / "model.safetensors")
        settings = json.loads((BASE / "config.json").read_text()) | config
        (path / "config.json").write_text(json.dumps(settings))
        return path

    return make


# --- the numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", sorted(PRESETS.keys() - set(STATIC)))
def test_it_is_what_quantize_makes_of_the_float_model(scheme: str, dtype: torch.dtype, float_base: FloatBase) -> None:
    exclude = NARROW if "64" in scheme or "128" in scheme else ("lm_head",)
    loaded = qi.load(BASE, dtype=dtype, scheme=scheme, exclude=exclude)
    quantized = qi.quantize_(float_base(dtype), scheme, exclude=exclude)
    check_same(loaded, quantized)
    assert sum(isinstance(m, QuarkLinear) for m in loaded.modules()) == (5 if exclude is NARROW else 7)


def test_a_wider_model(float_base: FloatBase) -> None:
    loaded = qi.load(FIXTURES / "base_wide", scheme="int4_wo_128", exclude=NARROW)
    check_same(loaded, qi.quantize_(float_base(torch.float32, "base_wide"), "int4_wo_128", exclude=NARROW))


@pytest.mark.parametrize(
    ("scheme", "exclude"),
    [
        ({"*self_attn*": "ptpc_fp8", "*": "mxfp4"}, ("lm_head",)),
        ({"*up_proj": "int4_wo_32"}, ()),
        ("mxfp4", ()),
        ("mxfp4", "*lm_head"),
        ("mxfp4", ["re:.*mlp", "lm_head"]),
    ],
    ids=str,
)
def test_schemes_by_pattern_and_excluded_layers(scheme: Any, exclude: Any, float_base: FloatBase) -> None:
    loaded = qi.load(BASE, dtype=torch.bfloat16, scheme=scheme, exclude=exclude)
    check_same(loaded, qi.quantize_(float_base(), scheme, exclude=exclude))


def test_tied_embeddings_stay_tied_or_not_as_in_quantize(
    float_copy: Callable[..., Path], float_base: FloatBase
) -> None:
    path = float_copy({"lm_head.weight": None}, tie_word_embeddings=True)
    loaded: Any = qi.load(path, scheme="mxfp4")
    check_same(loaded, qi.quantize_(float_base(torch.float32, tied=True), "mxfp4"))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_tied_lm_head_is_quantized_from_the_embeddings(
    float_copy: Callable[..., Path], float_base: FloatBase
) -> None:
    path = float_copy({"lm_head.weight": None}, tie_word_embeddings=True)
    loaded: Any = qi.load(path, scheme="mxfp4", exclude=())
    check_same(loaded, qi.quantize_(float_base(torch.float32, tied=True), "mxfp4", exclude=()))


def test_it_comes_back_from_a_save(tmp_path: Path) -> None:
    model = qi.load(BASE, scheme="ptpc_fp8")
    qi.save(model, tmp_path)
    assert state(qi.load(tmp_path)) == state(model)


# --- what is refused


@pytest.mark.parametrize("scheme", STATIC)
@pytest.mark.parametrize("dynamic_fallback", [False, True])
def test_static_activation_scales_are_refused_with_the_way_to_calibrate(scheme: str, dynamic_fallback: bool) -> None:
    with pytest.raises(ConfigError) as caught:
        qi.load(BASE, scheme=scheme, dynamic_fallback=dynamic_fallback)
    for text in (
        "model.layers.0.self_attn.q_proj",
        "static activation scales",
        "quantize_(model, scheme, calibration=",
    ):
        assert text in str(caught.value)


def test_every_scheme_is_in_one_of_the_two_lists() -> None:
    static = [n for n, s in PRESETS.items() if s.input is not None and not (s.input.second or s.input).is_dynamic]
    assert sorted(static) == STATIC


@pytest.mark.parametrize("name", ["mxfp4", "fp8", "nvfp4"])
def test_a_quantized_checkpoint_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"config\.json has a quantization_config already: load it without scheme="):
        qi.load(FIXTURES / name, scheme="mxfp4")


def test_a_float_checkpoint_without_a_scheme_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"config\.json has no quantization_config.*Pass scheme="):
        qi.load(BASE)


@pytest.mark.parametrize("scheme", ["mxfp5", {"*": "mxfp5"}, ""])
def test_an_unknown_scheme_is_refused(scheme: Any) -> None:
    with pytest.raises(ConfigError, match=r"there is no scheme '(mxfp5)?'; expected one of mxfp4"):
        qi.load(BASE, scheme=scheme)


@pytest.mark.parametrize(("scheme", "exclude"), [({}, ()), ({"nothing": "mxfp4"}, ()), ("mxfp4", "*")])
def test_nothing_to_quantize_is_refused(scheme: Any, exclude: Any) -> None:
    with pytest.raises(ConfigError, match="none of the model's Linears is quantized"):
        qi.load(BASE, scheme=scheme, exclude=exclude)


def test_a_size_that_does_not_fit_is_named() -> None:
    with pytest.raises(ShapeError, match=r"model\.layers\.0\.self_attn\.o_proj: K = 32.*128.*exclude"):
        qi.load(BASE, scheme="int4_wo_128")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("scheme", ["mxfp4", "ptpc_fp8", "int8_weight_only", "nvfp4_weight_only"])
def test_a_weight_that_is_not_finite_is_refused(scheme: str, value: float, float_copy: Callable[..., Path]) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    weight = load_file(BASE / "model.safetensors")[name].clone()
    weight[3, 5] = value
    with pytest.raises(CheckpointError, match=rf"{name} holds a NaN or an infinity"):
        qi.load(float_copy({name: weight}), scheme=scheme)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (None, "missing"),
        (torch.zeros(32, 127), "[32, 127], expected [32, 128]"),
        (torch.zeros(32, 128, dtype=torch.bfloat16), "dtype bfloat16, expected float32"),
        (torch.zeros(32, 128, dtype=torch.int8), "dtype int8, expected float32"),
        (torch.zeros(32, 128).to(torch.float8_e4m3fn), "dtype float8_e4m3fn, expected float32"),
    ],
)
def test_a_damaged_float_weight_is_named(change: Tensor | None, named: str, float_copy: Callable[..., Path]) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(CheckpointError) as caught:
        qi.load(float_copy({name: change}), scheme="mxfp4")
    assert name in str(caught.value)
    assert named in str(caught.value)


def test_a_float_checkpoint_has_no_scales(float_copy: Callable[..., Path]) -> None:
    name = "model.layers.0.mlp.up_proj.weight_scale"
    path = float_copy({name: torch.ones(32, 4, dtype=torch.uint8)})
    with pytest.raises(CheckpointError, match=rf"no place in the model.*{name}"):
        qi.load(path, scheme="mxfp4")
