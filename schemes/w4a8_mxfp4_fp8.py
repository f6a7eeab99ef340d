"""MXFP4 weights, FP8 activations: amd-quark's scheme ``mxfp4_fp8``, and its dynamic forms."""

from quark_inductor.schemes.activations import Fp8Activation
from quark_inductor.schemes.base import register_scheme
from quark_inductor.schemes.ocp_mx import QuarkOCP_MX
from quark_inductor.schemes.spec import LinearSpec


@register_scheme
class QuarkW4A8_MXFP4_FP8(QuarkOCP_MX):
    """The case of :class:`QuarkOCP_MX` with FP8 activations: static per tensor, dynamic per tensor or per token.

    vLLM 0.33 knows the static one (``quark/schemes/quark_w4a8_mxfp4_fp8.py``).
    """

    name = "w4a8_mxfp4_fp8"

    @classmethod
    def refuses(cls, spec: LinearSpec) -> str | None:
        """MXFP4 weights and FP8 inputs."""
        if spec.weight is None or spec.weight.block_format != "mxfp4" or spec.input is None:
            return "takes MXFP4 weights with an FP8 input"
        return Fp8Activation.refuses(spec.input) or super().refuses(spec)
