"""All that needs a GPU, in one go: the tests, then the benchmark with the time that is left.

    python benchmarks/gpu_run.py [--minutes 8] [--slow] [--log FILE] [arguments of gpu_gemm.py]

A kernel that reads what is not its own ruins the process it runs in: both are started again behind it. What they say is
written to a file too, as it comes. The exit code is 1 if a test failed.
"""

import argparse
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parents[1]
# What tests/test_gpu.py and gpu_gemm.py end with where the GPU cannot be used any more.
LOST = 86
# Of the time that is left: tests that take longer are ended, so that something is measured.
FOR_TESTS = 0.75
# A benchmark stops by itself; one that hangs is ended so much later.
GRACE_SECONDS = 30
_RESULT = re.compile(r"^(tests/\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")


def said(command: Sequence[str], seconds: float, log: TextIO) -> tuple[int | None, list[str]]:
    """Run a command, and copy what it says.

    Args:
        command: its arguments.
        seconds: after which it is ended.
        log: a second place for what it says.

    Returns:
        Its exit code, ``None`` if it was ended, and its lines.
    """
    lines = []
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", bufsize=1
    )
    ended = threading.Event()

    def end() -> None:
        ended.set()
        process.kill()

    timer = threading.Timer(max(0.0, seconds), end)
    timer.start()
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        print(line, end="", flush=True)
        print(line, end="", file=log, flush=True)
    code = process.wait()
    timer.cancel()
    return None if ended.is_set() else code, lines


Run = Callable[[Sequence[str], float], tuple[int | None, list[str]]]


def run_tests(run: Run, marked: str, deadline: float, clock: Callable[[], float]) -> dict[str, str]:
    """The results of all tests that need a GPU, by name; those that no time was left for are not in it."""
    results: dict[str, str] = {}
    command = [sys.executable, "-m", "pytest", "-m", marked, "-n", "0", "-v", "--color=no", "--tb=short", "tests"]
    command += ["--show-capture=no"]
    while clock() < deadline:
        done = [f"--deselect={name}" for name in results]
        code, lines = run([*command, *done], deadline - clock())
        found = {match[1]: match[2] for line in lines if (match := _RESULT.match(line))}
        # One that says nothing new would say so for ever.
        news = found.keys() - results.keys()
        results.update(found)
        # A process that dies of a signal says not even which test it was.
        if not (code == LOST and news):
            break
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; returns the exit code."""
    parser = argparse.ArgumentParser(description="All tests that need a GPU, then the benchmark.")
    parser.add_argument("--minutes", type=float, default=8.0, help="of both together")
    parser.add_argument("--slow", action="store_true", help="the tests that are marked slow too")
    parser.add_argument("--log", type=Path, default=ROOT / "gpu_run.log")
    asked, more = parser.parse_known_args(arguments)
    end = time.monotonic() + 60 * asked.minutes
    with asked.log.open("w", encoding="utf-8") as log:

        def run(command: Sequence[str], seconds: float) -> tuple[int | None, list[str]]:
            return said(command, seconds, log)

        available = "import sys, torch; sys.exit(not torch.cuda.is_available())"
        if run([sys.executable, "-c", available], 120)[0] != 0:
            print("benchmarks/gpu_run.py needs a GPU that torch can use", file=sys.stderr)
            return 2
        until = time.monotonic() + FOR_TESTS * (end - time.monotonic())
        results = run_tests(run, "gpu" if asked.slow else "gpu and not slow", until, time.monotonic)
        benchmark = [sys.executable, str(ROOT / "benchmarks" / "gpu_gemm.py"), *more]
        code: int | None = LOST
        while code == LOST and time.monotonic() < end:
            left = end - time.monotonic()
            code, _ = run([*benchmark, "--minutes", f"{left / 60:.2f}"], left + GRACE_SECONDS)
            if "--resume" not in benchmark:
                benchmark.append("--resume")
        counts = {kind: [*results.values()].count(kind) for kind in sorted(set(results.values()))}
        summary = f"tests: {counts or 'none was run'}; benchmark: " + ("ended" if code is None else f"exit code {code}")
        failed = [name for name, result in results.items() if result in ("FAILED", "ERROR")]
        for line in (summary, *(f"failed: {name}" for name in failed)):
            print(line)
            print(line, file=log)
    return 1 if failed or code != 0 else 0


if __name__ == "__main__":
    sys.exit(main())
