"""This package's kernels, compiled as a user compiles a model, and the emulation that runs where there is none."""

import copy
import functools
from dataclasses import replace
from typing import Any

from quark_inductor.machine import huge_page_share
from quark_inductor.peers.base import FEW_TOKENS, Peer, Place, Prepared, weight
from quark_inductor.peers.floats import each, prepared
from quark_inductor.peers.raw_read import raw_read


@functools.lru_cache(maxsize=1)
def _quantized(n: int, k: int, scheme: str) -> Any:
    """A quantized Linear."""
    import torch
    from torch import nn

    from quark_inductor.quantize import quantize_

    linear = nn.Linear(k, n, bias=False, device="meta")
    linear.weight = nn.Parameter(torch.from_numpy(weight(n, k)).bfloat16(), requires_grad=False)
    calibration = [torch.randn(8, k, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(2))]
    return quantize_(nn.Sequential(linear), scheme, exclude=(), calibration=calibration).get_submodule("0")


def _copies(first: Any, copies: int, packed: bool) -> list[Any]:
    """That many Linears with weights of their own; packed, in the memory that packed weights live in."""
    modules = []
    for _ in range(copies):
        module = copy.deepcopy(first)
        module.unpack_()
        if packed:
            module.pack_()
        modules.append(module)
    return modules


class _Compiled(Peer):
    per_scheme = True
    emulated: bool

    def __init__(self, place: Place, scheme: str) -> None:
        import torch

        super().__init__(place, scheme)
        # All schemes and numbers of tokens are compiled versions of one forward().
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1 << 20
        self.modules: list[Any] = []

    def prepare(self, m: int) -> Prepared:
        """Compiled for this number of tokens."""
        import torch

        from quark_inductor.lowering.registry import kernel_counts

        packed = not self.emulated
        if not self.modules:
            self.modules = _copies(_quantized(self.place.n, self.place.k, self.scheme), 1, packed)
        held = [getattr(self.modules[0], name).data for name in self.modules[0].weight_names()]
        size = sum(t.nbytes for t in held)
        # The emulation writes the dequantized weight each time, which no cache holds either.
        copies = self.place.copies(size, m) if packed else 1
        self.modules += _copies(self.modules[0], copies - len(self.modules), packed)
        mine = self.modules[:copies]
        module = torch.compile(
            each(mine),
            backend="quark",
            fullgraph=True,
            dynamic=False,
            options={} if packed else {"quark.provider": "emulation"},
        )
        before = kernel_counts()
        # What a call costs is nothing beside dequantizing.
        rounds = self.place.rounds(copies, m) if packed else 1
        result = prepared(module, self.place, copies, m, rounds=rounds, weight_bytes=size)
        ran = [name for name, count in kernel_counts().items() if count > before.get(name, 0)]
        tensors = [getattr(linear, name).data for linear in mine for name in linear.weight_names()]
        read = raw_read(tensors * rounds, self.place.threads) if packed and m <= FEW_TOKENS else None
        return replace(
            result,
            provider="+".join(ran) or "emulation",
            # Of the codes: what is small lies elsewhere.
            huge_pages=huge_page_share(t.data_ptr() for t in tensors if t.nbytes > size // 2),
            read=read,
        )


class Quark(_Compiled):
    """``torch.compile(backend="quark")``."""

    name = "quark"
    emulated = False


class Emulation(_Compiled):
    """The same model without kernels, its weights as the checkpoint has them: Inductor compiles the dequantize."""

    name = "emulation"
    emulated = True
