"""AMDFP4: FP4 in blocks of 16 or 32 whose scales are E5M3."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quark_inductor.schemes.base import QuarkScheme, register_scheme
from quark_inductor.schemes.ocp_mx import block_weight_tensors, quantize_block_weight
from quark_inductor.schemes.ops import dtype_name
from quark_inductor.schemes.spec import LinearSpec, TensorSpec


def _is_amdfp4(spec: TensorSpec | None) -> bool:
    return spec is not None and spec.block_format in ("amdfp4_g16", "amdfp4_g32")


@register_scheme
class QuarkAMDFP4(QuarkScheme):
    """``weight`` uint8 ``[N, K/2]``, ``weight_scale`` uint8 E5M3 ``[N, K/16]`` or ``[N, K/32]``.

    The activation is quantized at run time the same way. Source: amd-quark 0.13 (``observer.py: get_scale`` with
    scale_format e5m3, ``kernel/float8_e5m3``).
    """

    name = "amdfp4"

    @classmethod
    def refuses(cls, spec: LinearSpec) -> str | None:
        """Weights in AMDFP4; the input too, or not quantized."""
        ok = _is_amdfp4(spec.weight) and (spec.input is None or _is_amdfp4(spec.input))
        return None if ok else "takes AMDFP4 weights (and inputs)"

    @classmethod
    def get_min_capability(cls) -> int:
        """As for MXFP4: vLLM has no scheme of this name."""
        return 70

    @property
    def format(self) -> str:
        """The weight's block format."""
        assert self.spec.weight is not None
        assert self.spec.weight.block_format is not None
        return self.spec.weight.block_format

    def weight_tensors(self, widths: list[int], k: int, params_dtype: torch.dtype) -> Mapping[str, Tensor]:
        """K must be a multiple of the block."""
        return block_weight_tensors(self.format, widths, k)

    def dequantize_weight(self, layer: Any, dtype: torch.dtype) -> Tensor:
        """``element * scale`` in float32, then one cast."""
        weight: Tensor = torch.ops.quark_inductor.block_dequantize(
            layer.weight, layer.weight_scale, self.format, dtype_name(dtype)
        )
        return weight

    def quantize_weight(self, weight: Tensor) -> Mapping[str, Tensor]:
        """Blocks along K, scale ``amax / 6`` rounded to the weight's dtype, then to E5M3."""
        codes, scales = quantize_block_weight(weight, self.format, "nearest")
        return {"weight": codes, "weight_scale": scales}
