"""Which C++ computes with a packed weight: the fastest that the CPU can run, else the portable one."""

from collections.abc import Mapping
from typing import Any

from quark_inductor.lowering.base import GemmProblem
from quark_inductor.lowering.cpp import avx2, bf16, portable, vnni
from quark_inductor.lowering.cpp.kernel import Kernel
from quark_inductor.lowering.cpp.panel64 import ROWS
from quark_inductor.lowering.target import Target

# Products of an element and a block scale of these are exact in bfloat16.
_EXACT = frozenset({"", "mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2", "amdfp4_g16", "amdfp4_g32"})


def kernel_of_panels(
    target: Target, problem: GemmProblem, inputs: Mapping[str, Any], rounds_to: str | None, threads: int
) -> Kernel:
    """See :func:`quark_inductor.lowering.cpp.kernels.kernel_for`."""
    channels = _channels(problem, threads)
    # Only kernels in float32 round operands to the model's dtype.
    if rounds_to is None or {problem.x_format, problem.weight_format} <= _EXACT:
        for isa, of in (("avx512_vnni", vnni.kernel), ("avx512_bf16", bf16.kernel), ("avx2", avx2.integers)):
            if target.has(isa) and (kernel := of(problem, inputs, channels)) is not None:
                return kernel
    if target.has("avx2"):
        return avx2.floats(problem, inputs, channels, rounds_to)
    return portable.kernel(problem, inputs, channels)


def _channels(problem: GemmProblem, threads: int) -> int:
    """How many channels of a panel a thread takes at a time: all 64, or fewer if that shares them more evenly."""

    def busy(channels: int) -> int:
        return -(-problem.n // (channels * threads)) * channels

    return min((ROWS, ROWS // 2, ROWS // 4), key=lambda channels: (busy(channels) > 1.04 * busy(16), -channels))
