"""The files of a checkpoint directory. The error for a damaged one names it, and the tensor if there is one."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quark_inductor import files
from quark_inductor.errors import CheckpointError, ConfigError

FIXTURES = Path(__file__).parents[1] / "fixtures"
INDEX = "model.safetensors.index.json"
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
CopyOf = Callable[[str], Any]


def raw_safetensors(path: Path, header: str, size: int) -> None:
    """A file with this header, whatever it says, and ``size`` bytes of zeros."""
    encoded = header.encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(size))


# --- what is there


@pytest.mark.parametrize("name", ["mxfp4", "fp8", "mxfp4_sharded"])
def test_every_tensor_is_found_with_its_file_shape_and_dtype(name: str) -> None:
    directory = FIXTURES / name
    expected = {
        key: (path, tuple(tensor.shape), tensor.dtype)
        for path in directory.glob("model*.safetensors")
        for key, tensor in load_file(path).items()
    }
    found = files.stored_tensors(directory)
    assert {key: (s.file, s.shape, s.dtype) for key, s in found.items()} == expected
    assert len({s.file for s in found.values()}) == (3 if name == "mxfp4_sharded" else 1)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bfloat16,
        torch.float16,
        torch.float32,
        torch.float64,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.float8_e8m0fnu,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.uint8,
        torch.bool,
    ],
)
def test_a_tensor_of_any_dtype_is_read_as_it_was_written(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.tensor([[0, 1, 2], [3, 0, 1]]).to(dtype)
    save_file({"a.b": tensor, "scalar": tensor[1, 0].clone()}, tmp_path / files.SINGLE)
    found = files.stored_tensors(tmp_path)
    assert (found["a.b"].shape, found["scalar"].shape) == ((2, 3), ())
    assert found["a.b"].dtype == found["scalar"].dtype == dtype
    for name, expected in (("a.b", tensor), ("scalar", tensor[1, 0])):
        read = files.read_tensor(found[name])
        assert (read.dtype, read.shape) == (dtype, expected.shape)
        assert torch.equal(read.view(torch.uint8), expected.clone().view(torch.uint8)) if read.ndim else True
        assert torch.equal(read.double(), expected.double())


def test_a_tensor_has_memory_of_its_own(tmp_path: Path) -> None:
    """It is no view of the file's pages, which would show what is written there later."""
    save_file({"a": torch.zeros(4096), "b": torch.ones(4096)}, tmp_path / files.SINGLE)
    stored = files.stored_tensors(tmp_path)["a"]
    tensor = files.read_tensor(stored)
    assert tensor.untyped_storage().nbytes() == 4096 * 4
    size = stored.file.stat().st_size
    with open(stored.file, "r+b") as file:
        file.seek(size - 2 * 4096 * 4)
        file.write(b"\x01" * 2 * 4096 * 4)
    assert files.read_tensor(stored).count_nonzero() == 4096
    assert tensor.count_nonzero() == 0


# --- JSON


@pytest.mark.parametrize("text", ["", "{", "nonsense", '{"a": }', "\ufeff{}", "[" * 100_000])
def test_what_is_no_json_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json is not JSON"):
        files.read_json(tmp_path / "config.json")


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ConfigError, match=r"config\.json is not JSON"):
        files.read_json(tmp_path / "config.json")


@pytest.mark.parametrize("kind", ["missing", "directory"])
def test_a_json_file_that_cannot_be_read_is_named(kind: str, tmp_path: Path) -> None:
    if kind == "directory":
        (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot read .*config\.json"):
        files.read_json(tmp_path / "config.json")


# --- one file


def test_a_directory_without_a_safetensors_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        files.stored_tensors(tmp_path)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 500, -1, -100_000])
def test_a_truncated_file_is_refused(keep: int, copy_of: CopyOf) -> None:
    path = copy_of("mxfp4") / files.SINGLE
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        files.stored_tensors(path.parent)


U8 = '{"dtype":"U8","shape":[4],"data_offsets":[0,4]}'
HEADERS = {
    "no JSON": "x" * 40,
    "a list": "[]",
    "too long": '{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}',
    "not its shape": '{"a":{"dtype":"U8","shape":[5],"data_offsets":[0,4]}}',
    "negative shape": '{"a":{"dtype":"U8","shape":[-4],"data_offsets":[0,4]}}',
    "overflowing shape": '{"a":{"dtype":"U8","shape":[4294967296,4294967296,4294967297],"data_offsets":[0,4]}}',
    "backwards": '{"a":{"dtype":"U8","shape":[4],"data_offsets":[4,0]}}',
    "overlapping": f'{{"a":{U8},"b":{U8}}}',
    "unknown dtype": '{"a":{"dtype":"U9","shape":[4],"data_offsets":[0,4]}}',
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_lies_is_refused(case: str, tmp_path: Path) -> None:
    raw_safetensors(tmp_path / files.SINGLE, HEADERS[case], 4)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        files.stored_tensors(tmp_path)


def test_a_header_that_is_longer_than_any_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / files.SINGLE).write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        files.stored_tensors(tmp_path)


@pytest.mark.parametrize("dtype", ["U16", "C64"])
def test_a_dtype_that_no_checkpoint_has_is_named(dtype: str, tmp_path: Path) -> None:
    size = {"U16": 2, "C64": 8}[dtype]
    raw_safetensors(
        tmp_path / files.SINGLE, f'{{"layer.a":{{"dtype":"{dtype}","shape":[1],"data_offsets":[0,{size}]}}}}', size
    )
    with pytest.raises(CheckpointError, match=rf"layer\.a in .*model\.safetensors has dtype {dtype}.*known are"):
        files.stored_tensors(tmp_path)


def test_a_file_that_shrank_after_its_header_was_read_is_refused(tmp_path: Path) -> None:
    save_file({"layer.a": torch.zeros(64)}, tmp_path / files.SINGLE)
    stored = files.stored_tensors(tmp_path)["layer.a"]
    stored.file.write_bytes(stored.file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"cannot read layer\.a from .*model\.safetensors"):
        files.read_tensor(stored)
    stored.file.unlink()
    with pytest.raises(CheckpointError, match=r"cannot read layer\.a from .*model\.safetensors"):
        files.read_tensor(stored)


# --- several files


def test_the_index_counts_when_there_is_one(copy_of: CopyOf) -> None:
    copy = copy_of("mxfp4_sharded")
    (copy / files.SINGLE).write_bytes(b"")
    assert files.stored_tensors(copy.path).keys() == files.stored_tensors(FIXTURES / "mxfp4").keys()


@pytest.mark.parametrize("content", [[], {}, {"weight_map": []}, {"weight_map": None}, {"weight_map": {"a": 1}}])
def test_an_index_without_a_map_is_refused(content: Any, copy_of: CopyOf) -> None:
    copy = copy_of("mxfp4_sharded")
    (copy / INDEX).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=rf"{INDEX} has no weight_map"):
        files.stored_tensors(copy.path)


def test_an_index_that_is_no_json_is_refused(copy_of: CopyOf) -> None:
    copy = copy_of("mxfp4_sharded")
    (copy / INDEX).write_text("{")
    with pytest.raises(ConfigError, match=rf"{INDEX} is not JSON"):
        files.stored_tensors(copy.path)


@pytest.mark.parametrize("shard", SHARDS)
def test_a_missing_shard_is_named_with_a_tensor_of_it(shard: str, copy_of: CopyOf) -> None:
    copy = copy_of("mxfp4_sharded")
    (copy / shard).unlink()
    with copy.json(INDEX) as index:
        first = next(name for name, file in index["weight_map"].items() if file == shard)
    with pytest.raises(CheckpointError, match=rf"{shard} is missing.*{first}"):
        files.stored_tensors(copy.path)


@pytest.mark.parametrize("shard", SHARDS)
def test_a_truncated_shard_is_named(shard: str, copy_of: CopyOf) -> None:
    copy = copy_of("mxfp4_sharded")
    (copy / shard).write_bytes((copy / shard).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"{shard} is damaged"):
        files.stored_tensors(copy.path)


@pytest.mark.parametrize(
    "shard",
    [
        "../outside.safetensors",
        "sub/outside.safetensors",
        "./model-00001-of-00003.safetensors",
        "{absolute}",
        "..",
        "",
        "model-00001-of-00003.bin",
        "/etc/passwd",
    ],
)
def test_a_file_elsewhere_is_not_opened(shard: str, copy_of: CopyOf) -> None:
    copy = copy_of("mxfp4_sharded")
    (copy / "sub").mkdir()
    tensor = {"extra": torch.zeros(1)}
    for place in (copy.path.parent / "outside.safetensors", copy / "sub" / "outside.safetensors"):
        save_file(tensor, place)
    shard = shard.format(absolute=copy.path.parent / "outside.safetensors")
    with copy.json(INDEX) as index:
        index["weight_map"]["extra"] = shard
    with pytest.raises(CheckpointError) as caught:
        files.stored_tensors(copy.path)
    assert f"names {shard!r}, expected a .safetensors file beside it" in str(caught.value)


@pytest.mark.parametrize("shard", ["a" * 300 + ".safetensors", "a\0.safetensors"])
def test_a_name_that_no_file_can_have_is_refused(shard: str, copy_of: CopyOf) -> None:
    copy = copy_of("mxfp4_sharded")
    with copy.json(INDEX) as index:
        index["weight_map"]["extra"] = shard
    with pytest.raises(CheckpointError, match=rf"extra|{INDEX}"):
        files.stored_tensors(copy.path)


def test_a_tensor_that_the_index_places_in_another_shard_is_refused(copy_of: CopyOf) -> None:
    copy = copy_of("mxfp4_sharded")
    with copy.json(INDEX) as index:
        old = index["weight_map"]["lm_head.weight"]
        new = next(shard for shard in SHARDS if shard != old)
        index["weight_map"]["lm_head.weight"] = new
    with pytest.raises(CheckpointError, match=rf"{old} holds lm_head\.weight, which {INDEX} places in {new}"):
        files.stored_tensors(copy.path)


def test_a_tensor_that_the_index_does_not_list_is_refused(copy_of: CopyOf) -> None:
    copy = copy_of("mxfp4_sharded")
    with copy.tensors(SHARDS[1]) as tensors:
        tensors["extra"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=rf"{SHARDS[1]} holds extra, which {INDEX} places in None"):
        files.stored_tensors(copy.path)


def test_a_tensor_that_the_index_lists_and_no_shard_holds_is_refused(copy_of: CopyOf) -> None:
    copy = copy_of("mxfp4_sharded")
    with copy.json(INDEX) as index:
        index["weight_map"]["extra"] = SHARDS[2]
    with pytest.raises(CheckpointError, match=rf"lists extra, which {SHARDS[2]} does not hold"):
        files.stored_tensors(copy.path)


def test_a_tensor_in_two_shards_is_refused(copy_of: CopyOf) -> None:
    copy = copy_of("mxfp4_sharded")
    name = next(iter(load_file(copy / SHARDS[0])))
    with copy.tensors(SHARDS[2]) as tensors:
        tensors[name] = load_file(copy / SHARDS[0])[name]
    with pytest.raises(CheckpointError, match=rf"{SHARDS[2]} holds {name}, which {INDEX} places in {SHARDS[0]}"):
        files.stored_tensors(copy.path)


def test_a_shard_that_is_a_directory_is_refused(copy_of: CopyOf) -> None:
    copy = copy_of("mxfp4_sharded")
    (copy / SHARDS[0]).unlink()
    (copy / SHARDS[0]).mkdir()
    with pytest.raises(CheckpointError, match=SHARDS[0]):
        files.stored_tensors(copy.path)
