"""Triton kernels without a GPU: run by Triton's interpreter, or compiled for a chip that is not there."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor


def load(name: str, folder: Path = Path(__file__).parent) -> ModuleType:
    """A module beside this one. Tests are no package from which it could be imported."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="session")
def interpreter_worker() -> ModuleType:
    """``interpreter_worker.py``."""
    pytest.importorskip("triton", reason="runs Triton kernels: pip install triton")
    return load("interpreter_worker")


@pytest.fixture(scope="session")
def interpreter(interpreter_worker: ModuleType) -> Iterator[Any]:
    """``Interpreter`` of ``interpreter_worker.py``: ``interpreter.run(source, name, arguments, grid)``."""
    with interpreter_worker.Interpreter() as started:
        yield started


@pytest.fixture(scope="session")
def offline() -> Iterator[Any]:
    """``Offline`` of ``offline.py``: compiles Triton kernels in processes of their own."""
    pytest.importorskip("triton", reason="compiles Triton kernels: pip install triton")
    with load("offline").Offline() as compiler:
        yield compiler


@pytest.fixture(scope="session")
def generated() -> ModuleType:
    """``generated.py``: what Inductor generates."""
    pytest.importorskip("triton", reason="generates Triton code: pip install triton")
    return load("generated")


@pytest.fixture(scope="session")
def fake_gpu() -> ModuleType:
    """``tests/fake_gpu.py``."""
    return load("fake_gpu", Path(__file__).parents[2])


@pytest.fixture
def on_gpu(interpreter: Any, generated: ModuleType, fake_gpu: ModuleType) -> Callable[..., list[Tensor]]:
    """Results of a function of tensors on a GPU that is not there: its kernels run in the interpreter."""

    def run_kernel(kernel: Any, arguments: dict[str, Any], grid: tuple[int, ...]) -> None:
        after = interpreter.run(kernel.interpreted, kernel.name, arguments, grid)
        for name, tensor in after.items():
            if name.startswith(("out_ptr", "in_out_ptr")):
                arguments[name].copy_(tensor)

    def run(function: Callable[..., Any], arch: str, *inputs: Tensor, **options: Any) -> list[Tensor]:
        from quark_inductor.lowering.base import forcing

        graph = generated.graph_of(function, *inputs).graph
        with forcing("triton"), torch.no_grad():
            code = fake_gpu.gpu_code(graph, arch, **options)
        results: list[Tensor] = generated.call(code, inputs, run_kernel)
        return results

    return run
