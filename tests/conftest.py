"""What every test runs under."""

import atexit
import functools
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

# Nothing that Inductor compiled for another run or another project may answer for this one. Export the variable to
# keep a cache from run to run. Set before torch is imported; subprocesses inherit it.
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="quark-inductor-tests-")
    atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)


def cores() -> int:
    """Those this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One a core, 8 at most, as each collects all tests; for tests that are given by name none but this process."""
    if cores() == 1 or all("::" in argument for argument in config.args):
        return 0
    return min(cores(), 8)


# Workers share the cores, but each has two threads at least: with one, kernels would not be tested in parallel. A
# thread that waits sleeps, as another worker has use for its core. Both are read when torch is imported.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(2, cores() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture
def fresh() -> Iterator[None]:
    """No graph of another test's, from memory or from a cache; kernels are reused where their source is the same."""
    import torch
    from torch._dynamo.utils import counters

    from quark_inductor.lowering import target
    from quark_inductor.patterns._inductor import graphs_not_cached

    torch._dynamo.reset()
    counters.clear()
    with graphs_not_cached(), torch.no_grad():
        yield
    torch._dynamo.reset()
    target.current.cache_clear()


@pytest.fixture
def materialized() -> Iterator[str]:
    """A provider without prologues: what quantizes stays in the graph. On a GPU its kernel is a call."""
    import torch
    from torch._inductor.lowering import fallback_handler

    from quark_inductor.lowering.base import GemmProblem, No, Provider, register_provider, unregister_provider
    from quark_inductor.lowering.cpp import Cpp
    from quark_inductor.lowering.target import Target

    @register_provider
    class Materialized(Provider):
        name = "materialized"

        def can_run(self, target: Target, problem: GemmProblem) -> No | None:
            return No("has no prologue") if problem.op == "prologue_gemm" else None

        def lower(self, target: Target, problem: GemmProblem, args: Mapping[str, Any]) -> Any:
            if target.device_type == "cpu":
                return Cpp().lower(target, problem, args)
            op = getattr(torch.ops.quark_inductor, problem.op).default
            return fallback_handler(op, add_to_fallback_set=False)(**args)

    yield Materialized.name
    unregister_provider(Materialized.name)


@functools.cache
def helper(name: str) -> ModuleType:
    """A module beside this one. Tests are no package from which it could be imported."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def oracle() -> ModuleType:
    """``oracle.py``: operands by ml_dtypes and numpy."""
    return helper("oracle")


@pytest.fixture(scope="session")
def gemms() -> ModuleType:
    """``gemms.py``: fused GEMMs of every pair of formats."""
    return helper("gemms")


@pytest.fixture(scope="session")
def specs() -> ModuleType:
    """``specs.py``: every kind of quantized Linear."""
    return helper("specs")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The argument ``spec_name`` is each name in ``specs.py``."""
    if "spec_name" in metafunc.fixturenames:
        metafunc.parametrize("spec_name", [*helper("specs").SPECS])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked ``gpu`` where torch has none."""
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="needs a GPU that torch can use"))
