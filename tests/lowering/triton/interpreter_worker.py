"""Runs Triton kernels in the corrected interpreter, in a process of its own.

A process either interprets kernels or compiles them, from the moment it imports ``triton``. Tests generate code in
theirs, so this file, which they import, does not import it: ``python -P interpreter_worker.py FD MODE`` does. FD is the
inherited end of a pipe, and with the MODE ``stock`` nothing is corrected.
"""

import importlib.util
import io
import os
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor


class KernelError(Exception):
    """A kernel raised. The message is the traceback of the process that ran it."""


class Interpreter:
    """A process that interprets kernels. A context manager: the process ends with it, or with this one.

    Args:
        corrected: False for the interpreter as Triton has it.
    """

    def __init__(self, *, corrected: bool = True) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="interpreter-")
        self._pipe, theirs = Pipe()
        with theirs:
            environment = {
                **os.environ,
                "TRITON_INTERPRET": "1",
                "TRITON_CACHE_DIR": self._folder.name,
                "TMPDIR": self._folder.name,
                "OMP_NUM_THREADS": "1",  # tiles are small
            }
            command = [sys.executable, "-P", __file__, str(theirs.fileno()), "corrected" if corrected else "stock"]
            self._process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()])

    def run(
        self,
        source: str,
        name: str,
        arguments: Mapping[str, Tensor | int | float],
        grid: tuple[int, ...],
        timeout: float = 300,
    ) -> dict[str, Tensor]:
        """Run a kernel on copies of its arguments, which share memory where those do.

        Args:
            source: of a module.
            name: of the kernel in it.
            arguments: by name. CPU tensors, with any strides, and numbers.
            grid: of one to three dimensions.
            timeout: in seconds. An interpreter that needs more is closed.

        Returns:
            All arguments that are tensors, as the kernel leaves them.

        Raises:
            KernelError: it raised, or this is not how it is called.
        """
        try:
            self._pipe.send_bytes(packed((source, name, dict(arguments), tuple(grid))))
            if not self._pipe.poll(timeout):
                self.close()
                raise TimeoutError(f"{name} ran for more than {timeout} s")
            outcome = unpacked(self._pipe.recv_bytes())
        except (EOFError, ConnectionError) as error:
            raise RuntimeError(f"the interpreter ended in {name}, with {self._process.wait(10)}") from error
        if isinstance(outcome, str):
            raise KernelError(outcome)
        return outcome

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        try:
            self._process.wait(0.5)  # it ends when there is nobody to read from, unless a kernel runs
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def packed(message: Any) -> bytes:
    """A message as bytes. By torch, for which tensors of all dtypes are alike."""
    buffer = io.BytesIO()
    torch.save(message, buffer)
    return buffer.getvalue()


def unpacked(message: bytes) -> Any:
    """The message of these bytes."""
    return torch.load(io.BytesIO(message), weights_only=True)


def main(descriptor: str, mode: str) -> None:
    """Run what comes, until the other end is closed."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of numbers that overflow: a GPU says nothing
    spec = importlib.util.spec_from_file_location("interpreter", Path(__file__).with_name("interpreter.py"))
    assert spec is not None
    assert spec.loader is not None
    interpreter = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(interpreter)
    if mode == "corrected":
        interpreter.correct()
    pipe = Connection(int(descriptor))
    while True:
        try:
            source, name, arguments, grid = unpacked(pipe.recv_bytes())
        except EOFError:
            return
        try:
            interpreter.run(source, name, arguments, grid)
            outcome: Any = {key: value for key, value in arguments.items() if isinstance(value, Tensor)}
        except Exception:
            outcome = traceback.format_exc()
        try:
            pipe.send_bytes(packed(outcome))
        except ConnectionError:
            return


if __name__ == "__main__":
    main(*sys.argv[1:])
