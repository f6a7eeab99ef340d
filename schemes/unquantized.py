"""A float weight whose Linear's output is quantized: an excluded k_proj or v_proj under an FP8 KV cache."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quark_inductor.schemes.base import QuarkScheme, register_scheme
from quark_inductor.schemes.spec import LinearSpec


@register_scheme
class QuarkUnquantized(QuarkScheme):
    """``weight [N, K]`` in the model's dtype. Only the output is quantized and dequantized."""

    name = "unquantized"

    @classmethod
    def refuses(cls, spec: LinearSpec) -> str | None:
        """No weight and no input, but an output."""
        return None if spec.weight is spec.input is None is not spec.output else "takes a quantized output only"

    @classmethod
    def get_min_capability(cls) -> int:
        """Any."""
        return 0

    def weight_tensors(self, widths: list[int], k: int, params_dtype: torch.dtype) -> Mapping[str, Tensor]:
        """Any size."""
        return {"weight": torch.empty(sum(widths), k, dtype=params_dtype)}

    def dequantize_weight(self, layer: Any, dtype: torch.dtype) -> Tensor:
        """The weight."""
        weight: Tensor = layer.weight.to(dtype)
        return weight

    def quantize_weight(self, weight: Tensor) -> Mapping[str, Tensor]:
        """The weight."""
        return {"weight": weight}
