"""``env``: facts of this machine, and what each provider says to what would run here."""

import json
import platform
from collections.abc import Iterator
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from quark_inductor import environment as module
from quark_inductor.environment import SCHEMES, TOKENS, Cache, Environment, environment
from quark_inductor.lowering import target
from quark_inductor.lowering.base import provider_names

SCHEMA = json.loads((resources.files("quark_inductor") / "schemas" / "environment.json").read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def another_target() -> Iterator[None]:
    """A test may be told of another CPU."""
    yield
    target.current.cache_clear()


@pytest.fixture(scope="module")
def found() -> Environment:
    """Of this machine."""
    return environment({"QUARK_INDUCTOR_ISA": "", "TORCH_LOGS": "+inductor", "HOME": "somewhere", "PASSWORD": "secret"})


def test_what_is_installed(found: Environment) -> None:
    assert found.versions["torch"] == torch.__version__
    assert found.versions["transformers"] == metadata.version("transformers")
    assert "amd-quark" in found.versions
    assert found.machine["python"] == platform.python_version()
    assert found.isa == target.current().isa
    assert set(found.isa_refusals) == set(target.ISA_LEVELS) - {
        level for level in target.ISA_LEVELS if target.current().has(level)
    }


def test_only_variables_that_matter(found: Environment) -> None:
    assert found.variables == {"QUARK_INDUCTOR_ISA": "", "TORCH_LOGS": "+inductor"}


def test_every_provider_answers_for_every_family(found: Environment) -> None:
    cpu = {p.provider: p for p in found.providers if p.device == "cpu"}
    assert tuple(cpu) == provider_names()[:-1]
    for provider in cpu.values():
        asked = [(a.scheme, a.tokens) for a in provider.answers]
        assert asked == [(scheme, tokens) for scheme in SCHEMES for tokens in TOKENS]
        assert all(bool(a.op) != bool(a.reason) for a in provider.answers)
    assert len(cpu["cpp"].runs) == len(SCHEMES) * len(TOKENS)
    assert {a.op for a in cpu["cpp"].runs} == {"prologue_gemm", "weight_only_gemm"}
    assert {a.reason for a in cpu["triton"].answers} == {"for GPUs, the device is cpu"}


def test_the_text_and_the_json(found: Environment) -> None:
    content: dict[str, Any] = json.loads(json.dumps(found.to_dict()))
    validator = jsonschema.Draft202012Validator(SCHEMA)
    validator.validate(content)
    assert not validator.is_valid({**content, "isa": None})
    text = str(found)
    for line in (
        "  triton on cpu: 0 of 24",
        "    no, for GPUs, the device is cpu",
        "  cpp on cpu: 24 of 24",
        "  TORCH_LOGS=+inductor",
        f"  kernels for {found.isa}",
    ):
        assert line in text.splitlines()
    assert len(text.splitlines()) < 60


def test_a_level_that_this_cpu_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong is said in its place, and all else is there."""
    monkeypatch.setenv("QUARK_INDUCTOR_ISA", "sse")
    target.current.cache_clear()
    found = environment()
    assert found.isa.startswith("nothing: QUARK_INDUCTOR_ISA is 'sse'")
    assert {a.reason.partition(";")[0] for p in found.providers for a in p.answers} == {"QUARK_INDUCTOR_ISA is 'sse'"}
    assert found.variables["QUARK_INDUCTOR_ISA"] == "sse"


def test_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "inductor" / "ab").mkdir(parents=True)
    (tmp_path / "inductor" / "ab" / "kernel.so").write_bytes(b"1234")
    (tmp_path / "inductor" / "gone").symlink_to(tmp_path / "nowhere")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    inductor, _, ours = module._caches()
    assert inductor == Cache("Inductor", str(tmp_path / "inductor"), 4, 1)
    assert ours == Cache("quark-inductor", str(tmp_path / "quark-inductor"), None, 0)


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, major, minor, total_memory = "H100", 9, 0, 80 << 30

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    assert module._gpus() == ({"name": "H100", "arch": "sm_90", "memory_bytes": 80 << 30},) * 2
