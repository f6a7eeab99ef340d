"""What every test runs under."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest

# Nothing that Inductor compiled for another run or another project may answer for this one. Export the variable to
# keep a cache from run to run. Set before torch is imported; subprocesses inherit it.
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="quark-inductor-tests-")
    atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked ``gpu`` where torch has none."""
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="needs a GPU that torch can use"))
