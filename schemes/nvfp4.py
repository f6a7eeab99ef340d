"""NVFP4: FP4 in blocks of 16 whose FP8 scales are under one float32 scale a tensor."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quark_inductor.schemes.base import per_shard, register_scheme, set_parameters
from quark_inductor.schemes.block_weight import BlockWeightScheme
from quark_inductor.schemes.numerics import block
from quark_inductor.schemes.spec import LinearSpec

log = logging.getLogger(__name__)
FORMAT = "nvfp4"


@register_scheme
class QuarkNVFP4(BlockWeightScheme):
    """Codes, block scales and global scales, all multipliers.

    ``weight`` uint8 ``[N, K/2]``, ``weight_scale`` E4M3 ``[N, K/16]``, ``weight_scale_2`` float32 ``[]``,
    ``input_scale_2`` float32 ``[]`` if the input is quantized.

    Loaded layers also get the buffers vLLM's kernels use: ``alpha = input_scale_2 * weight_scale_2`` and
    ``input_global_scale_inv = 1 / input_scale_2``. Source: amd-quark 0.13 (``realquantizer.py:
    SequentialRealQuantizer``, ``post_calibration.py``), vLLM 0.33 (``quark/schemes/quark_nvfp4.py``).
    """

    name = "nvfp4"

    @classmethod
    def refuses(cls, spec: LinearSpec) -> str | None:
        """Weights in NVFP4; the input too, or not quantized."""
        if spec.weight is not None and spec.weight.second is not None and spec.weight.second.dtype == "fp8_e5m3":
            # post_calibration.py casts them to uint8, the dtype E5M3 is stored in, as numbers.
            return (
                "amd-quark 0.13 exports E5M3 scales under a global scale as integers modulo 256, which nobody can read"
            )
        ok = spec.weight is not None and all(
            t.block_format == FORMAT for t in (spec.weight, spec.input) if t is not None
        )
        return None if ok else "takes NVFP4 weights (and inputs)"

    @classmethod
    def get_min_capability(cls) -> int:
        """As the scheme of this name in vLLM."""
        return 75

    def weight_tensors(self, widths: list[int], k: int, params_dtype: torch.dtype) -> Mapping[str, Tensor]:
        """K must be a multiple of 16; ``weight_scale_2`` has one entry a shard if shards are fused."""
        tensors = super().weight_tensors(widths, k, params_dtype)
        return {**tensors, "weight_scale_2": torch.empty(per_shard(widths), dtype=torch.float32)}

    def merge_shards(self, layer: Any) -> None:
        """The largest global scale for all; the block scales of the others are scaled down to it, and rounded."""
        globals_ = layer.weight_scale_2
        largest = globals_.amax()
        if (globals_ != largest).any():
            log.warning(
                "fused shards have unlike global scales %s: all take the largest, which rounds the block scales of the "
                "others once more. Quantize them with a common scale",
                globals_.tolist(),
            )
        shards = [
            (scale.float() * (own / largest)).to(scale.dtype)
            for scale, own in zip(layer.weight_scale.split(layer.logical_widths), globals_, strict=True)
        ]
        set_parameters(layer, weight_scale=torch.cat(shards), weight_scale_2=largest)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Also makes ``alpha`` and ``input_global_scale_inv``."""
        super().process_weights_after_loading(layer)
        if "input_scale_2" in layer._parameters:
            layer.register_buffer("alpha", layer.input_scale_2 * layer.weight_scale_2, persistent=False)
            layer.register_buffer("input_global_scale_inv", 1 / layer.input_scale_2, persistent=False)

    def quantize_weight(self, weight: Tensor) -> Mapping[str, Tensor]:
        """Blocks along K under a global scale for the weight's own largest magnitude."""
        return self.quantize_shared_weight(weight, weight.abs().amax())

    def quantize_shared_weight(self, weight: Tensor, amax: Tensor) -> Mapping[str, Tensor]:
        """Blocks along K under a global scale for ``amax``: amd-quark has one for q, k and v, one for gate and up."""
        global_scale = block.BLOCK_FORMATS[FORMAT].global_scale(amax)
        codes, scales = self.quantize_blocks(weight, "combined", global_scale)
        return {"weight": codes, "weight_scale": scales, "weight_scale_2": global_scale}
