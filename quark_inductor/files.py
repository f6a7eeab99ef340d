"""The files of a checkpoint directory: what is in them without reading it, and one tensor at a time."""

import json
import math
import re
from collections.abc import Mapping
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
    """A tensor in a file, or a part of one.

    Attributes:
        file: where it is.
        name: its name there.
        shape: its shape.
        dtype: its dtype.
        part: ``None``: all of what is stored. Else which entry of the first dimension, from which output feature to
            which, and whether those are the last dimension, as a weight ``[E, K, N]`` has them.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    part: tuple[int, int, int, bool] | None = None


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        CheckpointError: there is no such file.
        ConfigError: it is not JSON.
    """
    if path.exists() and not path.is_file():
        raise CheckpointError(f"cannot read {path}: not a regular file; a checkpoint directory has this file")
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse, parse_float=_finite)
    except OSError as e:
        raise CheckpointError(f"cannot read {path}: {e.strerror}; a checkpoint directory has this file") from e
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"{path} is not JSON: {e}") from e


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no number JSON knows")


def _finite(text: str) -> float:
    return number if math.isfinite(number := float(text)) else _refuse(text)


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
        return header(single)
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
        for name, stored in header(directory / shard).items():
            if weight_map.get(name) != shard:
                raise CheckpointError(f"{shard} holds {name}, which {index_path.name} places in {weight_map.get(name)}")
            tensors[name] = stored
    if absent := sorted(set(weight_map) - set(tensors)):
        raise CheckpointError(f"{index_path.name} lists {absent[0]}, which {weight_map[absent[0]]} does not hold")
    return tensors


def header(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of one file by name.

    Raises:
        CheckpointError: the file is damaged, or has a dtype that is not known.
    """
    tensors = {}
    if not path.is_file():
        raise CheckpointError(f"cannot read {path}: not a regular file; download or export it again")
    try:
        # For torch the whole file is mapped so that it could be written to, which memory must be there for.
        with safe_open(path, framework="np") as file:
            for name in file.keys():
                view = file.get_slice(name)
                dtype = _DTYPES.get(view.get_dtype())
                if dtype is None:
                    raise CheckpointError(
                        f"{name} in {path} has dtype {view.get_dtype()}; known are {', '.join(_DTYPES)}"
                    )
                tensors[name] = StoredTensor(path, name, tuple(view.get_shape()), dtype)
    except (SafetensorError, OSError) as e:
        raise CheckpointError(f"{path} is damaged or not a safetensors file ({e}); download or export it again") from e
    return tensors


# amd-quark 0.11 under transformers 5 wrote the names of its own modules (amd/Quark issue 44).
_OLD_NAME = re.compile(r"^(.*\.)(weight|input|output)_quantizer\.(?:([01])\.)?(scale|zero_point)$")


def canonical_names(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The same tensors under the names amd-quark 0.13 writes: ``weight_quantizer.scale`` becomes ``weight_scale``.

    Of two stages, ``weight_quantizer.0.scale`` becomes ``weight_scale`` and ``weight_quantizer.1.scale``
    ``weight_scale_2``.

    Raises:
        CheckpointError: a tensor is there under both names.
    """
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        old = _OLD_NAME.match(name)
        new = name if old is None else f"{old[1]}{old[2]}_{old[4]}{'_2' if old[3] == '1' else ''}"
        if new in tensors or (new != name and new in stored):
            raise CheckpointError(f"{name} is the old name of {new}, and the checkpoint has both")
        tensors[new] = tensor
    return tensors


def read_tensor(stored: StoredTensor) -> Tensor:
    """One tensor, in memory of its own.

    The file is opened for this tensor alone: pages of a mapping that stays open count as memory, and a checkpoint
    would be held twice while it loads.
    """
    try:
        with safe_open(stored.file, framework="pt") as file:
            if stored.part is None:
                tensor: Tensor = file.get_tensor(stored.name).clone()
            else:
                expert, begin, end, transposed = stored.part
                view = file.get_slice(stored.name)
                tensor = view[expert, :, begin:end].t() if transposed else view[expert, begin:end]
                tensor = tensor.clone(memory_format=torch.contiguous_format)
    except (SafetensorError, OSError) as e:
        raise CheckpointError(f"cannot read {stored.name} from {stored.file} ({e}); download or export it again") from e
    return tensor
