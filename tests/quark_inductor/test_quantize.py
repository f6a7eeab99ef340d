"""``quantize_``: the bytes that amd-quark makes of the same weights, in the layers that are asked for, or nothing."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import quark_inductor as qi
from quark_inductor.errors import ConfigError, QuarkInductorError, ShapeError
from quark_inductor.schemes.base import QuarkLinear
from quark_inductor.schemes.spec import PRESETS
from quark_inductor.schemes.w4a4_mxfp4 import QuarkW4A4MXFP4

FIXTURES = Path(__file__).parents[1] / "fixtures"
LINEARS = [
    *(f"model.layers.{layer}.self_attn.{p}_proj" for layer in (0, 1) for p in "qkvo"),
    *(f"model.layers.{layer}.mlp.{p}_proj" for layer in (0, 1) for p in ("gate", "up", "down")),
]
Llama = Callable[..., Any]


def raw_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def schemes(model: nn.Module) -> dict[str, str]:
    """Scheme name of every quantized Linear."""
    names = {spec: name for name, spec in PRESETS.items()}
    return {n: names[m.scheme.spec] for n, m in model.named_modules() if isinstance(m, QuarkLinear)}


def snapshot(model: nn.Module) -> Any:
    """Everything an error must leave as it was."""
    modules = {name: (id(m), m.training) for name, m in model.named_modules()}
    parameters = {name: (id(p), p.dtype, p.requires_grad, raw_bytes(p)) for name, p in model.named_parameters()}
    return modules, parameters


# --- amd-quark's numbers


@pytest.mark.parametrize(
    ("scheme", "fixture"),
    [
        ("mxfp4", "mxfp4"),
        ("mxfp4", "mxfp4_fp32"),
        ("ptpc_fp8", "ptpc_fp8"),
        ("ptpc_fp8", "ptpc_fp8_fp32"),
        ("fp8_dynamic", "fp8"),
        ("fp8_dynamic", "fp8_fp32"),
    ],
)
def test_the_tensors_are_amd_quarks_byte_by_byte(
    scheme: str, fixture: str, fixtures_float_model: Callable[[torch.dtype], Any]
) -> None:
    """From the float weights that amd-quark had: outliers, tiny rows, rows and blocks of zeros.

    amd-quark's ``fp8`` has the weights of ``fp8_dynamic``, and the calibrated ``input_scale`` beside them.
    """
    model = fixtures_float_model(torch.float32 if "fp32" in fixture else torch.bfloat16)
    quantized = qi.quantize_(model, scheme).state_dict()
    stored = {n: t for n, t in load_file(FIXTURES / fixture / "model.safetensors").items() if "input_scale" not in n}
    assert quantized.keys() == stored.keys()
    for name, tensor in stored.items():
        assert quantized[name].dtype == tensor.dtype, name
        assert quantized[name].shape == tensor.shape, name
        assert raw_bytes(quantized[name]) == raw_bytes(tensor), name


# --- which layers


def test_a_name_quantizes_everything_but_lm_head(llama: Llama) -> None:
    model = llama().train()
    assert qi.quantize_(model, "mxfp4") is model
    assert schemes(model) == dict.fromkeys(LINEARS, "mxfp4")
    assert type(model.lm_head) is nn.Linear
    assert not any(m.training for m in model.modules())
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("scheme", ["mxfp4", "ptpc_fp8", "fp8_dynamic"])
def test_a_bias_and_what_is_not_a_linear_stay_as_they_are(scheme: str, llama: Llama) -> None:
    model = llama()
    before = {n: (id(p), raw_bytes(p)) for n, p in model.named_parameters() if "proj.weight" not in n}
    assert sum(name.endswith("proj.bias") for name in before) == 8
    qi.quantize_(model, scheme)
    after = dict(model.named_parameters())
    assert {n: (id(after[n]), raw_bytes(after[n])) for n in before} == before


@pytest.mark.parametrize(
    ("exclude", "kept"),
    [
        ([], []),
        (["lm_head"], ["lm_head"]),
        (("lm_head", "*.mlp.*"), ["lm_head", *(n for n in LINEARS if "mlp" in n)]),
        (["re:.*layers\\.1\\..*(up|down)_proj$"], ["model.layers.1.mlp.down_proj", "model.layers.1.mlp.up_proj"]),
        (["model.layers.0.self_attn.q_proj"], ["model.layers.0.self_attn.q_proj"]),
        (["q_proj"], []),
    ],
)
def test_excluded_layers_stay_float(exclude: Any, kept: list[str], llama: Llama) -> None:
    model = qi.quantize_(llama(), "ptpc_fp8", exclude=exclude)
    assert sorted(n for n, m in model.named_modules() if type(m) is nn.Linear) == sorted(kept)
    assert len(schemes(model)) == len(LINEARS) + 1 - len(kept)


def test_one_name_as_a_string_is_excluded_or_refused(llama: Llama) -> None:
    """A string is a sequence too, of letters, which name no layer: what is asked for must not be quantized."""
    model = llama()
    try:
        qi.quantize_(model, "mxfp4", exclude="lm_head")
    except ConfigError as error:
        assert "exclude" in str(error)  # noqa: PT017  (it need not raise)
    assert type(model.lm_head) is nn.Linear


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (
            {"*self_attn*": "ptpc_fp8", "*mlp*": "mxfp4"},
            {n: "ptpc_fp8" if "self_attn" in n else "mxfp4" for n in LINEARS},
        ),
        ({"*.0.*": "fp8_dynamic", "*": "mxfp4"}, {n: "fp8_dynamic" if ".0." in n else "mxfp4" for n in LINEARS}),
        ({"*": "mxfp4", "*.0.*": "fp8_dynamic"}, dict.fromkeys(LINEARS, "mxfp4")),
        ({"model.layers.1.mlp.up_proj": "mxfp4"}, {"model.layers.1.mlp.up_proj": "mxfp4"}),
    ],
)
def test_the_first_pattern_of_a_dict_wins_and_the_rest_stays_float(
    patterns: dict[str, str], expected: dict[str, str], llama: Llama
) -> None:
    model = qi.quantize_(llama(), patterns)
    assert schemes(model) == expected
    assert all(type(model.get_submodule(n)) is nn.Linear for n in [*LINEARS, "lm_head"] if n not in expected)


def test_a_dict_excludes_lm_head_too_unless_told_otherwise(llama: Llama) -> None:
    assert "lm_head" not in schemes(qi.quantize_(llama(), {"*": "mxfp4"}))
    assert "lm_head" in schemes(qi.quantize_(llama(), {"*": "mxfp4"}, exclude=()))


def test_a_model_is_quantized_in_two_steps(llama: Llama) -> None:
    model = qi.quantize_(llama(), {"*mlp*": "mxfp4"})
    qi.quantize_(model, {"*self_attn*": "ptpc_fp8"})
    assert schemes(model) == {n: "ptpc_fp8" if "self_attn" in n else "mxfp4" for n in LINEARS}


def test_a_subclass_of_linear_is_not_touched() -> None:
    class Own(nn.Linear):
        pass

    model = qi.quantize_(nn.Sequential(nn.Linear(64, 64), Own(64, 64)), "mxfp4")
    assert schemes(model) == {"0": "mxfp4"}
    assert type(model[1]) is Own


def test_a_linear_that_is_used_twice_is_quantized_in_both_places() -> None:
    linear = nn.Linear(64, 64)
    model = qi.quantize_(nn.Sequential(linear, nn.ReLU(), linear), "mxfp4")
    assert type(model[0]) is QuarkLinear
    assert model[2] is model[0]


def test_a_float_weight_is_freed_as_soon_as_it_is_quantized(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    model, alive = llama(), []
    weights = [weakref.ref(model.get_submodule(name).weight) for name in LINEARS]
    original = QuarkW4A4MXFP4.quantize_weight

    def counting(self: QuarkW4A4MXFP4, weight: Tensor) -> Any:
        alive.append(sum(ref() is not None for ref in weights))
        return original(self, weight)

    monkeypatch.setattr(QuarkW4A4MXFP4, "quantize_weight", counting)
    qi.quantize_(model, "mxfp4")
    assert alive == list(range(14, 0, -1))
    assert [ref() for ref in weights] == [None] * 14


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scheme", ["mxfp4", "ptpc_fp8", "fp8_dynamic"])
def test_the_model_computes_in_its_own_dtype_and_near_the_float_one(
    scheme: str, dtype: torch.dtype, llama: Llama, ids: Tensor
) -> None:
    """The correlation with the float model's logits: 0.92 (FP4) and 0.995 (FP8) are measured with these weights."""
    with torch.no_grad():
        exact = llama(dtype)(ids).logits
        logits = qi.quantize_(llama(dtype), scheme)(ids).logits
    assert logits.dtype == dtype
    correlation = torch.corrcoef(torch.stack([exact.double().flatten(), logits.double().flatten()]))[0, 1]
    assert (0.85 if scheme == "mxfp4" else 0.98) < correlation < 1


# --- errors


def mixed_dtypes(model: Any) -> None:
    model.get_submodule(LINEARS[3]).to(torch.float32)


def odd_size(model: Any) -> None:
    model.model.layers[1].mlp.down_proj = nn.Linear(72, 64, dtype=torch.bfloat16)


# What is asked of which model, the error, and what its message must name.
REFUSED: dict[str, tuple[Callable[[Any], None], dict[str, Any], type[QuarkInductorError], list[str]]] = {
    "unknown scheme": (
        lambda m: None,
        {"scheme": "mxfp5"},
        ConfigError,
        ["'mxfp5'", "mxfp4", "ptpc_fp8", "fp8_dynamic"],
    ),
    "unknown scheme of a pattern": (lambda m: None, {"scheme": {"*": "mxfp4", "a": "int3"}}, ConfigError, ["'int3'"]),
    "static activations": (
        lambda m: None,
        {"scheme": "fp8"},
        ConfigError,
        ["model.layers.0.self_attn.q_proj", "fp8_e4m3", "static", "calibration="],
    ),
    "static activations of a pattern": (
        lambda m: None,
        {"scheme": {"*": "fp8"}},
        ConfigError,
        ["model.layers.0.self_attn.q_proj", "fp8_e4m3", "calibration="],
    ),
    "no pattern": (lambda m: None, {"scheme": {}}, ConfigError, ["none of the model's Linears"]),
    "a pattern of nothing": (
        lambda m: None,
        {"scheme": {"q_proj": "mxfp4"}},
        ConfigError,
        ["none of the model's Linears"],
    ),
    "all excluded": (
        lambda m: None,
        {"scheme": "mxfp4", "exclude": ["*"]},
        ConfigError,
        ["none of the model's Linears"],
    ),
    "no regular expression": (
        lambda m: None,
        {"scheme": "mxfp4", "exclude": ["re:("]},
        ConfigError,
        ["exclude", "re:("],
    ),
    "two dtypes": (mixed_dtypes, {"scheme": "mxfp4"}, ConfigError, ["2 dtypes", "float32", "bfloat16"]),
    "the last layer's size": (
        odd_size,
        {"scheme": "mxfp4"},
        ShapeError,
        ["model.layers.1.mlp.down_proj", "K = 72", "32", "exclude"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_leaves_the_model_as_it_was(case: str, llama: Llama) -> None:
    prepare, arguments, error, named = REFUSED[case]
    model = llama().train()
    prepare(model)
    before = snapshot(model)
    with pytest.raises(QuarkInductorError) as caught:
        qi.quantize_(model, **arguments)
    assert type(caught.value) is error
    for text in named:
        assert text in str(caught.value)
    assert snapshot(model) == before


def test_the_size_that_a_scheme_refuses_can_be_excluded(llama: Llama) -> None:
    model = llama()
    odd_size(model)
    assert "model.layers.1.mlp.down_proj" not in schemes(
        qi.quantize_(model, "mxfp4", exclude=["lm_head", "*.1.mlp.down_proj"])
    )


def test_a_quantized_model_has_nothing_left_to_quantize(llama: Llama) -> None:
    model = qi.quantize_(llama(), "mxfp4", exclude=[])
    before = snapshot(model)
    with pytest.raises(ConfigError, match="Linear"):
        qi.quantize_(model, "ptpc_fp8")
    assert snapshot(model) == before


def test_a_linear_alone_has_no_place_for_another_one() -> None:
    """It cannot be replaced in place, so it must not be returned as if it had been."""
    linear = nn.Linear(64, 64)
    before = snapshot(linear)
    with pytest.raises(ConfigError):
        qi.quantize_(linear, "mxfp4")
    assert snapshot(linear) == before
