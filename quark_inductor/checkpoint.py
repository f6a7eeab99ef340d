"""``quantization_config`` of a Quark checkpoint: read into specs, and written from them.

Every key is known here or is an error: a key that is skipped today is a wrong number tomorrow. Written after amd-quark
0.13 (``quark/torch/export/main_export/quant_config_parser.py`` and ``quantization/config/config.py``); older files
lack some keys, which then take the defaults below.
"""

import fnmatch
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quark_inductor.schemes.errors import ConfigError
from quark_inductor.schemes.spec import LinearSpec, TensorSpec

QUARK_VERSION = "0.13"  # the format that is written

# Keys of a tensor spec that decide no number once the tensors are stored.
_INERT = {"enable_buffer_reuse", "max_input_numel", "observer_cls", "zero_point_type"}
# Keys that would decide one, with the values that mean nothing special.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "block_size": (None,),
    "is_scale_quant": (False, None),
    "mx_element_dtype": (None,),
    "round_method": ("half_even", None),
    "scale_type": ("float", None),  # the model's dtype
    "symmetric": (True, None),
}
_SPEC_KEYS = {"dtype", "qscheme", "ch_axis", "group_size", "is_dynamic", "scale_format", "scale_calculation_mode"}
# Algorithms whose whole effect is in the stored weights.
_OFFLINE_ALGORITHMS = {"autosmoothquant", "awq", "gptaq", "gptq", "qronos", "smooth", "smoothquant"}
# Keys of quantization_config itself: what they must be if they are there (None: read elsewhere, or says nothing).
_TOP: dict[str, tuple[Any, ...] | None] = {
    "algo_config": None,
    "exclude": None,
    "export": None,
    "global_quant_config": None,
    "kv_cache_post_rope": (False, None),
    "kv_cache_quant_config": ({}, None),
    "layer_quant_config": None,
    "layer_type_quant_config": ({}, None),
    "quant_method": ("quark",),
    "quant_mode": ("eager_mode", None),
    "softmax_quant_spec": (None,),
    "version": None,
}
_EXPORT_KEYS = {"kv_cache_group", "min_kv_scale", "pack_method", "weight_format", "weight_merge_groups"}
_LAYER_KEYS = {"bias", "input_tensors", "output_tensors", "target_device", "weight"}


@dataclass(frozen=True, slots=True)
class QuantizationConfig:
    """Which Linear is quantized how.

    Attributes:
        default: the spec of every Linear that no pattern names.
        by_pattern: fnmatch pattern on the module's name -> spec; the first that matches wins.
        exclude: fnmatch patterns, or ``re:`` and a regular expression that must match from the name's start (as files
        on
            the hub and vLLM have it); a Linear one of them names is not quantized, whatever else names it.
    """

    default: LinearSpec | None
    by_pattern: Mapping[str, LinearSpec | None] = field(default_factory=dict)
    exclude: tuple[str, ...] = ()

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
            return None
        for pattern, spec in self.by_pattern.items():
            if fnmatch.fnmatchcase(name, pattern):
                return spec
        return self.default


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
    export = _mapping(config.get("export") or {}, f"{where}.export")
    if export.get("weight_format", "real_quantized") != "real_quantized":
        raise ConfigError(
            f"{where}.export.weight_format is {export['weight_format']!r}, expected 'real_quantized': export the model "
            "again with weight_format='real_quantized'"
        )
    if export.get("kv_cache_group"):
        groups = export["kv_cache_group"]
        raise ConfigError(f"{where}.export.kv_cache_group is {groups!r}: a quantized KV cache is not supported yet")
    if unknown := sorted(set(export) - _EXPORT_KEYS):
        raise ConfigError(f"{where}.export has unknown keys {unknown}; known are {sorted(_EXPORT_KEYS)}")
    if export.get("pack_method") not in (None, "reorder", "order"):
        raise ConfigError(f"{where}.export.pack_method is {export['pack_method']!r}, expected 'reorder' or 'order'")
    algorithms = config.get("algo_config") or []
    if not isinstance(algorithms, list):
        raise ConfigError(f"{where}.algo_config is {algorithms!r}, expected a list")
    for algorithm in algorithms:
        name = _mapping(algorithm, f"{where}.algo_config entry").get("name")
        if not isinstance(name, str) or name not in _OFFLINE_ALGORITHMS:
            raise ConfigError(
                f"{where}.algo_config has {name!r}, which may change the model's graph; supported are "
                f"{', '.join(sorted(_OFFLINE_ALGORITHMS))}, whose whole effect is in the weights"
            )
    if "global_quant_config" not in config:
        raise ConfigError(f"{where} has no global_quant_config: it says how the Linears are quantized")
    layers = _mapping(config.get("layer_quant_config") or {}, f"{where}.layer_quant_config")
    exclude = config.get("exclude") or []
    if not isinstance(exclude, list) or not all(isinstance(e, str) for e in exclude):
        raise ConfigError(f"{where}.exclude is {exclude!r}, expected a list of names or patterns")
    return QuantizationConfig(
        default=_linear_spec(config["global_quant_config"], f"{where}.global_quant_config"),
        by_pattern={p: _linear_spec(c, f"{where}.layer_quant_config[{p!r}]") for p, c in layers.items()},
        exclude=tuple(exclude),
    )


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} is {value!r}, expected a JSON object")
    return value


def _linear_spec(config: Any, where: str) -> LinearSpec | None:
    if config is None:
        return None
    config = _mapping(config, where)
    if unknown := sorted(set(config) - _LAYER_KEYS):
        raise ConfigError(f"{where} has unknown keys {unknown}; known are {sorted(_LAYER_KEYS)}")
    for key in ("output_tensors", "bias"):
        if config.get(key) is not None:
            raise ConfigError(f"{where}.{key} is {config[key]!r}: only weights and inputs can be quantized yet")
    weight = _tensor_spec(config.get("weight"), f"{where}.weight")
    inputs = _tensor_spec(config.get("input_tensors"), f"{where}.input_tensors")
    if weight is None:
        if inputs is not None:
            raise ConfigError(f"{where} quantizes the input but not the weight, which no scheme does")
        return None
    return LinearSpec(weight=weight, input=inputs)


def _tensor_spec(config: Any, where: str) -> TensorSpec | None:
    if config is None:
        return None
    if isinstance(config, list):
        raise ConfigError(f"{where} has {len(config)} stages; only single-stage specs are supported yet")
    config = _mapping(config, where)
    if unknown := sorted(set(config) - _INERT - set(_NEUTRAL) - _SPEC_KEYS):
        known = sorted(_INERT | set(_NEUTRAL) | _SPEC_KEYS)
        raise ConfigError(f"{where} has unknown keys {unknown}; known are {known}")
    for key, allowed in _NEUTRAL.items():
        if config.get(key) not in allowed:
            raise ConfigError(f"{where}.{key} is {config[key]!r}, which is not supported yet; expected {allowed[0]!r}")
    for key in ("dtype", "qscheme"):
        if not isinstance(config.get(key), str):
            raise ConfigError(f"{where}.{key} is {config.get(key)!r}, expected a name such as 'fp8_e4m3', 'per_tensor'")
    group = config.get("group_size")
    if group is not None and (not isinstance(group, int) or group < 1):
        raise ConfigError(f"{where}.group_size is {group!r}, expected a positive number or null")
    axis, qscheme = config.get("ch_axis"), config["qscheme"]
    # A group runs along the last dimension. A channel of a weight is a row; a channel of an activation [batch, tokens,
    # K] is a token, which amd-quark writes as axis 1.
    expected = {"per_group": (-1, 1, None), "per_channel": (1,) if ".input" in where else (0,)}.get(qscheme)
    if expected is not None and axis not in expected:
        raise ConfigError(f"{where}.ch_axis is {axis!r} with {qscheme}, expected {expected[0]}")
    scale_format = config.get("scale_format")
    if scale_format is not None and qscheme != "per_group":
        raise ConfigError(f"{where}.scale_format is {scale_format!r} with {qscheme}, expected null")
    e8m0 = scale_format == "e8m0"
    dynamic = config.get("is_dynamic")
    if dynamic not in (True, False, None) or (isinstance(dynamic, int) and not isinstance(dynamic, bool)):
        raise ConfigError(f"{where}.is_dynamic is {dynamic!r}, expected true or false")
    return TensorSpec(
        dtype=config["dtype"],
        qscheme=qscheme,
        group_size=group if qscheme == "per_group" else None,
        is_dynamic=bool(dynamic),
        scale_format=scale_format,
        scale_calculation_mode=(config.get("scale_calculation_mode") or "even") if e8m0 else None,
    )


def to_json(linears: Mapping[str, LinearSpec], unquantized: list[str]) -> dict[str, Any]:
    """The ``quantization_config`` of a model, as amd-quark 0.13 writes it.

    Args:
        linears: the quantized Linears' specs by module name, at least one.
        unquantized: names of the Linears that are not quantized.
    """
    counts = Counter(linears.values())
    default = counts.most_common(1)[0][0]
    return {
        "algo_config": None,
        "exclude": unquantized,
        "export": {
            "kv_cache_group": [],
            "min_kv_scale": 0.0,
            "pack_method": "reorder",
            "weight_format": "real_quantized",
            "weight_merge_groups": None,
        },
        "global_quant_config": _linear_json(default),
        "kv_cache_post_rope": False,
        "kv_cache_quant_config": {},
        "layer_quant_config": {name: _linear_json(spec) for name, spec in linears.items() if spec != default},
        "layer_type_quant_config": {},
        "quant_method": "quark",
        "quant_mode": "eager_mode",
        "softmax_quant_spec": None,
        "version": QUARK_VERSION,
    }


def _linear_json(spec: LinearSpec) -> dict[str, Any]:
    return {
        "bias": None,
        "input_tensors": None if spec.input is None else _tensor_json(spec.input, channel_axis=1),
        "output_tensors": None,
        "target_device": None,
        "weight": _tensor_json(spec.weight, channel_axis=0),
    }


def _tensor_json(spec: TensorSpec, channel_axis: int) -> dict[str, Any]:
    e8m0 = spec.scale_format == "e8m0"
    observers = {"per_tensor": "PerTensorMinMaxObserver", "per_channel": "PerChannelMinMaxObserver"}
    return {
        "block_size": None,
        "ch_axis": {"per_tensor": None, "per_channel": channel_axis, "per_group": -1}[spec.qscheme],
        "dtype": spec.dtype,
        "enable_buffer_reuse": False,
        "group_size": spec.group_size,
        "is_dynamic": spec.is_dynamic,
        "is_scale_quant": False,
        "max_input_numel": 4194304,
        "mx_element_dtype": None,
        "observer_cls": "PerBlockMXObserver" if e8m0 else observers[spec.qscheme],
        "qscheme": spec.qscheme,
        "round_method": "half_even",
        "scale_calculation_mode": spec.scale_calculation_mode,
        "scale_format": spec.scale_format,
        "scale_type": "float",
        "symmetric": None if e8m0 else True,
        "zero_point_type": "int32",
    }
