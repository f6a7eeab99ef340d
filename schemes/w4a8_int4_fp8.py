"""INT4 weights under an FP8 scale, FP8 activations: amd-quark's ``int4_fp8`` ("W4A8", progressive)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quark_inductor.schemes.activations import Fp8Activation
from quark_inductor.schemes.base import QuarkScheme, per_shard, register_scheme, set_parameters
from quark_inductor.schemes.errors import ShapeError
from quark_inductor.schemes.layout import Stored
from quark_inductor.schemes.numerics import fp8, int4, integer
from quark_inductor.schemes.spec import LinearSpec


@register_scheme
class QuarkW4A8_INT4_FP8(QuarkScheme):
    """The weight as FP8 codes under a scale a tensor, those as INT4 codes under a scale a channel.

    ``weight`` int32 ``[N, K/8]``, ``weight_scale`` float32 ``[]`` (the FP8 stage), ``weight_scale_2`` float32 ``[N]``
    and ``weight_zero_point_2`` int32 ``[N/8]`` (the INT4 stage). Source: amd-quark 0.13 (``realquantizer.py:
    SequentialRealQuantizer``).
    """

    name = "w4a8_int4_fp8"

    @classmethod
    def refuses(cls, spec: LinearSpec) -> str | None:
        """FP8 E4M3 per tensor, then INT4 per channel; an FP8 input or none."""
        w, x = spec.weight, spec.input
        second = w.second if w is not None else None
        if w is None or second is None or (w.dtype, w.qscheme) != ("fp8_e4m3", "per_tensor"):
            return "takes two-stage weights, FP8 per tensor and INT4 per channel"
        if (second.dtype, second.qscheme) != ("int4", "per_channel") or w.is_dynamic or second.is_dynamic:
            return "takes static INT4 per channel as the second stage"
        return Fp8Activation.refuses(x) if x is not None else None

    @classmethod
    def get_min_capability(cls) -> int:
        """FP8 tensor cores: compute capability 8.9."""
        return 89

    def weight_tensors(self, widths: list[int], k: int, params_dtype: torch.dtype) -> Mapping[str, Tensor]:
        """N and K must be multiples of 8. The FP8 stage's scale has one entry a shard if shards are fused."""
        n = sum(widths)
        if k % 8 or any(width % 8 for width in widths):
            raise ShapeError(f"N = {n}, K = {k}: int4 needs multiples of 8; exclude this layer")
        return {
            "weight": torch.empty(n, k // 8, dtype=torch.int32),
            "weight_scale": torch.empty(per_shard(widths), dtype=torch.float32),
            "weight_scale_2": torch.empty(n, dtype=torch.float32),
            "weight_zero_point_2": torch.empty(n // 8, dtype=torch.int32),
        }

    def merge_shards(self, layer: Any) -> None:
        """The largest scale for all; what the others lack goes into their channels' scales."""
        largest = layer.weight_scale.amax()
        widths = torch.tensor(layer.logical_widths, device=largest.device)
        ratio = (layer.weight_scale / largest).repeat_interleave(widths)
        set_parameters(layer, weight_scale=largest, weight_scale_2=layer.weight_scale_2 * ratio)

    def stored(self, layer: Any) -> Stored | None:
        """Codes ``[N, K/8]``."""
        if self.spec.pack_method != "reorder":
            return None
        return Stored(format="int4_fp8", shape=tuple(layer.weight.shape), activation=self.activation)

    def dequantize_weight(self, layer: Any, dtype: torch.dtype) -> Tensor:
        """``((code - zero_point) * weight_scale_2) * weight_scale`` in float32, then one cast."""
        return int4.dequantize_two_stages(
            layer.weight,
            layer.weight_scale,
            layer.weight_scale_2,
            layer.weight_zero_point_2,
            int4.format_of("int4", self.spec.pack_method),
            dtype,
        )

    def quantize_weight(self, weight: Tensor) -> Mapping[str, Tensor]:
        """FP8 with ``amax / 448`` in float32, then the FP8 codes' values to INT4 with ``amax / 7.5`` a row.

        The latter in the dtype of ``weight``, although it is stored in float32.
        """
        scale = fp8.dynamic_scale(weight, "per_tensor", scale_dtype=torch.float32)
        stage = fp8.quantize(weight, scale).to(weight.dtype)
        codes, scale_2, zero_point = integer.quantized_weight(stage, "int4", symmetric=True)
        return {
            "weight": int4.pack(codes, self.spec.pack_method),
            "weight_scale": scale,
            "weight_scale_2": scale_2.float(),
            "weight_zero_point_2": int4.pack(zero_point, self.spec.pack_method),
        }
