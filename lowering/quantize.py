"""Who quantizes to a block format in a kernel of its own, where no GEMM does; what nobody does is plain aten."""

from quark_inductor.lowering.base import No, forced_provider
from quark_inductor.lowering.target import Target
from quark_inductor.lowering.triton import quantize

PROVIDER = "triton"


def quantizes(target: Target, format: str, scale_rule: str, dtype: str, k: int | None) -> No | None:
    """``None`` if there is a kernel that is better than what Inductor makes of plain aten, else why not.

    Args:
        target: where it will run.
        format: of a block.
        scale_rule: how scales are computed.
        dtype: bare name of the dtype of ``x [..., K]``.
        k: ``None`` if it is not known before run time.
    """
    if (forced := forced_provider()) not in (None, PROVIDER):
        return No(f"{PROVIDER}: option quark.provider is {forced!r}: leave it out to ask all")
    reason = quantize.refuse(target, format, scale_rule, dtype, k)
    return None if reason is None else No(f"{PROVIDER}: {reason}")
