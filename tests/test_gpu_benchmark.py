"""``benchmarks/gpu_gemm.py`` and ``gpu_run.py``, as far as they need no GPU."""

import importlib.util
import io
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def gemm() -> Any:
    return loaded("gpu_gemm")


@pytest.fixture(scope="module")
def everything() -> Any:
    return loaded("gpu_run")


# --- what is measured, and in which order


def test_the_most_important_come_first(gemm: Any) -> None:
    cells = gemm.plan(("a", "b"), ((1, 2), (3, 4)), (1, 16, 256))
    assert len(set(cells)) == len(cells) == 12
    assert [(c.scheme, c.n, c.m) for c in cells[:3]] == [("a", 1, 1), ("a", 1, 16), ("b", 1, 1)]
    assert (cells[-1].scheme, cells[-1].n, cells[-1].m) == ("b", 3, 256)
    # What is cut off at any place is never better in all respects than what is left.
    places = [("ab".index(c.scheme), (1, 3).index(c.n), (1, 16, 256).index(c.m)) for c in cells]
    for i, later in enumerate(places):
        assert not any(all(x >= y for x, y in zip(earlier, later, strict=True)) for earlier in places[:i])


def test_all_that_is_meant_can_be_measured(gemm: Any) -> None:
    assert set(gemm.SCHEMES) <= gemm.PRESETS.keys()
    assert sorted(gemm.ALL_TOKENS) == [1, 8, 16, 64, 256, 1024, 4096]
    assert len(set(gemm.ALL_SHAPES)) == 8
    assert all(gemm.weight_bytes(scheme, n, k) > 0 for scheme in gemm.SCHEMES for n, k in gemm.ALL_SHAPES)


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("", 256 * 512 * 2),
        ("mxfp4", 256 * 512 // 2 + 256 * 512 // 32),
        ("mxfp8", 256 * 512 + 256 * 512 // 32),
        ("nvfp4", 256 * 512 // 2 + 256 * 512 // 16 + 4),
        ("ptpc_fp8", 256 * 512 + 2 * 256),
        ("int4_wo_128", 256 * 512 // 2 + (2 * 256 + 256 // 2) * 4),
    ],
)
def test_bytes_of_a_weight(gemm: Any, scheme: str, expected: int) -> None:
    assert gemm.weight_bytes(scheme, 256, 512) == expected


def test_bits_of_the_operands(gemm: Any) -> None:
    bits = {scheme: gemm.operand_bits(scheme) for scheme in ("", *gemm.SCHEMES)}
    assert [scheme for scheme, of in bits.items() if of == 4] == ["mxfp4", "nvfp4"]
    assert [scheme for scheme, of in bits.items() if of == 16] == ["", "mxfp4_weight_only", "int4_wo_128"]


def test_floors(gemm: Any) -> None:
    """By hand: H200 moves 4.8 TB/s, and multiplies 1979 * 10^12 times two numbers of 8 bits, 4 bits like them."""
    h200 = gemm.chip_of("NVIDIA H200")
    moves = (1_000_000 + 2 * 1 * (4096 + 8192)) / 4.8e12 * 1e6
    assert gemm.floor_us(h200, 4, 1_000_000, 4096, 8192, 1) == pytest.approx(moves)
    multiplies = 2 * 4096 * 4096 * 8192 / 1979e12 * 1e6
    assert gemm.floor_us(h200, 4, 1_000_000, 4096, 8192, 4096) == pytest.approx(multiplies)
    assert gemm.floor_us(h200, 16, 1_000_000, 4096, 8192, 4096) == pytest.approx(multiplies * 1979 / 989)
    b200 = gemm.chip_of("NVIDIA B200")
    assert gemm.floor_us(b200, 4, 1_000_000, 4096, 8192, 4096) == pytest.approx(multiplies * 1979 / 9000)
    assert math.isnan(gemm.floor_us(None, 4, 1_000_000, 4096, 8192, 4096))


def test_chips_are_known_by_name(gemm: Any) -> None:
    assert gemm.chip_of("AMD Instinct MI300X").bytes_per_s == 5.3e12
    assert gemm.chip_of("AMD Instinct MI355X").tflops[4] == 10000
    # Others, of whose numbers nothing is said.
    for name in ("NVIDIA H200 NVL", "NVIDIA GB200", "NVIDIA H100 80GB HBM3", "AMD Instinct MI300A", ""):
        assert gemm.chip_of(name) is None


# --- results


def row(gemm: Any, name: str, us: float, m: int = 1, scheme: str = "", **more: Any) -> Any:
    return gemm.Row(scheme=scheme, n=64, k=32, m=m, name=name, us=us, **more)


def test_tables(gemm: Any) -> None:
    rows = gemm.with_speedups(
        [
            row(gemm, "bf16-eager", 10.0),
            row(gemm, "bf16-inductor", 8.0, floor_us=4.0),
            row(gemm, "quark", 2.0, scheme="mxfp4", provider="triton", floor_us=1.0),
            row(gemm, "quark", 5.0, m=64, scheme="mxfp4", provider="scaled_mm"),
            row(gemm, "emulation", math.nan, scheme="mxfp4", error="RuntimeError: no"),
        ]
    )
    assert rows[2].speedup == 4.0
    assert math.isnan(rows[3].speedup)  # no bfloat16 of 64 tokens
    assert gemm.tables(rows).splitlines() == [
        "N = 64, K = 32:",
        "",
        "| | M = 1 | M = 64 |",
        "|---|---|---|",
        "| bf16-eager | 10.0 |  |",
        "| bf16-inductor | 8.0 (50%) |  |",
        "| quark mxfp4 | 2.0 (4.00x, 50%) | 5.0 scaled_mm |",
        "| emulation mxfp4 | failed |  |",
        "",
        "Not measured:",
        "",
        "- emulation mxfp4 64x32 M=1: RuntimeError: no",
    ]
    page = gemm.page(rows, {"torch": "1.2"}, "python x", [gemm.Cell("nvfp4", 1, 2, 3)])
    assert "torch 1.2: `python x`" in page
    assert "1 rows are left, first nvfp4 1x2 M=3" in page


def test_a_file_is_read_as_it_was_written(gemm: Any, tmp_path: Path) -> None:
    rows = [row(gemm, "quark", 2.5, scheme="mxfp4", provider="triton", error='a "b", c'), row(gemm, "bf16-eager", 1.0)]
    gemm.write_csv(tmp_path / "rows.csv", rows)
    # NaN is not equal to itself.
    assert [str(r) for r in gemm.read_csv(tmp_path / "rows.csv")] == [str(r) for r in rows]


# --- running


class Slow:
    """A bench whose cells take so many seconds, by a clock of its own."""

    def __init__(self, seconds: Sequence[float]) -> None:
        self.now, self.seconds, self.done = 0.0, list(seconds), dict[Any, list[Any]]()

    def rows(self, cell: Any) -> None:
        self.now += self.seconds.pop(0)
        self.done[cell.scheme, cell.n, cell.k, cell.m] = []


@pytest.mark.parametrize(
    ("seconds", "left"), [([10, 10, 10], 0), ([40, 30, 10], 1), ([101, 1, 1], 2), ([10, 60, 30], 1)]
)
def test_it_stops_in_time(gemm: Any, seconds: list[float], left: int) -> None:
    """Before a cell for which there may be too little: 100 seconds are given."""
    cells = gemm.plan(("mxfp4",), ((64, 64),), (1, 2, 3))
    bench, told = Slow(seconds), list[int]()
    rest = gemm.run(cells, bench, 100.0, lambda rows, left: told.append(len(left)), lambda: bench.now)
    assert rest == cells[len(cells) - left :]
    assert told == [2, 1, 0][: 3 - left]


def test_it_goes_on_where_it_stopped(gemm: Any) -> None:
    cells = gemm.plan(("mxfp4",), ((64, 64),), (1, 2, 3))
    bench = Slow([1, 1])
    bench.done[("mxfp4", 64, 64, 2)] = []
    seen = []
    gemm.run(cells, bench, 100.0, lambda rows, left: seen.append([c.m for c in left]), lambda: bench.now)
    assert seen == [[3], []]


def test_a_lost_gpu_ends_it(gemm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a row that says who did it, behind which ``--resume`` goes on."""

    def lost() -> None:
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    bench = gemm.Bench("cuda", None)
    monkeypatch.setattr(bench, "activation", lambda *args, **kwargs: torch.zeros(1))
    monkeypatch.setattr(bench, "floats", lambda cell: [])
    told: list[Any] = []
    with pytest.raises(gemm.LostError, match="mxfp4 64x64 M=1 quark: "):
        gemm.run(
            gemm.plan(("mxfp4",), ((64, 64),), (1, 2)), bench, math.inf, lambda rows, left: told.append((rows, left))
        )
    (((only,), left),) = told
    assert (only.name, bool(only.error)) == ("quark", True)
    assert [cell.m for cell in left] == [2]


@pytest.mark.fuzz
def test_every_candidate_computes_the_product(gemm: Any, fresh: None) -> None:
    """On CPU, in a size of no interest; each is compiled once for all of its weights."""
    bench = gemm.Bench(
        "cpu", gemm.chip_of("NVIDIA H200"), lambda calls: (calls(), (1.0, 2.0, 3.0))[1], cold_bytes=20_000
    )
    cells = gemm.plan(("ptpc_fp8", "mxfp4_weight_only"), ((64, 128),), (3,))
    assert gemm.run(cells, bench, math.inf, lambda rows, left: None) == []
    rows = [row for of_cell in bench.done.values() for row in of_cell]
    assert [row.error for row in rows if row.error] == []
    assert {row.name for row in rows if not row.scheme} == {*gemm.BASELINES, "scaled_mm-row", "scaled_mm-tensor"}
    assert {(row.scheme, row.name) for row in rows if row.op and row.provider == "cpp"} == {
        ("ptpc_fp8", "quark"),
        ("ptpc_fp8", "quark-producer"),
        ("mxfp4_weight_only", "quark"),
    }
    assert all(row.us == 2000 / row.copies for row in rows)
    assert all(row.copies * row.weight_bytes >= 20_000 for row in rows)
    bench.inputs = [torch.ones(3, 128)]
    with pytest.raises(ValueError, match="off by"):
        bench.check(torch.zeros(3, 64), cells[0])


def test_without_a_gpu(
    gemm: Any, everything: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gemm.main([]) == 2
    assert "needs a GPU" in capsys.readouterr().err
    assert gemm.main(["--dry-run", "--chip", "H200", "--tokens", "1", "--scheme", "mxfp4"]) == 0
    assert capsys.readouterr().out == "mxfp4 28672x4096 M=1: 62.4 MB, at least 13.0 us\n"
    assert gemm.main(["--dry-run", "--shape", "all"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(gemm.SCHEMES) * 8 * len(gemm.TOKENS)


# --- tests and benchmark together


def test_tests_go_on_behind_a_lost_gpu(everything: Any) -> None:
    """In another process, without those that have a result."""
    answers = [
        (86, ["tests/test_gpu.py::a[1] PASSED [ 1%]", "tests/test_gpu.py::b FAILED [ 2%]", "!! lost !!"]),
        (1, ["tests/test_gpu.py::c SKIPPED (why) [ 9%]"]),
    ]
    commands: list[Sequence[str]] = []

    def run(command: Sequence[str], seconds: float) -> Any:
        commands.append(command)
        return answers[len(commands) - 1]

    results = everything.run_tests(run, "gpu", deadline=10.0, clock=lambda: 0.0)
    assert results == {
        "tests/test_gpu.py::a[1]": "PASSED",
        "tests/test_gpu.py::b": "FAILED",
        "tests/test_gpu.py::c": "SKIPPED",
    }
    assert [a for a in commands[1] if a not in commands[0]] == [
        "--deselect=tests/test_gpu.py::a[1]",
        "--deselect=tests/test_gpu.py::b",
    ]


def test_tests_do_not_go_on_for_ever(everything: Any) -> None:
    commands = []

    def run(command: Sequence[str], seconds: float) -> Any:
        commands.append(command)
        return 86, ["tests/test_gpu.py::a FAILED"]

    assert len(everything.run_tests(run, "gpu", deadline=10.0, clock=lambda: 0.0)) == 1
    assert len(commands) == 2
    assert everything.run_tests(run, "gpu", deadline=10.0, clock=lambda: 11.0) == {}


def test_a_command_is_ended(everything: Any) -> None:
    log = io.StringIO()
    code, lines = everything.said([sys.executable, "-c", "print(1, flush=True); import time; time.sleep(60)"], 3.0, log)
    assert (code, lines, log.getvalue()) == (None, ["1"], "1\n")
    assert everything.said([sys.executable, "-c", "raise SystemExit(3)"], 60.0, log) == (3, [])


def test_the_codes_agree(gemm: Any, everything: Any) -> None:
    text = Path(__file__).with_name("test_gpu.py").read_text()
    assert f"\nLOST = {gemm.LOST}\n" in text
    assert gemm.LOST == everything.LOST


def test_the_budget_is_shared(everything: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests first; the benchmark gets the rest, again where the GPU was lost, and is told to go on."""
    asked: list[tuple[list[str], float]] = []
    now = SimpleNamespace(seconds=0.0)

    def said(command: Sequence[str], seconds: float, log: Any) -> Any:
        asked.append(([*command], seconds))
        now.seconds += 60
        benchmarks = sum("gpu_gemm.py" in " ".join(of) for of, _ in asked)
        if "pytest" in command:
            return 1, ["tests/test_gpu.py::a FAILED [ 1%]"]
        return (86 if benchmarks == 1 else 0), []

    monkeypatch.setattr(everything, "said", said)
    monkeypatch.setattr(everything.time, "monotonic", lambda: now.seconds)
    assert everything.main(["--minutes", "8", "--log", str(tmp_path / "log"), "--tokens", "1"]) == 1
    _, tested, first, second = asked
    assert tested[1] == 0.75 * 420
    assert first[0][-4:] == ["--tokens", "1", "--minutes", "6.00"]
    assert second[0][-5:] == ["--tokens", "1", "--resume", "--minutes", "5.00"]
    assert "failed: tests/test_gpu.py::a" in (tmp_path / "log").read_text()
