"""Hundreds of damaged checkpoints: each is refused by name, or gives the undamaged one's logits bit by bit.

Never another exception, a hang, or a wrong number. What a file cannot betray is left out: another number where any
number is allowed (a code, a bias, the epsilon of a norm), and a config that says something else which is as valid (see
:func:`means_something_else`).
"""

import functools
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import quark_inductor as qi
from quark_inductor import checkpoint
from quark_inductor.errors import QuarkInductorError

FIXTURES = Path(__file__).parents[1] / "fixtures"
SINGLES = [
    "mxfp4_lmhead",
    "nvfp4",
    "fp8_kv_fp8",
    "ptpc_int8",
    "int8",
    "int8_perchannel_asym",
    "int4_wo_32",
    "uint4_wo_32",
    "int4_fp8",
    "amdfp4",
    "mxfp4_kv_fp8",
    "mxfp4_attn_ptpc",
    "mxfp6_e2m3",
    "fp8_block",
]
SHARDED, INDEX = "mxfp4_sharded", "model.safetensors.index.json"
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
Json = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One damage.

    Attributes:
        name: what pytest shows.
        fixture: of which checkpoint.
        damage: done to a copy of its directory.
        culprits: the error's message has one of these; none: there must be no error.
        config: the damaged ``quantization_config``, if that is all the damage.
    """

    name: str
    fixture: str
    damage: Callable[[Path], None]
    culprits: tuple[str, ...]
    config: Any = None


def stored(name: str) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in load_file(FIXTURES / name / "model.safetensors").items()}


def settings(name: str) -> Json:
    found: Json = json.loads((FIXTURES / name / "config.json").read_text())
    return found


def write_json(path: Path, content: Any) -> None:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


# --- tensors


def kind(tensor: str) -> str:
    """``model.layers.0.mlp.up_proj.weight_scale`` -> ``proj.weight_scale``."""
    *_, module, parameter = tensor.split(".")
    return f"{'proj' if module.endswith('_proj') else module}.{parameter}"


def with_tensors(change: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        tensors = {n: t.clone() for n, t in load_file(path / "model.safetensors").items()}
        change(tensors)
        save_file({n: t.contiguous() for n, t in tensors.items()}, path / "model.safetensors")

    return damage


def replaced(name: str, new: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    return with_tensors(lambda tensors: tensors.update({name: new(tensors[name])}))


def renamed(old: str, new: str) -> Callable[[Path], None]:
    return with_tensors(lambda tensors: tensors.update({new: tensors.pop(old)}))


def element(value: float, raw: bool) -> Callable[[Tensor], Tensor]:
    """Set one element, the first in memory, to a value or to a byte."""

    def change(t: Tensor) -> Tensor:
        flat = t.reshape(-1).clone()
        (flat.view(torch.uint8) if raw else flat)[0] = value
        return flat.view(t.shape)

    return change


def reshapes(t: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    found: dict[str, Callable[[Tensor], Tensor]] = {"one more dimension": lambda t: t.unsqueeze(0)}
    if t.ndim:
        found["one less row"] = lambda t: t[:-1]
        found["one row more"] = lambda t: torch.cat([t, t[:1]])
        found["no rows"] = lambda t: t[:0]
    if t.ndim == 2:
        found["flat"] = lambda t: t.reshape(-1)
        found["rows and columns reshaped"] = lambda t: t.reshape(t.shape[0] * 2, -1)
        if t.shape[0] != t.shape[1]:
            found["transposed"] = lambda t: t.t()
    return found


def retypes(t: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    found: dict[str, Callable[[Tensor], Tensor]] = {}
    for dtype in (torch.float32, torch.float16, torch.int8, torch.uint8, torch.int64, torch.float8_e5m2, torch.bool):
        if dtype != t.dtype:
            found[f"as {str(dtype)[6:]}"] = lambda t, dtype=dtype: t.float().to(dtype)
    return found


def poisons(parameter: str, t: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Numbers that no undamaged tensor of this kind holds."""
    if t.dtype in (torch.float8_e4m3fn, torch.uint8) and ("scale" in parameter or t.dtype != torch.uint8):
        found = {"NaN code": element(0x7F if t.dtype != torch.uint8 else 0xFF, raw=True)}
        if t.dtype == torch.float8_e4m3fn:
            found["negative NaN code"] = element(0xFF, raw=True)
        if t.dtype == torch.float8_e4m3fn and "scale" in parameter:
            found["negative scale code"] = element(0xB8, raw=True)
        return found
    if "scale" not in parameter or not t.is_floating_point():
        return {}
    values = {"NaN": float("nan"), "infinity": float("inf"), "-infinity": -float("inf"), "negative": -1.0, "zero": 0.0}
    return {name: element(value, raw=False) for name, value in values.items()} | {"-zero": element(-0.0, raw=False)}


def tensor_cases() -> Iterator[Case]:
    chance = random.Random(20)
    for fixture in SINGLES:
        tensors = stored(fixture)
        by_kind: dict[str, list[str]] = {}
        for name in sorted(tensors):
            by_kind.setdefault(kind(name), []).append(name)
        chosen = [
            chance.choice(names) for key, names in by_kind.items() if key.startswith("proj.") and "bias" not in key
        ]
        chosen += chance.sample([n for n in sorted(tensors) if kind(n) not in map(kind, chosen)], k=2)
        for name in chosen:
            t, parameter = tensors[name], name.split(".")[-1]
            layer = name.removesuffix(f".{parameter}")
            quantized = "_proj." in name and parameter != "bias"
            ways = {"dropped": with_tensors(lambda tensors, name=name: void(tensors.pop(name)))}
            ways["renamed"] = renamed(name, f"{name}s")
            for group in (reshapes(t), retypes(t)):
                for way in chance.sample(sorted(group), k=1):
                    ways[way] = replaced(name, group[way])
            others = [n for n in sorted(tensors) if tensors[n].shape != t.shape and n != name]
            other = chance.choice(others)
            ways[f"swapped with {other}"] = with_tensors(
                lambda tensors, name=name, other=other: tensors.update({name: tensors[other], other: tensors[name]})
            )
            ways = {way: ways[way] for way in chance.sample(sorted(ways), k=3 if quantized else 2)}
            found = poisons(parameter, t)
            ways |= {way: replaced(name, found[way]) for way in chance.sample(sorted(found), k=min(3, len(found)))}
            for way, damage in ways.items():
                # Numbers are checked layer by layer: the message has "layer: parameter holds ...".
                culprits = (name, f"{layer}: {parameter} ", *([other] if "swapped" in way else []))
                yield Case(f"{fixture}-{name}-{way}", fixture, damage, culprits)
        yield Case(
            f"{fixture}-a tensor more",
            fixture,
            with_tensors(lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.weight_scale_3": torch.ones(1)})),
            ("model.layers.0.mlp.up_proj.weight_scale_3",),
        )


# --- quantization_config


def nested(depth: int) -> Json:
    value: Json = {}
    for _ in range(depth):
        value = {"weight": value}
    return value


# Of every JSON type, and recognizable in a message.
WRONG: dict[str, Any] = {
    "number": 7919,
    "string": "zzz",
    "list": [["zzz"]],
    "object": {"zzz": {}},
    "true": True,
    "false": False,
    "null": None,
    "fraction": -17.5,
    "huge number": 10**40,
    "huge fraction": 1.7e308,
    "NaN": float("nan"),
    "infinity": float("inf"),
    "nesting": nested(150),
    "empty string": "",
    "empty list": [],
    "empty object": {},
}
Path_ = tuple[str | int, ...]


def every_key(config: Any, path: Path_ = ()) -> Iterator[Path_]:
    items = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from every_key(value, (*path, key))


def at(config: Any, path: Path_) -> Any:
    for key in path:
        config = config[key]
    return config


# Why another meaning is all that is left: the logits differ, and no reader can know.
_WEIGHTS_ONLY = "says that activations are not quantized, which leaves no trace in the tensors of a dynamic scheme"
_SCALE_DTYPE = "says that dynamic scales are computed in the model's dtype, which leaves no trace in the tensors"


def means_something_else(path: Path_, way: str, value: Any) -> str | None:
    """Why a damaged config may be as valid as the other, if it may."""
    if path[-1] == "input_tensors" and (way == "dropped" or value is None):
        return _WEIGHTS_ONLY
    if path[-1] == "scale_type" and "input_tensors" in path and (way == "dropped" or value is None):
        return _SCALE_DTYPE
    return None


def config_cases() -> Iterator[Case]:
    chance = random.Random(21)
    for fixture in SINGLES:
        config = settings(fixture)["quantization_config"]
        keys = list(every_key(config))
        for path in keys:
            ways: dict[str, Any] = {}
            if chance.random() < 0.07:
                ways["dropped"] = None
            if chance.random() < 0.03 and isinstance(path[-1], str):
                ways["renamed"] = None
            ways |= {way: WRONG[way] for way in chance.sample(sorted(WRONG), k=1) if chance.random() < 0.12}
            for way, value in ways.items():
                changed = json.loads(json.dumps(config))
                inner = at(changed, path[:-1])
                if way == "dropped":
                    del inner[path[-1]]
                elif way == "renamed":
                    inner[f"{path[-1]}zzz"] = inner.pop(path[-1])
                else:
                    inner[path[-1]] = value
                if means_something_else(path, way, value) is not None:
                    continue
                yield config_case(fixture, path, way, changed, value)


def config_case(fixture: str, path: Path_, way: str, changed: Any, value: Any) -> Case:
    named = [str(k) for k in path[-2:] if isinstance(k, str)] + [str(path[-1])] * isinstance(path[-1], str)
    named += ["zzz"] * (way in ("renamed", "string", "list", "object")) + ["7919"] * (way == "number")
    if way in ("NaN", "infinity"):
        named.append("config.json")  # which is no JSON then
    if isinstance(path[-1], int):
        named.append(f"{path[-2]}[{path[-1]}]")
    if "input_tensors" in path:
        named += ["input ", "input_scale"]  # how a spec is printed; what is static has a scale
    if "weight" in path:
        named += ["weight ", "Linears is quantized"]
    if path[0] == "exclude":
        named.append("lm_head")
    if path[0] in ("kv_cache_quant_config", "layer_quant_config"):
        named += ["k_proj", "v_proj", "self_attn"]
    if path[0] == "global_quant_config":
        named.append("Linears is quantized")

    def damage(directory: Path) -> None:
        content = settings(fixture)
        content["quantization_config"] = changed
        write_json(directory / "config.json", content)

    return Case(f"{fixture}-{'.'.join(map(str, path))}-{way}", fixture, damage, tuple(named), changed)


# --- config.json


def model_cases() -> Iterator[Case]:
    """Keys of transformers' own: of each, values of the wrong type; and values of the right one that do not fit."""
    chance, fixture = random.Random(22), "fp8_kv_fp8"
    content = settings(fixture)
    harmless = {"rms_norm_eps", "rope_parameters", "quantization_config"}  # any number is as valid
    for key in sorted(content.keys() - harmless):
        for way in chance.sample(["dropped", *sorted(WRONG)], k=2):
            changed = {k: v for k, v in content.items() if k != key} | ({} if way == "dropped" else {key: WRONG[way]})
            yield Case(
                f"config.json-{key}-{way}",
                fixture,
                lambda p, changed=changed: write_json(p / "config.json", changed),
                ("config.json", "model.", "lm_head"),
            )
    for key, value in {
        "hidden_size": 0,
        "vocab_size": 0,
        "num_hidden_layers": 0,
        "num_hidden_layers ": 2,
        "num_hidden_layers  ": 10**6,
        "num_hidden_layers   ": 10**18,
        "hidden_size ": 10**12,
        "head_dim": 10**15,
        "head_dim ": 0,
        "intermediate_size": -32,
        "num_key_value_heads": 3,
        "num_attention_heads": -4,
        "dtype": "float8_e4m3fn",
        "dtype ": "float16",
        "dtype  ": "int8",
        "dtype   ": "float32",
    }.items():
        changed = content | {key.strip(): value}
        yield Case(
            f"config.json-{key.strip()}-{value}",
            fixture,
            lambda p, changed=changed: write_json(p / "config.json", changed),
            ("config.json", "model.", "lm_head", "Linears is quantized"),
        )


def not_finite_cases() -> Iterator[Case]:
    """JSON has no such numbers, though Python reads and writes them: the model's would be wrong."""
    for value in (float("nan"), float("inf"), -float("inf")):
        for key in ("rms_norm_eps", "rope_theta"):
            content = settings("int8")
            (content if key in content else content["rope_parameters"])[key] = value
            yield Case(
                f"config.json-{key} {value}",
                "int8",
                lambda p, content=content: write_json(p / "config.json", content),
                ("config.json", key),
            )


JSONS: dict[str, bytes] = {
    "empty": b"",
    "one byte": b"{",
    "null": b"null",
    "number": b"5",
    "string": b'"quark"',
    "list": b"[]",
    "empty object": b"{}",
    "not UTF-8": b'{"a": "\xff\xfe"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf{}",
    "NUL": b"\0" * 100,
    "nesting 500": b'{"a":' * 500 + b"1" + b"}" * 500,
    "nesting 3000": b'{"quantization_config":' * 3000 + b"1" + b"}" * 3000,
    "nesting 100000": b"[" * 100_000 + b"]" * 100_000,
    "a number of 5000 digits": b'{"quantization_config": ' + b"9" * 5000 + b"}",
    "an exponent of 400 digits": b'{"quantization_config": 1e' + b"9" * 400 + b"}",
    "NaN": b'{"quantization_config": NaN}',
    "trailing text": b"{} {}",
    "comment": b"{} // quark",
}


def json_cases() -> Iterator[Case]:
    for file, fixture in (("config.json", "int8"), (INDEX, SHARDED)):
        for way, content in JSONS.items():
            yield Case(
                f"{file}-{way}",
                fixture,
                lambda p, f=file, c=content: void((p / f).write_bytes(c)),
                (file, "quantization_config is"),
            )
        yield Case(f"{file}-a directory", fixture, lambda p, f=file: directory_instead(p / f), (file,))
        yield Case(f"{file}-a link to itself", fixture, lambda p, f=file: link(p / f, p / f), (file,))
    for way, content in JSONS.items():
        # Which tokens end a text decides no number.
        yield Case(
            f"generation_config.json-{way}",
            "int8",
            lambda p, c=content: void((p / "generation_config.json").write_bytes(c)),
            ("generation_config.json",),
        )
    # In a duplicated key the last one counts.
    for key in ("exclude", "global_quant_config", "quant_method", "export", "layer_quant_config"):
        for way, value in {"number": 7919, "string": "zzz", "list": ["zzz"]}.items():
            for first in (True, False):
                yield Case(
                    f"config.json-{key} twice, {'first' if first else 'last'} a {way}",
                    "int8",
                    lambda p, key=key, value=value, first=first: twice(p / "config.json", key, value, first),
                    () if first else (key, "zzz", "lm_head"),
                )
    for depth in (200, 900, 5000):
        text = json.dumps(settings("int8")).replace('"version": "', '"version": "')
        deep = '{"weight":' * depth + "{}" + "}" * depth
        for key in ("global_quant_config", "exclude", "algo_config", "quant_method", "export"):
            yield Case(
                f"config.json-{key} of depth {depth}",
                "int8",
                lambda p, text=text, deep=deep, key=key: void(
                    (p / "config.json").write_text(replace_value(text, key, deep))
                ),
                (key, "config.json"),
            )


def replace_value(text: str, key: str, value: str) -> str:
    """In JSON text, for what :mod:`json` cannot write."""
    content = json.loads(text)
    content["quantization_config"][key] = "PLACE"
    return json.dumps(content).replace('"PLACE"', value)


def twice(path: Path, key: str, value: Any, first: bool) -> None:
    content = json.loads(path.read_text())
    right = content["quantization_config"].pop(key)
    pair = [f"{json.dumps(key)}: {json.dumps(v)}" for v in ((value, right) if first else (right, value))]
    rest = json.dumps(content["quantization_config"])[1:-1]
    content["quantization_config"] = "PLACE"
    path.write_text(json.dumps(content).replace('"PLACE"', f"{{{pair[0]}, {rest}, {pair[1]}}}"))


def void(_: Any) -> None:
    return None


def directory_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def link(path: Path, target: Path) -> None:
    path.unlink()
    path.symlink_to(target)


# --- safetensors files


def raw_header(path: Path) -> tuple[str, bytes]:
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    return content[8 : 8 + size].decode(), content[8 + size :]


def write_raw(path: Path, header: str | bytes, data: bytes, size: int | None = None) -> None:
    encoded = header if isinstance(header, bytes) else header.encode()
    path.write_bytes(struct.pack("<Q", len(encoded) if size is None else size) + encoded + data)


def change_header(change: Callable[[str], str]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        header, data = raw_header(path / "model.safetensors")
        write_raw(path / "model.safetensors", change(header), data)

    return damage


def flipped(position: float, bit: int) -> Callable[[Path], None]:
    """A bit of the header, at a fraction of its length."""

    def damage(path: Path) -> None:
        header, data = raw_header(path / "model.safetensors")
        raw = bytearray(header.rstrip().encode())
        raw[int(position * len(raw))] ^= 1 << bit
        write_raw(path / "model.safetensors", bytes(raw), data)

    return damage


def header_json(change: Callable[[Json], None]) -> Callable[[Path], None]:
    def apply(text: str) -> str:
        header = json.loads(text)
        change(header)
        return json.dumps(header)

    return change_header(apply)


UP = "model.layers.0.mlp.up_proj.weight"


def file_cases() -> Iterator[Case]:
    chance, file = random.Random(23), ("model.safetensors",)
    for fixture in ("mxfp4_lmhead", "nvfp4", "int4_wo_32"):
        size = (FIXTURES / fixture / "model.safetensors").stat().st_size
        for keep in (0, 1, 7, 8, 9, 100, size // 2, size - 1):
            yield Case(
                f"{fixture}-{keep} of {size} bytes",
                fixture,
                lambda p, keep=keep: os.truncate(p / "model.safetensors", keep),
                file,
            )
        yield Case(f"{fixture}-bytes more", fixture, lambda p: append(p / "model.safetensors", b"\0" * 8), file)
        for i in range(12):
            position, bit = chance.random(), chance.randrange(8)
            # A name in the header may be what is hit, or the number of a metadata key.
            yield Case(
                f"{fixture}-header bit {i}",
                fixture,
                flipped(position, bit),
                (*file, "model.", "lm_head", "no place in the model"),
            )
    fixture = "int8"
    changes: dict[str, Callable[[Json], None]] = {
        "offsets exchanged": lambda h: h[UP].update(data_offsets=h[UP]["data_offsets"][::-1]),
        "negative offset": lambda h: h[UP].update(data_offsets=[-1, h[UP]["data_offsets"][1]]),
        "huge offset": lambda h: h[UP].update(data_offsets=[0, 1 << 63]),
        "huge shape": lambda h: h[UP].update(shape=[1 << 32, 1 << 32]),
        "negative shape": lambda h: h[UP].update(shape=[-32, -128]),
        "other dtype": lambda h: h[UP].update(dtype="U8"),
        "unknown dtype": lambda h: h[UP].update(dtype="I4"),
        "dtype of another size": lambda h: h[UP].update(dtype="BF16"),
        "shape a number": lambda h: h[UP].update(shape=4096),
        "shape flat": lambda h: h[UP].update(shape=[4096]),
        "no dtype": lambda h: void(h[UP].pop("dtype")),
        "an object less": lambda h: void(h.pop(UP)),
        "a string": lambda h: h.update({UP: "zzz"}),
        "metadata a list": lambda h: h.update(__metadata__=[1]),
        "overlapping": lambda h: h.update({UP: h["model.layers.0.mlp.gate_proj.weight"]}),
    }
    for way, change in changes.items():
        yield Case(f"{fixture}-header-{way}", fixture, header_json(change), (*file, UP))
    texts: dict[str, Callable[[str], str]] = {
        "a tensor twice": lambda t: t.rstrip()[:-1] + "," + re.search(rf'"{UP}":\{{.*?\}}', t)[0] + "}",  # type: ignore[index]
        "a key twice": lambda t: t.replace(f'"{UP}":{{', f'"{UP}":{{"dtype":"U8",', 1),
        "nested": lambda t: '{"a":' * 2000 + t + "}" * 2000,
        "empty": lambda t: "",
        "a list": lambda t: f"[{t}]",
        "NaN": lambda t: t.replace(f'"{UP}":{{', f'"{UP}":{{"x":NaN,', 1),
    }
    for way, text in texts.items():
        yield Case(f"{fixture}-header-{way}", fixture, change_header(text), (*file, UP))
    yield Case(f"{fixture}-file a directory", fixture, lambda p: directory_instead(p / "model.safetensors"), file)
    yield Case(f"{fixture}-file a pickle", fixture, lambda p: write(p / "model.safetensors", b"\x80\x04N."), file)
    yield Case(f"{fixture}-no file", fixture, lambda p: (p / "model.safetensors").unlink(), file)


def append(path: Path, data: bytes) -> None:
    path.write_bytes(path.read_bytes() + data)


def write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


# --- several files


def index_with(change: Callable[[Json, Path], None]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        index = json.loads((path / INDEX).read_text())
        change(index, path)
        write_json(path / INDEX, index)

    return damage


def moved(name: str) -> Callable[[Path], None]:
    """The first shard's tensors are to be in a file of this name, where the shard really is if it can be."""

    def change(index: Json, path: Path) -> None:
        new = name.format(absolute=path.parent / "outside.safetensors")
        index["weight_map"] = {k: new if v == SHARDS[0] else v for k, v in index["weight_map"].items()}
        (path / "sub").mkdir()
        shutil.copy(path / SHARDS[0], path / "sub" / SHARDS[0])
        shutil.move(path / SHARDS[0], path.parent / "outside.safetensors")

    return index_with(change)


def linked(to: str, path: Path) -> None:
    outside = path.parent / "outside.safetensors"
    shutil.move(path / SHARDS[0], outside)
    targets = {
        "the same file outside": outside,
        "another shard": path / SHARDS[1],
        "nothing": path.parent / "nothing",
        "a directory": path.parent,
        "itself": path / SHARDS[0],
        "text": path / "config.json",
        "an empty device": Path(os.devnull),
    }
    (path / SHARDS[0]).symlink_to(targets[to])


def index_cases() -> Iterator[Case]:
    names = {
        "absolute": "{absolute}",
        "parent": "../outside.safetensors",
        "parent of a folder": "sub/../../outside.safetensors",
        "folder": f"sub/{SHARDS[0]}",
        "dots": "..",
        "dot": ".",
        "here": f"./{SHARDS[0]}",
        "empty": "",
        "NUL": "model\0.safetensors",
        "NUL at the end": f"{SHARDS[0]}\0",
        "long": "a" * 300 + ".safetensors",
        "very long": "a" * 100_000 + ".safetensors",
        "backslashes": "..\\outside.safetensors",
        "a pickle": "pytorch_model.bin",
        "an address": "https://example.com/model.safetensors",
        "a home": "~/model.safetensors",
        "surrogate": "\ud800.safetensors",
        "newline": "\n.safetensors",
        "drive": "C:model.safetensors",
    }
    for way, name in names.items():
        yield Case(f"shard {way}", SHARDED, moved(name), (INDEX, ".safetensors is missing", SHARDS[0]))
    for to in (
        "the same file outside",
        "another shard",
        "nothing",
        "a directory",
        "itself",
        "text",
        "an empty device",
    ):
        yield Case(f"shard a link to {to}", SHARDED, functools.partial(linked, to), (SHARDS[0], SHARDS[1]))
    values: dict[str, Any] = {way: value for way, value in WRONG.items() if way != "nesting"}
    for way, value in values.items():
        yield Case(
            f"weight_map-{way}",
            SHARDED,
            index_with(lambda i, p, v=value: i.update(weight_map=v)),
            (INDEX, "lm_head.weight"),
        )
        yield Case(
            f"lm_head in a {way}",
            SHARDED,
            index_with(lambda i, p, v=value: i["weight_map"].update({"lm_head.weight": v})),
            (INDEX, "lm_head.weight"),
        )
        yield Case(f"metadata-{way}", SHARDED, index_with(lambda i, p, v=value: i.update(metadata=v)), (INDEX,))
    for i, shard in enumerate(SHARDS):
        other = SHARDS[(i + 1) % 3]
        yield Case(f"{shard}-missing", SHARDED, lambda p, s=shard: (p / s).unlink(), (shard,))
        yield Case(f"{shard}-truncated", SHARDED, lambda p, s=shard: os.truncate(p / s, 5000), (shard,))
        yield Case(
            f"{shard}-is {other}", SHARDED, lambda p, s=shard, o=other: void(shutil.copy(p / o, p / s)), (shard,)
        )
        yield Case(f"{shard}-empty", SHARDED, lambda p, s=shard: os.truncate(p / s, 0), (shard,))
    yield Case("no index", SHARDED, lambda p: (p / INDEX).unlink(), (INDEX,))
    yield Case(
        "a tensor less in the index",
        SHARDED,
        index_with(lambda i, p: void(i["weight_map"].pop("lm_head.weight"))),
        ("lm_head.weight",),
    )
    yield Case(
        "a tensor more in the index",
        SHARDED,
        index_with(lambda i, p: i["weight_map"].update({"zzz": SHARDS[0]})),
        ("zzz",),
    )


# --- the cases, and what is checked


@functools.cache
def cases() -> dict[str, Case]:
    found: dict[str, Case] = {}
    for make in (tensor_cases, config_cases, model_cases, not_finite_cases, json_cases, file_cases, index_cases):
        for case in make():
            assert case.name not in found, case.name
            found[case.name] = case
    return found


@functools.cache
def undamaged(fixture: str) -> Tensor:
    return logits(qi.load(FIXTURES / fixture))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(torch.arange(12)[None] % 16).logits
    return result


@functools.cache
def parsed(fixture: str) -> checkpoint.QuantizationConfig:
    return checkpoint.parse(settings(fixture)["quantization_config"])


@pytest.mark.timeout(10)
@pytest.mark.parametrize("name", cases())
def test_a_damaged_checkpoint_is_refused_by_name_or_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    case = cases()[name]
    try:
        # Where the config is all the damage, and says the same as before, there is nothing to load.
        if case.config is not None and checkpoint.parse(case.config) == parsed(case.fixture):
            return
        directory = tmp_path / "damaged"
        shutil.copytree(FIXTURES / case.fixture, directory, ignore=shutil.ignore_patterns("reference.safetensors"))
        case.damage(directory)
        model = qi.load(directory)
    except QuarkInductorError as error:
        message = str(error)
        assert any(culprit in message for culprit in case.culprits), message
        assert len(message) < 400_000
        return
    assert torch.equal(logits(model), undamaged(case.fixture))


WAITS = """
import os, sys
import quark_inductor as qi
from quark_inductor.errors import QuarkInductorError
for name in sys.argv[2:]:
    path = os.path.join(sys.argv[1], name)
    os.rename(path, path + ".kept")
    os.mkfifo(path)
    try:
        qi.load(sys.argv[1])
    except QuarkInductorError as error:
        print(name in str(error), flush=True)
    os.unlink(path)
    os.rename(path + ".kept", path)
"""


@pytest.mark.slow
def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    """In a process of its own: the wait would be in a library that no signal interrupts."""
    files = ["config.json", INDEX, SHARDS[1]]
    shutil.copytree(FIXTURES / SHARDED, tmp_path / "x", ignore=shutil.ignore_patterns("reference.safetensors"))
    command = [sys.executable, "-c", WAITS, str(tmp_path / "x"), *files]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert result.stdout.split() == ["True"] * len(files), result.stderr


def test_there_are_hundreds_of_cases_and_they_are_the_same_every_time() -> None:
    assert len(cases()) >= 300
    again = [case.name for make in (tensor_cases, config_cases) for case in make()]
    assert again == list(cases())[: len(again)]
    assert len({case.fixture for case in cases().values()}) >= 14
