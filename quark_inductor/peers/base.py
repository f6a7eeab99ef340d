"""What a peer is. Without torch: those of other runtimes must not share a process with its thread pool."""

import functools
import importlib.metadata
import importlib.util
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from quark_inductor.schemes.errors import QuarkInductorError

# From here on weights are read for many rows at once, and do not have to come from memory each time.
FEW_TOKENS = 16
# With few tokens, and with many. They share what a call of a module costs besides: 0.3 ms, as no cache holds its code
# after so many weights. A model's share it too, and are more: 224 in Llama 8B.
_LEAST_PRODUCTS = 64, 8
# Of a product of random numbers; 4 bits on both sides cost 0.16.
_TOLERANCE = 0.3
_MOST_COPIES = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where and on what a peer works.

    Attributes:
        n: output features.
        k: input features.
        threads: how many it may use.
        cold_bytes: with few tokens a call goes through so many bytes of weights, which no cache holds.
    """

    n: int
    k: int
    threads: int
    cold_bytes: int

    def copies(self, weight_bytes: int, m: int) -> int:
        """How many weights of a size a call goes through: two where compute is the limit."""
        wanted = math.ceil(self.cold_bytes / weight_bytes) if m <= FEW_TOKENS else 2
        return min(max(wanted, 2), _MOST_COPIES)

    def rounds(self, copies: int, m: int) -> int:
        """How often a call of a module goes through its ``copies`` weights, each time with another activation."""
        return math.ceil(_LEAST_PRODUCTS[m > FEW_TOKENS] / copies) if self.cold_bytes else 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A call that can be timed.

    Attributes:
        call: computes ``linears`` products.
        linears: how many.
        weights: of how many weights.
        weight_bytes: what one of the weights takes, scales included.
        provider: who computes, where there is a choice.
        huge_pages: how much of the memory around the weights is in huge pages, from 0 to 1; ``None``: not asked.
        read: reads the weights and does nothing else, with the same threads.
    """

    call: Callable[[], Any]
    linears: int
    weights: int
    weight_bytes: int
    provider: str = ""
    huge_pages: float | None = None
    read: Callable[[], Any] | None = None


class Peer(ABC):
    """Something that multiplies activations ``[M, K]`` by weights ``[N, K]``.

    Attributes:
        name: what ``--peers`` takes.
        package: the distribution it needs on top of this package's own; ``""``: none.
        module: what that is imported as.
        get: how to get it.
        per_scheme: whether there is one for each of this package's schemes.
    """

    name: ClassVar[str]
    package: ClassVar[str] = ""
    module: ClassVar[str] = ""
    get: ClassVar[str] = ""
    per_scheme: ClassVar[bool] = False

    @classmethod
    def missing(cls) -> str | None:
        """``None`` if it is installed, else what is missing. Imports nothing."""
        if cls.module and importlib.util.find_spec(cls.module) is None:
            return f"{cls.package} is not installed"
        return None

    @classmethod
    def version(cls) -> str:
        """Of the package; ``""``: it needs none."""
        return importlib.metadata.version(cls.package) if cls.package else ""

    def __init__(self, place: Place, scheme: str) -> None:
        self.place = place
        self.scheme = scheme

    @abstractmethod
    def prepare(self, m: int) -> Prepared:
        """Everything up to the call for ``m`` tokens, once a number of tokens; the call has run before this returns."""


@functools.lru_cache(maxsize=1)
def weight(n: int, k: int) -> NDArray[np.float32]:
    """A random weight ``[N, K]`` of the size real ones have, always the same."""
    return np.random.default_rng(0).standard_normal((n, k), dtype=np.float32) / np.float32(math.sqrt(k))


def activations(copies: int, m: int, k: int) -> NDArray[np.float32]:
    """``[copies, M, K]`` random numbers, always the same."""
    return np.random.default_rng(1).standard_normal((copies, m, k), dtype=np.float32)


def check(y: NDArray[np.float32], x: NDArray[np.float32], w: NDArray[np.float32]) -> None:
    """That ``y [M, N]`` is the product of ``x [M, K]`` and ``w [N, K]``, but for the quantization of both.

    Raises:
        QuarkInductorError: it is something else, whose speed says nothing.
    """
    rows = min(len(x), 4)
    expected = x[:rows] @ w.T
    error = float(np.linalg.norm(y[:rows] - expected) / np.linalg.norm(expected))
    if not error < _TOLERANCE:
        raise QuarkInductorError(f"what it computes is off by {error:.0%} of the product: it was not measured")
