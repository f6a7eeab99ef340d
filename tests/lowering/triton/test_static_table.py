"""The figures in ``benchmarks/triton_static.json``: none is worse than AITER's, but for those that are named here."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]


def load_benchmark() -> Any:
    """``benchmarks/triton_static.py``, which is in no package."""
    spec = importlib.util.spec_from_file_location("triton_static", ROOT / "benchmarks" / "triton_static.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


benchmark = load_benchmark()
AITER = json.loads(benchmark.ANCHOR.read_text())
OURS = json.loads(benchmark.OURS.read_text())
ROWS = benchmark.gemms(AITER)

# What is worse, and why.
WORSE = {
    ("gfx950 gemm_afp4wfp4_preshuffle 128x128x256", "shared_reads"): "its scales are shuffled when they are loaded",
    ("gfx950 gemm_a8wfp4 128x256x128", "registers"): "one wave a SIMD; AITER's is held to two, and spills 49",
    ("gfx950 gemm_afp8wfp8 64x64x128", "instructions"): "AITER's has twice the MFMAs: one of the next two tiles",
}


def figures(row: dict[str, Any]) -> dict[str, float]:
    """Those that are compared: of the loop, for each MFMA."""
    found = {name: row[name] for name in ("registers", "spills")}
    if row["loop"] is None:
        return found | {"instructions": row["instructions"]}
    of_loop = ("instructions", "valu", "conversions", "shared_reads")
    return found | {name: benchmark.per_mma(row, name) for name in of_loop if row["loop"][name] is not None}


def test_every_gemm_is_there() -> None:
    assert list(OURS["kernels"]) == list(ROWS)
    assert OURS["triton"] == AITER["triton"]


def test_nothing_else_is_worse() -> None:
    worse = set()
    for name, row in ROWS.items():
        theirs, ours = figures(row), figures(OURS["kernels"][name])
        worse |= {(name, what) for what, figure in theirs.items() if ours[what] > figure}
    assert worse == set(WORSE)


def test_nothing_spills() -> None:
    assert {name for name, ours in OURS["kernels"].items() if ours["spills"]} == set()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gfx950 gemm_a8wfp4 128x256x128", "gfx942 gemm_a8w8 fp8 128x128x128"])
def test_figures_are_those_of_the_kernels(offline: Any, name: str) -> None:
    triton = pytest.importorskip("triton", reason="compiles Triton kernels: pip install triton")
    if triton.__version__ != OURS["triton"]:
        pytest.skip(f"the figures are of Triton {OURS['triton']}, not {triton.__version__}")
    (found,) = offline.compile([benchmark.job(ROWS[name], AITER["n"], AITER["k"])])
    assert benchmark.figures_of(found) == OURS["kernels"][name]
