"""A line on the terminal while a graph compiles: what is going on, how many kernels are built, how long it takes."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from quark_inductor.recorder import phase_of

if TYPE_CHECKING:
    from quark_inductor.patterns._inductor import CompileEvent

VARIABLE = "QUARK_INDUCTOR_PROGRESS"


def wanted() -> bool:
    """Whether somebody is looking: standard error is a terminal, and ``QUARK_INDUCTOR_PROGRESS`` is not ``0``."""
    return os.environ.get(VARIABLE) != "0" and sys.stderr is not None and sys.stderr.isatty()


@contextlib.contextmanager
def progress() -> Iterator[None]:
    """Inside, a line says how the compilation goes, and is wiped away at the end; nothing where nobody is looking."""
    if not wanted():
        yield
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from quark_inductor.patterns._inductor import compile_events

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=4) as line:
        watch = Watch()
        task = line.add_task(str(watch))

        def tell(event: "CompileEvent") -> None:
            watch.tell(event)
            line.update(task, description=str(watch))

        with compile_events(tell):
            yield


class Watch:
    """What a compilation is at, by the events it is told."""

    def __init__(self) -> None:
        self._main = threading.get_ident()
        self._lock = threading.Lock()
        self.phase = ""
        self.kernels = self.built = 0

    def tell(self, event: "CompileEvent") -> None:
        """An event."""
        with self._lock:
            if event.name == "quark.kernel_queued":
                self.kernels += 1
            elif event.name == "quark.kernel_built" or (event.kind == "E" and self._is_kernel(event)):
                self.built += 1
            elif event.kind == "B" and event.thread == self._main:
                self.phase = phase_of(event.name) or self.phase

    def _is_kernel(self, event: "CompileEvent") -> bool:
        # The compiling thread builds headers and checks of the compiler; kernels are built beside it.
        return event.name == "quark.build" and event.thread != self._main

    def __str__(self) -> str:
        kernels = f", kernels {self.built}/{self.kernels}" if self.kernels else ""
        return f"compiling: {self.phase.replace('_', ' ') or 'starts'}{kernels}"
