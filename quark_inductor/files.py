"""The files of a checkpoint directory: what is in them without reading it, and one tensor at a time."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quark_inductor.schemes.errors import CheckpointError, ConfigError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# How a safetensors header spells a dtype.
_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file: where, its shape and its dtype."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        CheckpointError: there is no such file.
        ConfigError: it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise CheckpointError(f"cannot read {path}: {e.strerror}; a checkpoint directory has this file") from e
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"{path} is not JSON: {e}") from e


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint by name, from the files' headers.

    Raises:
        CheckpointError: a file is missing, truncated or not safetensors, or the index and the files disagree.
    """
    index_path = directory / INDEX
    if not index_path.exists():
        single = directory / SINGLE
        if not single.exists():
            raise CheckpointError(f"{directory} has neither {SINGLE} nor {INDEX}: it is not a safetensors checkpoint")
        return _header(single)
    index = read_json(index_path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index_path} has no weight_map of tensor names to file names")
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{index_path} names {shard!r}, expected a .safetensors file beside it")
        if len(shard) > 255 or not (directory / shard).exists():  # no file has a longer name
            missing = next(k for k, v in weight_map.items() if v == shard)
            raise CheckpointError(
                f"{directory / shard} is missing; {index_path.name} says it holds {missing} and others"
            )
        for name, stored in _header(directory / shard).items():
            if weight_map.get(name) != shard:
                raise CheckpointError(f"{shard} holds {name}, which {index_path.name} places in {weight_map.get(name)}")
            tensors[name] = stored
    if absent := sorted(set(weight_map) - set(tensors)):
        raise CheckpointError(f"{index_path.name} lists {absent[0]}, which {weight_map[absent[0]]} does not hold")
    return tensors


def _header(path: Path) -> dict[str, StoredTensor]:
    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                view = file.get_slice(name)
                dtype = _DTYPES.get(view.get_dtype())
                if dtype is None:
                    raise CheckpointError(
                        f"{name} in {path} has dtype {view.get_dtype()}; known are {', '.join(_DTYPES)}"
                    )
                tensors[name] = StoredTensor(path, tuple(view.get_shape()), dtype)
    except (SafetensorError, OSError) as e:
        raise CheckpointError(f"{path} is damaged or not a safetensors file ({e}); download or export it again") from e
    return tensors


def read_tensor(stored: StoredTensor, name: str) -> Tensor:
    """One tensor, in memory of its own.

    The file is opened for this tensor alone: pages of a mapping that stays open count as memory, and a checkpoint
    would be held twice while it loads.
    """
    try:
        with safe_open(stored.file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name).clone()
    except (SafetensorError, OSError) as e:
        raise CheckpointError(f"cannot read {name} from {stored.file} ({e}); download or export it again") from e
    return tensor
