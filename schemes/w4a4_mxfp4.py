"""MXFP4 weights, MXFP4 activations quantized at run time: amd-quark's scheme ``mxfp4``."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quark_inductor.schemes import ops
from quark_inductor.schemes.base import QuarkScheme, register_scheme, set_parameters
from quark_inductor.schemes.errors import CheckpointError, ShapeError
from quark_inductor.schemes.numerics import e8m0, mx
from quark_inductor.schemes.spec import PRESETS, LinearSpec

FORMAT = "mxfp4"
SCALE_RULE = "even"


@register_scheme
class QuarkW4A4MXFP4(QuarkScheme):
    """``weight`` uint8 ``[N, K/2]`` (element 2i in the low nibble), ``weight_scale`` uint8 E8M0 ``[N, K/32]``.

    The activation is quantized along K in blocks of 32, scale rule "even", elements half to even. Source: amd-quark
    0.13 (``export/nn/modules/qparamslinear.py``, ``observer.py: PerBlockMXObserver``).
    """

    name = "w4a4_mxfp4"
    fused_op = "mx_prologue_gemm"

    @classmethod
    def refuses(cls, spec: LinearSpec) -> str | None:
        """Takes exactly the spec of the scheme name ``mxfp4``."""
        return None if spec == PRESETS["mxfp4"] else f"takes only [{PRESETS['mxfp4']}]"

    @classmethod
    def get_min_capability(cls) -> int:
        """As the scheme of this name in vLLM."""
        return 70

    def create_weights(
        self,
        layer: nn.Module,
        *,
        output_partition_sizes: list[int],
        input_size_per_partition: int,
        params_dtype: torch.dtype,
    ) -> None:
        """See :class:`QuarkScheme`. K must be a multiple of 32."""
        n, k = sum(output_partition_sizes), input_size_per_partition
        if k % mx.BLOCK:
            raise ShapeError(f"K = {k} input features: MXFP4 needs a multiple of {mx.BLOCK}; exclude this layer")
        set_parameters(
            layer,
            weight=torch.empty(n, k // 2, dtype=torch.uint8),
            weight_scale=torch.empty(n, k // mx.BLOCK, dtype=torch.uint8),
        )

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check the scales. The checkpoint's layout is what the emulation and the kernels read."""
        if (layer.weight_scale == e8m0.NAN_CODE).any():
            raise CheckpointError(
                "weight_scale holds the E8M0 code 255, a NaN: the checkpoint is damaged; export it again"
            )

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        """See :class:`QuarkScheme`."""
        codes, scales = torch.ops.quark_inductor.mx_quantize(x, FORMAT, SCALE_RULE)
        weight, weight_scale = layer.weight, layer.weight_scale
        return ops.mx_gemm(codes, scales, weight, weight_scale, bias, FORMAT, FORMAT, ops.dtype_name(x.dtype))

    def quantize_weight(self, weight: Tensor) -> Mapping[str, Tensor]:
        """Blocks along K, scale rule "even". A block amd-quark would scale by ``2**-127`` is stored with byte 1."""
        codes, scales = mx.quantize(weight, FORMAT, SCALE_RULE)
        # amd-quark takes log2(max(scale, 2**-126)) when it stores a scale (utils/numerics.py: to_e8m0_uint8).
        return {"weight": codes, "weight_scale": scales.clamp(min=1)}
