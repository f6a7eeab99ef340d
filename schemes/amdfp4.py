"""AMDFP4: FP4 in blocks of 16 or 32 whose scales are E5M3."""

from collections.abc import Mapping

from torch import Tensor

from quark_inductor.schemes.base import register_scheme
from quark_inductor.schemes.block_weight import BlockWeightScheme
from quark_inductor.schemes.spec import LinearSpec, TensorSpec


def _is_amdfp4(spec: TensorSpec | None) -> bool:
    return spec is not None and spec.block_format in ("amdfp4_g16", "amdfp4_g32")


@register_scheme
class QuarkAMDFP4(BlockWeightScheme):
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

    def quantize_weight(self, weight: Tensor) -> Mapping[str, Tensor]:
        """Blocks along K, scale ``amax / 6`` rounded to the weight's dtype, then to E5M3."""
        codes, scales = self.quantize_blocks(weight, "nearest")
        return {"weight": codes, "weight_scale": scales}
