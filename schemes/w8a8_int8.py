"""INT8 and UINT8 weights with integer activations or none: amd-quark's ``int8`` and its variants."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quark_inductor.schemes.activations import IntegerActivation
from quark_inductor.schemes.base import QuarkScheme, per_shard, register_scheme, set_parameters
from quark_inductor.schemes.errors import ShapeError
from quark_inductor.schemes.layout import Stored
from quark_inductor.schemes.numerics import integer
from quark_inductor.schemes.spec import LinearSpec


@register_scheme
class QuarkW8A8Int8(QuarkScheme):
    """``weight`` int8 or uint8, ``weight_scale`` and ``weight_zero_point``: ``(code - zero_point) * scale``.

    Per tensor: ``[N, K]``, float32 ``[]``, ``[]``. Per channel: ``[N, K]``, ``[N]``, ``[N]``. Per group, transposed:
    ``[K, N]``, ``[K/G, N]``, ``[K/G, N]``. The activation is static per tensor (``input_scale``, ``input_zero_point``),
    dynamic per tensor or per token, or not quantized.

    Loaded layers with an asymmetric input also get vLLM's buffer ``azp_adj``, int32 ``[1, N]``: the sums over K of the
    weight's codes less their zero points, so that ``sum((x - zp) * w) = sum(x * w) - zp * azp_adj``. Source: amd-quark
    0.13 (``hw_emulation_interface.py: dequantize_int_*``), vLLM 0.33 (``quark/schemes/quark_w8a8_int8.py``).
    """

    name = "w8a8_int8"

    @classmethod
    def refuses(cls, spec: LinearSpec) -> str | None:
        """8-bit integer weights; inputs of 8-bit integers without groups."""
        w, x = spec.weight, spec.input
        if w is None or w.dtype not in ("int8", "uint8") or w.second is not None or w.scale_format is not None:
            return "takes int8 or uint8 weights"
        if w.qscheme not in ("per_tensor", "per_channel", "per_group") or w.is_dynamic:
            return "takes static weights per tensor, per channel or per group"
        if x is not None and (x.dtype not in ("int8", "uint8") or x.qscheme == "per_group"):
            return "takes int8 or uint8 inputs per tensor or per token"
        return IntegerActivation.refuses(x) if x is not None else None

    @classmethod
    def get_min_capability(cls) -> int:
        """INT8 tensor cores: compute capability 7.5."""
        return 75

    def weight_tensors(self, widths: list[int], k: int, params_dtype: torch.dtype) -> Mapping[str, Tensor]:
        """By groups K must be a multiple of the group. A per-tensor scale has one entry a shard if shards are fused."""
        w, n = self.weight, sum(widths)
        codes, scale_dtype = integer.codes_dtype(w.dtype), params_dtype
        shape, per_scale = [n, k], [n]
        if w.group_size is not None:
            if k % w.group_size:
                raise ShapeError(f"K = {k} input features: needs a multiple of {w.group_size}; exclude this layer")
            shape, per_scale = [k, n], [k // w.group_size, n]
        elif w.qscheme == "per_tensor":
            per_scale, scale_dtype = per_shard(widths), torch.float32
        return {
            "weight": torch.empty(shape, dtype=codes),
            "weight_scale": torch.empty(per_scale, dtype=scale_dtype),
            "weight_zero_point": torch.empty(per_scale, dtype=codes),
        }

    def merge_shards(self, layer: Any) -> None:
        """Per tensor becomes per channel: each row keeps its shard's scale."""
        if self.weight.qscheme == "per_tensor":
            widths = torch.tensor(layer.logical_widths, device=layer.weight_scale.device)
            for name in ("weight_scale", "weight_zero_point"):
                set_parameters(layer, **{name: getattr(layer, name).data.repeat_interleave(widths)})

    def process_weights_after_loading(self, layer: Any) -> None:
        """Also makes ``azp_adj``."""
        super().process_weights_after_loading(layer)
        if self.spec.input is not None and not self.spec.input.symmetric:
            scale_one = torch.ones_like(layer.weight_scale, dtype=torch.float32)
            integers = self._dequantize(layer, scale_one, torch.float32)
            layer.register_buffer(
                "azp_adj", integers.double().sum(1, keepdim=True).t().to(torch.int32), persistent=False
            )

    def stored(self, layer: Any) -> Stored | None:
        """Codes ``[N, K]``, by groups ``[K, N]``."""
        by_groups = self.weight.group_size is not None
        if (self.weight.group_size or 0) % 8:
            return None
        return Stored(
            format=self.weight.dtype, shape=tuple(layer.weight.shape), transposed=by_groups, activation=self.activation
        )

    def dequantize_weight(self, layer: Any, dtype: torch.dtype) -> Tensor:
        """``(code - zero_point) * scale`` in float32, then one cast."""
        return self._dequantize(layer, layer.weight_scale, dtype)

    def _dequantize(self, layer: Any, scale: Tensor, dtype: torch.dtype) -> Tensor:
        tensors = layer.weight, scale, layer.weight_zero_point
        codes, scale, zero_point = tensors if self.weight.group_size is None else (t.t() for t in tensors)
        return integer.dequantize_weight(codes, scale, zero_point, dtype)

    def quantize_weight(self, weight: Tensor) -> Mapping[str, Tensor]:
        """See :func:`.numerics.integer.quantized_weight`."""
        w = self.weight
        codes, scale, zero_point = integer.quantized_weight(
            weight, w.dtype, w.symmetric, w.qscheme == "per_tensor", w.group_size
        )
        tensors = {"weight": codes, "weight_scale": scale, "weight_zero_point": zero_point.to(codes.dtype)}
        return tensors if w.group_size is None else {name: t.t().contiguous() for name, t in tensors.items()}
