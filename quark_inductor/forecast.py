"""Who will run a quantized Linear when it is compiled, told from its shapes and dtypes, without its numbers.

The Linear is traced with fake tensors, the rules run on that graph, and providers are asked as they always are. Two
things are not known before a model is compiled and loaded: which of its neighbours share what (that decides where an
activation is quantized, not who multiplies), and block scales above 2^63, which keep a weight from being packed.
"""

import contextlib
import logging
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.fx import Graph

from quark_inductor.lowering import providers  # noqa: F401
from quark_inductor.lowering import target as targets
from quark_inductor.lowering.base import GemmProblem
from quark_inductor.patterns._inductor import fwd_only, remove_noop_ops, unset_fake_temporarily
from quark_inductor.patterns.base import History, Options, registered_rules
from quark_inductor.patterns.canonicalize import hoist_views
from quark_inductor.patterns.cse import cse
from quark_inductor.patterns.pipeline import run_rules
from quark_inductor.patterns.selection import LinearResult, problem_of
from quark_inductor.schemes import memory, registry  # noqa: F401
from quark_inductor.schemes.base import QuarkLinear, set_parameters
from quark_inductor.schemes.experts import QuarkExperts
from quark_inductor.schemes.layout import Layout, Stored, layout_for


def kind_of(linear: QuarkLinear) -> Hashable:
    """What a forecast depends on: Linears of one kind have one."""
    parameters = tuple((name, tuple(p.shape), p.dtype) for name, p in linear.named_parameters(recurse=False))
    return linear.scheme.spec, linear.out_features, linear.in_features, linear.params_dtype, parameters


def forecast(linear: QuarkLinear, tokens: Sequence[int], device: str = "cpu") -> list[LinearResult]:
    """What becomes of a Linear, for each number of tokens.

    Args:
        linear: not packed; may be without memory.
        tokens: each is compiled for itself.
        device: torch's name of a device type.
    """
    with _without_numbers():
        return [_result(graph) for graph in _graphs(linear, tokens, device)]


def forms(linear: QuarkLinear, tokens: Sequence[int], device: str = "cpu") -> list[list[GemmProblem]]:
    """The GEMMs that the rules make of a Linear, one of the other, for each number of tokens, the last one first.

    Args:
        linear: as for :func:`forecast`, its output not quantized.
        tokens: see there.
        device: see there.
    """
    found = []
    with _without_numbers():
        for graph in _graphs(linear, tokens, device):
            remove_noop_ops(graph)
            hoist_views(graph)
            cse(graph)
            history, problems = History(), list[GemmProblem]()
            for rule in registered_rules():
                rule.apply(graph, history)
            (node,) = graph.output_node().all_input_nodes
            while node in history.replaced:
                problems.append(problem_of(node))
                node, _ = history.replaced[node]
            found.append(problems)
    return found


def forecast_experts(
    experts: QuarkExperts, rows: Sequence[int], device: str = "cpu"
) -> dict[str, tuple[str, list[LinearResult]]] | str:
    """What becomes of the experts of a layer, by the name of an expert's Linear: which projection it is part of.

    Args:
        experts: their Linears are not packed; may be without memory.
        rows: how many all experts have together, each is compiled for itself.
        device: torch's name of a device type.

    Returns:
        The name of the projection that is one GEMM for all experts, and what becomes of it for each number of rows.
        A reason where there is none.
    """
    with _without_numbers():
        made: dict[Hashable, QuarkLinear] = {}

        def stand_in(name: str, linear: nn.Module) -> nn.Module:
            if not isinstance(linear, QuarkLinear):
                return linear
            key = name, kind_of(linear)
            if key not in made:
                made[key] = _stand_in(linear, device)
            return made[key]

        linears = [{name: stand_in(name, m) for name, m in e.named_children()} for e in experts.experts]
        whole = QuarkExperts(linears, experts.original, experts.sums)
        whole.group_()
        if not whole.grouped:
            return whole.refusal
        found = {}
        offsets = _empty((experts.count,), torch.int32, device)
        for projection in whole.grouped:
            module: Any = whole.get_submodule(projection)
            tensors = {name: getattr(module, name) for name in module.names}
            dtype = next(iter(made.values())).params_dtype
            inputs = [_empty((s, module.in_features), dtype, device) for s in rows]
            found[projection] = [_result(_graph(module, tensors, [x, offsets])) for x in inputs]
        # Gate and up are parts of one projection, or projections themselves.
        return {name: next((p, found[p]) for p in (name, *whole.grouped) if p in found) for name in linears[0]}


def _graphs(linear: QuarkLinear, tokens: Sequence[int], device: str) -> list[Graph]:
    stand_in = _stand_in(linear, device)
    inputs = [_empty((m, linear.in_features), linear.params_dtype, device) for m in tokens]
    return [_graph(stand_in, dict(stand_in.named_parameters()), [x]) for x in inputs]


def _graph(module: nn.Module, tensors: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> Graph:
    """A module as the rules get it."""

    def call(*values: Tensor) -> Any:
        given = dict(zip(tensors, values[len(inputs) :], strict=True))
        return functional_call(module, given, values[: len(inputs)])

    graph: Graph = fwd_only(call, [*inputs, *tensors.values()]).graph
    return graph


def _result(graph: Graph) -> LinearResult:
    (result,) = run_rules(graph, Options()).linears
    return result


def _stand_in(linear: QuarkLinear, device: str) -> QuarkLinear:
    """As :func:`.loading.load` leaves it on a device, but for the numbers."""
    bias = linear.bias is not None
    new = QuarkLinear(
        linear.in_features, linear.out_features, linear.scheme, bias=bias, dtype=linear.params_dtype, device=device
    )
    parameters = dict(linear.named_parameters(recurse=False))
    set_parameters(new, **{name: _empty(tuple(p.shape), p.dtype, device) for name, p in parameters.items()})
    new.scheme.adapt_to(new, targets.current(device).arch)
    new.pack_(_layout)
    return new


def _layout(device_type: str, tensors: Sequence[Tensor], stored: Stored) -> Layout | None:
    with unset_fake_temporarily():  # a layout looks at scales: zeros are none that it refuses
        return layout_for(device_type, [torch.zeros(t.shape, dtype=t.dtype) for t in tensors], stored)


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


@contextlib.contextmanager
def _without_numbers() -> Iterator[None]:
    logger = logging.getLogger("quark_inductor.patterns.pipeline")
    disabled, logger.disabled = logger.disabled, True  # it warns of what is being found out here
    try:
        with FakeTensorMode(), memory.short_lived(), torch.no_grad():
            yield
    finally:
        logger.disabled = disabled
