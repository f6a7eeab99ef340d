"""A float model into a quantized one, in place."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quark_inductor.checkpoint import QuantizationConfig, from_presets
from quark_inductor.experts import finish_experts, packing_for, split_float_experts_
from quark_inductor.loading import naming, quantized_linears, replace_linears
from quark_inductor.schemes.base import QuarkLinear, set_parameters
from quark_inductor.schemes.errors import ConfigError
from quark_inductor.schemes.experts import QuarkExperts


def quantize_(
    model: nn.Module,
    scheme: str | Mapping[str, str],
    exclude: str | Sequence[str] = ("lm_head",),
    calibration: Iterable[Any] | None = None,
) -> nn.Module:
    """Quantize a model's Linears in place, with amd-quark's numbers.

    Args:
        model: a float model with its weights; every ``nn.Linear`` in it is a candidate, and so are the experts of
            transformers' models, as Linears under amd-quark's names (``mlp.experts.0.gate_proj``, ...).
        scheme: a scheme's name (``"mxfp4"``, ``"ptpc_fp8"``, ``"nvfp4"``, ...), or a dict of fnmatch patterns on module
            names to scheme names: the first that matches wins, a Linear that none matches stays as it is.
        exclude: fnmatch patterns (or ``re:`` and a regular expression) of Linears that stay as they are.
        calibration: inputs of the model, for schemes with static activation scales: a tensor (token ids), or a mapping
            of keyword arguments, each. The float model runs on all of them; the smallest and largest value each Linear
            gets make its scales. NVFP4's global weight scale is shared by calibrated Linears that read one activation.

    Returns:
        The model, in eval mode; none of its parameters wants a gradient any more.

    Raises:
        ConfigError: an unknown scheme, or one that must be calibrated without data; nothing to quantize; a NaN or an
            infinity in a weight or in what the calibration data gives.
        ShapeError: a layer's sizes do not fit the scheme; exclude it.
    """
    config = from_presets(scheme, exclude)
    undo = split_float_experts_(model, lambda name: config.spec_for(name) is not None)
    try:
        planned, seen = _plan(model, config, calibration)
    except BaseException:
        undo()
        raise
    del undo  # it holds float weights
    for name in list(planned):
        old, new = planned.pop(name)  # so that a float weight is freed as soon as it is quantized
        if new.weight.is_meta:
            with naming(name), packing_for(model, name):
                _quantize(old, new, seen.get(name))
        replace_linears(model, {name: (old, new)})
    finish_experts(model)
    return model.requires_grad_(False).eval()


def _plan(
    model: nn.Module, config: QuantizationConfig, calibration: Iterable[Any] | None
) -> tuple[dict[str, tuple[nn.Linear, QuarkLinear]], dict[str, "_Seen"]]:
    """What replaces each Linear, and what calibration has seen of it. Every layer is checked; none is changed."""
    linears = [m for m in model.modules() if type(m) is nn.Linear]
    dtypes = {m.weight.dtype for m in linears}
    if len(dtypes) != 1:
        raise ConfigError(
            f"the model's Linears have {len(dtypes)} dtypes ({dtypes}), expected one: cast the model first"
        )
    planned = quantized_linears(model, config.spec_for, dtypes.pop())
    static = [n for n, (_, new) in planned.items() if _is_calibrated(new)]
    if static and calibration is None:
        raise ConfigError(
            f"{static[0]}: [{planned[static[0]][1].scheme.spec}] has static activation scales, which need calibration: "
            "pass calibration=, an iterable of inputs of the model"
        )
    for name, (old, _) in planned.items():
        if not old.weight.isfinite().all():
            raise ConfigError(f"{name}: the weight holds a NaN or an infinity, which cannot be quantized")
    if calibration is None:
        return planned, {}
    return planned, _run(model, {n: old for n, (old, _) in planned.items()}, calibration, _synchronized(model, planned))


def _synchronized(model: nn.Module, planned: Mapping[str, tuple[nn.Linear, QuarkLinear]]) -> Iterable[list[str]]:
    """Linears that get one range: in amd-quark NVFP4 has one global scale for the inputs of all experts of a layer."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, (_, new) in planned.items():
        experts, _, linear = name.rpartition(".")
        experts = experts.rpartition(".")[0]
        has_global = new.scheme.spec.input is not None and new.scheme.spec.input.second is not None
        if has_global and isinstance(model.get_submodule(experts), QuarkExperts):
            groups.setdefault((experts, linear), []).append(name)
    return groups.values()


@dataclass(slots=True)
class _Seen:
    """What one Linear got: the range of its inputs, and the largest weight among those that got the same ones."""

    amin: Tensor
    amax: Tensor
    weight_amax: Tensor


def _quantize(old: nn.Linear, new: QuarkLinear, seen: _Seen | None) -> None:
    scheme = new.scheme
    weight = old.weight.data.contiguous()  # of an expert it may be part of a transposed one
    if seen is None or scheme.input is None or not _is_calibrated(new):
        tensors = scheme.quantize_weight(weight)
    else:
        tensors = scheme.quantize_shared_weight(weight, seen.weight_amax)
        tensors = {**tensors, **scheme.input.calibrated(seen.amin, seen.amax)}
    set_parameters(new, **tensors)
    new.bias = old.bias
    scheme.process_weights_after_loading(new)
    new.pack_()


def _is_calibrated(linear: QuarkLinear) -> bool:
    """Whether parameters of the input's quantizer are stored."""
    return linear.scheme.input is not None and bool(linear.scheme.input.tensors(linear.params_dtype))


@torch.no_grad()
def _run(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    calibration: Iterable[Any],
    synchronized: Iterable[list[str]],
) -> dict[str, _Seen]:
    """Run the float model; what each Linear saw, or all of a synchronized group.

    Raises:
        ConfigError: no data; a Linear that saw none, or something that is not finite.
    """
    ranges: dict[str, tuple[Tensor, Tensor]] = {}
    sharing: dict[str, set[str]] = {name: {name} for name in linears}
    last: tuple[Tensor | None, str] = None, ""

    def observe(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal last
            x = args[0]
            # Linears that read one activation are called one after the other with the same tensor.
            if last[0] is x:
                together = sharing[last[1]] | sharing[name]
                sharing.update(dict.fromkeys(together, together))
            last = x, name
            amin, amax = x.aminmax()
            if name in ranges:
                amin, amax = torch.minimum(amin, ranges[name][0]), torch.maximum(amax, ranges[name][1])
            ranges[name] = amin, amax

        return hook

    with contextlib.ExitStack() as stack:
        for name, linear in linears.items():
            stack.callback(linear.register_forward_pre_hook(observe(name)).remove)
        with _evaluating(model):
            for inputs in calibration:
                if isinstance(inputs, Mapping):
                    model(**inputs)
                else:
                    model(inputs)
    for names in synchronized:
        if seen := [ranges[name] for name in names if name in ranges]:
            lows, highs = zip(*seen, strict=True)
            ranges.update(dict.fromkeys(names, (torch.stack(lows).amin(), torch.stack(highs).amax())))
    for name in linears:
        if name not in ranges:
            raise ConfigError(f"{name}: the calibration data never reached it; exclude it, or calibrate with more")
        if not all(bound.isfinite() for bound in ranges[name]):
            raise ConfigError(f"{name}: its input was not finite for some of the calibration data")
    amaxes = {name: linear.weight.abs().amax() for name, linear in linears.items()}
    return {
        name: _Seen(*ranges[name], torch.stack([amaxes[n] for n in together]).amax())
        for name, together in sharing.items()
    }


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in was.items():
            module.training = training
