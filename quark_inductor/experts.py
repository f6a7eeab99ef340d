"""Experts of transformers' models, which hold all of a layer's as one parameter, as Linears of their own and back."""

import contextlib
import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quark_inductor.files import StoredTensor
from quark_inductor.schemes.base import QuarkLinear, replace_module
from quark_inductor.schemes.experts import DOWN, QuarkExperts
from quark_inductor.schemes.memory import short_lived

# Transformers before 5 had, and amd-quark under them wrote, Mixtral's experts under these names.
_OLD_MODULE, _OLD_LINEARS = "block_sparse_moe", {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_OLD_NAME = re.compile(rf"^(.*)\.{_OLD_MODULE}\.(?:experts\.(\d+)\.(w[123])\.)?(.+)$")
# amd-quark adds up the experts of these in float32, all others in the dtype of the activation.
SUMMED_IN_FLOAT32 = frozenset({"GptOssExperts"})


def experts_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The modules of a model that hold experts as transformers' ``use_experts_implementation`` has them, by name."""
    for name, module in model.named_modules():
        down = module._parameters.get(DOWN)
        if hasattr(module, "is_concatenated") and down is not None and down.ndim == 3:
            yield name, module


def linears_of(module: Any) -> dict[str, tuple[str, slice]]:
    """An expert's Linears by amd-quark's names: the parameter each is part of, and which of its output features."""
    parameter = "gate_up_proj" if module.has_gate else "up_proj"
    n = module._parameters[parameter].shape[2 if module.is_transposed else 1]
    if parameter == "gate_up_proj" and module.is_concatenated:
        into = {"gate_proj": (parameter, slice(0, n // 2)), "up_proj": (parameter, slice(n // 2, n))}
    else:
        into = {parameter: (parameter, slice(0, n))}
    h = module._parameters[DOWN].shape[2 if module.is_transposed else 1]
    return {**into, DOWN: (DOWN, slice(0, h))}


def with_todays_names(model: nn.Module, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """A checkpoint's tensors, those of Mixtral's experts under the names that they have since transformers 5."""
    modules = {name for name, _ in model.named_modules()}
    tensors = {}
    for name, tensor in stored.items():
        old = _OLD_NAME.match(name)
        if old is None or f"{old[1]}.{_OLD_MODULE}" in modules or f"{old[1]}.mlp" not in modules:
            tensors[name] = tensor
        elif old[2] is None:
            tensors[f"{old[1]}.mlp.{old[4]}"] = tensor
        else:
            tensors[f"{old[1]}.mlp.experts.{old[2]}.{_OLD_LINEARS[old[3]]}.{old[4]}"] = tensor
    return tensors


def split_for_(
    model: nn.Module, stored: Mapping[str, StoredTensor], wanted: Callable[[str], bool]
) -> dict[str, StoredTensor]:
    """Put Linears in the place of those experts that a checkpoint has as Linears, or that shall be quantized.

    Args:
        model: changed in place.
        stored: the checkpoint's tensors.
        wanted: whether a Linear shall be quantized, by name, of experts that the checkpoint has as one parameter.

    Returns:
        The tensors: such a parameter is replaced by its parts.
    """
    expert = re.compile(r"^(.+)\.\d+\.[^.]+\.[^.]+$")
    by_linears = {found[1] for name in stored if (found := expert.match(name))}
    tensors = dict(stored)
    for name, module in list(experts_of(model)):
        parts = linears_of(module)
        if name not in by_linears:
            if not _any_wanted(name, module, wanted):
                continue
            _replace_by_parts(tensors, name, module, parts)
        replace_module(model, name, _split(module))
    return tensors


def _replace_by_parts(
    tensors: dict[str, StoredTensor], name: str, module: Any, parts: Mapping[str, tuple[str, slice]]
) -> None:
    for linear, (parameter, rows) in parts.items():
        for suffix, end in (("weight", ""), ("bias", "_bias")):
            whole = tensors.get(f"{name}.{parameter}{end}")
            if whole is None or not whole.shape:
                continue
            n, transposed = rows.stop - rows.start, module.is_transposed and suffix == "weight"
            shape = (n, whole.shape[-2 if transposed else -1]) if suffix == "weight" else (n,)
            for e in range(whole.shape[0]):
                part = dataclasses.replace(whole, shape=shape, part=(e, rows.start, rows.stop, transposed))
                tensors[f"{name}.{e}.{linear}.{suffix}"] = part
    for parameter in {parameter for parameter, _ in parts.values()}:
        for end in ("", "_bias"):
            tensors.pop(f"{name}.{parameter}{end}", None)


def split_experts_(model: nn.Module, wanted: Callable[[str], bool]) -> list[QuarkExperts]:
    """Put Linears in the place of the experts' parameters, views of their parts.

    Args:
        model: changed in place.
        wanted: which modules of experts, by name.

    Returns:
        What took their places.
    """
    found = []
    for name, module in list(experts_of(model)):
        if wanted(name):
            found.append(_split(module))
            replace_module(model, name, found[-1])
    return found


def _any_wanted(name: str, module: Any, wanted: Callable[[str], bool]) -> bool:
    experts = range(module._parameters[DOWN].shape[0])
    return any(wanted(f"{name}.{e}.{linear}") for linear in linears_of(module) for e in experts)


def split_float_experts_(model: nn.Module, wanted: Callable[[str], bool]) -> Callable[[], None]:
    """Put Linears in the place of experts of which some shall be quantized; they share the parameters' memory.

    Args:
        model: changed in place.
        wanted: whether a Linear shall be quantized, by name.

    Returns:
        What puts the model's own modules back, with their parameters.
    """
    found = {name: module for name, module in experts_of(model) if _any_wanted(name, module, wanted)}
    parameters = {name: dict(module._parameters) for name, module in found.items()}
    for name, module in found.items():
        replace_module(model, name, _split(module))

    def undo() -> None:
        for name, module in found.items():
            module._parameters.update(parameters[name])
            replace_module(model, name, module)

    return undo


def _split(module: Any) -> QuarkExperts:
    parts = linears_of(module)
    weights = {name: module._parameters[name] for name, _ in parts.values()}
    experts = []
    for e in range(weights[DOWN].shape[0]):
        linears: dict[str, nn.Module] = {}
        for name, (parameter, rows) in parts.items():
            weight = weights[parameter].data[e]
            weight = (weight.t() if module.is_transposed else weight)[rows]
            bias = module._parameters[f"{parameter}_bias"].data[e][rows] if module.has_bias else None
            linears[name] = _linear(weight, bias)
        experts.append(linears)
    for name in weights:
        del module._parameters[name]
        module._parameters.pop(f"{name}_bias", None)
    module._is_hf_initialized = True  # or transformers, loading a checkpoint, gives its parameters random values
    sums = torch.float32 if type(module).__name__ in SUMMED_IN_FLOAT32 else None
    return QuarkExperts(experts, module, sums)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    n, k = weight.shape
    linear = nn.Linear(k, n, bias=bias is not None, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def packing_for(model: nn.Module, name: str) -> contextlib.AbstractContextManager[None]:
    """Around what packs a Linear of this name: one of experts is copied when all of them are grouped."""
    expert, _, _ = name.rpartition(".")
    owner = model.get_submodule(expert.rpartition(".")[0])
    return short_lived() if isinstance(owner, QuarkExperts) else contextlib.nullcontext()


class Grouping:
    """Groups the experts of a layer as soon as the last of their Linears is finished, so that few lie in two places."""

    def __init__(self, model: nn.Module) -> None:
        self._owners: dict[nn.Module, QuarkExperts] = {}
        for module in model.modules():
            if isinstance(module, QuarkExperts):
                linears = (m for expert in module.experts for m in expert.children())
                self._owners |= {m: module for m in linears if isinstance(m, QuarkLinear)}
        self._left = Counter(self._owners.values())

    @contextlib.contextmanager
    def finishing(self, linear: nn.Module) -> Iterator[None]:
        """Around what packs a Linear."""
        owner = self._owners.get(linear)
        if owner is None:
            yield
            return
        with short_lived():  # it is copied when it is grouped
            yield
        self._left[owner] -= 1
        if not self._left[owner]:
            owner.group_()


def finish_experts(model: nn.Module) -> None:
    """Once every Linear has its tensors: group those of a layer, or put the model's own experts back if all are float.

    Args:
        model: changed in place.
    """
    for name, module in list(model.named_modules()):
        if not isinstance(module, QuarkExperts):
            continue
        linears: list[dict[str, Any]] = [dict(expert.named_children()) for expert in module.experts]
        if all(type(m) is nn.Linear for expert in linears for m in expert.values()):
            original: Any = module.original
            _join(original, linears)
            replace_module(model, name, original)
        else:
            module.group_()


def _join(original: Any, experts: list[dict[str, Any]]) -> None:
    names = [name for name in experts[0] if name != DOWN]
    into = "gate_up_proj" if original.has_gate else "up_proj"
    for parameter, parts in ((into, names), (DOWN, [DOWN])):
        weight = torch.stack([torch.cat([expert[name].weight.data for name in parts]) for expert in experts])
        if original.is_transposed:
            weight = weight.transpose(1, 2).contiguous()
        setattr(original, parameter, nn.Parameter(weight, requires_grad=False))
        if original.has_bias:
            bias = torch.stack([torch.cat([expert[name].bias.data for name in parts]) for expert in experts])
            setattr(original, f"{parameter}_bias", nn.Parameter(bias, requires_grad=False))
