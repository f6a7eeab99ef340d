"""Providers: who can turn a fused op into a kernel, asked in order, each with its reason when it cannot."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar

from quark_inductor.lowering.target import Target
from quark_inductor.schemes.errors import OptionError, QuarkInductorError
from quark_inductor.schemes.ops import MIN_CAPABILITY


@dataclass(frozen=True, kw_only=True, slots=True)
class GemmProblem:
    """One fused GEMM: ``y [M, N] = x [M, K] @ weight [N, K].T + bias``.

    Attributes:
        op: bare name of the fused op: ``"fp8_gemm"``, ``"block_prologue_gemm"``, ...
        m: tokens, or ``None`` when not known before run time.
        n: output features.
        k: input features.
        dtype: bare name of the dtype of ``y``.
        granularity: what shares an activation scale, for ops that compute it.
        formats: block formats of ``x`` and ``weight``, for ops on those.
    """

    op: str
    m: int | None
    n: int
    k: int
    dtype: str
    granularity: str = ""
    formats: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class No:
    """A provider cannot: why, in words, and what to do if something can be done."""

    reason: str


class Provider(ABC):
    """Makes kernels for some fused ops on some targets. Stateless."""

    name: ClassVar[str]

    @abstractmethod
    def can_run(self, target: Target, problem: GemmProblem) -> No | None:
        """``None`` if :meth:`lower` can make this kernel for this target, else why not. Must be cheap and pure."""

    @abstractmethod
    def lower(self, target: Target, problem: GemmProblem, args: Mapping[str, Any]) -> Any:
        """Inductor IR of the fused op, from its arguments by name (tensors are Inductor IR nodes)."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Who runs a problem: ``provider`` is ``None`` when only the emulation can; ``refusals`` says why not others."""

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


_forced: ContextVar[str | None] = ContextVar("quark_inductor_provider", default=None)


@contextlib.contextmanager
def forcing(provider: str | None) -> Iterator[None]:
    """Inside, :func:`select` asks only this provider where it is not told otherwise: rules and lowerings agree."""
    token = _forced.set(provider)
    try:
        yield
    finally:
        _forced.reset(token)


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
    forced = forced or _forced.get()
    if forced is not None and forced not in provider_names():
        raise OptionError(f"there is no provider {forced!r}; expected one of {', '.join(provider_names())}")
    needed, arch = MIN_CAPABILITY.get(problem.op, 0), target.arch.removeprefix("sm_")
    if target.arch.startswith("sm_") and arch.isdigit() and int(arch) < needed:
        reason = (
            f"{target.arch} is below compute capability {needed / 10}, from which {problem.op} has hardware kernels"
        )
        return Selection(None, (reason,))
    refusals = []
    for name, provider in _PROVIDERS.items():
        if forced not in (None, name):
            refusals.append(f"{name}: option quark.provider is {forced!r}")
            continue
        answer = provider.can_run(target, problem)
        if answer is None:
            return Selection(provider, tuple(refusals))
        refusals.append(f"{name}: {answer.reason}")
    return Selection(None, tuple(refusals))
