"""What a rule is: ``variants`` says which graphs, ``check`` whether this one, ``rewrite`` what it becomes.

A rule says what a graph means, for every target. Who can run what it made is asked afterwards
(:mod:`.selection`), and what nobody can run becomes again the graph that it was.
"""

import functools
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch.fx import Graph, Node

from quark_inductor.patterns._inductor import (
    CallFunction,
    statically_known_true,
    traced_pattern,
    unset_fake_temporarily,
)
from quark_inductor.patterns.matcher import Calls, calls_of, match
from quark_inductor.schemes.errors import QuarkInductorError

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_aten = torch.ops.aten
# Where the operands of a GEMM are among its arguments: what it multiplies, by what, and what it adds.
GEMMS: Mapping[Any, tuple[int, int, int | None]] = {
    _aten.mm.default: (0, 1, None),
    _aten.addmm.default: (1, 2, 0),
    _aten.bmm.default: (0, 1, None),
    _aten._grouped_mm.default: (0, 1, None),
}
# What ends the way back from an operand to what it was computed from: another product, or a look-up.
PRODUCTS = frozenset({*GEMMS, _aten.baddbmm.default, _aten.embedding.default})
VIEWS = frozenset({_aten.reshape.default, _aten.view.default})
# In which order rules run; those of one stage in any order.
STAGES = ("weight", "activation", "prologue")


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why something was not rewritten, and where.

    Attributes:
        reason: in words, with what to do if something can be done.
        layer: the module the node comes from, as the model names it; ``""`` if unknown.
        rule: name of the rule that refused; ``""`` if no rule got that far, or a provider refused.
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
        provider: only this provider may make kernels; ``"emulation"``: none may; ``None``: any.
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
        dtype: of what it computes, if known: it is traced, which takes 10 ms, only where that dtype occurs.
    """

    search: Callable[..., Any]
    example: Mapping[str, torch.Tensor]
    facts: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """A place where a variant of a rule's pattern was found.

    Attributes:
        node: what the rule would replace.
        named: the variant's facts, the nodes matched by its example's names, and the constant arguments of this
            package's ops by their names.
        nodes: every node that matched.
    """

    node: Node
    named: Mapping[str, Any]
    nodes: tuple[Node, ...]

    def __getitem__(self, name: str) -> Any:
        return self.named[name]

    def value(self, name: str) -> torch.Tensor:
        """The fake tensor of a matched node."""
        return value(self.named[name])


@dataclass(frozen=True, slots=True)
class History:
    """What the rules did to a graph so far.

    Attributes:
        replaced: of each new node the one whose place it took, and the rule's name, or those of several in one step.
        refused: of a node that stayed, the last rule's reason.
    """

    replaced: dict[Node, tuple[Node, str]] = field(default_factory=dict)
    refused: dict[Node, Refusal] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Traced:
    """A variant's pattern and its calls, the dtypes of what it computes and of its floating-point examples, its facts.

    Codes may be of any dtype: which, is for the rule's check.
    """

    pattern: CallFunction
    calls: Calls | CallFunction
    dtype: torch.dtype
    dtypes: Mapping[str, torch.dtype]
    facts: Mapping[str, Any]

    def refuse_dtypes(self, named: Mapping[str, Any]) -> str | None:
        """``None`` if the nodes matched by the examples' names have their dtypes."""
        for name, dtype in self.dtypes.items():
            if name in named and value(named[name]).dtype != dtype:
                return f"{name} is {value(named[name]).dtype}, expected {dtype}"
        return None


class Rule(ABC):
    """A rewrite of one shape of graph. Holds no state: everything it knows of a place is in :class:`Found`."""

    name: ClassVar[str]
    stage: ClassVar[str] = "weight"
    # What a node calls that the rule may replace; None: anything, and every node of a graph is tried.
    targets: ClassVar[tuple[Any, ...] | None] = None

    @abstractmethod
    def variants(self) -> Iterable[Variant]:
        """The forms of the pattern, the most frequent first: the first that passes the check is taken."""

    @abstractmethod
    def check(self, found: Found) -> str | None:
        """``None``, or why this place must stay as it is; ``""`` if it is not what the rule is about.

        May not change the graph nor guard on a symbolic size.
        """

    @abstractmethod
    def rewrite(self, found: Found) -> Node:
        """The node that replaces ``found.node``, inserted just before it. May read, but not change what was matched."""

    def operand(self, node: Node) -> Node | None:
        """The node a pattern must end in for ``node``, one of :attr:`targets`, to be replaced; ``None``: nothing.

        By default ``node`` itself.
        """
        return node

    def may_be(self, variant: Variant, end: Node) -> bool:
        """Whether a variant's pattern can end in a node, told without tracing it."""
        return variant.dtype in (None, value(end).dtype)

    def possible(self, end: Node) -> Iterator[Traced]:
        """The variants that compute what a node computes; each is traced once per process, when its turn comes."""
        if not isinstance(end.meta.get("val"), torch.Tensor):
            return
        for i, variant in enumerate(self._variants):
            if self.may_be(variant, end) and (traced := self._traced(i)).dtype == value(end).dtype:
                yield traced

    @functools.cached_property
    def _variants(self) -> tuple[Variant, ...]:
        with unset_fake_temporarily():  # rules run while a graph is compiled, where tensors are fake
            return tuple(self.variants())

    @functools.cache  # noqa: B019  a rule lives as long as the process
    def _traced(self, index: int) -> Traced:
        variant = self._variants[index]
        with unset_fake_temporarily():
            pattern, dtype = traced_pattern(variant.search, variant.example)
        floats = {name: t.dtype for name, t in variant.example.items() if t.dtype in FLOAT_DTYPES}
        return Traced(pattern, calls_of(pattern), dtype, floats, variant.facts)

    def _candidates(self, graph: Graph) -> list[Node]:
        if self.targets is None:
            return [node for node in graph.nodes if node.op == "call_function"]
        return [node for target in self.targets for node in graph.find_nodes(op="call_function", target=target)]

    def apply(self, graph: Graph, history: History) -> PassResult:
        """Rewrite every match in a graph, in place. What is replaced stays in it, without users."""
        start = time.perf_counter()
        matches, refusals = 0, []
        for node in self._candidates(graph):
            if not node.users or (end := self.operand(node)) is None:
                continue
            reason = ""
            for traced in self.possible(end):
                if (matched := match(traced.calls, end)) is None:
                    continue
                named, nodes = matched
                found = Found(node, {**named, **traced.facts}, nodes)
                refusal = _unnamed_kwargs(node) or traced.refuse_dtypes(named) or self.check(found)
                if refusal is not None:
                    reason = reason or refusal
                    continue
                with graph.inserting_before(node):
                    new = self.rewrite(found)
                new.meta.update(node.meta)
                node.replace_all_uses_with(new)
                history.replaced[new] = node, self.name
                matches, reason = matches + 1, ""
                break
            if reason:
                history.refused[node] = Refusal(reason, layer_of(node), self.name)
                refusals.append(history.refused[node])
        return PassResult(self.name, matches, tuple(refusals), (time.perf_counter() - start) * 1e3)


def _unnamed_kwargs(node: Node) -> str | None:
    """Up to torch 2.13 a match ignores kwargs its pattern does not name: ``addmm(beta=0.5)`` would lose its beta."""
    if node.target in GEMMS and node.kwargs:
        return f"{node.target} has {dict(node.kwargs)}, which no fused GEMM computes"
    return None


_RULES: dict[str, Rule] = {}


def register_rule(cls: type[Rule]) -> type[Rule]:
    """Class decorator: make a rule known. Rules run by stage, within one in the order of registration."""
    if cls.name in _RULES:
        raise QuarkInductorError(f"two rules are named {cls.name!r}; rename one")
    if cls.stage not in STAGES:
        raise QuarkInductorError(f"rule {cls.name!r} has the stage {cls.stage!r}; expected one of {', '.join(STAGES)}")
    _RULES[cls.name] = cls()
    return cls


def unregister_rule(name: str) -> None:
    """Forget a rule (for tests that register their own)."""
    del _RULES[name]


def registered_rules() -> tuple[Rule, ...]:
    """Every rule, in running order."""
    return tuple(sorted(_RULES.values(), key=lambda rule: STAGES.index(rule.stage)))


def value(node: Node) -> torch.Tensor:
    """The fake tensor a node computes."""
    result: torch.Tensor = node.meta["val"]
    return result


def is_byte(node: Any) -> bool:
    """Whether something is a node that computes a tensor of 8-bit codes or scales."""
    val = node.meta.get("val") if isinstance(node, Node) else None
    return isinstance(val, torch.Tensor) and val.dtype.itemsize == 1 and val.dtype != torch.bool


def same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are known to be the same. Compares symbolic sizes without a guard."""
    return len(a) == len(b) and all(statically_known_true(x == y) for x, y in zip(a, b, strict=True))


def layer_of(node: Node) -> str:
    """The innermost module a node comes from, as the model names it (``"model.layers.0.mlp.up_proj"``)."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = next(reversed(stack.values()))[0]
    # Dynamo writes the variable that held the model before it: L['self'].model.layers.0, G['model'].layers.0
    return re.sub(r"^[LG]\[['\"]\w+['\"]\]\.?", "", str(path)).removeprefix("_modules.")


def call(graph: Graph, op: torch._ops.OpOverload, named: Mapping[str, Any]) -> Node:
    """A call of an op, its arguments found by name, else ``None``."""
    # Positional, as tracing writes it: a later rule's pattern must find it so.
    values = [named.get(a.name, a.default_value if a.has_default_value() else None) for a in op._schema.arguments]
    return graph.call_function(op, tuple(values))


def arguments(node: Node) -> dict[str, Any]:
    """The arguments of a call that :func:`call` made, by name."""
    assert isinstance(node.target, torch._ops.OpOverload)
    return {a.name: v for a, v in zip(node.target._schema.arguments, node.args, strict=False)}
