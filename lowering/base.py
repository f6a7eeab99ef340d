"""Providers: who can turn a fused op into a kernel, asked in order, each with its reason when it cannot."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar

from quark_inductor.lowering.target import Target
from quark_inductor.schemes.errors import OptionError, QuarkInductorError
from quark_inductor.schemes.numerics.block import BLOCK_FORMATS
from quark_inductor.schemes.operands import features_of, fp8_weight, is_transposed, min_capability


@dataclass(frozen=True, kw_only=True, slots=True)
class GemmProblem:
    """One fused GEMM: ``y [M, N] = x [M, K] @ weight [N, K].T + bias``.

    Attributes:
        op: bare name of the fused op: ``"weight_only_gemm"``, ``"quantized_gemm"``, ``"prologue_gemm"``.
        m: tokens, or ``None`` when not known before run time.
        n: output features.
        k: input features.
        dtype: bare name of the dtype of ``y``.
        weight_format: format of the weight, see :mod:`quark_inductor.schemes.operands`.
        weight_scale_ndim: dimensions of the weight's scale: ``0`` per tensor, ``1`` per channel, ``2`` blocks.
        experts: how many weights there are, each with ``m`` tokens of its own; 0: one, without a dimension for it.
        grouped: the experts have ``m`` tokens together, and which are whose is known at run time only.
        x_format: format of the activation; ``""`` if it is not quantized.
        x_granularity: what shares a scale of the activation that is given: ``"per_tensor"``, ``"per_token"``,
            ``"per_group"``.
        scale_rule: how the prologue computes the activation's scale, ``"given"`` if it does not.
        group_size: elements along K that share a computed scale; 0: a row does.
        x_columns: elements along K that share a scale of the activation, given or computed, if those are no block
            format's; 0: a row does.
        weight_columns: the same of the weight.
        zero_points: whether zero points of an operand are given, whatever their values.
        rounds: whether operands shall be rounded to the result's dtype before they are multiplied, as the emulation
            rounds them.
        layout: how the weight is packed, see :mod:`quark_inductor.schemes.layout`; ``""``: it is not.
    """

    op: str
    m: int | None
    n: int
    k: int
    dtype: str
    weight_format: str = ""
    weight_scale_ndim: int = 0
    experts: int = 0
    grouped: bool = False
    x_format: str = ""
    x_granularity: str = ""
    scale_rule: str = ""
    group_size: int = 0
    x_columns: int = 0
    weight_columns: int = 0
    zero_points: bool = False
    rounds: bool = False
    layout: str = ""

    def __str__(self) -> str:
        activation = " ".join(part for part in (self.x_format, self.scale_rule) if part) or self.dtype
        experts = f", {self.experts} experts" if self.experts else ""
        return f"{self.op} of {activation} and {self.weight_format}{experts}"


def gemm_problem(
    op: str,
    args: Mapping[str, Any],
    shape: Callable[[Any], list[int | None]],
    dtype: Callable[[Any], str],
    rounds: bool = False,
) -> GemmProblem:
    """The problem of a call of a fused op.

    Args:
        op: bare name of the op.
        args: the call's arguments by name; a tensor as anything.
        shape: a tensor's shape, ``None`` for a size not known before run time.
        dtype: bare name of a tensor's dtype.
        rounds: Inductor's option ``emulate_precision_casts``.
    """
    x_scale, weight_format, layout = args.get("x_scale"), args.get("weight_format", ""), args.get("weight_layout", "")
    grouped = args.get("offsets") is not None

    def of_weight(tensor: Any) -> list[int | None]:
        return shape(tensor)[grouped:]

    # A packed weight's scales are in it, those of blocks.
    scale_ndim = 2 if args["weight_scale"] is None else len(of_weight(args["weight_scale"]))
    weight = [int(size or 0) for size in shape(args["weight"])]
    n, k = features_of(args, lambda tensor: [size or 0 for size in of_weight(tensor)])
    experts = weight[0] if grouped or (len(weight) == 3 and not layout) else 0
    granularity, sizes = "", shape(x_scale) if x_scale is not None else []
    if grouped and len(sizes) == 1:  # of an expert
        sizes = []
    if x_scale is not None:
        granularity = "per_tensor" if not sizes else "per_token" if sizes[-1] == 1 else "per_group"
    return GemmProblem(
        op=op,
        m=shape(args["x"])[-2],
        n=n,
        k=k,
        dtype=args.get("out_dtype") or dtype(args["x"]),
        weight_format=weight_format,
        # Of one expert: [E, N, 1] is that of channels.
        weight_scale_ndim=max(0, scale_ndim - bool(experts and not grouped)),
        experts=experts,
        grouped=grouped,
        x_format=args.get("x_format", ""),
        x_granularity=granularity,
        scale_rule=args.get("scale_rule", ""),
        group_size=args.get("group_size", 0),
        x_columns=_x_columns(args, k, sizes),
        weight_columns=0
        if (experts and not grouped) or args["weight_scale"] is None
        else _weight_columns(args, k, of_weight),
        zero_points=any(args.get(f"{operand}_zero_point") is not None for operand in ("x", "weight")),
        rounds=rounds,
        layout=layout,
    )


def _x_columns(args: Mapping[str, Any], k: int, scale: list[int | None]) -> int:
    if args.get("x_format") in BLOCK_FORMATS:
        return 0
    groups = scale[-1] if scale else 1
    return k // groups if groups and groups > 1 else int(args.get("group_size", 0))


def _weight_columns(args: Mapping[str, Any], k: int, shape: Callable[[Any], list[int | None]]) -> int:
    format, scale = args.get("weight_format", ""), shape(args["weight_scale"])
    if len(scale) != 2 or format in BLOCK_FORMATS:
        return 0
    if (of_fp8 := fp8_weight(format)) is not None:
        return of_fp8[1][1] if of_fp8[1] else 0
    return k // int(scale[0 if is_transposed(2, format) else 1] or 1)


@dataclass(frozen=True, slots=True)
class No:
    """A provider cannot: why, in words, and what to do if something can be done."""

    reason: str


# Reasons that several providers have, in the same words.


def no_rule(scale_rule: str) -> str:
    """Of a scale rule that no kernel computes as the emulation does."""
    return f"scale rule {scale_rule!r} takes a logarithm, which two libraries round differently: quantize with 'even'"


def no_dtype(problem: GemmProblem, dtypes: Sequence[str], it: str = "it") -> str:
    """Of a result in none of the dtypes."""
    return f"the result's dtype is {problem.dtype}; {it} makes {', '.join(dtypes)}: choose one with load(dtype=)"


def no_layout(problem: GemmProblem) -> str:
    """Of a weight that is packed, or of experts."""
    of = f"the layout {problem.layout}, which unpack_() undoes" if problem.layout else "experts"
    return f"has no kernel for {of}"


def tokens(m: int | None) -> str:
    """How many tokens there are, for a reason that is about their number."""
    return "not known: compile with dynamic=False" if m is None else str(m)


class Provider(ABC):
    """Makes kernels for some fused ops on some targets. Stateless."""

    name: ClassVar[str]

    @abstractmethod
    def can_run(self, target: Target, problem: GemmProblem) -> No | None:
        """``None`` if :meth:`lower` can make this kernel for this target, else why not. Must be cheap and pure."""

    @abstractmethod
    def lower(self, target: Target, problem: GemmProblem, args: Mapping[str, Any]) -> Any:
        """Inductor IR of the fused op, from its arguments by name (tensors are Inductor IR nodes)."""

    def found(self) -> tuple[str, ...]:
        """What :meth:`can_run` finds outside of this package, a library for instance: part of Inductor's cache key."""
        return ()


@dataclass(frozen=True, slots=True)
class Selection:
    """Who runs a problem: ``provider`` is ``None`` when only the emulation can; ``refusals`` says why not others.

    A refusal is ``"names: reason"``: a reason that several give stands once.
    """

    provider: Provider | None
    refusals: tuple[str, ...]


_PROVIDERS: dict[str, Provider] = {}
EMULATION = "emulation"


def register_provider(cls: type[Provider]) -> type[Provider]:
    """Class decorator: make a provider known. The order of registration is the order of preference."""
    if cls.name in _PROVIDERS or cls.name == EMULATION:
        raise QuarkInductorError(f"two providers are named {cls.name!r}; rename one")
    _PROVIDERS[cls.name] = cls()
    return cls


def unregister_provider(name: str) -> None:
    """Forget a provider (for tests that register their own)."""
    del _PROVIDERS[name]


def provider_names() -> tuple[str, ...]:
    """Every provider's name in order of preference, the emulation last."""
    return (*_PROVIDERS, EMULATION)


def provider_keys() -> tuple[tuple[str, ...], ...]:
    """What a selection depends on besides target, problem and this package: of each provider name and findings."""
    return tuple((name, *provider.found()) for name, provider in _PROVIDERS.items())


def answers(target: Target, problem: GemmProblem) -> dict[str, No | None]:
    """What each provider says to a problem, all of them asked: ``None`` is yes."""
    if (reason := _below_capability(target, problem)) is not None:
        return dict.fromkeys(_PROVIDERS, No(reason))
    return {name: provider.can_run(target, problem) for name, provider in _PROVIDERS.items()}


def _below_capability(target: Target, problem: GemmProblem) -> str | None:
    """``None`` if a GPU has hardware kernels for the weight's format, else which have."""
    needed, arch = min_capability(problem.weight_format), target.arch.removeprefix("sm_")
    if not target.arch.startswith("sm_") or not arch.isdigit() or int(arch) >= needed:
        return None
    return (
        f"{target.arch} is below compute capability {needed / 10}, from which weights in {problem.weight_format} "
        "have hardware kernels"
    )


_forced: ContextVar[str | None] = ContextVar("quark_inductor_provider", default=None)


@contextlib.contextmanager
def forcing(provider: str | None) -> Iterator[None]:
    """Inside, :func:`select` asks only this provider where it is not told otherwise: rules and lowerings agree."""
    token = _forced.set(provider)
    try:
        yield
    finally:
        _forced.reset(token)


def forced_provider() -> str | None:
    """The only provider that may be asked, by :func:`forcing`; ``None``: any."""
    return _forced.get()


def select(target: Target, problem: GemmProblem, forced: str | None = None) -> Selection:
    """The first provider that can run a problem.

    Args:
        target: where it will run.
        problem: what to run.
        forced: a provider's name: nobody else is asked. ``"emulation"`` makes everybody refuse. By default that of
            :func:`forcing`.

    Raises:
        OptionError: there is no provider of that name.
    """
    forced = forced or forced_provider()
    if forced is not None and forced not in provider_names():
        raise OptionError(f"there is no provider {forced!r}; expected one of {', '.join(provider_names())}")
    if (reason := _below_capability(target, problem)) is not None:
        return Selection(None, (reason,))
    refusals: dict[str, list[str]] = {}
    chosen = None
    for name, provider in _PROVIDERS.items():
        if forced not in (None, name):
            answer: No | None = No(f"option quark.provider is {forced!r}: leave it out to ask all")
        else:
            answer = provider.can_run(target, problem)
        if answer is None:
            chosen = provider
            break
        refusals.setdefault(answer.reason, []).append(name)
    return Selection(chosen, tuple(f"{', '.join(names)}: {reason}" for reason, names in refusals.items()))
