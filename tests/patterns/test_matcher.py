"""The matcher on graphs made for it; ``conftest.py`` compares it with Inductor's on every other test's graphs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Node

from quark_inductor.patterns._inductor import Match, attempt, fwd_only, traced_pattern
from quark_inductor.patterns.cse import cse
from quark_inductor.patterns.matcher import calls_of, match


def search(x: Tensor, scale: Tensor) -> Tensor:
    y = x.amax(-1, True) * scale
    return (y + x.view(8, 2).sum() * scale).clamp(-2.0, 2.0) + torch.full((4, 4), 2.0)


def matched(fn: Callable[..., Tensor]) -> tuple[Any, list[Node]]:
    example = {"x": torch.ones(4, 4), "scale": torch.ones(4, 1)}
    pattern, _ = traced_pattern(search, example)
    gm = fwd_only(fn, [torch.ones(4, 4), torch.ones(4, 1), torch.ones(4, 1)])
    cse(gm.graph)
    (end,) = gm.graph.output_node().all_input_nodes
    found = match(calls_of(pattern), end)
    reference = attempt(pattern, end)
    assert isinstance(reference, Match) == (found is not None)
    if found is not None:
        assert found[0] == reference.kwargs
        assert set(found[1]) == set(reference.nodes)
    return found, list(gm.graph.nodes)


def test_match() -> None:
    found, nodes = matched(lambda x, scale, other: search(x, scale))
    assert found is not None
    named, calls = found
    assert named == {"x": nodes[0], "scale": nodes[1]}
    assert set(calls) == {node for node in nodes if node.op == "call_function"}


def end(x: Tensor, low: float = -2.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return x.clamp(low, 2.0) + torch.full((4, 4), 2.0, dtype=dtype)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x, s, o: end(x.amax(-1, True) * s + x.view(8, 2).sum() * o),  # two where the pattern has one
        lambda x, s, o: end(x.amax(-1, True) * s + x.view(8, 2).mean() * s),  # another op
        lambda x, s, o: end(x.amax(-1, True) * s + x.view(8, 2).sum() * s, low=-1.0),  # another constant
        lambda x, s, o: end(x.amax(-1, True) * s + x.view(8, 2).sum() * s, dtype=torch.int32),  # another named one
        lambda x, s, o: end(x.amax(0, True) * s + x.view(8, 2).sum() * s),  # another list of constants
        lambda x, s, o: end(x.amax(-1, True) * s + x.view(4, 2, 2).sum() * s),  # more sizes
        lambda x, s, o: end(x.amax(-1, True) * s + x.view(8, 2).sum([0, 1]) * s),  # more arguments
        lambda x, s, o: end(x.amax(-1, True) * s + s * x.view(8, 2).sum()),  # another order
        lambda x, s, o: (x.amax(-1, True) * s + x.view(8, 2).sum() * s).clamp(-2.0, 2.0),  # ends sooner
    ],
)
def test_near_miss(fn: Callable[..., Tensor]) -> None:
    assert matched(fn)[0] is None


def test_a_call_read_twice_is_one() -> None:
    """A pattern that reads one value twice is no graph that computes it from two."""
    pattern, _ = traced_pattern(lambda x: x.exp() * x.exp(), {"x": torch.ones(2)})  # cse makes it one
    for fn, expected in ((lambda x, y: x.exp().mul(y.exp()), False), (lambda x, y: (e := x.exp()) * e, True)):
        gm = fwd_only(fn, [torch.ones(2), torch.ones(2)])
        (node,) = gm.graph.output_node().all_input_nodes
        assert (match(calls_of(pattern), node) is not None) == expected
        assert isinstance(attempt(pattern, node), Match) == expected


def test_a_list_of_tensors_is_left_to_the_other_matcher() -> None:
    def joined(x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([x.exp(), y]).sin()

    pattern, _ = traced_pattern(joined, {"x": torch.ones(2), "y": torch.ones(2)})
    assert calls_of(pattern) is pattern
    for fn, expected in ((joined, True), (lambda x, y: torch.cat([x, y]).sin(), False)):
        gm = fwd_only(fn, [torch.ones(2), torch.ones(2)])
        (node,) = gm.graph.output_node().all_input_nodes
        found = match(calls_of(pattern), node)
        assert (found is not None) == expected
        if found is not None:
            assert found[0] == dict(zip("xy", gm.graph.find_nodes(op="placeholder"), strict=True))
            assert len(found[1]) == 3
