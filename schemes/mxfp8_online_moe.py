"""MXFP8 experts, quantized from float ones: vLLM's online method of this name."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quark_inductor.schemes.base import QuarkLinear, scheme_for, set_parameters
from quark_inductor.schemes.errors import CheckpointError, ShapeError
from quark_inductor.schemes.experts import QuarkExperts
from quark_inductor.schemes.numerics.block import BLOCK_FORMATS
from quark_inductor.schemes.spec import PRESETS


class _SiluAndMul(nn.Module):
    """The gate of most models: ``silu(gate) * up`` of ``[S, 2 I]``, the gate first."""

    has_gate = True

    def _apply_gate(self, y: Tensor) -> Tensor:
        gate, up = y.chunk(2, -1)
        return F.silu(gate) * up


class Mxfp8OnlineMoEMethod:
    """Float experts into MXFP8 ones, each as :class:`.mxfp8_online.Mxfp8OnlineLinearMethod` has a Linear.

    ``w13_weight [E, 2 I, H]`` (the gate's I rows first) and ``w2_weight [E, H, I]`` become E4M3 codes with E8M0 scales
    by blocks of 32 along the last dimension; activations are quantized alike, at run time, before each of the two
    GEMMs (vLLM leaves them as they are). Source: vLLM 0.33 (``layers/quantization/online/mxfp8.py``).
    """

    name = "mxfp8_online_moe"

    def create_weights(
        self,
        layer: nn.Module,
        *,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
    ) -> None:
        """Register ``w13_weight`` and ``w2_weight`` on ``layer``, float and uninitialized.

        Raises:
            ShapeError: a size is not a multiple of 32.
        """
        size = BLOCK_FORMATS["mxfp8_e4m3"].size
        h, i = hidden_size, intermediate_size_per_partition
        for name, features in (("hidden_size", h), ("intermediate_size_per_partition", i)):
            if features % size:
                raise ShapeError(f"{name} is {features}, MXFP8 experts need a multiple of {size}; leave them float")
        set_parameters(
            layer,
            w13_weight=torch.empty(num_experts, 2 * i, h, dtype=params_dtype),
            w2_weight=torch.empty(num_experts, h, i, dtype=params_dtype),
        )

    def process_weights_after_loading(self, layer: Any) -> None:
        """Quantize, expert by expert, into a module ``layer.experts``; the float weights are let go.

        Raises:
            CheckpointError: a weight holds a NaN or an infinity.
        """
        w13, w2 = layer.w13_weight.data, layer.w2_weight.data
        for name, weight in (("w13_weight", w13), ("w2_weight", w2)):
            if not weight.isfinite().all():
                raise CheckpointError(f"{name} holds a NaN or an infinity, which cannot be quantized")
        del layer.w13_weight, layer.w2_weight
        experts = [
            {"gate_proj": _quantized(gate), "up_proj": _quantized(up), "down_proj": _quantized(down)}
            for (gate, up), down in zip((w.chunk(2) for w in w13), w2, strict=True)
        ]
        layer.experts = QuarkExperts(experts, _SiluAndMul())
        layer.experts.group_()

    def apply_weights(self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """``x [T, H]`` to ``[T, H]``, by experts ``topk_ids [T, k]`` times ``topk_weights [T, k]``."""
        y: Tensor = layer.experts(x, topk_ids, topk_weights)
        return y


def _quantized(weight: Tensor) -> QuarkLinear:
    n, k = weight.shape
    linear = QuarkLinear(k, n, scheme_for(PRESETS["mxfp8"]), bias=False, dtype=weight.dtype, device="meta")
    set_parameters(linear, **linear.scheme.quantize_weight(weight))
    linear.scheme.process_weights_after_loading(linear)
    linear.pack_()
    return linear
