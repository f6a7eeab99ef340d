"""The line on a terminal while a graph compiles, and silence where there is none."""

import os
import re
import subprocess
import sys
import threading

import pytest

from quark_inductor import progress
from quark_inductor.patterns._inductor import CompileEvent

# With a number that no other test has, so that there is a kernel to build.
PROGRAM = """
import os, torch
number = os.getpid()
torch.compile(lambda x: torch.relu(x) * number, backend="quark")(torch.ones(64))
print("done")
"""


def on_a_terminal() -> str:
    """What the program writes to a terminal."""
    pty = pytest.importorskip("pty", reason="this system has no terminals")
    ours, theirs = pty.openpty()
    variables = {**os.environ, "TERM": "xterm"}
    with subprocess.Popen(
        [sys.executable, "-P", "-c", PROGRAM], stdout=theirs, stderr=theirs, env=variables
    ) as process:
        os.close(theirs)
        written = b""
        while True:
            try:
                block = os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
            if not block:
                break
            written += block
    os.close(ours)
    assert process.returncode == 0, written.decode()
    return written.decode()


@pytest.mark.slow
def test_a_terminal_sees_phases_and_kernels() -> None:
    written = on_a_terminal()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written)
    assert re.search(
        r"compiling: kernel compile, kernels 0/1 +\d+:\d\d:\d\d|compiling: kernel compile +\d+:\d\d:\d\d", plain
    )
    assert re.search(r"compiling: [a-z ]+, kernels \d/1 ", plain)
    assert plain.rstrip().endswith("done")


def test_it_is_silent_where_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.delenv(progress.VARIABLE, raising=False)
    assert progress.wanted()
    monkeypatch.setenv(progress.VARIABLE, "0")
    assert not progress.wanted()
    monkeypatch.delenv(progress.VARIABLE)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    assert not progress.wanted()
    monkeypatch.setattr(sys, "stderr", None)  # a program without a console
    assert not progress.wanted()


def test_what_it_counts() -> None:
    watch, here = progress.Watch(), threading.get_ident()

    def tell(kind: str, name: str, thread: int = here) -> str:
        watch.tell(CompileEvent(kind, name, 0, thread, {}))
        return str(watch)

    assert str(watch) == "compiling: starts"
    assert tell("B", "bytecode_tracing") == "compiling: dynamo"
    assert tell("B", "something new") == "compiling: dynamo"
    assert tell("B", "quark.block_weight") == "compiling: quark passes"
    assert tell("E", "quark.build") == "compiling: quark passes"  # a header
    assert tell("i", "quark.kernel_queued") == "compiling: quark passes, kernels 0/1"
    tell("i", "quark.kernel_queued")
    assert tell("B", "quark.build", 1) == "compiling: quark passes, kernels 0/2"
    assert tell("E", "quark.build", 1) == "compiling: quark passes, kernels 1/2"
    assert tell("i", "quark.kernel_built") == "compiling: quark passes, kernels 2/2"
    assert tell("B", "async_compile.wait") == "compiling: kernel compile, kernels 2/2"
