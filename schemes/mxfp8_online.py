"""MXFP8 weights and activations, quantized from a float model: vLLM's online method of this name."""

from quark_inductor.schemes.base import register_scheme
from quark_inductor.schemes.ocp_mx import QuarkOCP_MX, other_than
from quark_inductor.schemes.spec import LinearSpec


@register_scheme
class Mxfp8OnlineLinearMethod(QuarkOCP_MX):
    """The case of :class:`QuarkOCP_MX` with FP8 E4M3 elements and scales ``2**ceil(log2(amax / 448))``.

    ``weight`` E4M3 ``[N, K]``, ``weight_scale`` uint8 E8M0 ``[N, K/32]``; K must be a multiple of 32. Nothing
    saturates. amd-quark exports no such weights. The activation is quantized the same way (vLLM leaves it as it is).
    Source: vLLM 0.33 (``layers/quantization/online/mxfp8.py``, ``utils/mxfp8_utils.py``).
    """

    name = "mxfp8_online"

    @classmethod
    def refuses(cls, spec: LinearSpec) -> str | None:
        """Takes weight and input of the scheme name ``mxfp8``."""
        return other_than("mxfp8", spec)
