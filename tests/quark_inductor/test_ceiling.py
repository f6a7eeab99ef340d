"""The machine's ceilings: measured once, kept in a file, and no kernel is faster."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch

from quark_inductor import ceiling
from quark_inductor.ceiling import Ceilings, ceilings_of
from quark_inductor.lowering import target as targets
from quark_inductor.lowering.base import GemmProblem
from quark_inductor.peers.raw_read import build, compiler
from quark_inductor.schemes.errors import QuarkInductorError


@pytest.fixture(autouse=True)
def a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the test's own, and short measurements of little memory."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(ceiling, "SIZES", (1 << 20, 1 << 22))
    monkeypatch.setattr(ceiling, "_SECONDS", 0.02)


def test_they_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = ceilings_of()
    assert list(found.reads) == [1 << 20, 1 << 22]
    assert found.reads[1 << 20] >= found.reads[1 << 22] > 0
    # A core that multiplied only one pair of floats a cycle at 1 GHz.
    assert found.peaks["fp32"] > 1
    assert (found.threads, found.isa) == (torch.get_num_threads(), targets.current().isa)
    known = json.loads(ceiling.file().read_text())
    (key,) = known
    assert found.name in key
    assert found.isa in key
    before = ceiling._of_cpu

    def never(*args: object) -> None:
        raise AssertionError("it was measured again")

    monkeypatch.setattr(ceiling, "_of_cpu", never)
    assert ceilings_of() == found
    # What is measured again is kept where it is higher.
    monkeypatch.setattr(ceiling, "_of_cpu", lambda *args: ({1 << 20: 1e6, 1 << 22: 1e-6}, {"fp32": 1e-6, "new": 1.0}))
    again = ceilings_of(again=True)
    assert again.reads == {1 << 20: 1e6, 1 << 22: found.reads[1 << 22]}
    assert again.peaks == {"fp32": found.peaks["fp32"], "new": 1.0}
    assert ceilings_of() == again
    # A broken file is written anew.
    monkeypatch.setattr(ceiling, "_of_cpu", before)
    ceiling.file().write_text("{")
    assert ceilings_of().peaks.keys() == found.peaks.keys()
    assert list(json.loads(ceiling.file().read_text())) == [key]


def test_another_isa_is_measured_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceiling, "_of_cpu", lambda target, threads: ({1 << 20: 1.0}, {"fp32": 1.0}))
    ceilings_of()
    monkeypatch.setenv("QUARK_INDUCTOR_ISA", "portable")
    targets.current.cache_clear()
    try:
        assert ceilings_of().isa == "portable"
    finally:
        monkeypatch.undo()
        targets.current.cache_clear()


def test_without_a_folder_it_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nothing")
    monkeypatch.setattr(ceiling, "_of_cpu", lambda target, threads: ({1 << 20: 1.0}, {"fp32": 1.0}))
    assert ceilings_of().peaks == {"fp32": 1.0}


# What the loop for each instruction must be made of, and a CPU that has it.
MULTIPLIES = (
    (("AMX",), "sapphirerapids", {"tdpbsud", "tdpbf16ps", "vfmadd"}),
    (("AVX512_BF16", "AVX512_VNNI"), "sapphirerapids", {"vpdpbusd", "vdpbf16ps", "vfmadd"}),
    (("AVX512_VNNI",), "icelake-server", {"vpdpbusd", "vfmadd"}),
    (("AVX2",), "alderlake", {"vpdpbusd", "vfmadd"}),
    (("AVX2",), "haswell", {"vpmaddubsw", "vfmadd"}),
    ((), "x86-64", {"mulps"}),
)


@pytest.mark.skipif(targets.current().arch != "x86_64", reason="instructions of x86-64")
@pytest.mark.parametrize(("defined", "cpu", "instructions"), MULTIPLIES)
def test_the_loops_multiply_in_registers(
    defined: tuple[str, ...], cpu: str, instructions: set[str], tmp_path: Path
) -> None:
    source, result = tmp_path / "source.cpp", tmp_path / "source.s"
    source.write_text(ceiling._SOURCE)
    flags = ("-O3", "-ffp-contract=fast", f"-march={cpu}", *(f"-D{define}" for define in defined))
    subprocess.run([compiler(), *flags, "-S", str(source), "-o", str(result)], check=True, capture_output=True)
    every = ("tdpbsud", "tdpbf16ps", "vpdpbusd", "vdpbf16ps", "vpmaddubsw", "vfmadd", "mulps")
    line = r"^\t(?:\{{vex\}} )?{}\S*\s+(.*)$"
    found = {name: re.findall(line.format(name), result.read_text(), re.MULTILINE) for name in every}
    assert {name for name in every if found[name]} == instructions
    for name in instructions - {"mulps"}:
        # One a sum: none was merged with another, none reads memory.
        assert len(found[name]) == 12, name
        assert not any("(" in operands for operands in found[name]), name


def test_a_source_that_does_not_compile_is_told() -> None:
    with pytest.raises(QuarkInductorError, match=r"cannot compile the loops:\n.*error"):
        build("what?", "the loops")


def test_which_ceiling_is_whose() -> None:
    known = Ceilings("", 2, "avx512_vnni", {10: 5.0, 20: 4.0, 40: 1.0}, {"int8": 8.0, "fp32": 2.0})
    assert [known.read_gb_s(size) for size in (1, 10, 19, 20, 39, 1000)] == [5, 5, 5, 4, 4, 1]
    floats = GemmProblem(op="weight_only_gemm", m=1, n=1, k=1, dtype="bfloat16")
    assert [known.peak(floats, name) for name in ("int8", "fp32", "bf16")] == [8, 2, 2]
    gpu = Ceilings("", 0, "sm_90", {1: 1.0}, {"float8_e4m3fn": 4.0, "bfloat16": 2.0, "float32": 1.0})
    fp8 = GemmProblem(
        op="quantized_gemm", m=1, n=1, k=1, dtype="bfloat16", x_format="fp8_e4m3", weight_format="fp8_e4m3"
    )
    assert (gpu.peak(floats, ""), gpu.peak(fp8, "")) == (2, 4)
    facts = gpu.facts(7)
    assert (facts["gpu"], facts["threads"], facts["read_gb_s"], facts["gflop_s"]) == ("", 0, 1.0, 4.0)
    assert "cpu" in known.facts(7)
