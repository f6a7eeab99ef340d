"""A float model into a quantized one, in place, for schemes whose activations need no calibration."""

from collections.abc import Mapping, Sequence

from torch import nn

from quark_inductor.checkpoint import QuantizationConfig
from quark_inductor.loading import quantized_linears, replace_linears
from quark_inductor.schemes.base import set_parameters
from quark_inductor.schemes.errors import ConfigError
from quark_inductor.schemes.spec import PRESETS, LinearSpec


def quantize_(
    model: nn.Module, scheme: str | Mapping[str, str], exclude: str | Sequence[str] = ("lm_head",)
) -> nn.Module:
    """Quantize a model's Linears in place, with amd-quark's numbers.

    Args:
        model: a float model with its weights; every ``nn.Linear`` in it is a candidate.
        scheme: a scheme's name (``"mxfp4"``, ``"ptpc_fp8"``, ``"fp8_dynamic"``), or a dict of fnmatch patterns on
        module
            names to scheme names: the first that matches wins, a Linear that none matches stays as it is.
        exclude: fnmatch patterns (or ``re:`` and a regular expression) of Linears that stay as they are.

    Returns:
        The model, in eval mode; none of its parameters wants a gradient any more.

    Raises:
        ConfigError: an unknown scheme, or one whose activation scales must be calibrated; nothing to quantize.
        ShapeError: a layer's sizes do not fit the scheme; exclude it.
    """
    exclude = (exclude,) if isinstance(exclude, str) else exclude
    if isinstance(scheme, str):
        config = QuantizationConfig(default=_preset(scheme), exclude=tuple(exclude))
    else:
        by_pattern = {pattern: _preset(name) for pattern, name in scheme.items()}
        config = QuantizationConfig(default=None, by_pattern=by_pattern, exclude=tuple(exclude))
    linears = [m for m in model.modules() if type(m) is nn.Linear]
    dtypes = {m.weight.dtype for m in linears}
    if len(dtypes) != 1:
        raise ConfigError(
            f"the model's Linears have {len(dtypes)} dtypes ({dtypes}), expected one: cast the model first"
        )
    # Every layer is checked before the first is changed: an error leaves the model as it was.
    planned = quantized_linears(model, config, dtypes.pop())
    for name, (old, _) in planned.items():
        if not old.weight.isfinite().all():
            raise ConfigError(f"{name}: the weight holds a NaN or an infinity, which cannot be quantized")
    del linears
    for name in list(planned):
        old, new = planned.pop(name)  # so that a float weight is freed as soon as it is quantized
        if new.weight.is_meta:
            set_parameters(new, **new.scheme.quantize_weight(old.weight.data))
            new.bias = old.bias
        replace_linears(model, {name: (old, new)})
    return model.requires_grad_(False).eval()


def _preset(name: str) -> LinearSpec:
    spec = PRESETS.get(name)
    if spec is None:
        raise ConfigError(f"there is no scheme {name!r}; expected one of {', '.join(PRESETS)}")
    if spec.input is not None and not spec.input.is_dynamic:
        raise ConfigError(f"{name!r} has static activation scales, which need calibration: export it with amd-quark")
    return spec
