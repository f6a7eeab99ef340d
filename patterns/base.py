"""What a rule is: ``patterns`` says which graphs, ``check`` whether this one, ``rewrite`` what it becomes."""

import functools
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch.fx import Graph, Node

from quark_inductor.lowering import target as targets
from quark_inductor.lowering.base import GemmProblem, select
from quark_inductor.patterns._inductor import Match, PatternExpr, traced_pattern
from quark_inductor.schemes.errors import QuarkInductorError
from quark_inductor.schemes.ops import dtype_name

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_aten = torch.ops.aten
# What ends the way back from an operand to what it was computed from: another product, or a look-up.
PRODUCTS = frozenset(
    {
        _aten.mm.default,
        _aten.addmm.default,
        _aten.bmm.default,
        _aten.baddbmm.default,
        _aten.embedding.default,
    }
)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a match was not rewritten, and where.

    Attributes:
        reason: in words, with what to do if something can be done.
        layer: the module the node comes from, as the model names it; ``""`` if unknown.
        rule: name of the rule that refused.
    """

    reason: str
    layer: str
    rule: str = ""


@dataclass(frozen=True, slots=True)
class PassResult:
    """What one pass did to one graph."""

    name: str
    matches: int
    refusals: tuple[Refusal, ...]
    ms: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The options of this package, without their prefix ``quark.``.

    Attributes:
        strict: a quantized Linear left to the emulation is an error.
        provider: only this provider may make kernels; ``"emulation"`` turns the rules off; ``None``: any.
    """

    strict: bool = False
    provider: str | None = None


@dataclass(frozen=True, slots=True)
class Variant:
    """One form of a rule's pattern.

    Attributes:
        search: the function whose graph is looked for, called with the example as keyword arguments.
        example: tensors to trace it with; their names are those of the matched nodes, their sizes do not matter.
        facts: what ``check`` and ``rewrite`` need to know of this form.
    """

    search: Callable[..., Any]
    example: Mapping[str, torch.Tensor]
    facts: Mapping[str, Any] = field(default_factory=dict)


class Rule(ABC):
    """A rewrite of one shape of graph. Holds no state: everything it knows of a match is in the match."""

    name: ClassVar[str]

    @abstractmethod
    def variants(self) -> Iterable[Variant]:
        """The forms of the pattern, the most specific first."""

    @abstractmethod
    def check(self, match: Match, facts: Mapping[str, Any], options: Options) -> str | None:
        """``None``, or why this match must stay as it is. May not change the graph nor guard on a symbolic size."""

    @abstractmethod
    def rewrite(self, match: Match, facts: Mapping[str, Any]) -> Node:
        """The node that replaces the match's output, inserted just before it."""

    @functools.cached_property
    def traced(self) -> tuple[tuple[PatternExpr, Mapping[str, Any]], ...]:
        """Each variant's pattern and facts, traced once per process."""
        return tuple((traced_pattern(v.search, v.example), v.facts) for v in self.variants())

    def apply(self, graph: Graph, options: Options) -> PassResult:
        """Rewrite every match in a graph."""
        start = time.perf_counter()
        matches, refusals = 0, []
        roots = {target for pattern, _ in self.traced for target in getattr(pattern, "fns", ())}
        for node in [n for n in graph.nodes if n.op == "call_function" and n.target in roots]:
            for pattern, facts in self.traced:
                match = pattern.match(node)
                if not isinstance(match, Match):
                    continue
                reason = _unnamed_kwargs(match) or self.check(match, facts, options)
                if reason is not None:
                    refusals.append(Refusal(reason, layer_of(node), self.name))
                    break
                with graph.inserting_before(node):
                    new = self.rewrite(match, facts)
                new.meta.update(node.meta)
                node.replace_all_uses_with(new)
                match.erase_nodes()
                matches += 1
                break
        return PassResult(self.name, matches, tuple(refusals), (time.perf_counter() - start) * 1e3)


def _unnamed_kwargs(match: Match) -> str | None:
    """Up to torch 2.13 a match ignores kwargs its pattern does not name: ``addmm(beta=0.5)`` would lose its beta."""
    for node in match.nodes:
        if node.target in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) and node.kwargs:
            return f"{node.target} has {dict(node.kwargs)}, which no fused GEMM computes"
    return None


_RULES: dict[str, Rule] = {}


def register_rule(cls: type[Rule]) -> type[Rule]:
    """Class decorator: make a rule known. Rules run in the order of registration."""
    if cls.name in _RULES:
        raise QuarkInductorError(f"two rules are named {cls.name!r}; rename one")
    _RULES[cls.name] = cls()
    return cls


def unregister_rule(name: str) -> None:
    """Forget a rule (for tests that register their own)."""
    del _RULES[name]


def registered_rules() -> tuple[Rule, ...]:
    """Every rule, in running order."""
    return tuple(_RULES.values())


def value(node: Node) -> torch.Tensor:
    """The fake tensor a node computes."""
    result: torch.Tensor = node.meta["val"]
    return result


def layer_of(node: Node) -> str:
    """The innermost module a node comes from, as the model names it (``"model.layers.0.mlp.up_proj"``)."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = next(reversed(stack.values()))[0]
    # Dynamo writes the variable that held the model before it: L['self'].model.layers.0, G['model'].layers.0
    return re.sub(r"^[LG]\[['\"]\w+['\"]\]\.?", "", str(path)).removeprefix("_modules.")


def fused_call(match: Match, op: torch._ops.OpOverload, facts: Mapping[str, Any]) -> Node:
    """A call of a fused op, its arguments found by name in the match and the facts, else ``None``."""
    named = {**match.kwargs, **facts}
    # Positional, as tracing writes it: a later rule's pattern must find it so.
    return match.graph.call_function(op, tuple(named.get(a.name) for a in op._schema.arguments))


def refuse_unless_provided(
    op: str, match: Match, options: Options, *, k: int, granularity: str = "", formats: tuple[str, ...] = ()
) -> str | None:
    """``None`` if some provider can run the fused GEMM of a match, else everybody's reasons."""
    result = value(match.output_node())
    m, n = result.shape
    bias = match.kwargs.get("bias")
    if bias is not None and tuple(value(bias).shape) not in ((n,), (1,)):
        return f"what is added has shape {tuple(value(bias).shape)}, expected a bias [{n}]"
    problem = GemmProblem(
        op=op,
        m=m if isinstance(m, int) else None,
        n=n,
        k=k,
        dtype=dtype_name(result.dtype),
        granularity=granularity,
        formats=formats,
    )
    selection = select(targets.current(result.device.type), problem, options.provider)
    return None if selection.provider else "; ".join(selection.refusals)


def refuse_two_dtypes(match: Match) -> str | None:
    """``None`` if a match's activation ``x`` has the dtype of its result, as a GEMM that quantizes it wants."""
    x, y = value(match.kwargs["x"]), value(match.output_node())
    same = x.dtype == y.dtype
    return None if same else f"the activation is {x.dtype}, the result {y.dtype}: a prologue GEMM keeps one dtype"


def with_and_without_bias(
    search: Callable[..., Any], example: Mapping[str, torch.Tensor], n: int, dtype: torch.dtype, **facts: Any
) -> Iterable[Variant]:
    """Both variants of a search function whose parameter ``bias [N]`` may be ``None``."""
    yield Variant(search, {**example, "bias": torch.empty(n, dtype=dtype)}, facts)
    yield Variant(functools.partial(search, bias=None), example, facts)
