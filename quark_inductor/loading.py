"""A Quark checkpoint into a transformers model, with every tensor accounted for before any is read."""

import contextlib
import dataclasses
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quark_inductor import checkpoint, files
from quark_inductor.experts import Grouping, finish_experts, split_for_, with_todays_names
from quark_inductor.lowering import providers  # noqa: F401  their layouts
from quark_inductor.lowering.target import current
from quark_inductor.schemes import registry  # noqa: F401
from quark_inductor.schemes.base import AT_LOAD, PER_CALL, QuarkLinear, replace_module, scheme_for, set_parameters
from quark_inductor.schemes.errors import CheckpointError, ConfigError, OptionError, QuarkInductorError
from quark_inductor.schemes.memory import return_freed
from quark_inductor.schemes.ops import dtype_name
from quark_inductor.schemes.spec import LinearSpec

log = logging.getLogger(__name__)


def load(
    path: str | Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    strict: bool = True,
    emulation: str = PER_CALL,
    dynamic_fallback: bool = False,
    scheme: str | Mapping[str, str] | None = None,
    exclude: str | Sequence[str] = ("lm_head",),
) -> nn.Module:
    """Load a checkpoint written by AMD Quark, or a float one that is quantized on the way.

    Needs no amd-quark and runs no code of the checkpoint's (no pickle, no remote code). Memory stays near the
    checkpoint's size: the model is built without memory and filled tensor by tensor.

    Args:
        path: a directory with ``config.json`` and safetensors files, or the id of a model on the Hugging Face hub.
        device: where the model goes; the CPU by default.
        dtype: dtype of everything that is not quantized, and of results; that of the checkpoint by default.
        strict: a tensor of the checkpoint that the model has no place for is an error; if false it is logged.
        emulation: when a weight is dequantized where no kernel runs: ``"per_call"``, or ``"at_load"``, once for all,
            which is faster, gives the same numbers, needs 2x to 4x the memory and leaves no codes for a kernel.
        dynamic_fallback: a static activation scale that the checkpoint lacks (amd-quark's file-to-file export does not
            calibrate) is computed at run time, per tensor, instead of being an error.
        scheme: for a float checkpoint: what to quantize it to, as in :func:`quark_inductor.quantize_`. Each weight is
            quantized as soon as it is read: the float model is never in memory. Only schemes without static activation
            scales.
        exclude: with ``scheme``: fnmatch patterns (or ``re:`` and a regular expression) of Linears that stay float.

    Returns:
        The transformers model in eval mode, its quantized Linears as ``QuarkLinear``; no parameter wants a gradient.

    Raises:
        ConfigError: the configuration is missing, unknown or not Quark's.
        CheckpointError: a file is missing or damaged; a tensor is missing, unexpected, or of the wrong shape or dtype.
        ShapeError: a layer's sizes do not fit its scheme.
    """
    if emulation not in (PER_CALL, AT_LOAD):
        raise OptionError(f"emulation is {emulation!r}; expected {PER_CALL!r} or {AT_LOAD!r}")
    found = skeleton(path, dtype, dynamic_fallback, scheme, exclude)
    model = found.model
    _fill(model, found.stored, torch.device(device or "cpu"), found.stored_dtype, strict, found.online, emulation)
    finish_experts(model)
    model.requires_grad_(False)
    return model.eval()


@dataclasses.dataclass(frozen=True, slots=True)
class Skeleton:
    """A checkpoint and its model before any tensor is read.

    Attributes:
        model: without memory for its parameters, its quantized Linears in place.
        stored: the checkpoint's tensors by the name of what they become.
        stored_dtype: dtype of the checkpoint's float tensors.
        linears: quantized Linears by name.
        online: with ``scheme``, Linears by the name of the float weight they are quantized from.
    """

    model: Any
    stored: Mapping[str, files.StoredTensor]
    stored_dtype: torch.dtype
    linears: Mapping[str, QuarkLinear]
    online: Mapping[str, QuarkLinear]


def skeleton(
    path: str | Path,
    dtype: torch.dtype | None = None,
    dynamic_fallback: bool = False,
    scheme: str | Mapping[str, str] | None = None,
    exclude: str | Sequence[str] = ("lm_head",),
    problems: list[QuarkInductorError] | None = None,
) -> Skeleton:
    """All of :func:`load` that needs no more than ``config.json`` and the headers of the files.

    Args:
        path: as in :func:`load`, and so are the next four.
        dtype: see there.
        dynamic_fallback: see there.
        scheme: see there.
        exclude: see there.
        problems: takes the errors that are about one layer instead of their being raised; the layer stays float.

    Raises:
        QuarkInductorError: as in :func:`load`.
    """
    directory = folder_of(path)
    raw = files.read_json(directory / files.CONFIG)
    config = _config(raw, directory, scheme, exclude)
    stored = files.canonical_names(files.stored_tensors(directory))
    _check_depth(raw, stored, directory)
    model, stored_dtype = _empty_model(directory, dtype)
    tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", {}))
    stored = with_todays_names(model, stored)
    stored = split_for_(model, stored, lambda name: scheme is not None and config.spec_for(name) is not None)
    linears = insert_linears(model, config, stored, dynamic_fallback if scheme is None else None, problems)
    # A float lm_head that is not stored, being the embedding, is quantized from the embedding.
    for name, source in tied.items():
        if scheme is not None and name.removesuffix(".weight") in linears and name not in stored and source in stored:
            stored[name] = stored[source]
    online = {} if scheme is None else {f"{name}.weight": linear for name, (_, linear) in linears.items()}
    return Skeleton(model, stored, stored_dtype, {name: linear for name, (_, linear) in linears.items()}, online)


def _config(
    raw: Any, directory: Path, scheme: str | Mapping[str, str] | None, exclude: str | Sequence[str]
) -> checkpoint.QuantizationConfig:
    if scheme is None:
        return checkpoint.parse(quantization_of(raw, directory))
    if not isinstance(raw, dict) or raw.get("quantization_config") is not None:
        raise ConfigError(f"{directory / files.CONFIG} has a quantization_config already: load it without scheme=")
    return checkpoint.from_presets(scheme, exclude)


def quantization_of(raw: Any, directory: Path) -> Any:
    """The ``quantization_config`` of a checkpoint's ``config.json``, as it is there.

    Raises:
        ConfigError: there is none.
    """
    if not isinstance(raw, dict) or raw.get("quantization_config") is None:
        raise ConfigError(
            f"{directory / files.CONFIG} has no quantization_config: the checkpoint is not quantized. Pass scheme= to "
            "quantize it while it loads"
        )
    return raw["quantization_config"]


def _check_depth(config: Any, stored: Mapping[str, files.StoredTensor], directory: Path) -> None:
    # transformers would build a million layers, without memory but for hours.
    layers = config.get("num_hidden_layers") if isinstance(config, dict) else None
    if type(layers) is int and layers > len(stored) > 0:
        raise CheckpointError(
            f"{directory / files.CONFIG}: num_hidden_layers is {layers}, but the checkpoint has {len(stored)} tensors"
        )


def insert_linears(
    model: nn.Module,
    config: checkpoint.QuantizationConfig,
    stored: Mapping[str, files.StoredTensor],
    dynamic_fallback: bool | None,
    problems: list[QuarkInductorError] | None = None,
) -> dict[str, tuple[nn.Linear, QuarkLinear]]:
    """Replace the Linears that a checkpoint quantizes, on the meta device; what was replaced by what, by name.

    Args:
        model: the float model.
        config: what is quantized how.
        stored: the checkpoint's tensors by canonical name.
        dynamic_fallback: as in :func:`load`; ``None`` for a float checkpoint.
        problems: as in :func:`skeleton`.

    Raises:
        ConfigError: no scheme for a layer's spec, or no layer to quantize.
        CheckpointError: a layer's static activation scale is not there.
        ShapeError: a layer's sizes do not fit its scheme.
    """

    def spec_for(name: str) -> LinearSpec | None:
        spec = config.spec_for(name)
        return None if spec is None else _calibrated(name, spec, stored, dynamic_fallback)

    linears = quantized_linears(model, spec_for, model.dtype, problems)  # type: ignore[arg-type]
    replace_linears(model, linears)
    return linears


def finish(name: str, linear: QuarkLinear, emulation: str) -> None:
    """What is left to do to a quantized Linear once its tensors are loaded.

    Raises:
        CheckpointError: its numbers are damaged; names the layer.
    """
    with naming(name):
        linear.scheme.process_weights_after_loading(linear)
    linear.scheme.adapt_to(linear, current(next(linear.parameters()).device.type).arch)
    if emulation == AT_LOAD:
        linear.dequantize_()
    else:
        linear.pack_()
    return_freed()


def _calibrated(
    name: str, spec: LinearSpec, stored: Mapping[str, files.StoredTensor], dynamic_fallback: bool | None
) -> LinearSpec:
    """The spec of a layer, its input made dynamic if its stored scale is missing and ``dynamic_fallback`` says so."""
    x = spec.input
    if x is None or (x.is_dynamic and (x.second is None or x.second.is_dynamic)):
        return spec
    if dynamic_fallback is None:
        raise ConfigError(
            f"{name}: [{spec}] has static activation scales, which need calibration: load the float model with "
            "transformers and call quark_inductor.quantize_(model, scheme, calibration=...)"
        )
    scale = f"{name}.input_scale" if x.second is None else f"{name}.input_scale_2"
    if scale in stored:
        return spec
    if not dynamic_fallback:
        raise CheckpointError(
            f"{scale} is missing: the config says that activations have static scales, but they were never calibrated "
            "(amd-quark's direct_quantize_checkpoint does not). Quantize the model with calibration data, or "
            "pass dynamic_fallback=True to compute them at run time"
        )
    log.warning("%s is missing: it is computed at run time", scale)
    second = None if x.second is None else dataclasses.replace(x.second, is_dynamic=True)
    return dataclasses.replace(spec, input=dataclasses.replace(x, is_dynamic=True, second=second))


def folder_of(path: str | Path) -> Path:
    """The folder of a checkpoint; one of the hub's is downloaded.

    Raises:
        CheckpointError: there is no such folder, nor can the hub give it.
    """
    if Path(path).is_dir():
        return Path(path)
    if Path(path).exists() or str(path).startswith((".", "/", "~")) or str(path).count("/") != 1:
        raise CheckpointError(f"{path} is not a directory; expected one with {files.CONFIG}, or a hub id 'owner/name'")
    from huggingface_hub import snapshot_download

    kinds = ["*.json", "*.safetensors", "tokenizer*", "*.jinja"]
    try:
        return Path(snapshot_download(str(path), allow_patterns=kinds))
    except Exception as e:  # those of the hub and of its transport have no common class
        first = (str(e).strip().splitlines() or [""])[0]
        raise CheckpointError(
            f"{path} is no directory here, and the Hugging Face hub does not give a model of that name "
            f"({type(e).__name__}: {first}); check the path, the name or the network"
        ) from e


def _empty_model(directory: Path, dtype: torch.dtype | None) -> tuple[Any, torch.dtype]:
    """The float model without memory for its parameters, and the dtype the checkpoint was written in."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    path = directory / files.CONFIG
    with _refused_by_transformers(f"read {path}"):
        config: Any = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    stored_dtype = config.dtype
    if not isinstance(stored_dtype, torch.dtype):
        raise ConfigError(f"{path}: dtype is {stored_dtype!r}, expected one such as 'bfloat16'")
    # Buffers that no file holds (rotary frequencies) are real: only parameters stay on the meta device.
    with init_empty_weights(include_buffers=False), _refused_by_transformers(f"build the model of {path}"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype or stored_dtype, trust_remote_code=False)
    for name, tensor in kept_in_float32(model).items():
        assign(model, name, tensor.float())
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
    model: nn.Module,
    spec_for: Callable[[str], LinearSpec | None],
    dtype: torch.dtype,
    problems: list[QuarkInductorError] | None = None,
) -> dict[str, tuple[nn.Linear, QuarkLinear]]:
    """What replaces each Linear that has a spec, by name; the new ones are without memory (meta device).

    Args:
        model: the float model.
        spec_for: of a Linear's name.
        dtype: of everything that is not quantized.
        problems: as in :func:`skeleton`.

    Raises:
        ConfigError: no scheme for a layer's spec, or no layer to quantize.
        ShapeError: a layer's sizes do not fit its scheme.
    """
    found: dict[str, tuple[nn.Linear, QuarkLinear]] = {}
    shared: dict[int, QuarkLinear] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) is not nn.Linear:
            continue
        with _collecting(problems):
            if (spec := spec_for(name)) is None:
                continue
            if not name:
                raise ConfigError(
                    "the model is a Linear itself, which cannot be replaced in place; put it into a module"
                )
            with naming(name):
                n, k, bias = module.out_features, module.in_features, module.bias is not None
                new = QuarkLinear(k, n, scheme_for(spec), bias=bias, dtype=dtype, device="meta")
                # A module that is used at two places stays one module.
                new = shared.setdefault(id(module), new)
                if new.scheme.spec != spec:
                    raise ConfigError("this Linear is used under another name too, where it has another spec")
            found[name] = module, new
    if not found and not problems:
        raise ConfigError("none of the model's Linears is quantized; check the patterns and the excluded names")
    return found


@contextlib.contextmanager
def _collecting(problems: list[QuarkInductorError] | None) -> Iterator[None]:
    """Put an error of ours raised inside into a list, if there is one."""
    try:
        yield
    except QuarkInductorError as e:
        if problems is None:
            raise
        problems.append(e)


def replace_linears(model: nn.Module, linears: Mapping[str, tuple[nn.Linear, QuarkLinear]]) -> None:
    """Put the new Linears in place; one whose weight was tied to another tensor is so no longer."""
    for name, (_, linear) in linears.items():
        replace_module(model, name, linear)
    tied: dict[str, str] | None = getattr(model, "all_tied_weights_keys", None)
    for key in [k for k, source in (tied or {}).items() if {k, source} & {f"{n}.weight" for n in linears}]:
        assert tied is not None
        del tied[key]
        model.config.tie_word_embeddings = False  # type: ignore[union-attr]


@dataclasses.dataclass(frozen=True, slots=True)
class Accounting:
    """Every tensor of a checkpoint has its place in the model, and every place its tensor.

    Attributes:
        targets: what each stored tensor becomes, without memory: shape and dtype.
        zero_points: names of zero points the checkpoint leaves out: all are 0.
    """

    targets: Mapping[str, Tensor]
    zero_points: tuple[str, ...]


def account(
    model: nn.Module,
    stored: Mapping[str, files.StoredTensor],
    stored_dtype: torch.dtype,
    strict: bool,
    online: Mapping[str, QuarkLinear] | None = None,
    problems: list[QuarkInductorError] | None = None,
) -> Accounting:
    """Compare a checkpoint's headers with a model on the meta device.

    Args:
        model: with its quantized Linears in place.
        stored: the checkpoint's tensors by canonical name.
        stored_dtype: dtype of the checkpoint's float tensors.
        strict: a tensor the model has no place for is an error; if false it is logged.
        online: Linears by the name of the float weight they are quantized from.
        problems: takes what is wrong, all of it, instead of the first's being raised.

    Raises:
        CheckpointError: a tensor is missing, unexpected, or of the wrong shape or dtype.
    """
    persistent = model.state_dict(keep_vars=True)
    targets: dict[str, Tensor] = {n: t for n, t in persistent.items() if isinstance(t, Tensor)}
    for name, linear in (online or {}).items():
        for parameter in linear.weight_names():
            del targets[f"{name.removesuffix('weight')}{parameter}"]
        targets[name] = torch.empty(linear.out_features, linear.in_features, dtype=linear.params_dtype, device="meta")
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    if unexpected := sorted(set(stored) - set(targets)):
        message = (
            f"{len(unexpected)} tensors of the checkpoint have no place in the model, the first is {unexpected[0]}; "
            "pass strict=False to leave them out"
        )
        if strict:
            with _collecting(problems):
                raise CheckpointError(message)
        else:
            log.warning(message)
    scales, zero_points = scales_and_zero_points(model)
    if missing := sorted(n for n in set(targets) - set(stored) - zero_points if n not in tied):
        hint = (
            "; amd-quark's direct_quantize_checkpoint leaves it out and packs the weight in another order than its "
            "config says: export the model with export_safetensors"
        )
        with _collecting(problems):
            raise CheckpointError(
                f"{len(missing)} tensors are missing from the checkpoint, the first is {missing[0]}"
                + (hint if missing[0].endswith("weight_zero_point") else "")
            )
    found, kept = {}, kept_in_float32(model).keys()
    for name in sorted(set(stored) & set(targets)):
        target = targets[name]
        is_float = target.dtype == model.dtype or name in kept
        with _collecting(problems):
            _check(name, stored[name], target, stored_dtype if is_float else None, scales | kept)
        # Scales that were computed in float32 stay so.
        exact = name in scales and stored[name].dtype == torch.float32 != stored_dtype
        found[name] = target.to(torch.float32) if exact else target
    return Accounting(found, tuple(sorted(zero_points & set(targets) - set(stored))))


def _fill(
    model: nn.Module,
    stored: Mapping[str, files.StoredTensor],
    device: torch.device,
    stored_dtype: torch.dtype,
    strict: bool,
    online: Mapping[str, QuarkLinear],
    emulation: str,
) -> None:
    from rich.progress import track

    accounting = account(model, stored, stored_dtype, strict, online)
    fill_zero_points(model, accounting, device)
    linears = {module: name for name, module in model.named_modules() if isinstance(module, QuarkLinear)}
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in accounting.targets}
    grouping = Grouping(model)
    # A Linear is finished as soon as its last tensor is there, and the largest come first: what finishing one takes
    # is memory besides all that were loaded before.
    left = Counter(owners.values())
    sizes: Counter[nn.Module] = Counter()
    for name, target in accounting.targets.items():
        sizes[owners[name]] += target.nbytes
    packed = 0
    names = sorted(owners, key=lambda name: (-sizes[owners[name]], name))
    for name in track(names, "Loading", transient=True, console=_console()):
        target = accounting.targets[name]
        tensor = files.read_tensor(stored[name]).reshape(target.shape).to(device=device, dtype=target.dtype)
        owner = owners[name]
        quantized = isinstance(owner, QuarkLinear) and not name.endswith(".bias") and name not in online
        # Those of a quantized Linear are looked at when all of them are there.
        if not quantized and not _is_finite(tensor):
            raise CheckpointError(f"{name} holds a NaN or an infinity: the checkpoint is damaged; export it again")
        if name in online:
            set_parameters(online[name], **online[name].scheme.quantize_weight(tensor))
            return_freed()
        else:
            assign(model, name, tensor)
        del tensor
        left[owner] -= 1
        if isinstance(owner, QuarkLinear) and not left[owner]:
            packed += sum(p.nbytes for p in owner.parameters())
            with grouping.finishing(owner):
                finish(linears[owner], owner, emulation)
    if emulation == AT_LOAD:
        floats = sum(p.nbytes for linear in linears for p in linear.parameters())
        log.warning(
            "%d Linears were dequantized at load: %.1f MB instead of %.1f MB, and no kernel for them",
            len(linears),
            floats / 1e6,
            packed / 1e6,
        )
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    for name in tied:
        if name in stored and not torch.equal(model.get_parameter(name), model.get_parameter(tied[name])):
            raise CheckpointError(f"{name} and {tied[name]} are one tensor in the model, but two in the checkpoint")
    if tied:
        model.tie_weights()  # type: ignore[operator]
    for name, buffer in model.named_buffers():
        if buffer.device != device:
            assign(model, name, buffer.to(device))


def _is_finite(tensor: Tensor) -> bool:
    # A piece at a time: what isfinite() makes on its way is several times as large as an embedding.
    return all(bool(piece.isfinite().all()) for piece in tensor.flatten().split(2**20))


def fill_zero_points(model: nn.Module, accounting: Accounting, device: torch.device | None = None) -> None:
    """Give the zero points that a checkpoint leaves out their value, 0."""
    for name in accounting.zero_points:
        zero_point = model.get_parameter(name)
        assign(model, name, torch.zeros_like(zero_point, device=device or zero_point.device))


def _console() -> Any:
    from rich.console import Console

    console = Console(stderr=True)
    console.quiet = not console.is_terminal
    return console


def scales_and_zero_points(model: nn.Module) -> tuple[set[str], set[str]]:
    """Names of the floating-point scales, and of the zero points that a checkpoint may leave out: all are 0."""
    scales, zero_points = set(), set()
    for name, module in model.named_modules():
        if isinstance(module, QuarkLinear):
            spec = module.scheme.spec
            for parameter, p in module.named_parameters(recurse=False):
                tensor = spec.input if parameter.startswith("input_") else spec.weight
                if "_scale" in parameter and p.is_floating_point() and p.dtype.itemsize > 1:
                    scales.add(f"{name}.{parameter}")
                # A file without those of 4-bit integers is packed in another order than its config says: amd-quark's
                # direct_quantize_checkpoint (file2file_quantization.py) writes such.
                elif (
                    "_zero_point" in parameter
                    and tensor is not None
                    and tensor.symmetric
                    and "int4" not in tensor.dtype
                ):
                    zero_points.add(f"{name}.{parameter}")
    return scales, zero_points


def kept_in_float32(model: nn.Module) -> dict[str, Tensor]:
    """What transformers keeps in float32 in a model of 16 bits, by name: the bias of a router."""
    kept = "|".join(map(re.escape, getattr(model, "_keep_in_fp32_modules_strict", None) or ()))
    tensors = (*model.named_parameters(), *model.named_buffers())
    return {name: t for name, t in tensors if kept and re.search(rf"(^|\.)({kept})(\.|$)", name)}


def _check(
    name: str, stored: files.StoredTensor, target: Tensor, model_dtype: torch.dtype | None, scales: set[str]
) -> None:
    # amd-quark before 1.0 wrote per-tensor scales as [1].
    if stored.shape != tuple(target.shape) and not (stored.shape == (1,) and target.shape == () and name in scales):
        raise CheckpointError(f"{name} has shape {list(stored.shape)}, expected {list(target.shape)}")
    expected = {model_dtype or target.dtype} | ({torch.float32} if name in scales else set())
    if stored.dtype not in expected:
        wanted = " or ".join(sorted(map(dtype_name, expected)))
        raise CheckpointError(f"{name} has dtype {dtype_name(stored.dtype)}, expected {wanted}")


def assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor where a parameter or buffer of this name is."""
    parent, _, attribute = name.rpartition(".")
    module = model.get_submodule(parent)
    if attribute in module._parameters:
        tensor = nn.Parameter(tensor, requires_grad=False)
    setattr(module, attribute, tensor)
