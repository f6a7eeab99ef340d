"""Triton kernels, run by Triton's interpreter: without a GPU."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="session")
def interpreter_worker() -> ModuleType:
    """``interpreter_worker.py``. Tests are no package from which it could be imported."""
    pytest.importorskip("triton", reason="runs Triton kernels: pip install triton")
    path = Path(__file__).with_name("interpreter_worker.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def interpreter(interpreter_worker: ModuleType) -> Iterator[Any]:
    """``Interpreter`` of ``interpreter_worker.py``: ``interpreter.run(source, name, arguments, grid)``."""
    with interpreter_worker.Interpreter() as started:
        yield started
