"""A quantized model as a checkpoint in AMD Quark's format."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quark_inductor import checkpoint, files
from quark_inductor.loading import kept_in_float32, scales_and_zero_points
from quark_inductor.schemes.base import AT_LOAD, QuarkLinear
from quark_inductor.schemes.errors import CheckpointError, ConfigError
from quark_inductor.schemes.experts import QuarkExperts
from quark_inductor.schemes.ops import dtype_name


def save(model: nn.Module, path: str | Path) -> None:
    """Write ``config.json`` and safetensors files that :func:`quark_inductor.load` and amd-quark read.

    Args:
        model: a transformers model with quantized Linears, from ``load`` or ``quantize_``.
        path: a directory, made if needed. A tokenizer is not the model's: save it beside.

    Raises:
        ConfigError: nothing in the model is quantized.
        CheckpointError: the directory holds a checkpoint already.
    """
    from huggingface_hub import save_torch_state_dict

    linears = {n: m for n, m in model.named_modules() if isinstance(m, QuarkLinear)}
    for name, linear in linears.items():
        if linear.emulation == AT_LOAD:
            raise ConfigError(f"{name} was dequantized at load and has no codes: load it with emulation='per_call'")
        if len(linear.logical_widths) > 1:
            raise ConfigError(f"{name} was fused from {len(linear.logical_widths)} Linears; save the model before")
    quantized = {n: m.scheme.spec for n, m in linears.items()}
    if not quantized:
        raise ConfigError("the model has no quantized Linear; save it with save_pretrained")
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    if taken := [f for f in (files.CONFIG, files.SINGLE, files.INDEX) if (directory / f).exists()]:
        raise CheckpointError(f"{directory} already holds {taken[0]}; choose another directory, or empty it")
    plain = [n for n, m in model.named_modules() if type(m) is nn.Linear]
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    # A copy of each, because what was merged, and Linears of experts, share memory that would be written once.
    merged = tuple(f"{n}." for n, m in linears.items() if m.merged is not None)
    merged += tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, QuarkExperts))
    state = {
        n: t.clone(memory_format=torch.contiguous_format) if n.startswith(merged) else t
        for n, t in model.state_dict().items()
        if n not in tied
    }
    exempt = scales_and_zero_points(model)[0] | kept_in_float32(model).keys()
    floats = {t.dtype for n, t in state.items() if n not in exempt and t.is_floating_point() and t.dtype.itemsize > 1}
    if len(floats) != 1:
        raise ConfigError(f"the model's float tensors have {len(floats)} dtypes ({floats}), expected one")
    save_torch_state_dict(state, directory, filename_pattern="model{suffix}.safetensors", metadata={"format": "pt"})
    config: dict[str, Any] = model.config.to_diff_dict()  # type: ignore[union-attr, operator]
    config["architectures"] = [type(model).__name__]
    config["dtype"] = dtype_name(floats.pop())
    config["quantization_config"] = checkpoint.to_json(quantized, plain)
    (directory / files.CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(directory)  # type: ignore[union-attr, operator]
