"""``quantization_config`` of a Quark checkpoint: read into specs, and written from them.

Every key is known here or is an error: a key that is skipped today is a wrong number tomorrow. Written after amd-quark
0.13 (``quark/torch/export/main_export/quant_config_parser.py`` and ``quantization/config/config.py``); older files
lack some keys, which then take the defaults below.
"""

import dataclasses
import fnmatch
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quark_inductor.schemes.errors import ConfigError
from quark_inductor.schemes.spec import PRESETS, LinearSpec, TensorSpec

QUARK_VERSION = "0.13"  # the format that is written

# Keys of a tensor spec that decide no number once the tensors are stored.
_INERT = {"enable_buffer_reuse", "max_input_numel", "observer_cls"}
# Keys that would decide one, with the values that mean nothing special.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "mx_element_dtype": (None,),
    "round_method": ("half_even", None),
    "zero_point_type": ("int32", None),
}
_SPEC_KEYS = {
    "block_size",
    "ch_axis",
    "dtype",
    "group_size",
    "is_dynamic",
    "is_scale_quant",
    "qscheme",
    "scale_calculation_mode",
    "scale_format",
    "scale_type",
    "symmetric",
}
_DTYPES = ("fp4", "fp6_e2m3", "fp6_e3m2", "fp8_e4m3", "fp8_e5m2", "fp8_e5m3", "int8", "uint8", "int4", "uint4")
_QSCHEMES = ("per_tensor", "per_channel", "per_group", "per_block")
_SCALE_RULES = ("even", "floor", "ceil", "rceil")
# Algorithms whose whole effect is in the stored weights.
_OFFLINE_ALGORITHMS = {"autosmoothquant", "awq", "gptaq", "gptq", "qronos", "smooth", "smoothquant"}
# Keys of quantization_config itself: what they must be if they are there (None: read elsewhere, or says nothing).
_TOP: dict[str, tuple[Any, ...] | None] = {
    "algo_config": None,
    "exclude": None,
    "export": None,
    "global_quant_config": None,
    "kv_cache_post_rope": (False, None),
    "kv_cache_quant_config": None,
    "layer_quant_config": None,
    "layer_type_quant_config": None,
    "quant_method": ("quark",),
    "quant_mode": ("eager_mode", None),
    "softmax_quant_spec": None,
    "version": None,
}
_EXPORT_KEYS = {"kv_cache_group", "min_kv_scale", "pack_method", "weight_format", "weight_merge_groups"}
_LAYER_KEYS = {"bias", "input_tensors", "output_tensors", "target_device", "weight"}

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class QuantizationConfig:
    """Which Linear is quantized how, as amd-quark 0.13 decides it (``quant_config_parser.py: get_layer_quant_config``).

    vLLM 0.33 reads the same keys differently: there a pattern of ``layer_quant_config`` without ``*`` matches every
    layer whose name it contains, ``layer_type_quant_config`` never matches, and ``exclude`` holds whole names or
    regular expressions, no fnmatch patterns.

    Attributes:
        default: the spec of every Linear that no pattern names.
        by_pattern: fnmatch pattern on the module's name -> spec; the first that matches wins.
        exclude: fnmatch patterns, or ``re:`` and a regular expression that must match from the name's start (as files
            on the hub and vLLM have it); a Linear one of them names is not quantized, whatever else names it.
        by_type: spec of a module type (``"Linear"``) that no pattern names.
        kv_cache: fnmatch pattern -> spec of the output of a Linear that is excluded; it stays quantized.
    """

    default: LinearSpec | None
    by_pattern: Mapping[str, LinearSpec | None] = field(default_factory=dict)
    exclude: tuple[str, ...] = ()
    by_type: Mapping[str, LinearSpec | None] = field(default_factory=dict)
    kv_cache: Mapping[str, TensorSpec | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what is no pattern.

        Raises:
            ConfigError: a regular expression that does not compile.
        """
        for pattern in self.exclude:
            try:
                re.compile(pattern.removeprefix("re:") if pattern.startswith("re:") else "")
            except (re.error, OverflowError, RecursionError) as e:
                raise ConfigError(f"exclude has {pattern[:80]!r}, which is no regular expression: {e}") from e

    def spec_for(self, name: str) -> LinearSpec | None:
        """The spec of the Linear of this name, or ``None`` if it is not quantized."""
        if any(_names(pattern, name) for pattern in self.exclude):
            output = _first_match(self.kv_cache, name, None)
            return None if output is None else LinearSpec(weight=None, output=output)
        return _first_match(self.by_pattern, name, self.by_type.get("Linear", self.default))


def _first_match(by_pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    return next((v for pattern, v in by_pattern.items() if fnmatch.fnmatchcase(name, pattern)), default)


def _names(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), name) is not None
    return fnmatch.fnmatchcase(name, pattern)


def parse(config: Any) -> QuantizationConfig:
    """A checkpoint's ``quantization_config`` as specs.

    Raises:
        ConfigError: anything in it is unknown, has the wrong type, or asks for what no scheme does yet.
    """
    where = "quantization_config"
    config = _mapping(config, where)
    method = config.get("quant_method")
    if method != "quark":
        raise ConfigError(
            f"{where}.quant_method is {method!r}, expected 'quark': this checkpoint was not written by AMD Quark in "
            "its own format; load it with transformers"
        )
    for key, value in config.items():
        if key not in _TOP:
            raise ConfigError(f"{where} has an unknown key {key!r} ({value!r}); known are {', '.join(sorted(_TOP))}")
        allowed = _TOP[key]
        if allowed is not None and value not in allowed:
            raise ConfigError(f"{where}.{key} is {value!r}, which is not supported yet; expected {allowed[0]!r}")
    export = _mapping(_given(config, "export", {}), f"{where}.export")
    if export.get("weight_format", "real_quantized") != "real_quantized":
        raise ConfigError(
            f"{where}.export.weight_format is {export['weight_format']!r}, expected 'real_quantized': export the model "
            "again with weight_format='real_quantized'"
        )
    if unknown := sorted(set(export) - _EXPORT_KEYS):
        raise ConfigError(f"{where}.export has unknown keys {unknown}; known are {sorted(_EXPORT_KEYS)}")
    pack_method = _given(export, "pack_method", "reorder")
    if pack_method not in ("reorder", "order"):
        raise ConfigError(f"{where}.export.pack_method is {pack_method!r}, expected 'reorder' or 'order'")
    _check_algorithms(_given(config, "algo_config", []), f"{where}.algo_config")
    if "global_quant_config" not in config:
        raise ConfigError(f"{where} has no global_quant_config: it says how the Linears are quantized")
    if config.get("softmax_quant_spec") is not None:
        log.warning("softmax_quant_spec is left out: amd-quark does not apply it to a loaded checkpoint either")
    exclude = _given(config, "exclude", [])
    if not isinstance(exclude, list) or not all(isinstance(e, str) for e in exclude):
        raise ConfigError(f"{where}.exclude is {exclude!r}, expected a list of names or patterns")

    def linear_specs(key: str) -> dict[str, LinearSpec | None]:
        entries = _mapping(_given(config, key, {}), f"{where}.{key}")
        return {p: _linear_spec(c, f"{where}.{key}[{p!r}]", pack_method) for p, c in entries.items()}

    by_pattern, by_type = linear_specs("layer_quant_config"), linear_specs("layer_type_quant_config")
    if unknown := sorted(set(by_type) - {"Linear"}):
        raise ConfigError(f"{where}.layer_type_quant_config has {unknown}: only Linears can be quantized yet")
    kv_cache = {
        p: spec.output if spec is not None else None for p, spec in linear_specs("kv_cache_quant_config").items()
    }
    groups = _given(export, "kv_cache_group", [])
    if not isinstance(groups, list) or not all(isinstance(group, str) for group in groups):
        raise ConfigError(f"{where}.export.kv_cache_group is {groups!r}, expected a list of patterns")
    for group in groups:
        if group not in kv_cache and group not in by_pattern:
            raise ConfigError(
                f"{where}.export.kv_cache_group has {group!r}, which neither kv_cache_quant_config nor "
                "layer_quant_config says how to quantize"
            )
    return QuantizationConfig(
        default=_linear_spec(config["global_quant_config"], f"{where}.global_quant_config", pack_method),
        by_pattern=by_pattern,
        exclude=tuple(exclude),
        by_type=by_type,
        kv_cache=kv_cache,
    )


def _given(config: Mapping[str, Any], key: str, default: Any) -> Any:
    """A value; the default where it is null or missing, as in older files."""
    value = config.get(key)
    return default if value is None else value


def _check_algorithms(algorithms: Any, where: str) -> None:
    if not isinstance(algorithms, list):
        raise ConfigError(f"{where} is {algorithms!r}, expected a list")
    for algorithm in algorithms:
        config = _mapping(algorithm, f"{where} entry")
        name = config.get("name")
        # The rotation r1 is merged into the weights; r2, r3, r4 (where they are not said to be off) and online ones are
        # not, or not wholly.
        offline_rotation = (
            name == "rotation"
            and all(config.get(key) is False for key in ("r2", "r3", "r4"))
            and not any(config.get(key) for key in ("online_config", "online_r1_rotation", "trainable", "train_smooth"))
        )
        if not isinstance(name, str) or not (name in _OFFLINE_ALGORITHMS or offline_rotation):
            raise ConfigError(
                f"{where} has {name!r}, which may change the model's graph; supported are "
                f"{', '.join(sorted(_OFFLINE_ALGORITHMS))} and rotation with r1 only, whose effect is in the weights"
            )


def from_presets(scheme: str | Mapping[str, str], exclude: str | Sequence[str]) -> QuantizationConfig:
    """The config of a scheme's name, or of fnmatch patterns on module names to scheme names (the first match wins).

    Args:
        scheme: as above.
        exclude: fnmatch patterns, or ``re:`` and a regular expression, of Linears that stay as they are.

    Raises:
        ConfigError: an unknown name.
    """
    exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    if isinstance(scheme, str):
        return QuantizationConfig(default=_preset(scheme), exclude=exclude)
    by_pattern = {pattern: _preset(name) for pattern, name in scheme.items()}
    return QuantizationConfig(default=None, by_pattern=by_pattern, exclude=exclude)


def _preset(name: str) -> LinearSpec:
    spec = PRESETS.get(name)
    if spec is None:
        raise ConfigError(f"there is no scheme {name!r}; expected one of {', '.join(PRESETS)}")
    return spec


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} is {value!r}, expected a JSON object")
    return value


def _linear_spec(config: Any, where: str, pack_method: str) -> LinearSpec | None:
    if config is None:
        return None
    config = _mapping(config, where)
    if unknown := sorted(set(config) - _LAYER_KEYS):
        raise ConfigError(f"{where} has unknown keys {unknown}; known are {sorted(_LAYER_KEYS)}")
    if config.get("bias") is not None:
        raise ConfigError(f"{where}.bias is {config['bias']!r}: a bias cannot be quantized yet")
    weight, inputs, output = (
        _tensor_spec(config.get(k), f"{where}.{k}") for k in ("weight", "input_tensors", "output_tensors")
    )
    if absent := sorted({"input_tensors", "weight"} - set(config)):
        raise ConfigError(f"{where} has no {absent[0]}; it says null where something is not quantized")
    if weight is None and inputs is not None:
        raise ConfigError(f"{where} quantizes the input but not the weight, which no scheme does")
    if weight is None and output is None:
        return None
    method = pack_method if _is_packed(weight) else "reorder"
    return LinearSpec(weight=weight, input=inputs, output=output, pack_method=method)


def _is_packed(weight: TensorSpec | None) -> bool:
    return weight is not None and "int4" in (weight.second or weight).dtype


def _tensor_spec(config: Any, where: str) -> TensorSpec | None:
    if config is None:
        return None
    if isinstance(config, list):
        if len(config) not in (1, 2):
            raise ConfigError(f"{where} has {len(config)} stages, expected one or two")
        stages = [_stage(c, f"{where}[{i}]", second=i == 1) for i, c in enumerate(config)]
        return dataclasses.replace(stages[0], second=stages[1] if len(stages) == 2 else None)
    return _stage(config, where, second=False)


def _stage(config: Any, where: str, second: bool) -> TensorSpec:
    config = _mapping(config, where)
    if unknown := sorted(set(config) - _INERT - set(_NEUTRAL) - _SPEC_KEYS):
        known = sorted(_INERT | set(_NEUTRAL) | _SPEC_KEYS)
        raise ConfigError(f"{where} has unknown keys {unknown}; known are {known}")
    for key, allowed in _NEUTRAL.items():
        if config.get(key) not in allowed:
            raise ConfigError(f"{where}.{key} is {config[key]!r}, which is not supported yet; expected {allowed[0]!r}")
    dtype = _choice(config, "dtype", _DTYPES, where)
    qscheme = _choice(config, "qscheme", _QSCHEMES, where)
    group = config.get("group_size")
    if group is not None and not _is_count(group):
        raise ConfigError(f"{where}.group_size is {group!r}, expected a positive number or null")
    block = config.get("block_size")
    if (qscheme == "per_block") != (block is not None) or not (
        block is None or (isinstance(block, list) and len(block) == 2 and all(map(_is_count, block)))
    ):
        raise ConfigError(
            f"{where}.block_size is {block!r} with {qscheme}, expected two numbers with per_block, else null"
        )
    if qscheme == "per_group" and group is None:
        raise ConfigError(f"{where}.group_size is null with per_group, expected a positive number")
    axis = config.get("ch_axis")
    # A group runs along the last dimension. A channel of a weight is a row; a channel of an activation [batch, tokens,
    # K] is a token, which amd-quark writes as axis 1.
    expected = {"per_group": (-1, 1, None), "per_channel": (0,) if ".weight" in where else (1,)}.get(qscheme)
    if expected is not None and (axis not in expected or isinstance(axis, bool)):
        raise ConfigError(f"{where}.ch_axis is {axis!r} with {qscheme}, expected {expected[0]}")
    scale_format = _choice(config, "scale_format", (None, "e8m0", "e5m3", "float32"), where)
    if scale_format is not None and qscheme != "per_group":
        raise ConfigError(f"{where}.scale_format is {scale_format!r} with {qscheme}, expected null")
    scale_type = _choice(config, "scale_type", (None, "float", "float32", "float8_e5m3"), where)
    if scale_type == "float8_e5m3" and scale_format != "e5m3":
        raise ConfigError(f"{where}.scale_type is 'float8_e5m3', the scale_format {scale_format!r}; expected 'e5m3'")
    mode = _choice(config, "scale_calculation_mode", (None, *_SCALE_RULES), where)
    if mode is not None and scale_format != "e8m0":
        raise ConfigError(
            f"{where}.scale_calculation_mode is {mode!r}, the scale_format {scale_format!r}; expected null"
        )
    integer = "int" in dtype
    symmetric = config.get("symmetric")
    if symmetric not in ((True, False) if integer else (True, None)) or type(symmetric) is int:
        values = "true or false" if integer else "true or null"
        raise ConfigError(f"{where}.symmetric is {symmetric!r} with {dtype}, expected {values}")
    scale_quant = _flag(config, "is_scale_quant", where)
    if scale_quant and not second:
        raise ConfigError(f"{where}.is_scale_quant is true, which only the second of two stages can be")
    return TensorSpec(
        dtype=dtype,
        qscheme=qscheme,
        group_size=group if qscheme == "per_group" else None,
        block_size=None if block is None else (block[0], block[1]),
        is_dynamic=_flag(config, "is_dynamic", where),
        symmetric=bool(symmetric) if integer else True,
        scale_format=scale_format,
        scale_type="float32" if scale_type == "float32" else None,
        scale_calculation_mode=(mode or "even") if scale_format == "e8m0" else None,
        is_scale_quant=scale_quant,
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _choice(config: Mapping[str, Any], key: str, allowed: tuple[str | None, ...], where: str) -> Any:
    value = config.get(key)
    if not isinstance(value, str | None) or value not in allowed:
        raise ConfigError(f"{where}.{key} is {value!r}; expected one of {', '.join(map(repr, allowed))}")
    return value


def _flag(config: Mapping[str, Any], key: str, where: str) -> bool:
    value = config.get(key)
    if value is not None and type(value) is not bool:
        raise ConfigError(f"{where}.{key} is {value!r}, expected true or false")
    return bool(value)


def to_json(linears: Mapping[str, LinearSpec], unquantized: list[str]) -> dict[str, Any]:
    """The ``quantization_config`` of a model, as amd-quark 0.13 writes it.

    Args:
        linears: the quantized Linears' specs by module name, at least one.
        unquantized: names of the Linears that are not quantized.

    Raises:
        ConfigError: 4-bit integers packed in two orders; a checkpoint has one.
    """
    counts = Counter(spec for spec in linears.values() if spec.weight is not None)
    default = counts.most_common(1)[0][0] if counts else None
    methods = {s.pack_method for s in linears.values() if _is_packed(s.weight)}
    if len(methods) > 1:
        raise ConfigError("the model's 4-bit integers are packed in two orders, a checkpoint has one; save it in parts")
    cached = {n: s for n, s in linears.items() if s.output is not None and n.endswith(("k_proj", "v_proj"))}
    kept_float = [n for n, s in linears.items() if s.weight is None]
    if not_cached := sorted(set(kept_float) - set(cached)):
        raise ConfigError(f"{not_cached[0]}: only a k_proj or v_proj can have a quantized output and a float weight")
    return {
        "algo_config": None,
        "exclude": [*unquantized, *kept_float],
        "export": {
            "kv_cache_group": sorted(cached),
            "min_kv_scale": 0.0,
            "pack_method": methods.pop() if methods else "reorder",
            "weight_format": "real_quantized",
            "weight_merge_groups": None,
        },
        "global_quant_config": None if default is None else _linear_json(default),
        "kv_cache_post_rope": False,
        "kv_cache_quant_config": {name: _linear_json(spec) for name, spec in cached.items()},
        "layer_quant_config": {
            name: _linear_json(spec)
            for name, spec in linears.items()
            if spec not in (default,) and spec.weight is not None
        },
        "layer_type_quant_config": {},
        "quant_method": "quark",
        "quant_mode": "eager_mode",
        "softmax_quant_spec": None,
        "version": QUARK_VERSION,
    }


def _linear_json(spec: LinearSpec) -> dict[str, Any]:
    return {
        "bias": None,
        "input_tensors": _tensor_json(spec.input, channel_axis=1),
        "output_tensors": _tensor_json(spec.output, channel_axis=1),
        "target_device": None,
        "weight": _tensor_json(spec.weight, channel_axis=0),
    }


def _tensor_json(spec: TensorSpec | None, channel_axis: int) -> Any:
    if spec is None:
        return None
    if spec.second is not None:
        first = dataclasses.replace(spec, second=None)
        return [_tensor_json(first, channel_axis), _tensor_json(spec.second, channel_axis)]
    integer, in_blocks = "int" in spec.dtype, spec.qscheme == "per_group" and "int" not in spec.dtype
    observers = {
        "per_tensor": "PerTensorMinMaxObserver",
        "per_channel": "PerChannelMinMaxObserver",
        "per_group": "PerBlockMXObserver" if spec.scale_format else "PerGroupMinMaxObserver",
        "per_block": "PerBlock2DMinMaxObserver",
    }
    return {
        "block_size": None if spec.block_size is None else list(spec.block_size),
        "ch_axis": {"per_channel": channel_axis, "per_group": -1}.get(spec.qscheme),
        "dtype": spec.dtype,
        "enable_buffer_reuse": False,
        "group_size": spec.group_size,
        "is_dynamic": spec.is_dynamic,
        "is_scale_quant": spec.is_scale_quant,
        "max_input_numel": 4194304,
        "mx_element_dtype": None,
        "observer_cls": observers[spec.qscheme],
        "qscheme": spec.qscheme,
        "round_method": "half_even",
        "scale_calculation_mode": spec.scale_calculation_mode,
        "scale_format": spec.scale_format,
        "scale_type": "float8_e5m3" if spec.scale_format == "e5m3" else spec.scale_type or "float",
        "symmetric": spec.symmetric if integer else None if in_blocks and spec.scale_format else True,
        "zero_point_type": "int32",
    }
