"""The recorder: what it makes of events, and that tlparse shows ours beside torch's."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from quark_inductor import recorder as recorders
from quark_inductor.patterns._inductor import CompileEvent
from quark_inductor.profile import Run
from quark_inductor.recorder import Recorder, phase_of


class Scripted:
    """A recorder that is told of events whose times the test chooses, in seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(recorders.time, "time_ns", lambda: int(self.now * 1e9))
        self.recorder = Recorder()

    def at(self, s: float, kind: str, event: str, /, thread: int | None = None, **args: Any) -> None:
        self.now = s
        where = self.recorder._main if thread is None else thread
        self.recorder._tell(CompileEvent(kind, event, int(s * 1e9), where, args))


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    return Scripted(monkeypatch)


def test_self_time_is_exclusive_and_events_of_a_name_are_one(scripted: Scripted) -> None:
    with scripted.recorder as found:
        scripted.at(1, "B", "backend_compile")
        for start in (2, 5):
            scripted.at(start, "B", "quark.cse")
            scripted.at(start + 1, "B", "something new")
            scripted.at(start + 2, "E", "something new")
            scripted.at(start + 2, "E", "quark.cse")
        scripted.at(9, "E", "backend_compile")
        scripted.now = 10
    (top,) = found.root.children
    assert (top.s, top.self_s, top.count, top.phase) == (8, 4, 1, "aot_autograd")
    (cse,) = top.children
    assert (cse.s, cse.self_s, cse.count) == (4, 2, 2)
    # What is not known is in the phase of what is around it.
    assert found.phases() == {"aot_autograd": 4, "quark_passes": 4}
    assert (found.wall_s, found.unattributed_s) == (10, 2)


def test_an_exception_and_an_event_from_before_do_not_confuse_it(scripted: Scripted) -> None:
    with scripted.recorder as found:
        scripted.at(1, "E", "dynamo")  # it began before
        scripted.at(2, "B", "backend_compile")
        scripted.at(3, "B", "quark.cse")  # its end never comes
        scripted.at(5, "E", "backend_compile")
        scripted.now = 6
    assert found.phases() == {"aot_autograd": 1, "quark_passes": 2}
    assert found.unattributed_s == 3
    assert [(span.name, span.start_s, span.end_s, span.depth) for span in found.spans] == [
        ("backend_compile", 2, 5, 0),
        ("quark.cse", 3, 5, 1),
    ]


def test_compilers_beside_have_lanes_of_their_own(scripted: Scripted, tmp_path: Path) -> None:
    sources = [tmp_path / name for name in ("a.main.cpp", "b.main.cpp", "check.cpp")]
    for path, text in zip(sources, ("int one() { return 1; }", "", 'extern "C" void is_there(int) {}'), strict=True):
        path.write_text(f"// before\n{text}\n")
    with scripted.recorder as found:
        scripted.at(
            0, "i", "quark.kernel_defined", name="cpp_fused_one", source="f(r'''\nint one() { return 1; }\n''')"
        )
        for _ in range(3):
            scripted.at(0, "i", "quark.kernel_called", name="cpp_fused_one")
        scripted.at(0, "i", "quark.kernel_loaded")
        scripted.at(0, "i", "quark.kernel_loaded")
        scripted.at(1, "B", "async_compile.wait")
        scripted.at(1, "B", "quark.build", thread=7, source=str(sources[0]))
        scripted.at(2, "B", "quark.build", thread=8, source=str(sources[2]))
        scripted.at(3, "E", "quark.build", thread=8)
        scripted.at(5, "E", "quark.build", thread=7)
        scripted.at(5, "E", "async_compile.wait")
    # What runs beside takes no time of this thread's.
    assert found.phases() == {"kernel_compile": 4}
    assert {(span.name, span.lane) for span in found.spans} == {
        ("async_compile.wait", 0),
        ("g++ cpp_fused_one", 1),
        ("g++ is_there", 2),
    }
    kernels = found.kernels()
    assert (kernels.calls, kernels.distinct, kernels.deduplicated) == (3, 2, 2)
    assert (kernels.compiled, kernels.reused) == (1, 1)
    assert [(k.name, k.s, k.calls) for k in kernels.built] == [("cpp_fused_one", 4, 3), ("is_there", 1, None)]


def test_kernels_that_triton_builds(scripted: Scripted) -> None:
    with scripted.recorder as found:
        scripted.at(0, "i", "quark.kernel_defined", name="triton_one", source="async_compile.triton(...)")
        scripted.at(0, "i", "quark.kernel_loaded")
        scripted.at(1, "i", "quark.kernel_built", name="triton_one", info={"compile_time_us": 250_000})
    (kernel,) = found.kernels().built
    assert (kernel.name, kernel.compiler, kernel.s) == ("triton_one", "triton", 0.25)
    assert found.kernels().compiled == 1


def test_memory_of_a_gpu(scripted: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: seen.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: len(seen) * 1_000_000)
    with scripted.recorder as found:
        scripted.now = 1
    assert (seen, found.peak_gpu_bytes) == (["reset"], 1_000_000)
    run = Run.of(found)
    assert run.to_dict()["peak_gpu_memory_bytes"] == 1_000_000


def test_names_of_torchs_that_mean_something_else() -> None:
    assert phase_of("AOTAutogradCache.inductor_load") == "cache"
    assert phase_of("aot_trace_joint_graph") == "aot_autograd"
    assert phase_of("quark.render.quark_prologue_gemm") == "templates"
    assert phase_of("quark.anything") == "quark_passes"
    assert phase_of("CachingAutotuner.benchmark_all_configs") == "autotuning"
    assert phase_of("something new") is None


PROGRAM = """
import torch, quark_inductor as qi
model = qi.quantize_(torch.nn.Sequential(torch.nn.Linear(64, 32)), "mxfp4")
options = {"quark.provider": "emulation", "fx_graph_cache": False}
with torch.no_grad():
    torch.compile(model, backend="quark", options=options)(torch.ones(2, 64))
"""


@pytest.mark.slow
def test_tlparse_shows_what_is_ours(tmp_path: Path) -> None:
    """The passes' results as a file of a compilation, and every pass and rule in the timeline."""
    environment = {**os.environ, "TORCH_TRACE": str(tmp_path / "trace")}
    subprocess.run([sys.executable, "-P", "-c", PROGRAM], check=True, env=environment, timeout=300)
    (log,) = (tmp_path / "trace").iterdir()
    tlparse = Path(sys.executable).with_name("tlparse")
    subprocess.run([tlparse, log, "-o", tmp_path / "out", "--no-browser"], check=True, capture_output=True, timeout=60)
    (artifact,) = (tmp_path / "out").glob("*/quark_passes*.json")
    names = {one["name"] for one in json.loads(artifact.read_text())["passes"]}
    assert {"cse", "block_weight", "select_providers"} <= names
    events = json.loads((tmp_path / "out" / "chromium_events.json").read_text())
    assert {f"quark.{name}" for name in names} | {"quark.passes", "quark.late_decomposition"} <= {
        e["name"] for e in events
    }
