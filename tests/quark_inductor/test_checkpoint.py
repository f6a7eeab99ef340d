"""``quantization_config``: what amd-quark wrote is understood and written again; anything else is refused by name."""

import copy
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quark_inductor.checkpoint import QuantizationConfig, parse, to_json
from quark_inductor.errors import ConfigError, QuarkInductorError
from quark_inductor.schemes import registry  # noqa: F401
from quark_inductor.schemes.base import scheme_for
from quark_inductor.schemes.spec import PRESETS, LinearSpec

FIXTURES = Path(__file__).parents[1] / "fixtures"
CHECKPOINTS = ["mxfp4", "fp8", "ptpc_fp8", "mxfp4_fp32", "fp8_fp32", "ptpc_fp8_fp32", "mxfp4_sharded"]
Json = dict[str, Any]


def amd_quarks(name: str) -> Json:
    return json.loads((FIXTURES / name / "config.json").read_text())["quantization_config"]


GLOBAL = "global_quant_config"
WEIGHT, INPUT = (GLOBAL, "weight"), (GLOBAL, "input_tensors")


def changed(base: str, *path: str | int, to: Any) -> Json:
    """A config of amd-quark's with one value set."""
    config = amd_quarks(base)
    inner: Any = config
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = to
    return config


def preset(name: str) -> LinearSpec:
    return PRESETS[re.sub("_fp32|_sharded", "", name)]


# --- what amd-quark writes


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_amd_quarks_config_is_the_preset_of_its_name(name: str) -> None:
    config = parse(amd_quarks(name))
    assert config == QuantizationConfig(default=preset(name), by_pattern={}, exclude=("lm_head",))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_what_is_written_is_what_amd_quark_writes(name: str) -> None:
    """Key by key, with no exception: also those that say nothing here, and the version."""
    linears = {f"model.layers.{i}.mlp.up_proj": preset(name) for i in range(2)}
    written, expected = to_json(linears, ["lm_head"]), amd_quarks(name)
    assert written == expected
    assert json.dumps(written, sort_keys=True) == json.dumps(expected, sort_keys=True)  # 0.0 is not 0, true not 1


def test_fp8_dynamic_is_amd_quarks_fp8_with_one_value_changed() -> None:
    """amd-quark has no scheme of this name, so no file either."""
    expected = amd_quarks("fp8")
    expected["global_quant_config"]["input_tensors"]["is_dynamic"] = True
    assert to_json({"a": PRESETS["fp8_dynamic"]}, ["lm_head"]) == expected
    assert parse(expected).default == PRESETS["fp8_dynamic"]


def test_a_mixed_model_is_written_as_the_commonest_spec_and_the_others_by_name() -> None:
    linears = {"a.0": PRESETS["mxfp4"], "a.1": PRESETS["mxfp4"], "b": PRESETS["ptpc_fp8"], "c": PRESETS["fp8"]}
    written = json.loads(json.dumps(to_json(linears, ["x", "y"])))
    assert written["global_quant_config"] == amd_quarks("mxfp4")["global_quant_config"]
    assert written["layer_quant_config"] == {
        "b": amd_quarks("ptpc_fp8")["global_quant_config"],
        "c": amd_quarks("fp8")["global_quant_config"],
    }
    assert written["exclude"] == ["x", "y"]
    config = parse(written)
    assert {name: config.spec_for(name) for name in [*linears, "x", "y"]} == {**linears, "x": None, "y": None}


# Keys that older releases do not write (0.8 to 0.12), and what they say when they are not there.
OLDER = [
    "block_size",
    "zero_point_type",
    "enable_buffer_reuse",
    "max_input_numel",
    "scale_calculation_mode",
    "scale_type",
]


@pytest.mark.parametrize("name", ["mxfp4", "fp8", "ptpc_fp8"])
def test_an_older_file_lacks_some_keys(name: str) -> None:
    config = amd_quarks(name)
    for tensor in ("weight", "input_tensors"):
        for key in OLDER:
            del config["global_quant_config"][tensor][key]
    for key in (
        "kv_cache_post_rope",
        "layer_type_quant_config",
        "quant_mode",
        "softmax_quant_spec",
        "version",
        "algo_config",
    ):
        del config[key]
    assert parse(config).default == PRESETS[name]


@pytest.mark.parametrize("algorithm", ["awq", "gptq", "smoothquant", "autosmoothquant", "qronos"])
def test_an_algorithm_that_only_changes_weights_is_taken(algorithm: str) -> None:
    config = amd_quarks("mxfp4") | {"algo_config": [{"name": algorithm, "anything": 1}]}
    assert parse(config).default == PRESETS["mxfp4"]


def test_a_rotation_that_is_merged_into_the_weights_is_taken() -> None:
    config = amd_quarks("mxfp4_rotation")
    assert config["algo_config"][0]["name"] == "rotation"
    assert parse(config).default == PRESETS["mxfp4"]


def test_a_quantized_softmax_is_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    config = amd_quarks("fp8") | {"softmax_quant_spec": {"dtype": "fp8_e4m3"}}
    with caplog.at_level(logging.WARNING, logger="quark_inductor"):
        assert parse(config) == parse(amd_quarks("fp8"))
    assert "softmax_quant_spec" in caplog.text


def test_a_layer_without_a_spec_is_not_quantized() -> None:
    config = amd_quarks("mxfp4")
    config["layer_quant_config"] = {"none": None, "empty": {"weight": None, "input_tensors": None}}
    parsed = parse(config)
    assert parsed.spec_for("none") is None
    assert parsed.spec_for("empty") is None
    assert parsed.spec_for("other") == PRESETS["mxfp4"]


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("mxfp4", "group_size", 16),
        ("mxfp4", "is_dynamic", True),
        ("mxfp4", "dtype", "fp8_e5m3"),
        ("amdfp4", "group_size", 64),
        ("fp8", "dtype", "fp8_e5m2"),
        ("fp8", "dtype", "fp8_e5m3"),
        ("fp8", "is_dynamic", True),
        ("int8", "is_dynamic", True),
    ],
)
def test_what_decides_a_number_reaches_the_schemes_which_refuse_it(name: str, key: str, value: Any) -> None:
    spec = parse(changed(name, *WEIGHT, key, to=value)).default
    assert spec is not None
    assert getattr(spec.weight, key) == value
    assert spec.input == PRESETS[name].input
    with pytest.raises(ConfigError, match=rf"no scheme for \[weight .*{value if value is not True else 'dynamic'}"):
        scheme_for(spec)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("mxfp4", {"scale_calculation_mode": "floor"}),
        ("mxfp4", {"scale_calculation_mode": "ceil"}),
        ("mxfp4", {"dtype": "fp6_e2m3"}),
        ("mxfp4", {"dtype": "fp6_e3m2"}),
        ("fp8", {"scale_type": "float32"}),
        ("fp8", {"qscheme": "per_block", "block_size": (16, 64)}),
        ("int8", {"symmetric": False}),
        ("int8", {"dtype": "uint8"}),
        ("int4_wo_32", {"group_size": 64}),
    ],
)
def test_what_decides_a_number_reaches_the_schemes_which_take_it(name: str, values: dict[str, Any]) -> None:
    config = amd_quarks(name)
    config[GLOBAL]["weight"].update(values)
    spec = parse(json.loads(json.dumps(config))).default
    assert spec is not None
    assert {key: getattr(spec.weight, key) for key in values} == values
    assert spec.input == PRESETS[name].input
    assert scheme_for(spec).spec == spec


@pytest.mark.parametrize(
    ("name", "key", "value", "named"),
    [
        ("fp8", "output_tensors", "mxfp4", "output [fp4"),
        ("fp8", "input_tensors", "amdfp4", "input fp4"),
        ("int8", "input_tensors", "fp8", "input fp8"),
        ("nvfp4", "weight", "mxfp4", "weight fp4 per_group 32"),
    ],
)
def test_tensors_of_two_formats_reach_the_schemes_which_refuse_them(
    name: str, key: str, value: str, named: str
) -> None:
    spec = parse(changed(name, GLOBAL, key, to=amd_quarks(value)[GLOBAL]["weight"])).default
    assert spec is not None
    with pytest.raises(ConfigError) as caught:
        scheme_for(spec)
    assert named in str(caught.value)


# --- which layer


A, B, C = PRESETS["mxfp4"], PRESETS["fp8"], PRESETS["ptpc_fp8"]


@pytest.mark.parametrize(
    ("pattern", "name", "excluded"),
    [
        ("lm_head", "lm_head", True),
        ("lm_head", "model.lm_head", False),
        ("*lm_head", "model.lm_head", True),
        ("*.mlp.*", "model.layers.0.mlp.up_proj", True),
        ("*.mlp.*", "model.layers.0.self_attn.q_proj", False),
        ("model.layers.?.mlp.up_proj", "model.layers.1.mlp.up_proj", True),
        ("model.layers.?.mlp.up_proj", "model.layers.10.mlp.up_proj", False),
        ("model.layers.[01].*", "model.layers.1.mlp.up_proj", True),
        ("model.layers.[!01].*", "model.layers.1.mlp.up_proj", False),
        ("LM_HEAD", "lm_head", False),
        (".*gate", "mlp.gate", False),  # no regular expression without re:
        ("re:.*mlp.gate$", "model.layers.3.mlp.gate", True),
        ("re:.*mlp.gate$", "model.layers.3.mlp.gate_proj", False),
        ("re:mlp", "model.mlp", False),  # from the start of the name
        ("re:model", "model.mlp", True),  # not to its end
        ("re:model\\.layers\\.(0|1)\\.", "model.layers.1.mlp", True),
        ("re:", "anything", True),
    ],
)
def test_exclude_is_fnmatch_or_a_regular_expression(pattern: str, name: str, excluded: bool) -> None:
    config = parse(amd_quarks("mxfp4") | {"exclude": ["something else", pattern]})
    assert config.spec_for(name) == (None if excluded else A)


@pytest.mark.parametrize(
    ("patterns", "name", "spec"),
    [
        ({"*.q_proj": B, "*": C}, "a.q_proj", B),
        ({"*": C, "*.q_proj": B}, "a.q_proj", C),  # the first one, not the longest
        ({"*.q_proj": B, "*.k_proj": C}, "a.k_proj", C),
        ({"*.q_proj": B, "*.k_proj": C}, "a.v_proj", A),
        ({"a.q_proj": None, "*.q_proj": B}, "a.q_proj", None),
        ({"re:.*": B}, "a", A),  # only exclude knows re:
        ({"out": B}, "out", None),  # excluded, whatever else names it
    ],
)
def test_the_first_pattern_that_matches_wins(
    patterns: dict[str, LinearSpec | None], name: str, spec: LinearSpec | None
) -> None:
    by_spec = {A: "mxfp4", B: "fp8", C: "ptpc_fp8"}
    raw = amd_quarks("mxfp4") | {"exclude": ["out"]}
    raw["layer_quant_config"] = {
        pattern: None if s is None else amd_quarks(by_spec[s])["global_quant_config"] for pattern, s in patterns.items()
    }
    assert parse(raw).spec_for(name) == spec


# --- what is refused


def nested(depth: int) -> Json:
    value: Json = {}
    for _ in range(depth):
        value = {"weight": value}
    return value


THREE_STAGES = [amd_quarks("mxfp4")["global_quant_config"]["weight"]] * 3

# What is changed -> what is set, and what the message must name.
BAD: dict[str, tuple[Json, list[str]]] = {
    "not quark": (changed("fp8", "quant_method", to="awq"), ["quant_method", "'awq'", "'quark'"]),
    "quant_method null": (changed("fp8", "quant_method", to=None), ["quant_method", "None"]),
    "quant_method list": (changed("fp8", "quant_method", to=["quark"]), ["quant_method"]),
    "unknown top key": (changed("fp8", "attn_quant_config", to=None), ["attn_quant_config", "quantization_config"]),
    "no global": ({"quant_method": "quark"}, ["global_quant_config"]),
    "global list": (changed("fp8", GLOBAL, to=[]), [GLOBAL]),
    "global str": (changed("fp8", GLOBAL, to="fp8"), [GLOBAL, "'fp8'"]),
    "unknown layer key": (changed("fp8", GLOBAL, "weights", to=None), [GLOBAL, "weights"]),
    "bias quantized": (changed("fp8", GLOBAL, "bias", to=amd_quarks("fp8")[GLOBAL]["weight"]), [GLOBAL, "bias"]),
    "output with a bad spec": (
        changed("fp8", GLOBAL, "output_tensors", to={"dtype": "fp8_e4m3", "qscheme": "per_row"}),
        [f"{GLOBAL}.output_tensors.qscheme", "'per_row'"],
    ),
    "input without weight": (changed("fp8", *WEIGHT, to=None), [GLOBAL, "input", "weight"]),
    "weight str": (changed("fp8", *WEIGHT, to="fp8"), [f"{GLOBAL}.weight", "'fp8'"]),
    "unknown spec key": (changed("fp8", *WEIGHT, "dtypes", to="x"), [f"{GLOBAL}.weight", "dtypes"]),
    "three stages": (changed("fp8", *WEIGHT, to=THREE_STAGES), [f"{GLOBAL}.weight", "3 stages"]),
    "three stages of input": (changed("fp8", *INPUT, to=THREE_STAGES), [f"{GLOBAL}.input_tensors", "3 stages"]),
    "no stage": (changed("fp8", *WEIGHT, to=[]), [f"{GLOBAL}.weight", "0 stages"]),
    "stage str": (changed("fp8", *WEIGHT, to=["fp8"]), [f"{GLOBAL}.weight[0]", "'fp8'"]),
    "second stage null": (changed("nvfp4", *WEIGHT, 1, to=None), [f"{GLOBAL}.weight[1]", "None"]),
    "second stage with a bad spec": (
        changed("nvfp4", *INPUT, 1, "dtype", to="fp8"),
        [f"{GLOBAL}.input_tensors[1].dtype", "'fp8'"],
    ),
    "first stage of scales": (
        changed("nvfp4", *WEIGHT, 0, "is_scale_quant", to=True),
        [f"{GLOBAL}.weight[0].is_scale_quant"],
    ),
    "no dtype": (changed("fp8", *WEIGHT, "dtype", to=None), [f"{GLOBAL}.weight.dtype", "None"]),
    "dtype number": (changed("fp8", *WEIGHT, "dtype", to=8), [f"{GLOBAL}.weight.dtype", "8"]),
    "dtype list": (changed("fp8", *INPUT, "dtype", to=["fp4"]), [f"{GLOBAL}.input_tensors.dtype"]),
    "no qscheme": (changed("fp8", *WEIGHT, "qscheme", to=None), [f"{GLOBAL}.weight.qscheme"]),
    "group_size 0": (changed("mxfp4", *WEIGHT, "group_size", to=0), [f"{GLOBAL}.weight.group_size", "0"]),
    "group_size -32": (changed("mxfp4", *WEIGHT, "group_size", to=-32), [f"{GLOBAL}.weight.group_size", "-32"]),
    "group_size str": (changed("mxfp4", *WEIGHT, "group_size", to="32"), [f"{GLOBAL}.weight.group_size", "'32'"]),
    "group_size float": (changed("mxfp4", *WEIGHT, "group_size", to=32.0), [f"{GLOBAL}.weight.group_size", "32.0"]),
    "group axis": (changed("mxfp4", *WEIGHT, "ch_axis", to=0), [f"{GLOBAL}.weight.ch_axis", "0"]),
    "channel axis of a weight": (changed("ptpc_fp8", *WEIGHT, "ch_axis", to=1), [f"{GLOBAL}.weight.ch_axis", "1"]),
    "channel axis of an input": (changed("ptpc_fp8", *INPUT, "ch_axis", to=0), [f"{GLOBAL}.input_tensors.ch_axis"]),
    "channel axis null": (changed("ptpc_fp8", *WEIGHT, "ch_axis", to=None), [f"{GLOBAL}.weight.ch_axis", "None"]),
    "is_scale_quant": (changed("fp8", *WEIGHT, "is_scale_quant", to=True), [f"{GLOBAL}.weight.is_scale_quant is true"]),
    "scale_type": (
        changed("fp8", *WEIGHT, "scale_type", to="float64"),
        [f"{GLOBAL}.weight.scale_type", "'float64'"],
    ),
    "scale_type e5m3": (
        changed("fp8", *WEIGHT, "scale_type", to="float8_e5m3"),
        [f"{GLOBAL}.weight.scale_type", "'float8_e5m3'"],
    ),
    "asymmetric null": (changed("int8", *WEIGHT, "symmetric", to=None), [f"{GLOBAL}.weight.symmetric", "None"]),
    "asymmetric 0": (changed("int8", *WEIGHT, "symmetric", to=0), [f"{GLOBAL}.weight.symmetric", "0"]),
    "scale mode of another format": (
        changed("amdfp4", *WEIGHT, "scale_calculation_mode", to="even"),
        [f"{GLOBAL}.weight.scale_calculation_mode", "'even'"],
    ),
    "asymmetric": (changed("fp8", *WEIGHT, "symmetric", to=False), [f"{GLOBAL}.weight.symmetric", "False"]),
    "round_method": (changed("fp8", *WEIGHT, "round_method", to="floor"), [f"{GLOBAL}.weight.round_method", "'floor'"]),
    "block_size": (changed("fp8", *WEIGHT, "block_size", to=[128, 128]), [f"{GLOBAL}.weight.block_size", "128"]),
    "mx_element_dtype": (
        changed("mxfp4", *WEIGHT, "mx_element_dtype", to="fp4"),
        [f"{GLOBAL}.weight.mx_element_dtype"],
    ),
    "is_dynamic str": (
        changed("fp8", *INPUT, "is_dynamic", to="false"),
        [f"{GLOBAL}.input_tensors.is_dynamic", "'false'"],
    ),
    "scale_format of fp8": (
        changed("fp8", *WEIGHT, "scale_format", to="e5m3"),
        [f"{GLOBAL}.weight.scale_format", "'e5m3'"],
    ),
    "fake quantized": (
        changed("fp8", "export", "weight_format", to="fake_quantized"),
        ["export.weight_format", "'fake_quantized'", "real_quantized"],
    ),
    "export list": (changed("fp8", "export", to=["x"]), ["export"]),
    "unknown export key": (changed("fp8", "export", "packing", to="other"), ["export", "packing"]),
    "pack_method": (changed("fp8", "export", "pack_method", to="diagonal"), ["export.pack_method", "'diagonal'"]),
    "kv cache group": (changed("fp8", "export", "kv_cache_group", to=["*k_proj"]), ["export.kv_cache_group", "k_proj"]),
    "kv cache number": (
        changed("fp8", "kv_cache_quant_config", to={"*k_proj": 5}),
        ["kv_cache_quant_config", "k_proj"],
    ),
    "kv cache list": (changed("fp8", "kv_cache_quant_config", to=["*k_proj"]), ["kv_cache_quant_config", "k_proj"]),
    "kv cache with a bad spec": (
        changed("mxfp4_kv_fp8", "kv_cache_quant_config", "*k_proj", "output_tensors", "dtype", to="fp7"),
        ["kv_cache_quant_config['*k_proj'].output_tensors.dtype", "'fp7'"],
    ),
    "kv cache after rope": (changed("fp8", "kv_cache_post_rope", to=True), ["kv_cache_post_rope", "True"]),
    "layer type": (
        changed("fp8", "layer_type_quant_config", to={"Conv2d": amd_quarks("fp8")[GLOBAL]}),
        ["layer_type_quant_config", "Conv2d", "only Linears"],
    ),
    "layer type list": (changed("fp8", "layer_type_quant_config", to=["Linear"]), ["layer_type_quant_config"]),
    "layer type with a bad spec": (
        changed("fp8", "layer_type_quant_config", to={"Linear": {"weight": "fp8"}}),
        ["layer_type_quant_config['Linear'].weight", "'fp8'"],
    ),
    "graph mode": (changed("fp8", "quant_mode", to="fx_graph_mode"), ["quant_mode", "'fx_graph_mode'"]),
    **{
        f"rotation {key}": (
            changed("fp8", "algo_config", to=[{"name": "rotation", "r1": True, key: True}]),
            ["algo_config", "'rotation'", "r1", "awq"],
        )
        for key in ("r2", "r3", "r4", "online_r1_rotation", "trainable", "online_config")
    },
    "second algorithm": (
        changed("fp8", "algo_config", to=[{"name": "awq"}, {"name": "svdquant"}]),
        ["algo_config", "'svdquant'"],
    ),
    "nameless algorithm": (changed("fp8", "algo_config", to=[{}]), ["algo_config", "None"]),
    "algorithm str": (changed("fp8", "algo_config", to=["awq"]), ["algo_config", "'awq'"]),
    "algorithm named by a list": (changed("fp8", "algo_config", to=[{"name": ["awq"]}]), ["algo_config", "awq"]),
    "algo_config number": (changed("fp8", "algo_config", to=5), ["algo_config", "5"]),
    "layers list": (changed("fp8", "layer_quant_config", to=["*"]), ["layer_quant_config"]),
    "layer str": (changed("fp8", "layer_quant_config", to={"*.q": "fp8"}), ["layer_quant_config['*.q']", "'fp8'"]),
    "layer with a bad spec": (
        changed("fp8", "layer_quant_config", to={"*.q": {"weight": {"dtype": "fp4", "qscheme": 1}}}),
        ["layer_quant_config['*.q'].weight.qscheme"],
    ),
    "exclude str": (changed("fp8", "exclude", to="lm_head"), ["exclude", "'lm_head'"]),
    "exclude number": (changed("fp8", "exclude", to=[1]), ["exclude", "1"]),
    "exclude object": (changed("fp8", "exclude", to={"lm_head": True}), ["exclude", "lm_head"]),
    "no regular expression": (changed("fp8", "exclude", to=["re:(a"]), ["exclude", "re:(a"]),
    "regular expression with a huge count": (
        changed("fp8", "exclude", to=["re:a{99999999999999999999}"]),
        ["exclude", "re:a{99999999999999999999}"],
    ),
    "hostile regular expression": (
        changed("fp8", "exclude", to=["re:" + "(" * 5000 + ")" * 5000]),
        ["exclude", "re:(("],
    ),
    "hostile nesting": (changed("fp8", GLOBAL, to=nested(300)), [f"{GLOBAL}.weight", "'weight'"]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_config_that_is_not_understood_is_refused_by_name(case: str) -> None:
    config, named = BAD[case]
    with pytest.raises(ConfigError) as caught:
        parse(copy.deepcopy(config))
    for text in named:
        assert text in str(caught.value)


@pytest.mark.parametrize("config", [None, [], "quark", 5, True])
def test_what_is_no_object_is_refused(config: Any) -> None:
    with pytest.raises(ConfigError, match=r"quantization_config .* expected a JSON object"):
        parse(config)


def test_a_config_error_is_a_value_error_and_ours() -> None:
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ConfigError, QuarkInductorError)


@pytest.mark.parametrize("remove", ["quant_method", "global_quant_config"])
def test_a_missing_key_is_named(remove: str) -> None:
    config = amd_quarks("mxfp4")
    del config[remove]
    with pytest.raises(ConfigError, match=remove):
        parse(config)


def every_key(config: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if not isinstance(config, dict):
        return []
    return [found for key, value in config.items() for found in [(*path, key), *every_key(value, (*path, key))]]


def replacements() -> list[Callable[[Any], Any]]:
    return [lambda v: 5, lambda v: "x", lambda v: [[]], lambda v: {"x": {}}, lambda v: True, lambda v: -1.5]


@pytest.mark.parametrize("path", every_key(amd_quarks("mxfp4")), ids=".".join)
def test_no_value_of_any_key_raises_anything_but_a_config_error(path: tuple[str, ...]) -> None:
    for replacement in replacements():
        config = changed("mxfp4", *path, to=replacement(None))
        try:
            parse(config)
        except ConfigError as error:
            # The message names the key, or the one around it.
            assert any(key in str(error) for key in path[-2:])  # noqa: PT017  (it need not raise)
