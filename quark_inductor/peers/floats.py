"""bfloat16: what a Linear that is not quantized costs, eager and compiled by Inductor as well as it can."""

from collections.abc import Callable
from typing import Any, ClassVar

from quark_inductor.peers.base import Peer, Prepared, activations, check, weight


def linears(place: Any, copies: int) -> Any:
    """That many ``nn.Linear`` in bfloat16, of the weight with its rows turned: no two hold the same numbers."""
    import torch
    from torch import nn

    first = torch.from_numpy(weight(place.n, place.k)).bfloat16()
    modules = []
    for i in range(copies):
        linear = nn.Linear(place.k, place.n, bias=False, device="meta")
        linear.weight = nn.Parameter(first.roll(i, 0), requires_grad=False)
        modules.append(linear)
    return each(modules)


def each(modules: list[Any]) -> Any:
    """A module that gives all of ``modules`` its first activation, then all of them the next.

    A compiler may quantize one once for all of them. This package does not: each of its kernels does it anew.
    """
    import torch
    from torch import nn

    class Each(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linears = nn.ModuleList(modules)

        def forward(self, *activations: torch.Tensor) -> list[torch.Tensor]:
            return [linear(x) for x in activations for linear in self.linears]

    return Each().eval()


def prepared(module: Any, place: Any, copies: int, m: int, *, rounds: int, weight_bytes: int) -> Prepared:
    """The call of a module made by :func:`each`, once it has given the right numbers.

    It goes ``rounds`` times through its weights.
    """
    import torch

    numbers = activations(rounds, m, place.k)
    inputs = list(torch.from_numpy(numbers).bfloat16())

    def call() -> Any:
        with torch.inference_mode():
            return module(*inputs)

    outputs = call()
    for x, y in zip(numbers, outputs[::copies], strict=True):
        check(y.float().numpy(), x, weight(place.n, place.k))
    return Prepared(call=call, linears=len(outputs), weights=copies, weight_bytes=weight_bytes)


class LinearBf16(Peer):
    """``F.linear`` on bfloat16, eager: oneDNN."""

    name = "bf16-linear"

    def prepare(self, m: int) -> Prepared:
        """No compiler."""
        size = self.place.n * self.place.k * 2
        copies = self.place.copies(size, m)
        rounds = self.place.rounds(copies, m)
        return prepared(linears(self.place, copies), self.place, copies, m, rounds=rounds, weight_bytes=size)


class InductorBf16(Peer):
    """``torch.compile`` of bfloat16, weights frozen and packed, the best of ATen and the C++ template."""

    name = "bf16-inductor"
    options: ClassVar[dict[str, str | int | bool | Callable[..., Any]]] = {
        "freezing": True,
        "max_autotune": True,
        "max_autotune_gemm_backends": "ATEN,CPP",
    }

    def prepare(self, m: int) -> Prepared:
        """Compiled for this number of tokens."""
        import torch

        # Frozen weights live as long as the code that reads them.
        torch._dynamo.reset()
        size = self.place.n * self.place.k * 2
        copies = self.place.copies(size, m)
        compiled = torch.compile(linears(self.place, copies), fullgraph=True, dynamic=False, options=self.options)
        rounds = self.place.rounds(copies, m)
        return prepared(compiled, self.place, copies, m, rounds=rounds, weight_bytes=size)
