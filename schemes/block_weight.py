"""A weight in a block format: what OCP MX, AMDFP4 and NVFP4 have in common."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quark_inductor.schemes.base import QuarkScheme
from quark_inductor.schemes.errors import ShapeError
from quark_inductor.schemes.layout import Stored
from quark_inductor.schemes.numerics import block
from quark_inductor.schemes.ops import dtype_name


class BlockWeightScheme(QuarkScheme):
    """``weight [N, packed(K)]`` and ``weight_scale [N, K/B]``, blocks along K. For schemes to derive from."""

    @classmethod
    def get_min_capability(cls) -> int:
        """As QuarkOCP_MX has it in vLLM."""
        return 70

    @property
    def format(self) -> str:
        """The weight's block format."""
        assert self.weight.block_format is not None
        return self.weight.block_format

    def weight_tensors(self, widths: list[int], k: int, params_dtype: torch.dtype) -> Mapping[str, Tensor]:
        """K must be a multiple of the block."""
        f, n = block.named(self.format), sum(widths)
        if k % f.size:
            raise ShapeError(f"K = {k} input features: {self.format} needs a multiple of {f.size}; exclude this layer")
        return {
            "weight": torch.empty(n, f.packed(k), dtype=f.codes_dtype),
            "weight_scale": torch.empty(n, k // f.size, dtype=f.scales_dtype),
        }

    def dequantize_weight(self, layer: Any, dtype: torch.dtype) -> Tensor:
        """``element * scale (* weight_scale_2)`` in float32, then one cast (exact in bfloat16 for MX)."""
        global_scale = layer.weight_scale_2 if block.named(self.format).has_global_scale else None
        weight: Tensor = torch.ops.quark_inductor.block_dequantize(
            layer.weight, layer.weight_scale, self.format, dtype_name(dtype), global_scale
        )
        return weight

    def stored(self, layer: Any) -> Stored:
        """Codes ``[N, packed(K)]``."""
        return Stored(format=self.format, shape=tuple(layer.weight.shape), activation=self.activation)

    def quantize_blocks(
        self, weight: Tensor, scale_rule: str, global_scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """:func:`.numerics.block.quantize`, some rows at a time: it makes twenty float32 copies of what it gets."""
        rows = max(1, 2**18 // weight.shape[1])
        pieces = [block.quantize(piece, self.format, scale_rule, global_scale) for piece in weight.split(rows)]
        codes, scales = zip(*pieces, strict=True)
        return torch.cat(codes), torch.cat(scales)
