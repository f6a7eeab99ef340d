"""Real compiles, of as few graphs as will do: a kernel costs a second."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from quark_inductor.lowering import registry, target  # noqa: F401


@pytest.fixture(autouse=True)
def every_test_is_fresh(fresh: None) -> None:
    """See the conftest above this one."""


@pytest.fixture(params=["fast", "portable"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both kinds of CPU kernels, the portable ones chosen as a user would."""
    return use_isa(request.param, monkeypatch)


def use_isa(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Choose the fast or the portable CPU kernels for what is compiled next."""
    monkeypatch.setenv("QUARK_INDUCTOR_ISA", "portable" if name == "portable" else "")
    target.current.cache_clear()
    chosen = target.current().isa
    if name == "fast" and not target.current().has("avx512_vnni"):
        pytest.skip("this CPU has no AVX512-VNNI")
    assert (chosen == "portable") == (name == "portable")
    return chosen


@pytest.fixture
def compiled() -> Callable[..., Any]:
    """Compile a function with ``backend="quark"`` and run it."""

    def run(fn: Callable[..., Any], *args: Any, dynamic: bool | None = None, **options: Any) -> Any:
        torch._dynamo.reset()
        return torch.compile(fn, backend="quark", fullgraph=True, dynamic=dynamic, options=options)(*args)

    return run


@pytest.fixture
def gpu_code(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What Inductor generates for a function of tensors on a GPU that is not there, see ``tests/fake_gpu.py``."""
    pytest.importorskip("triton", reason="generates Triton code: pip install triton")
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    import fake_gpu

    def generated(fn: Callable[..., Any], tensors: Sequence[torch.Tensor], **options: Any) -> str:
        graph = make_fx(fn, tracing_mode="fake")(*tensors).graph
        code: str = fake_gpu.gpu_code(graph, **options)
        return code

    return generated
