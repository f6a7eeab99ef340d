"""What a rule is: how rules are registered, matched and refused, and how a layer is named."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

from quark_inductor.patterns.base import (
    STAGES,
    Found,
    Rule,
    Variant,
    arguments,
    call,
    register_rule,
    registered_rules,
    unregister_rule,
)
from quark_inductor.schemes.errors import QuarkInductorError

aten = torch.ops.aten


class SinOfCos(Rule):
    """``sin(cos(x) * c)`` becomes ``tan(x)``, for any ``c`` of its variants."""

    name = "sin_of_cos"
    reason: str | None = None

    def variants(self) -> Iterable[Variant]:
        for c in (2.0, 3.0):
            yield Variant(lambda x, c=c: torch.sin(torch.cos(x) * c), {"x": torch.ones(2)}, {"c": c})

    def check(self, found: Found) -> str | None:
        return self.reason

    def rewrite(self, found: Found) -> Node:
        return found.node.graph.call_function(aten.tan.default, (found["x"],))


@pytest.fixture
def rule() -> Iterator[type[Rule]]:
    register_rule(SinOfCos)
    yield SinOfCos
    unregister_rule(SinOfCos.name)


def test_names_are_unique(rule: type[Rule]) -> None:
    with pytest.raises(QuarkInductorError, match="two rules are named 'sin_of_cos'"):
        register_rule(rule)


def test_a_stage_is_one_of_three() -> None:
    class Late(SinOfCos):
        name = "late"
        stage = "afterwards"

    with pytest.raises(QuarkInductorError, match="'late' has the stage 'afterwards'; expected one of weight, act"):
        register_rule(Late)
    assert "late" not in [r.name for r in registered_rules()]


def test_order_is_that_of_stages(rule: type[Rule]) -> None:
    """An activation's rule works on what the weight's made, a prologue's on what the activation's made."""
    rules = {r.name: r.stage for r in registered_rules()}
    families = {
        "weight": {"block", "fp8", "integer", "int4"},
        "activation": {"block", "fp8", "integer"},
        "prologue": {"block", "fp8", "integer"},
    }
    assert rules == {
        "sin_of_cos": "weight",
        **{f"{family}_{stage}": stage for stage, names in families.items() for family in names},
    }
    assert [*dict.fromkeys(rules.values())] == [*STAGES]
    # Within its stage in the order of registration.
    assert [name for name, stage in rules.items() if stage == "weight"][-1] == "sin_of_cos"


@pytest.mark.parametrize("c", [2.0, 3.0])
def test_every_variant_is_looked_for(rule: type[Rule], rewrite: Callable[..., Any], c: float) -> None:
    x = torch.linspace(0, 1, 5)
    done = rewrite(lambda x: torch.sin(torch.cos(x) * c) + 1, x)
    assert done.result.matches("sin_of_cos") == 1
    assert (done.count(aten.sin.default), done.count(aten.cos.default)) == (0, 0)
    assert torch.equal(done.output, torch.tan(x) + 1)


@pytest.mark.parametrize("c", [4.0, 2])
def test_constants_are_exact(rule: type[Rule], rewrite: Callable[..., Any], c: float) -> None:
    """Another number is another function; an int that equals the float is not, aten multiplies by both alike."""
    done = rewrite(lambda x: torch.sin(torch.cos(x) * c), torch.ones(5))
    assert done.result.matches("sin_of_cos") == (c == 2)


def test_intermediates_may_have_other_users(rule: type[Rule], rewrite: Callable[..., Any]) -> None:
    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.cos(x) * 2.0
        return torch.sin(y), y

    x = torch.linspace(0, 1, 5)
    done = rewrite(fn, x)
    assert done.result.matches("sin_of_cos") == 1
    assert torch.equal(done.output[0], torch.tan(x))
    assert torch.equal(done.output[1], torch.cos(x) * 2.0)


def test_a_match_inside_a_match(rule: type[Rule], rewrite: Callable[..., Any]) -> None:
    def nested(x: Tensor) -> Tensor:
        return torch.sin(torch.cos(torch.sin(torch.cos(x) * 2.0)) * 3.0)

    x = torch.linspace(0, 1, 5)
    done = rewrite(nested, x)
    assert done.result.matches("sin_of_cos") == 2
    assert torch.equal(done.output, torch.tan(torch.tan(x)))


def test_a_refusal_says_what_where_and_who(
    rule: type[SinOfCos], rewrite: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(torch.cos(x) * 2.0)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Sequential(nn.Identity(), Inner())])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[0](x)

    monkeypatch.setattr(rule, "reason", "it is Tuesday")
    x = torch.linspace(0, 1, 5)
    done = rewrite(Outer(), x)
    (result,) = (p for p in done.result.passes if p.name == "sin_of_cos")
    assert result.matches == 0
    assert [(r.reason, r.layer, r.rule) for r in result.refusals] == [("it is Tuesday", "blocks.0.1", "sin_of_cos")]
    assert torch.equal(done.output, torch.sin(torch.cos(x) * 2.0))


def test_what_a_rule_is_not_about_is_no_refusal(
    rule: type[SinOfCos], rewrite: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rule, "reason", "")
    done = rewrite(lambda x: torch.sin(torch.cos(x) * 2.0), torch.ones(5))
    (result,) = (p for p in done.result.passes if p.name == "sin_of_cos")
    assert (result.matches, result.refusals) == (0, ())


def test_a_variant_of_another_dtype_is_not_traced(rewrite: Callable[..., Any]) -> None:
    """Tracing takes time; one whose result is of no dtype in the graph cannot match."""

    class OfTwoDtypes(SinOfCos):
        name = "of_two_dtypes"
        traced: list[torch.dtype] = []  # noqa: RUF012  a note for this test

        def variants(self) -> Iterable[Variant]:
            for dtype in (torch.float64, torch.float32):

                def search(x: Tensor, dtype: torch.dtype = dtype) -> Tensor:
                    self.traced.append(dtype)
                    return torch.sin(torch.cos(x) * 2.0)

                yield Variant(search, {"x": torch.ones(2, dtype=dtype)}, dtype=dtype)

    register_rule(OfTwoDtypes)
    try:
        for _ in range(2):
            done = rewrite(lambda x: torch.sin(torch.cos(x) * 2.0) + 1, torch.ones(5))
            assert done.result.matches("of_two_dtypes") == 1
    finally:
        unregister_rule("of_two_dtypes")
    assert set(OfTwoDtypes.traced) == {torch.float32}


def test_a_call_has_every_argument_by_name() -> None:
    """Positional, ``None`` where it is not named, and what the op does not take is left out."""
    graph = torch.fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    op = torch.ops.quark_inductor.block_quantize.default
    node = call(graph, op, {"scale_rule": "even", "x": x, "format": "mxfp4", "weight": weight})
    assert node.args == (x, "mxfp4", "even", None)
    assert arguments(node) == {"x": x, "format": "mxfp4", "scale_rule": "even", "global_scale": None}
