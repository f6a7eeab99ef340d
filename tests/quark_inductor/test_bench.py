import csv
import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._inductor.utils import run_and_get_code

from quark_inductor import bench
from quark_inductor.__main__ import main
from quark_inductor.errors import QuarkInductorError
from quark_inductor.peers import PEERS
from quark_inductor.peers.base import Place, activations, check, weight
from quark_inductor.peers.floats import each
from quark_inductor.peers.host import Died, Host
from quark_inductor.peers.ours import _copies, _quantized
from quark_inductor.peers.raw_read import raw_read
from quark_inductor.schemes.spec import PRESETS

COLUMNS = (
    "threads n k m name scheme provider linears weights weight_bytes huge_pages from_memory samples median_ms q1_ms "
    "q3_ms gb_per_s gop_per_s raw_read_fraction speedup_over_bf16"
).split()


def test_a_quick_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(PEERS["llama.cpp-q8_0"], "module", "a_module_that_nobody_has")
    table, numbers, picture = tmp_path / "rows.csv", tmp_path / "all.json", tmp_path / "plot.svg"
    files = ["--csv", str(table), "--json", str(numbers), "--plot", str(picture)]
    assert main(["bench", "--quick", "--peers", "bf16-linear", "llama.cpp-q8_0", *files]) == 0

    with table.open(encoding="utf-8") as file:
        lines = list(csv.reader(file))
    assert lines[0] == COLUMNS
    result = json.loads(numbers.read_text(encoding="utf-8"))
    rows = result["rows"]
    assert len(lines) == 1 + len(rows)
    assert all(list(row) == COLUMNS for row in rows)
    of_schemes = [("quark", s) for s in bench.QUICK_SCHEMES] + [("raw-read", s) for s in bench.QUICK_SCHEMES]
    expected = {(name, scheme, m) for name, scheme in [*of_schemes, ("bf16-linear", "")] for m in bench.QUICK_TOKENS}
    assert {(row["name"], row["scheme"], row["m"]) for row in rows} == expected
    assert len(rows) == len(expected)

    by_name = {(row["name"], row["scheme"], row["m"]): row for row in rows}
    for row in rows:
        assert 0 < row["q1_ms"] <= row["median_ms"] <= row["q3_ms"]
        assert row["samples"] >= bench.LEAST_SAMPLES
        assert row["gb_per_s"] == pytest.approx(row["weight_bytes"] / row["median_ms"] / 1e6)
        if row["name"] == "raw-read":
            assert row["gop_per_s"] is None
            continue
        operations = 2 * row["m"] * row["n"] * row["k"]
        assert row["gop_per_s"] == pytest.approx(operations / row["median_ms"] / 1e6)
        baseline = by_name["bf16-linear", "", row["m"]]["median_ms"]
        assert row["speedup_over_bf16"] == pytest.approx(baseline / row["median_ms"])
        if row["name"] == "quark":
            read = by_name["raw-read", row["scheme"], row["m"]]["median_ms"]
            assert row["raw_read_fraction"] == pytest.approx(read / row["median_ms"])
            assert row["provider"] == "cpp"
            # Half a byte a weight for MXFP4, one for FP8; then scales.
            bits = 4 if row["scheme"] == "mxfp4" else 8
            assert bits < 8 * row["weight_bytes"] / row["n"] / row["k"] < bits + 0.5

    assert {"cpu", "flags", "cores", "memory_bytes", "transparent_huge_pages", "torch", "compiler"} <= set(
        result["machine"]
    )
    (missing,) = result["missing"]
    assert missing["peer"] == "llama.cpp-q8_0"
    said = capsys.readouterr()
    assert "missing: llama.cpp-q8_0: llama-cpp-python is not installed; to get it: pip install" in said.out
    assert "1 threads, 128x256, M=16: quark mxfp4: " in said.err
    assert "M = 16" in picture.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scheme", "mxfp4", "--scheme", "fp3"], "there is no scheme 'fp3'; expected one of mxfp4,"),
        (["--peers", "bf16-linear", "numpy"], "there is no peer 'numpy'; expected one of bf16-linear,"),
        (["--shape", "4096"], "'4096' is no shape; expected N x K"),
        (["--shape", "4096x0"], "'4096x0' is no shape"),
        (["--tokens", "0"], "'0' is no positive number"),
    ],
)
def test_a_wrong_command_line_exits_with_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as e:
        main(["bench", *arguments])
    assert e.value.code == 2
    assert message in capsys.readouterr().err


def settings(**given: object) -> bench.Settings:
    names = ("schemes", "shapes", "tokens", "threads", "peers", "seconds")
    return bench.settings(**{"quick": False, **dict.fromkeys(names), **given})


def test_everything_is_measured_unless_told_otherwise() -> None:
    everything = settings()
    assert everything.schemes == tuple(PRESETS)
    assert everything.peers == tuple(PEERS)
    assert everything.shapes == ((4096, 4096), (14336, 4096), (4096, 14336))
    assert everything.tokens == (1, 4, 16, 128, 512)
    assert everything.threads[0] == 1
    # The slowest peer is asked everywhere only by its name; no peer at all is an answer too.
    assert not everything.all_emulated
    assert settings(peers=["emulation"]).all_emulated
    assert settings(peers=[]).peers == ()


def test_few_tokens_read_weights_that_no_cache_holds() -> None:
    place = Place(n=4096, k=4096, threads=1, cold_bytes=160_000_000)
    assert place.copies(10_000_000, 1) == place.copies(10_000_000, 16) == 16
    assert place.copies(10_000_000, 128) == 2
    assert place.copies(1000, 1) == 64
    assert (place.rounds(16, 1), place.rounds(6, 16), place.rounds(64, 1), place.rounds(2, 128)) == (4, 11, 1, 4)


@pytest.mark.usefixtures("fresh")
def test_a_call_reads_all_weights_before_it_reads_one_again() -> None:
    """Else the second product would find the weight in a cache."""
    linears = _copies(_quantized(64, 128, "mxfp4"), 3, packed=True)
    compiled = torch.compile(each(linears), backend="quark", fullgraph=True)
    outputs, (code,) = run_and_get_code(compiled, torch.randn(1, 128).bfloat16(), torch.randn(1, 128).bfloat16())
    assert len(outputs) == 6
    read = re.findall(r"^ +cpp_fused\w*\(\w+, (\w+), \w+\)$", code, re.MULTILINE)
    assert len(set(read)) == 3
    assert read == read[:3] * 2


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_raw_read_reads_every_byte(threads: int) -> None:
    tensors = [torch.randint(256, (size,), dtype=torch.uint8) for size in (512, 512 * 1001, 512 * 4096)]
    expected = sum(int(t.numpy().view(np.uint64).sum(dtype=np.uint64)) for t in tensors) % 2**64
    assert raw_read(tensors, threads)() == expected


def test_a_wrong_product_is_not_measured() -> None:
    x, w = activations(1, 8, 256)[0], weight(64, 256)
    check(x @ w.T, x, w)
    with pytest.raises(QuarkInductorError, match="off by"):
        check(x @ np.roll(w, 1, 0).T, x, w)
    with pytest.raises(QuarkInductorError, match="off by"):
        check(np.full((8, 64), np.nan, dtype=np.float32), x, w)


def test_a_crash_says_which_signal_and_the_next_question_finds_another_process() -> None:
    host = Host("bf16-linear", Place(n=64, k=64, threads=1, cold_bytes=0))
    try:
        with pytest.raises(QuarkInductorError, match="KeyError"):
            host.ask("turn", "")
        process = host._process.pid
        assert process is not None
        os.kill(process, signal.SIGABRT)
        with pytest.raises(Died, match="SIGABRT"):
            host.ask("prepare", "", 1)
        linears, weights, weight_bytes, *_ = host.ask("prepare", "", 1)
        assert (linears, weights, weight_bytes) == (2, 2, 64 * 64 * 2)
        assert all(ms > 0 for ms in host.ask("turn", ""))
    finally:
        host.close()


@pytest.mark.foreign
@pytest.mark.parametrize("name", [name for name, peer in PEERS.items() if peer.module])
def test_a_peer_that_is_installed_works(name: str) -> None:
    if reason := PEERS[name].missing():
        pytest.skip(f"{reason}: {PEERS[name].get}")
    assert PEERS[name].version()
    host = Host(name, Place(n=256, k=512, threads=1, cold_bytes=0))
    try:
        for m in (1, 32):
            linears, _, weight_bytes, *_ = host.ask("prepare", "", m)
            assert linears == 2
            assert weight_bytes >= 256 * 512 / 2
            assert all(ms > 0 for ms in host.ask("turn", ""))
    finally:
        host.close()
