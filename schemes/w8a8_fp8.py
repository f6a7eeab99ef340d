"""FP8 E4M3 weights and activations: amd-quark's schemes ``fp8`` and ``ptpc_fp8``, and ``fp8_dynamic``."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quark_inductor.schemes import ops
from quark_inductor.schemes.base import QuarkScheme, register_scheme, set_parameters
from quark_inductor.schemes.errors import CheckpointError
from quark_inductor.schemes.numerics import fp8
from quark_inductor.schemes.spec import PRESETS, LinearSpec


@register_scheme
class QuarkW8A8Fp8(QuarkScheme):
    """``weight`` float8_e4m3fn ``[N, K]``, ``weight_scale`` ``[]`` or ``[N]``, ``input_scale`` ``[]`` if static.

    Scales are multipliers in the model's dtype. Per token means one scale a row of the flattened ``[tokens, K]``
    input, as vLLM runs it; amd-quark's own emulation takes one scale per index of dimension 1, which is the same for a
    3-D input of batch 1 only. Source: amd-quark 0.13 (``hw_emulation_interface.py: fake_quantize_fp8_*``).
    """

    name = "w8a8_fp8"
    fused_op = "fp8_prologue_gemm"

    @classmethod
    def refuses(cls, spec: LinearSpec) -> str | None:
        """Takes exactly the specs of the scheme names ``fp8``, ``fp8_dynamic`` and ``ptpc_fp8``."""
        taken = [PRESETS[p] for p in ("fp8", "fp8_dynamic", "ptpc_fp8")]
        return None if spec in taken else "takes only " + " or ".join(f"[{s}]" for s in taken)

    @classmethod
    def get_min_capability(cls) -> int:
        """FP8 tensor cores: compute capability 8.9."""
        return 89

    @property
    def input_granularity(self) -> str:
        """What shares an activation scale: ``"static"``, ``"per_tensor"`` or ``"per_token"``."""
        assert self.spec.input is not None
        if not self.spec.input.is_dynamic:
            return "static"
        return "per_token" if self.spec.input.qscheme == "per_channel" else "per_tensor"

    def create_weights(
        self,
        layer: nn.Module,
        *,
        output_partition_sizes: list[int],
        input_size_per_partition: int,
        params_dtype: torch.dtype,
    ) -> None:
        """See :class:`QuarkScheme`. Any size."""
        n = sum(output_partition_sizes)
        per_channel = self.spec.weight.qscheme == "per_channel"
        set_parameters(
            layer,
            weight=torch.empty(n, input_size_per_partition, dtype=fp8.DTYPE),
            weight_scale=torch.empty((n,) if per_channel else (), dtype=params_dtype),
        )
        if self.input_granularity == "static":
            set_parameters(layer, input_scale=torch.empty((), dtype=params_dtype))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check the numbers. The checkpoint's layout is what the emulation and the kernels read."""
        for name, p in layer.named_parameters(recurse=False):
            if name == "bias":
                continue
            # The codes 0x7f and 0xff are NaN; isfinite() does not take FP8.
            bad = (p.view(torch.uint8) & 0x7F) == 0x7F if p.dtype == fp8.DTYPE else ~p.isfinite()
            if bad.any():
                raise CheckpointError(f"{name} holds a NaN or an infinity: the checkpoint is damaged; export it again")
            if p.dtype != fp8.DTYPE and (p <= 0).any():
                raise CheckpointError(f"{name} holds a scale that is not positive: the checkpoint is damaged")

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        """See :class:`QuarkScheme`."""
        granularity = self.input_granularity
        scale = layer.input_scale if granularity == "static" else fp8.dynamic_scale(x, granularity)
        codes = fp8.quantize(x, scale)
        return ops.fp8_gemm(codes, scale, layer.weight, layer.weight_scale, bias, ops.dtype_name(x.dtype))

    def quantize_weight(self, weight: Tensor) -> Mapping[str, Tensor]:
        """``scale = amax / 448`` per tensor or per row, codes rounded half to even, all in the dtype of ``weight``."""
        scale = fp8.dynamic_scale(weight, self.spec.weight.qscheme)
        return {"weight": fp8.quantize(weight, scale), "weight_scale": scale.squeeze(-1)}
