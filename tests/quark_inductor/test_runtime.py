"""``explain(measure=True)``: which ranges a profile has, what they add up to, and what is said of their times."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import quark_inductor as qi
from quark_inductor import runtime
from quark_inductor.ceiling import Ceilings
from quark_inductor.lowering.base import GemmProblem
from quark_inductor.patterns.selection import LinearResult, Traffic
from quark_inductor.report import Report
from quark_inductor.runtime import PREFIX
from quark_inductor.schemes.base import QuarkLinear
from quark_inductor.schemes.experts import QuarkExperts

CEILINGS = Ceilings("a CPU", 1, "avx2", {1 << 20: 100.0, 1 << 24: 10.0}, {"int8": 1000.0, "fp32": 100.0})


@pytest.fixture(autouse=True)
def every_test_is_fresh(fresh: None) -> None:
    """See the conftest above this one."""


@pytest.fixture
def profiled(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Report, Counter[str]]]:
    """``explain(measure=True)`` on a machine of known ceilings, and how often each range is in the profile."""
    profiles: list[Any] = []

    def profile(**kwargs: Any) -> Any:
        profiles.append(torch.profiler.profile(**kwargs))
        return profiles[-1]

    monkeypatch.setattr(runtime, "profile", profile)
    monkeypatch.setattr(runtime, "ceilings_of", lambda device, again=False: CEILINGS)
    monkeypatch.setattr(runtime, "_MOST", 7)

    def explain(model: Any, *args: Any, **kwargs: Any) -> tuple[Report, Counter[str]]:
        report = qi.explain(model, *args, measure=True, **kwargs)
        (found,) = profiles
        return report, Counter(e.name.removeprefix(PREFIX) for e in found.events() if e.name.startswith(PREFIX))

    return explain


class Odd(nn.Module):
    """A quantized weight that no rule knows."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.arange(64 * 64).view(64, 64).to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, torch.relu(self.codes.float() * 0.1))  # type: ignore[operator]


class Net(nn.Module):
    """Linears with one kernel, one called twice, two that are merged, one that is emulated, one that is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))
        self.twice = nn.Linear(64, 64)
        self.gate_proj, self.up_proj = nn.Linear(64, 64), nn.Linear(64, 64)
        self.odd, self.unused = Odd(), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x).tanh()
        x = self.twice(self.twice(x).sin())
        return self.odd(self.gate_proj(x) * self.up_proj(x))  # type: ignore[no-any-return]


def test_each_gemm_has_its_range(profiled: Callable[..., tuple[Report, Counter[str]]]) -> None:
    model = qi.quantize_(Net(), "mxfp4", exclude=())
    qi.merge_shared_input_(model)
    report, ranges = profiled(model, torch.randn(3, 64))
    assert report.call is not None
    calls = report.call.calls
    assert ranges == dict.fromkeys(("blocks.0", "blocks.1", "twice", "twice#2", "gate_proj"), calls)
    assert [r.name for r in report.linears if r.runtime] == ["blocks.0", "blocks.1", "twice", "twice", "gate_proj"]
    assert [r.name for r in report.linears if not r.runtime] == ["odd", "unused"]
    assert "  without a time: 2, which no kernel of ours runs" in report.summary.splitlines()
    times = [r.runtime.us for r in report.linears if r.runtime]
    assert 0 < max(times) < report.call.linears_us < report.call.us
    assert report.machine is not None
    assert report.machine["cpu"] == "a CPU"
    assert report.machine["peaks"] == {"int8": 1000.0, "fp32": 100.0}
    # Without measuring there are none.
    with torch.profiler.profile() as profile:
        torch.compile(model, backend="quark")(torch.randn(3, 64))
    assert not [e.name for e in profile.events() if e.name.startswith(PREFIX)]


def test_any_number_of_tokens_has_a_time(profiled: Callable[..., tuple[Report, Counter[str]]]) -> None:
    model = qi.quantize_(nn.Sequential(nn.Linear(64, 96)), "mxfp4", exclude=())
    report, ranges = profiled(model, torch.randn(5, 64), dynamic=True)
    assert report.call is not None
    assert ranges == {"0": report.call.calls}
    (row,) = report.linears
    assert (row.tokens, row.bytes.activation) == (None, None)
    # Of the call that was measured, the tokens are known.
    assert row.runtime is not None
    assert row.runtime.gflop_s == pytest.approx(2 * 5 * 96 * 64 / row.runtime.us / 1e3)
    assert row.runtime.gb_s == pytest.approx((128 * 34 + 96 * 4 + 5 * (64 + 96) * 4) / row.runtime.us / 1e3)


def test_a_library_call_has_its_range(
    materialized: str, monkeypatch: pytest.MonkeyPatch, profiled: Callable[..., tuple[Report, Counter[str]]]
) -> None:
    """As those of AITER on a GPU: not a template but an op that is called, and a kernel of its own before it."""
    from torch._inductor.lowering import fallback_handler

    from quark_inductor.lowering.base import _PROVIDERS

    def lower(target: Any, problem: GemmProblem, args: Any) -> Any:
        op = getattr(torch.ops.quark_inductor, problem.op).default
        return fallback_handler(op, add_to_fallback_set=False)(**args)

    monkeypatch.setattr(_PROVIDERS[materialized], "lower", lower)
    model = qi.quantize_(nn.Sequential(nn.Linear(64, 64)), "mxfp4", exclude=())
    report, ranges = profiled(model, torch.randn(3, 64), options={"quark.provider": materialized})
    assert report.call is not None
    assert ranges == {"0": report.call.calls}
    assert (report.linears[0].epilogue, report.linears[0].producer) == ((), "block_quantize")


class Gated(nn.Module):
    has_gate = True

    def _apply_gate(self, y: Tensor) -> Tensor:
        gate, up = y.chunk(2, -1)
        return F.silu(gate) * up


def test_grouped_experts_have_a_range_a_projection(profiled: Callable[..., tuple[Report, Counter[str]]]) -> None:
    sizes = {"gate_proj": (64, 128), "up_proj": (64, 128), "down_proj": (128, 64)}
    linears = [{name: nn.Linear(k, n, bias=False) for name, (n, k) in sizes.items()} for _ in range(8)]
    holder = qi.quantize_(nn.ModuleList(nn.ModuleDict(one) for one in linears), "mxfp4", exclude=())
    experts: list[dict[str, QuarkLinear]] = [dict(one.items()) for one in holder]  # type: ignore[operator]
    model = QuarkExperts(experts, Gated())
    model.group_()
    assert model.refusal == ""
    index = torch.tensor([[0, 1], [0, 2], [1, 2]])
    report, ranges = profiled(model, torch.randn(3, 128), index, torch.full((3, 2), 0.5))
    assert report.call is not None
    assert ranges == dict.fromkeys(("gate_up_proj", "down_proj"), report.call.calls)
    up, down = report.linears
    # Six rows, of two experts a token; all eight experts are counted as read.
    assert (up.tokens, up.shape, up.bytes.weight) == (6, (128, 128), 8 * 128 * (64 + 4))
    assert (down.tokens, down.shape, down.bytes.weight) == (6, (128, 64), 8 * 128 * (32 + 2))
    # Six rows read the weights of six experts at most.
    assert down.runtime is not None
    read = 6 * 128 * (32 + 2) + 6 * (64 + 128) * 4
    assert down.runtime.gb_s == pytest.approx(read / down.runtime.us / 1e3)


@pytest.mark.parametrize(
    ("tokens", "multiplies", "bound", "of_ceiling"),
    [
        # 1e6 bytes in 200 us are 5 GB/s of 10; 2e6 and 128e6 operations are 10 and 1280 GFLOP/s.
        (1, "int8", "memory", 0.5),
        (64, "int8", "compute", 0.64),
        (4, "fp32", "memory", 0.5),
        # No ceiling for it here: it runs as float32.
        (8, "bf16", "compute", 0.8),
    ],
)
def test_the_nearer_ceiling(tokens: int, multiplies: str, bound: str, of_ceiling: float) -> None:
    problem = GemmProblem(op="prologue_gemm", m=tokens, n=1000, k=1000, dtype="float32")
    traffic = Traffic(tokens, 1_000_000, 0, 0)
    linear = LinearResult("layer", "cpp", (), (1000, 1000), problem, (), traffic=traffic)
    found = runtime._runtime(linear, multiplies, CEILINGS, 1 << 25, 200.0, 3)
    assert (found.us, found.calls, found.gb_s, found.bound) == (200.0, 3, 5.0, bound)
    assert found.gflop_s == pytest.approx(tokens * 10)
    assert found.of_ceiling == pytest.approx(of_ceiling)
