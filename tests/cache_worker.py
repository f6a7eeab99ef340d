"""A process of tests/test_cache.py: compiles models and says what ran, or is killed on the way.

``python -P cache_worker.py PLAN``, a JSON object:
    jobs: list of ``[preset, options]``, compiled one after another.
    device: optional, where they run.
    meet: optional, an empty folder that this process shares with one other: neither rewrites a graph before both have
        found that no cache has it.
    killed: optional, the moment at which this process and its children die, of the signal KILL:
        ``"compiler"``: while the compiler of the first kernel runs;
        ``"linker"``: while the linker of that kernel runs, which has opened the library;
        anything else: when a file with this in its path has been written, but does not have its name yet.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch._dynamo.utils import counters

import quark_inductor
from quark_inductor.backend import quark
from quark_inductor.lowering import target
from quark_inductor.patterns import pipeline


def compiled(preset: str, options: dict[str, Any], device: str) -> dict[str, Any]:
    """Compile one quantized Linear. The backend is given as a function: a copy of the package has no entry point."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model = quark_inductor.quantize_(torch.nn.Sequential(torch.nn.Linear(64, 48, bias=False)), preset).to(device)
    x = torch.randn(3, 64).to(device)
    with torch.no_grad(), pipeline.collect_results() as results:
        y = torch.compile(model, backend=quark, fullgraph=True, options=options)(x)
        eager = model(x)
    ratio = (y / eager).median()
    inductor, aot = counters["inductor"], counters["aot_autograd"]
    return {
        "ratio": ratio.item(),
        "error": ((y - ratio * eager).abs().max() / y.abs().max()).item(),
        "passes": [[p.name, p.matches] for r in results for p in r.passes],
        "kernels": {k.rpartition(".")[2]: n for k, n in inductor.items() if k.startswith("quark.")},
        "fx": {k.removeprefix("fxgraph_cache_"): n for k, n in inductor.items() if "fxgraph_cache" in k},
        "aot": {k.removeprefix("autograd_cache_"): n for k, n in aot.items() if "autograd_cache" in k},
    }


def kernel_library(command: Any) -> Path | None:
    """What a command makes, if it is a kernel.

    Not one of the small programs by which Inductor finds out what the CPU can do, nor a header that it precompiles.
    """
    is_kernel = isinstance(command, list) and any(word.endswith(".main.cpp") for word in command)
    return Path(command[command.index("-o") + 1]) if is_kernel else None


def meet(folder: Path) -> None:
    """Wait in the first rewrite for the other process, and leave it time to meet a library that is not whole."""
    rewrite, real_run = pipeline.RulesPass.__call__, subprocess.run

    def call(self: pipeline.RulesPass, graph: torch.fx.Graph) -> None:
        (folder / str(os.getpid())).touch()
        end = time.monotonic() + 60
        while len(list(folder.iterdir())) < 2:
            assert time.monotonic() < end, "the other process did not come"
            time.sleep(0.01)
        rewrite(self, graph)

    def run(command: Any, *args: Any, **kwargs: Any) -> Any:
        if library := kernel_library(command):
            library.touch()  # as the linker does
            time.sleep(0.5)
        return real_run(command, *args, **kwargs)

    pipeline.RulesPass.__call__ = call  # type: ignore[method-assign]
    subprocess.run = run  # type: ignore[assignment]


def die() -> NoReturn:
    """With the compiler: what ends a container spares nobody."""
    assert os.getpgrp() == os.getpid(), "this process has no group of its own"
    os.killpg(0, signal.SIGKILL)
    raise AssertionError("survived")


def die_at(moment: str) -> None:
    """See the docstring of this file."""
    real_run, rename = subprocess.run, Path.rename

    def run(command: Any, *args: Any, **kwargs: Any) -> Any:
        library = kernel_library(command)
        if library is None or moment not in ("compiler", "linker"):
            return real_run(command, *args, **kwargs)
        compiler = subprocess.Popen(command, cwd=kwargs["cwd"])
        time.sleep(0.1)
        while moment == "linker" and not library.exists():
            time.sleep(1e-4)
        assert compiler.poll() is None, "the compiler was faster"
        die()

    def renamed(self: Path, target: Path | str) -> Path:
        if moment in str(target):
            # What was written last may not have reached the disk.
            os.truncate(self, self.stat().st_size // 2)
            die()
        return rename(self, target)

    subprocess.run = run  # type: ignore[assignment]
    Path.rename = renamed  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    plan = json.loads(sys.argv[1])
    if plan.get("meet"):
        meet(Path(plan["meet"]))
    if plan.get("killed"):
        die_at(plan["killed"])
    said = [compiled(*job, plan.get("device", "cpu")) for job in plan["jobs"]]
    print(json.dumps({"file": quark_inductor.__file__, "isa": target.current().isa, "jobs": said}))
