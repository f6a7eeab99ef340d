"""Common subexpression elimination: it changes no result, and leaves alone what a caller may write into."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from quark_inductor.patterns.cse import cse

aten, prims = torch.ops.aten, torch.ops.prims


def trace(fn: Callable[..., Any], *args: Tensor) -> torch.fx.GraphModule:
    return make_fx(fn, decomposition_table=select_decomp_table(), tracing_mode="fake")(*args)


def count(gm: torch.fx.GraphModule, target: Any) -> int:
    return len(gm.graph.find_nodes(op="call_function", target=target))


def run(gm: torch.fx.GraphModule, *args: Tensor) -> Any:
    gm.graph.lint()
    gm.recompile()
    return gm(*(a.clone() for a in args))


def test_cse_merges_what_is_computed_twice() -> None:
    def fn(x: Tensor) -> Tensor:
        (a, _), (b, _) = torch.max(x, 0), torch.max(x, 0)
        return a.exp() + b.exp() * torch.clamp(x, 0.0, 1.0) - torch.clamp(x, 0.0, 1.0)

    x = torch.tensor([[1.5, -2.0], [0.25, 3.0]])
    gm = trace(fn, x)
    before = len(gm.graph.nodes)
    removed = cse(gm.graph)
    assert removed == 6  # one max, two getitem, one exp, and clamp's two halves
    assert len(gm.graph.nodes) == before - removed
    assert count(gm, aten.exp.default) == 1
    assert torch.equal(run(gm, x), fn(x))


def test_cse_merges_chains_in_one_run() -> None:
    """A second run finds nothing: what became equal by a merge was merged too."""
    gm = trace(lambda x: ((x * 2 + 1) * 3).exp() + ((x * 2 + 1) * 3).exp(), torch.ones(2))
    assert cse(gm.graph) == 4
    assert cse(gm.graph) == 0


def test_cse_keeps_two_outputs() -> None:
    """The caller may write into one of them."""

    def fn(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x + 1, x + 1, (x + 1) * 2

    x = torch.zeros(3)
    gm = trace(fn, x)
    cse(gm.graph)
    a, b, c = run(gm, x)
    a.fill_(7.0)
    assert b.tolist() == [1.0] * 3
    assert c.tolist() == [2.0] * 3


@pytest.mark.parametrize(
    "view",
    [lambda a: a.view(4), lambda a: a.t(), lambda a: a[0], lambda a: a.t().reshape(4), lambda a: a.split(1)[1]],
    ids=["view", "transpose", "row", "copy", "split"],
)
def test_outputs_that_are_views_share_no_memory(rewrite: Callable[..., Any], view: Callable[[Tensor], Tensor]) -> None:
    """``x + 1`` is computed twice: its two results are two tensors, whatever views of them are returned."""

    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        return view(x + 1), view(x + 1)

    a, b = rewrite(fn, torch.zeros(2, 2)).output
    a.fill_(7.0)
    assert b.unique().tolist() == [1.0]


@pytest.mark.parametrize("values", [(1, 1.0), (1, True), (0, False)])
def test_cse_tells_arguments_that_compare_equal(values: tuple[Any, Any]) -> None:
    one, other = values

    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        return (x * one).neg(), (x * other).neg()

    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    products = [graph.call_function(aten.mul.Tensor, (x, v)) for v in values]
    graph.output(tuple(graph.call_function(aten.exp.default, (p,)) for p in products))
    assert cse(graph) == 0
    gm = torch.fx.GraphModule({}, graph)
    given = torch.tensor([3])
    assert [type(v) for v in values] == [
        type(n.args[1]) for n in graph.find_nodes(op="call_function", target=aten.mul.Tensor)
    ]
    assert gm(given)[0].equal(torch.exp(given * one))


def test_cse_tells_the_zeros() -> None:
    """0.0 and -0.0 compare equal, and ``1 / (x * 0.0)`` is not ``1 / (x * -0.0)``."""

    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        return 1 / (x * 0.0), 1 / (x * -0.0)

    x = torch.ones(2)
    gm = trace(fn, x)
    cse(gm.graph)
    assert [t.tolist() for t in run(gm, x)] == [[float("inf")] * 2, [float("-inf")] * 2]


def test_cse_tells_dtypes_and_keyword_arguments() -> None:
    def fn(x: Tensor) -> tuple[Tensor, ...]:
        sums = aten.sum.dim_IntList(x, [0]), aten.sum.dim_IntList(x, [0], dtype=torch.float64)
        casts = prims.convert_element_type(x, torch.float16), prims.convert_element_type(x, torch.bfloat16)
        return tuple(t.neg() for t in (*sums, *casts))

    gm = make_fx(fn, tracing_mode="fake")(torch.ones(3))
    assert cse(gm.graph) == 0


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: torch.rand_like(x),
        lambda x: torch.randn(x.shape),
        lambda x: torch.bernoulli(torch.full_like(x, 0.5)),
        lambda x: torch.nn.functional.dropout(x, 0.5, training=True),
        lambda x: torch.empty_like(x).uniform_(),
    ],
    ids=["rand_like", "randn", "bernoulli", "dropout", "uniform_"],
)
def test_cse_draws_twice(rewrite: Callable[..., Any], draw: Callable[[Tensor], Tensor]) -> None:
    a, b = rewrite(lambda x: (draw(x) * 1.5, draw(x) * 1.5), torch.ones(1000)).output
    assert not torch.equal(a, b)


def test_cse_sees_a_mutated_input(rewrite: Callable[..., Any]) -> None:
    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        before = x.sin()
        x.add_(1)
        return before * 2, x.sin() * 2

    x, y = torch.zeros(3), torch.zeros(3)
    expected = fn(y)
    assert [a.equal(b) for a, b in zip(rewrite(fn, x).output, expected, strict=True)] == [True, True]
    assert torch.equal(x, y)


def test_cse_sees_a_mutation_inside_the_graph() -> None:
    """A graph that was not functionalized: the second read is not the first."""

    def fn(x: Tensor) -> Tensor:
        before = x.sin()
        aten.add_.Tensor(x, 1)
        return before - x.sin()

    x = torch.zeros(3)
    gm = make_fx(fn, tracing_mode="fake")(x)
    cse(gm.graph)
    assert torch.equal(run(gm, x), fn(x.clone()))


@pytest.mark.parametrize("preset", ["fp8_dynamic", "ptpc_fp8", "mxfp4"])
def test_cse_quantizes_a_shared_input_once(
    rewrite: Callable[..., Any], linear: Callable[..., Any], preset: str
) -> None:
    q, k, v = linear(preset, n=48), linear(preset, n=16), linear(preset, n=16, bias=False)
    # "emulation" leaves the graph after cse as it is.
    done = rewrite(lambda x: (q(x), k(x), v(x)), torch.randn(3, 64), provider="emulation")
    quantize = torch.ops.quark_inductor.block_quantize.default if preset == "mxfp4" else aten.amax.default
    assert done.count(quantize) == 1
