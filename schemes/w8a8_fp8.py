"""FP8 weights with FP8 activations or none: amd-quark's ``fp8``, ``ptpc_fp8``, block-wise FP8, and their variants."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quark_inductor.schemes.activations import Fp8Activation
from quark_inductor.schemes.base import QuarkScheme, per_shard, register_scheme, set_parameters
from quark_inductor.schemes.errors import ShapeError
from quark_inductor.schemes.layout import Stored
from quark_inductor.schemes.numerics import fp8
from quark_inductor.schemes.operands import fp8_format
from quark_inductor.schemes.spec import LinearSpec


@register_scheme
class QuarkW8A8Fp8(QuarkScheme):
    """``weight`` E4M3 or E5M2 ``[N, K]``, ``weight_scale`` ``[]``, ``[N]`` or, by blocks R x C, ``[N/R, K/C]``.

    The activation is static per tensor (``input_scale []``), dynamic per tensor, per token or by groups along K, or not
    quantized. Scales are multipliers in the model's dtype (float32 where the spec or the file says so). Source:
    amd-quark 0.13 (``hw_emulation_interface.py: fake_quantize_fp8_*, dequantize_fp8_*``).
    """

    name = "w8a8_fp8"

    @classmethod
    def refuses(cls, spec: LinearSpec) -> str | None:
        """FP8 weights per tensor, channel or block."""
        w = spec.weight
        if w is None or w.dtype not in fp8.DTYPES or w.second is not None or w.scale_format is not None:
            return "takes FP8 weights with floating-point scales"
        if w.qscheme not in ("per_tensor", "per_channel", "per_block") or w.is_dynamic:
            return "takes static weights per tensor, per channel or per block"
        if spec.input is not None and (reason := Fp8Activation.refuses(spec.input)):
            return f"its input {reason}"
        if spec.input is not None and spec.input.dtype != w.dtype:
            return "takes one FP8 format for weight and input"
        return None

    @classmethod
    def get_min_capability(cls) -> int:
        """FP8 tensor cores: compute capability 8.9."""
        return 89

    def weight_tensors(self, widths: list[int], k: int, params_dtype: torch.dtype) -> Mapping[str, Tensor]:
        """Any size. A per-tensor scale has one entry a shard if shards are fused; blocks may not cross shards."""
        w, n = self.weight, sum(widths)
        if w.block_size is not None:
            rows, columns = w.block_size
            if any(width % rows for width in widths[:-1]):
                raise ShapeError(f"shards of {widths} output features cannot be fused: blocks have {rows} rows")
            shape = [sum(-(-width // rows) for width in widths), -(-k // columns)]
        else:
            shape = [n] if w.qscheme == "per_channel" else per_shard(widths)
        dtype = torch.float32 if w.scale_type == "float32" else params_dtype
        return {"weight": torch.empty(n, k, dtype=fp8.DTYPES[w.dtype]), "weight_scale": torch.empty(shape, dtype=dtype)}

    def merge_shards(self, layer: Any) -> None:
        """Per tensor: the weights are quantized again with the largest scale, as vLLM does it."""
        if layer.weight_scale.ndim != 1 or len(layer.weight_scale) != len(layer.logical_widths):
            return
        largest = layer.weight_scale.amax()
        shards = [
            codes
            if scale == largest
            else fp8.quantize(fp8.dequantize_weight(codes, scale, torch.float32), largest.float(), codes.dtype)
            for codes, scale in zip(layer.weight.split(layer.logical_widths), layer.weight_scale, strict=True)
        ]
        set_parameters(layer, weight=torch.cat(shards), weight_scale=largest)

    def adapt_to(self, layer: Any, arch: str) -> None:
        """For the matrix cores of gfx94x: E4M3 codes as "fnuz" codes of half the value, and scales twice as large.

        Dynamic activations are then scaled to 224.
        """
        if not arch.startswith("gfx94") or layer.weight.dtype != torch.float8_e4m3fn:
            return
        layer.is_fnuz = True
        set_parameters(layer, weight=fp8.to_fnuz(layer.weight.data), weight_scale=layer.weight_scale.data * 2)
        if "input_scale" in layer._parameters:
            set_parameters(layer, input_scale=layer.input_scale.data * 2)

    def dequantize_weight(self, layer: Any, dtype: torch.dtype) -> Tensor:
        """``code * scale`` in float32, then one cast."""
        return fp8.dequantize_weight(layer.weight, layer.weight_scale, dtype, self.weight.block_size)

    def stored(self, layer: Any) -> Stored | None:
        """Codes ``[N, K]``."""
        format = fp8_format(layer.weight.dtype)
        if self.weight.block_size is not None and self.weight.block_size[1] % 8:
            return None
        if format is None:
            return None
        return Stored(format=format, shape=tuple(layer.weight.shape), activation=self.activation)

    def quantize_weight(self, weight: Tensor) -> Mapping[str, Tensor]:
        """``scale = amax / 448`` (E5M2: 57344) per tensor, row or block, codes rounded half to even.

        All in the dtype of ``weight``; blocks, and scales of type float32, in float32.
        """
        w = self.weight
        dtype = fp8.DTYPES[w.dtype]
        if w.block_size is not None:
            codes, scales = fp8.quantize_blocks(weight, w.block_size, dtype)
            return {"weight": codes, "weight_scale": scales}
        scale = fp8.dynamic_scale(weight, w.qscheme, dtype, torch.float32 if w.scale_type == "float32" else None)
        return {"weight": fp8.quantize(weight, scale, dtype), "weight_scale": scale.squeeze(-1)}
