"""MXFP4 weights, MXFP4 activations quantized at run time: amd-quark's scheme ``mxfp4``."""

from quark_inductor.schemes.base import register_scheme
from quark_inductor.schemes.ocp_mx import QuarkOCP_MX, other_than
from quark_inductor.schemes.spec import LinearSpec


@register_scheme
class QuarkW4A4MXFP4(QuarkOCP_MX):
    """The case of :class:`QuarkOCP_MX` with MXFP4 both, scale rule "even"."""

    name = "w4a4_mxfp4"

    @classmethod
    def refuses(cls, spec: LinearSpec) -> str | None:
        """Takes weight and input of the scheme name ``mxfp4``."""
        return other_than("mxfp4", spec)
