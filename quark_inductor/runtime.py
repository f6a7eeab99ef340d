"""How long each fused GEMM of a compiled model takes, from ranges of ``torch.profiler`` that carry the layer's name.

The ranges are in the code that Inductor generates, around the call of a GEMM's kernel: what is fused into the kernel is
in them, and what runs before it is not, a quantize in a kernel of its own for instance. On a CPU a range takes as long
as its call. On a GPU, where calls return before their kernels run, it is the time of the kernels that were started in
it, as the profiler adds them up; no test has run that on a GPU yet.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from quark_inductor.ceiling import Ceilings, ceilings_of
from quark_inductor.report import Call, Runtime

if TYPE_CHECKING:
    from quark_inductor.lowering._inductor import GemmKernel
    from quark_inductor.patterns.selection import LinearResult

# What a range is named: this and the layer, as in "quark_inductor/model.layers.0.mlp.up_proj". Ops have "::" there.
PREFIX = "quark_inductor/"
_CALL = "quark_inductor call"
# Options of Inductor without which there would be no line of Python around each kernel.
OPTIONS: Mapping[str, Any] = {"cpp_wrapper": False, "triton.cudagraphs": False}
_SECONDS, _LEAST, _MOST = 1.0, 5, 50


class Ranges:
    """Names of ranges by a GEMM's key: one that has its layer with another gets a number, ``"...up_proj#2"``."""

    def __init__(self) -> None:
        self.names: dict[int, str] = {}
        self._layers = Counter[str]()

    def name(self, key: int, layer: str) -> str:
        """The name for a GEMM of a layer."""
        if key not in self.names:
            self._layers[layer] += 1
            count = self._layers[layer]
            self.names[key] = f"{PREFIX}{layer or '(unnamed)'}{f'#{count}' if count > 1 else ''}"
        return self.names[key]


@dataclass(frozen=True, slots=True)
class Measured:
    """What a report says of time.

    Attributes:
        rows: by key of a GEMM.
        call: the whole model.
        machine: what it was measured on.
    """

    rows: Mapping[int, Runtime] = field(default_factory=dict)
    call: Call | None = None
    machine: Mapping[str, Any] | None = None

    @classmethod
    def of(
        cls,
        call: Callable[[], Any],
        linears: Sequence["LinearResult"],
        kernels: Mapping[int, Sequence["GemmKernel"]],
        ranges: Ranges,
    ) -> "Measured":
        """Measure a compiled model.

        Args:
            call: calls it.
            linears: its GEMMs.
            kernels: those that were generated, by key of a GEMM.
            ranges: that their calls are in.
        """
        device = next((k.node.meta["val"].device.type for found in kernels.values() for k in found), "cpu")
        times, ceilings = _measure(call, device), ceilings_of(device)
        ran = [linear for linear in linears if linear.key in ranges.names]
        size = sum(linear.traffic.weight or 0 for linear in ran)

        def rows() -> dict[int, Runtime]:
            return {
                linear.key: _runtime(linear, kernels[linear.key][0].multiplies, ceilings, size, us, times.calls)
                for linear in ran
                if (us := times.by_range.get(ranges.names[linear.key])) is not None
            }

        found = rows()
        if any(row.of_ceiling > 1 for row in found.values()):
            # The machine had other work when they were measured.
            ceilings = ceilings_of(device, again=True)
            found = rows()
        return cls(found, Call(times.call, times.ranges, times.calls), ceilings.facts(size))


def _runtime(linear: "LinearResult", multiplies: str, ceilings: Ceilings, size: int, us: float, calls: int) -> Runtime:
    problem, traffic = linear.problem, linear.traffic
    assert problem is not None
    weight = traffic.weight or 0
    if problem.grouped and traffic.tokens is not None:
        weight = weight * min(traffic.tokens, problem.experts) // problem.experts
    gb_s = (weight + (traffic.activation or 0) + (traffic.output or 0)) / us / 1e3
    gflop_s = 2 * traffic.tokens * problem.n * problem.k / us / 1e3 if traffic.tokens is not None else None
    of = {"memory": gb_s / ceilings.read_gb_s(size), "compute": (gflop_s or 0) / ceilings.peak(problem, multiplies)}
    bound = max(of, key=lambda name: of[name])
    return Runtime(us, calls, gb_s, gflop_s, bound, of[bound])


@dataclass(frozen=True, slots=True)
class Times:
    """Microseconds of calls of a model, medians.

    Attributes:
        call: all of it.
        ranges: all ranges of a call together.
        calls: how many were measured.
        by_range: those of the ranges of one name in a call.
    """

    call: float
    ranges: float
    calls: int
    by_range: Mapping[str, float] = field(default_factory=dict)


def _measure(call: Callable[[], Any], device_type: str) -> Times:
    """Profile some calls of a compiled model whose code has ranges.

    Args:
        call: calls it.
        device_type: where it runs.
    """
    call()  # the first after compiling allocates
    start = time.perf_counter()
    call()
    _wait(device_type)
    calls = round(min(max(_SECONDS / (time.perf_counter() - start), _LEAST), _MOST))
    on_device = device_type != "cpu"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_device else [])]
    with profile(activities=activities) as profiled:
        for _ in range(calls):
            with record_function(_CALL):
                call()
                _wait(device_type)
    events = sorted(profiled.events(), key=lambda event: event.time_range.start)
    whole: list[float] = []
    of_call: list[Counter[str]] = []
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue
        if event.name == _CALL:
            whole.append(event.time_range.elapsed_us())
            of_call.append(Counter())
        elif event.name.startswith(PREFIX):
            us = event.device_time_total if on_device else event.time_range.elapsed_us()
            of_call[-1][event.name] += us
    names = {name for counts in of_call for name in counts}
    return Times(
        call=statistics.median(whole),
        ranges=statistics.median(counts.total() for counts in of_call),
        calls=calls,
        by_range={name: statistics.median(counts[name] for counts in of_call) for name in names},
    )


def _wait(device_type: str) -> None:
    if device_type != "cpu":
        torch.accelerator.synchronize()
