"""A Quark checkpoint into a transformers model, with every tensor accounted for before any is read."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quark_inductor import checkpoint, files
from quark_inductor.schemes import registry  # noqa: F401
from quark_inductor.schemes.base import QuarkLinear, replace_module, scheme_for
from quark_inductor.schemes.errors import CheckpointError, ConfigError, QuarkInductorError
from quark_inductor.schemes.ops import dtype_name

log = logging.getLogger(__name__)


def load(
    path: str | Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    strict: bool = True,
) -> nn.Module:
    """Load a checkpoint written by AMD Quark.

    Needs no amd-quark and runs no code of the checkpoint's (no pickle, no remote code). Memory stays near the
    checkpoint's
    size: the model is built without memory and filled tensor by tensor.

    Args:
        path: a directory with ``config.json`` and safetensors files, or the id of a model on the Hugging Face hub.
        device: where the model goes; the CPU by default.
        dtype: dtype of everything that is not quantized, and of results; that of the checkpoint by default.
        strict: a tensor of the checkpoint that the model has no place for is an error; if false it is logged.

    Returns:
        The transformers model in eval mode, its quantized Linears as ``QuarkLinear``; no parameter wants a gradient.

    Raises:
        ConfigError: the configuration is missing, unknown or not Quark's.
        CheckpointError: a file is missing or damaged; a tensor is missing, unexpected, or of the wrong shape or dtype.
        ShapeError: a layer's sizes do not fit its scheme.
    """
    directory = _directory(path)
    raw = files.read_json(directory / files.CONFIG)
    if not isinstance(raw, dict) or "quantization_config" not in raw:
        raise ConfigError(
            f"{directory / files.CONFIG} has no quantization_config: the checkpoint is not quantized. Load it with "
            "transformers, and quantize it with quark_inductor.quantize_ if you like"
        )
    config = checkpoint.parse(raw["quantization_config"])
    stored = files.stored_tensors(directory)
    model, stored_dtype = _empty_model(directory, dtype)
    replace_linears(model, quantized_linears(model, config, model.dtype))
    _fill(model, stored, torch.device(device or "cpu"), stored_dtype, strict)
    for name, module in model.named_modules():
        if isinstance(module, QuarkLinear):
            with naming(name):
                module.scheme.process_weights_after_loading(module)
    model.requires_grad_(False)
    return model.eval()


def _directory(path: str | Path) -> Path:
    if Path(path).is_dir():
        return Path(path)
    if Path(path).exists() or str(path).startswith((".", "/", "~")) or str(path).count("/") != 1:
        raise CheckpointError(f"{path} is not a directory; expected one with {files.CONFIG}, or a hub id 'owner/name'")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors", "tokenizer*", "*.jinja"]))


def _empty_model(directory: Path, dtype: torch.dtype | None) -> tuple[Any, torch.dtype]:
    """The float model without memory for its parameters, and the dtype the checkpoint was written in."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    path = directory / files.CONFIG
    with _refused_by_transformers(f"read {path}"):
        config: Any = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    del config.quantization_config
    stored_dtype = config.dtype
    if not isinstance(stored_dtype, torch.dtype):
        raise ConfigError(f"{path}: dtype is {stored_dtype!r}, expected one such as 'bfloat16'")
    # Buffers that no file holds (rotary frequencies) are real: only parameters stay on the meta device.
    with init_empty_weights(include_buffers=False), _refused_by_transformers(f"build the model of {path}"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype or stored_dtype, trust_remote_code=False)
    if (directory / "generation_config.json").exists():
        with _refused_by_transformers(f"read {directory / 'generation_config.json'}"):
            model.generation_config = GenerationConfig.from_pretrained(directory)
    return model, stored_dtype


@contextlib.contextmanager
def _refused_by_transformers(action: str) -> Iterator[None]:
    # What a wrong value in a config makes transformers raise has no common class.
    try:
        yield
    except Exception as e:
        raise ConfigError(f"transformers cannot {action}: {type(e).__name__}: {e}") from e


@contextlib.contextmanager
def naming(layer: str) -> Iterator[None]:
    """Put a layer's name before the message of any error of ours raised inside."""
    try:
        yield
    except QuarkInductorError as e:
        raise type(e)(f"{layer}: {e}") from e


def quantized_linears(
    model: nn.Module, config: checkpoint.QuantizationConfig, dtype: torch.dtype
) -> dict[str, tuple[nn.Linear, QuarkLinear]]:
    """What replaces each Linear that the config quantizes, by name; the new ones are without memory (meta device).

    Raises:
        ConfigError: no scheme for a layer's spec, or no layer to quantize.
        ShapeError: a layer's sizes do not fit its scheme.
    """
    found: dict[str, tuple[nn.Linear, QuarkLinear]] = {}
    shared: dict[int, QuarkLinear] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        spec = config.spec_for(name) if type(module) is nn.Linear else None
        if spec is None:
            continue
        assert isinstance(module, nn.Linear)
        if not name:
            raise ConfigError("the model is a Linear itself, which cannot be replaced in place; put it into a module")
        with naming(name):
            n, k, bias = module.out_features, module.in_features, module.bias is not None
            new = QuarkLinear(k, n, scheme_for(spec), bias=bias, dtype=dtype, device="meta")
            # A module that is used at two places stays one module.
            new = shared.setdefault(id(module), new)
            if new.scheme.spec != spec:
                raise ConfigError("this Linear is used under another name too, where it has another spec")
        found[name] = module, new
    if not found:
        raise ConfigError("none of the model's Linears is quantized; check the patterns and the excluded names")
    return found


def replace_linears(model: nn.Module, linears: Mapping[str, tuple[nn.Linear, QuarkLinear]]) -> None:
    """Put the new Linears in place; one whose weight was tied to another tensor is so no longer."""
    for name, (_, linear) in linears.items():
        replace_module(model, name, linear)
    tied: dict[str, str] | None = getattr(model, "all_tied_weights_keys", None)
    for key in [k for k, source in (tied or {}).items() if {k, source} & {f"{n}.weight" for n in linears}]:
        assert tied is not None
        del tied[key]
        model.config.tie_word_embeddings = False  # type: ignore[union-attr]


def _fill(
    model: nn.Module,
    stored: dict[str, files.StoredTensor],
    device: torch.device,
    stored_dtype: torch.dtype,
    strict: bool,
) -> None:
    from rich.progress import track

    persistent = model.state_dict(keep_vars=True)
    targets: dict[str, Tensor] = {n: t for n, t in persistent.items() if isinstance(t, Tensor)}
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    unexpected = sorted(set(stored) - set(targets))
    if unexpected:
        message = (
            f"{len(unexpected)} tensors of the checkpoint have no place in the model, the first is {unexpected[0]}; "
            "pass strict=False to leave them out"
        )
        if strict:
            raise CheckpointError(message)
        log.warning(message)
    if missing := sorted(n for n in set(targets) - set(stored) if n not in tied):
        raise CheckpointError(f"{len(missing)} tensors are missing from the checkpoint, the first is {missing[0]}")
    names = sorted(set(stored) & set(targets))
    for name in names:
        dtype = targets[name].dtype
        _check(name, stored[name], targets[name], stored_dtype if dtype == model.dtype else dtype)

    for name in track(names, "Loading", transient=True, console=_console()):
        tensor = files.read_tensor(stored[name], name)
        _assign(model, name, tensor.to(device=device, dtype=targets[name].dtype))
    for name in tied:
        if name in stored and not torch.equal(model.get_parameter(name), model.get_parameter(tied[name])):
            raise CheckpointError(f"{name} and {tied[name]} are one tensor in the model, but two in the checkpoint")
    if tied:
        model.tie_weights()  # type: ignore[operator]
    for name, buffer in model.named_buffers():
        if buffer.device != device:
            _assign(model, name, buffer.to(device))


def _console() -> Any:
    from rich.console import Console

    console = Console(stderr=True)
    console.quiet = not console.is_terminal
    return console


def _check(name: str, stored: files.StoredTensor, target: Tensor, expected: torch.dtype) -> None:
    if stored.shape != tuple(target.shape):
        raise CheckpointError(f"{name} has shape {list(stored.shape)}, expected {list(target.shape)}")
    if stored.dtype != expected:
        raise CheckpointError(f"{name} has dtype {dtype_name(stored.dtype)}, expected {dtype_name(expected)}")


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    parent, _, attribute = name.rpartition(".")
    module = model.get_submodule(parent)
    if attribute in module._parameters:
        tensor = nn.Parameter(tensor, requires_grad=False)
    setattr(module, attribute, tensor)
