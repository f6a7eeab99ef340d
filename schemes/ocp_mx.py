"""OCP MX weights (MXFP4, MXFP6, MXFP8) with any activation: none, another MX format, or FP8."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quark_inductor.schemes.activations import Fp8Activation
from quark_inductor.schemes.base import QuarkScheme, register_scheme
from quark_inductor.schemes.errors import ShapeError
from quark_inductor.schemes.numerics import block
from quark_inductor.schemes.ops import dtype_name
from quark_inductor.schemes.spec import LinearSpec, TensorSpec


def block_weight_tensors(name: str, widths: list[int], k: int) -> dict[str, Tensor]:
    """Uninitialized codes ``weight`` and ``weight_scale`` of a weight in a block format, blocks along K.

    Raises:
        ShapeError: K is not a multiple of the block.
    """
    f, n = block.named(name), sum(widths)
    if k % f.size:
        raise ShapeError(f"K = {k} input features: {name} needs a multiple of {f.size}; exclude this layer")
    return {
        "weight": torch.empty(n, f.packed(k), dtype=f.codes_dtype),
        "weight_scale": torch.empty(n, k // f.size, dtype=f.scales_dtype),
    }


def quantize_block_weight(
    weight: Tensor, name: str, scale_rule: str, global_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`.numerics.block.quantize`, a few rows at a time: it makes some twenty float32 copies of what it gets."""
    rows = max(1, 2**18 // weight.shape[1])
    pieces = [block.quantize(piece, name, scale_rule, global_scale) for piece in weight.split(rows)]
    codes, scales = zip(*pieces, strict=True)
    return torch.cat(codes), torch.cat(scales)


def is_mx(spec: TensorSpec | None) -> bool:
    """Whether a spec is an MX format: a block format with E8M0 scales."""
    return spec is not None and spec.block_format is not None and spec.scale_format == "e8m0"


@register_scheme
class QuarkOCP_MX(QuarkScheme):
    """``weight`` uint8 or FP8 ``[N, packed(K)]``, ``weight_scale`` uint8 E8M0 ``[N, K/32]``.

    MXFP4 holds two codes a byte, MXFP6 four codes in three bytes, MXFP8 one. The activation stays as it is, or is
    quantized at run time along K in blocks of 32, or to FP8 by a static scale (``input_scale``), per tensor or per
    token. Source: amd-quark 0.13 (``export/nn/modules/qparamslinear.py``, ``observer.py: PerBlockMXObserver``), which
    exports no MXFP8 weights; those are as vLLM 0.33 reads them (``quark/schemes/quark_ocp_mx.py``).
    """

    name = "ocp_mx"

    @classmethod
    def refuses(cls, spec: LinearSpec) -> str | None:
        """Any static MX weight; an input that is not quantized, MX, or FP8 without groups."""
        if not is_mx(spec.weight) or (spec.weight is not None and spec.weight.is_dynamic):
            return "takes MX weights"
        x = spec.input
        if x is not None and not is_mx(x) and (Fp8Activation.refuses(x) or x.qscheme == "per_group"):
            return "takes MX or FP8 inputs, FP8 per tensor or per token"
        return None

    @classmethod
    def get_min_capability(cls) -> int:
        """As the scheme of this name in vLLM."""
        return 70

    @property
    def format(self) -> str:
        """The weight's block format."""
        assert self.spec.weight is not None
        assert self.spec.weight.block_format is not None
        return self.spec.weight.block_format

    def weight_tensors(self, widths: list[int], k: int, params_dtype: torch.dtype) -> Mapping[str, Tensor]:
        """K must be a multiple of 32."""
        return block_weight_tensors(self.format, widths, k)

    def dequantize_weight(self, layer: Any, dtype: torch.dtype) -> Tensor:
        """``element * 2**(scale - 127)``, exact in bfloat16 and float32."""
        weight: Tensor = torch.ops.quark_inductor.block_dequantize(
            layer.weight, layer.weight_scale, self.format, dtype_name(dtype)
        )
        return weight

    def quantize_weight(self, weight: Tensor) -> Mapping[str, Tensor]:
        """Blocks along K. A block amd-quark would scale by ``2**-127`` is stored with byte 1."""
        assert self.spec.weight is not None
        rule = self.spec.weight.scale_calculation_mode or "even"
        codes, scales = quantize_block_weight(weight, self.format, rule)
        # amd-quark takes log2(max(scale, 2**-126)) when it stores a scale (utils/numerics.py: to_e8m0_uint8).
        return {"weight": codes, "weight_scale": scales if rule == "rceil" else scales.clamp(min=1)}
