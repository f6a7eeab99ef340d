"""INT4 and UINT4 weights, eight to an int32: amd-quark's ``int4_wo_*`` and ``uint4_wo_*``, AWQ's and GPTQ's exports."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quark_inductor.schemes.activations import IntegerActivation
from quark_inductor.schemes.base import QuarkScheme, register_scheme
from quark_inductor.schemes.errors import ShapeError
from quark_inductor.schemes.layout import Stored
from quark_inductor.schemes.numerics import int4, integer
from quark_inductor.schemes.spec import LinearSpec


@register_scheme
class QuarkW4A16Int4(QuarkScheme):
    """``(code - zero_point) * scale``; codes and zero points int32, packed by the checkpoint's pack method.

    Per channel: ``weight [N, K/8]``, ``weight_scale [N]``, ``weight_zero_point [N/8]``. Per group, transposed: ``weight
    [K, N/8]``, ``weight_scale [K/G, N]``, ``weight_zero_point [K/G, N/8]``. The activation stays as it is, or is
    quantized to 4-bit integers by groups along K at run time. Source: amd-quark 0.13 (``utils/pack.py: Pack_4_bits``,
    ``hw_emulation_interface.py: dequantize_int_*``).
    """

    name = "w4a16_int4"

    @classmethod
    def refuses(cls, spec: LinearSpec) -> str | None:
        """4-bit integer weights per channel or group."""
        w, x = spec.weight, spec.input
        if w is None or w.dtype not in ("int4", "uint4") or w.second is not None or w.scale_format is not None:
            return "takes int4 or uint4 weights"
        if w.qscheme not in ("per_channel", "per_group") or w.is_dynamic:
            return "takes static weights per channel or per group"
        if x is not None and (x.dtype not in ("int4", "uint4") or not x.is_dynamic):
            return "takes dynamic int4 or uint4 inputs"
        return IntegerActivation.refuses(x) if x is not None else None

    @classmethod
    def get_min_capability(cls) -> int:
        """As the scheme of this name in vLLM."""
        return 70

    def weight_tensors(self, widths: list[int], k: int, params_dtype: torch.dtype) -> Mapping[str, Tensor]:
        """N must be a multiple of 8; per channel K too, per group K a multiple of the group."""
        w, n = self.weight, sum(widths)
        if any(width % 8 for width in widths):
            raise ShapeError(f"N = {n} output features: {w.dtype} needs a multiple of 8; exclude this layer")
        if k % (w.group_size or 8):
            raise ShapeError(f"K = {k} input features: needs a multiple of {w.group_size or 8}; exclude this layer")
        if w.group_size is None:
            shape, per_scale, zero_points = [n, k // 8], [n], [n // 8]
        else:
            groups = k // w.group_size
            shape, per_scale, zero_points = [k, n // 8], [groups, n], [groups, n // 8]
        return {
            "weight": torch.empty(shape, dtype=torch.int32),
            "weight_scale": torch.empty(per_scale, dtype=params_dtype),
            "weight_zero_point": torch.empty(zero_points, dtype=torch.int32),
        }

    def stored(self, layer: Any) -> Stored | None:
        """Codes ``[N, K/8]``, by groups ``[K, N/8]``."""
        format = int4.format_of(self.weight.dtype, self.spec.pack_method)
        by_groups = self.weight.group_size is not None
        if (self.weight.group_size or 0) % 8:
            return None
        return Stored(format=format, shape=tuple(layer.weight.shape), transposed=by_groups, activation=self.activation)

    def dequantize_weight(self, layer: Any, dtype: torch.dtype) -> Tensor:
        """``(code - zero_point) * scale`` in float32, then one cast."""
        return int4.dequantize_weight(
            layer.weight,
            layer.weight_scale,
            layer.weight_zero_point,
            int4.format_of(self.weight.dtype, self.spec.pack_method),
            dtype,
        )

    def quantize_weight(self, weight: Tensor) -> Mapping[str, Tensor]:
        """See :func:`.numerics.integer.quantized_weight`."""
        w = self.weight
        codes, scale, zero_point = integer.quantized_weight(weight, w.dtype, w.symmetric, group_size=w.group_size)
        if w.group_size is not None:
            codes, scale, zero_point = codes.t(), scale.t().contiguous(), zero_point.t()
        method = self.spec.pack_method
        return {
            "weight": int4.pack(codes, method),
            "weight_scale": scale,
            "weight_zero_point": int4.pack(zero_point, method),
        }
