"""What a rule is: how rules are registered, matched and refused, and how a layer is named."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

from quark_inductor.patterns.base import (
    Options,
    Rule,
    Variant,
    register_rule,
    registered_rules,
    unregister_rule,
    with_and_without_bias,
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

    def check(self, match: Any, facts: Mapping[str, Any], options: Options) -> str | None:
        return self.reason

    def rewrite(self, match: Any, facts: Mapping[str, Any]) -> Node:
        return match.graph.call_function(aten.tan.default, (match.kwargs["x"],))


@pytest.fixture
def rule() -> Iterator[type[Rule]]:
    register_rule(SinOfCos)
    yield SinOfCos
    unregister_rule(SinOfCos.name)


def test_names_are_unique(rule: type[Rule]) -> None:
    with pytest.raises(QuarkInductorError, match="two rules are named 'sin_of_cos'"):
        register_rule(rule)


def test_order_is_that_of_registration(rule: type[Rule]) -> None:
    """A prologue rule works on what the GEMM rule of its format made."""
    names = [r.name for r in registered_rules()]
    assert sorted(names) == ["block_gemm", "block_prologue", "fp8_gemm", "fp8_prologue", "sin_of_cos"]
    assert names[-1] == "sin_of_cos"
    for family in ("fp8", "block"):
        assert names.index(f"{family}_gemm") < names.index(f"{family}_prologue")


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


def test_with_and_without_bias() -> None:
    def search(x: Tensor, bias: Tensor | None) -> Tensor:
        return x if bias is None else x + bias

    x = torch.ones(2, 3)
    with_bias, without = with_and_without_bias(search, {"x": x}, 3, torch.float32, fact=1)
    assert set(with_bias.example) == {"x", "bias"}
    assert with_bias.example["bias"].shape == (3,)
    assert set(without.example) == {"x"}
    assert torch.equal(without.search(**without.example), x)
    assert with_bias.facts == without.facts == {"fact": 1}
