"""torchao's quantized Linears, compiled by Inductor."""

from typing import Any

from quark_inductor.peers.base import Peer, Prepared
from quark_inductor.peers.floats import linears, prepared

# In bfloat16, before they are quantized, they take much memory.
_MOST_COPIES = 20


class _Torchao(Peer):
    package = module = "torchao"
    get = "pip install torchao"
    bits: int

    def config(self) -> Any:
        """What ``torchao.quantization.quantize_`` takes."""
        raise NotImplementedError

    def prepare(self, m: int) -> Prepared:
        """Compiled for this number of tokens."""
        import torch
        from torchao.quantization import quantize_

        torch._dynamo.reset()
        size = self.place.n * self.place.k * self.bits // 8
        # Its products are loops, which Inductor fuses where two read one weight: each has its own.
        copies = max(self.place.copies(size, m), min(self.place.rounds(1, m), _MOST_COPIES))
        module = linears(self.place, copies)
        quantize_(module, self.config())
        compiled = torch.compile(module, fullgraph=True, dynamic=False, options={"freezing": True})
        return prepared(compiled, self.place, copies, m, rounds=1, weight_bytes=size)


class TorchaoInt8(_Torchao):
    """INT8 weights, activations quantized to INT8 a token at a time."""

    name = "torchao-int8"
    bits = 8

    def config(self) -> Any:
        """``Int8DynamicActivationInt8WeightConfig``."""
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig

        return Int8DynamicActivationInt8WeightConfig()


class TorchaoInt4(_Torchao):
    """INT4 weights in groups of 32, activations as they are."""

    name = "torchao-int4"
    bits = 5  # with a scale and a zero point of 16 bits a group

    def config(self) -> Any:
        """Weight-only in the packing that its CPU kernel reads, a prototype since torchao 0.17."""
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        return PrototypeInt4WeightOnlyConfig(group_size=32)
