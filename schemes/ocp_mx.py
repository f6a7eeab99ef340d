"""OCP MX weights (MXFP4, MXFP6, MXFP8) with any activation: none, another MX format, or FP8."""

from collections.abc import Mapping

from torch import Tensor

from quark_inductor.schemes.activations import Fp8Activation
from quark_inductor.schemes.base import register_scheme
from quark_inductor.schemes.block_weight import BlockWeightScheme
from quark_inductor.schemes.spec import PRESETS, LinearSpec, TensorSpec


def other_than(preset: str, spec: LinearSpec) -> str | None:
    """A refusal of every spec whose weight and input are not those of a scheme name."""
    taken = PRESETS[preset]
    return None if (spec.weight, spec.input) == (taken.weight, taken.input) else f"takes only [{taken}]"


def is_mx(spec: TensorSpec | None) -> bool:
    """Whether a spec is an MX format: a block format with E8M0 scales."""
    return spec is not None and spec.block_format is not None and spec.scale_format == "e8m0"


@register_scheme
class QuarkOCP_MX(BlockWeightScheme):
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

    def quantize_weight(self, weight: Tensor) -> Mapping[str, Tensor]:
        """Blocks along K. A block amd-quark would scale by ``2**-127`` is stored with byte 1."""
        rule = self.weight.scale_calculation_mode or "even"
        codes, scales = self.quantize_blocks(weight, rule)
        # amd-quark takes log2(max(scale, 2**-126)) when it stores a scale (utils/numerics.py: to_e8m0_uint8).
        return {"weight": codes, "weight_scale": scales if rule == "rceil" else scales.clamp(min=1)}
