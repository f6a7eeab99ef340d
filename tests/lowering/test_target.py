"""What the code is told about the machine."""

import os
import platform
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quark_inductor.lowering import target
from quark_inductor.lowering.target import Target, current

AVX2 = {name: True for name in ("avx2", "fma3", "f16c")}
AVX512 = {f"avx512_{name}": True for name in ("f", "bw", "vl", "dq", "vnni")}
EVERYTHING = {**AVX2, **AVX512}


@pytest.fixture(autouse=True)
def fresh() -> Any:
    current.cache_clear()
    yield
    current.cache_clear()


def test_names() -> None:
    assert str(Target(device_type="cpu", arch="x86_64", isa="portable")) == "cpu x86_64 portable"
    assert str(Target(device_type="cuda", arch="gfx942")) == "cuda gfx942"


@pytest.mark.parametrize(
    ("lacking", "variable", "isa"),
    [
        (None, None, "avx512_vnni"),
        (None, "portable", "portable"),
        (None, "", "avx512_vnni"),
        (None, "avx2", "avx2"),
        *((name, None, "avx2") for name in AVX512),
        *((name, None, "portable") for name in AVX2),
    ],
)
def test_cpu(monkeypatch: pytest.MonkeyPatch, lacking: str | None, variable: str | None, isa: str) -> None:
    """The fast kernels need every feature they use."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {**EVERYTHING, **({lacking: False} if lacking else {})})
    monkeypatch.delenv("QUARK_INDUCTOR_ISA", raising=False)
    if variable is not None:
        monkeypatch.setenv("QUARK_INDUCTOR_ISA", variable)
    assert current() == current("cpu") == Target(device_type="cpu", arch=platform.machine(), isa=isa)


@pytest.mark.parametrize(
    ("has", "permitted", "isa"), [(True, True, "amx"), (True, False, "avx512_bf16"), (False, True, "avx512_bf16")]
)
def test_amx(monkeypatch: pytest.MonkeyPatch, has: bool, permitted: bool, isa: str) -> None:
    """The system has to permit it."""
    below = {**EVERYTHING, "avx512_bf16": True, "avx512_vbmi": True, "amx_tile": True, "amx_bf16": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {**below, "amx_int8": has})
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: permitted)
    monkeypatch.delenv("QUARK_INDUCTOR_ISA", raising=False)
    assert current().isa == isa
    assert current().has("avx512_bf16")


def test_cpu_without_any_feature(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on ARM, where the names do not exist."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "aarch64", "neon": True})
    assert current().isa == "portable"


def test_environment_of_a_process() -> None:
    code = "from quark_inductor.lowering.target import current; print(current())"
    env = {**os.environ, "QUARK_INDUCTOR_ISA": "portable"}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == f"cpu {platform.machine()} portable"


@pytest.mark.parametrize(
    ("properties", "arch"),
    [
        ({"gcnArchName": "gfx942:sramecc+:xnack-", "major": 9, "minor": 4}, "gfx942"),
        ({"major": 9, "minor": 0}, "sm_90"),
        ({"gcnArchName": "", "major": 10, "minor": 3}, "sm_103"),
    ],
)
def test_gpu(monkeypatch: pytest.MonkeyPatch, properties: dict[str, Any], arch: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**properties))
    assert current("cuda") == Target(device_type="cuda", arch=arch)


def test_a_device_nobody_knows() -> None:
    assert current("xpu") == Target(device_type="xpu", arch="unknown")


def test_it_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rule asks for every match."""
    asked: list[None] = []
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: asked.append(None) or {})
    assert target.current() is target.current()
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("lacking", "variable", "refusals"),
    [
        (
            "avx512_vnni",
            None,
            {
                "avx512_vnni": "the CPU has no avx512_vnni",
                "avx512_bf16": "it needs all of avx512_vnni",
                "amx": "the system does not let a process use AMX",
            },
        ),
        (
            "avx512_vbmi",
            "avx2",
            {
                "avx512_vnni": "QUARK_INDUCTOR_ISA is 'avx2'",
                "avx512_bf16": "the CPU has no avx512_vbmi",
                "amx": "the system does not let a process use AMX",
            },
        ),
        (None, None, {"amx": "the system does not let a process use AMX"}),
    ],
)
def test_why_not_a_higher_level(
    monkeypatch: pytest.MonkeyPatch, lacking: str | None, variable: str | None, refusals: dict[str, str]
) -> None:
    everything = {**EVERYTHING, **dict.fromkeys(target.ISA_LEVELS["avx512_bf16"] + target.ISA_LEVELS["amx"], True)}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {**everything, **({lacking: False} if lacking else {})})
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: False)
    monkeypatch.setenv("QUARK_INDUCTOR_ISA", variable or "")
    assert target.isa_refusals() == refusals
