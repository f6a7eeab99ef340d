"""Which C++ computes with a packed weight: the fastest that the CPU can run, else the portable one."""

from collections.abc import Mapping
from typing import Any

from quark_inductor.lowering.base import GemmProblem
from quark_inductor.lowering.cpp import amx, avx2, bf16, portable, vnni
from quark_inductor.lowering.cpp.bf16 import EXACT
from quark_inductor.lowering.cpp.kernel import Kernel
from quark_inductor.lowering.cpp.panel64 import ROWS
from quark_inductor.lowering.target import Target


def kernel_of_panels(
    target: Target, problem: GemmProblem, inputs: Mapping[str, Any], rounds_to: str | None, threads: int
) -> Kernel:
    """See :func:`quark_inductor.lowering.cpp.kernels.kernel_for`."""
    channels = _channels(problem, threads)
    # What float32 rounds is less than what the order of a sum does.
    if rounds_to == "float" or {problem.x_format, problem.weight_format} <= EXACT:
        rounds_to = None
    families = (
        ("amx", amx.kernel),
        ("avx512_vnni", vnni.kernel),
        ("avx512_bf16", bf16.kernel),
        ("avx2", avx2.integers),
        ("avx2", avx2.floats),
    )
    for isa, kernel_of in families:
        if target.has(isa) and (kernel := kernel_of(problem, inputs, rounds_to, channels)) is not None:
            return kernel
    return portable.kernel(problem, inputs, channels)


def _channels(problem: GemmProblem, threads: int) -> int:
    """How many channels of a panel a thread takes at a time: all 64, or fewer if that shares them more evenly."""

    def busy(channels: int) -> int:
        return -(-problem.n // (channels * threads)) * channels

    return min((ROWS, ROWS // 2, ROWS // 4), key=lambda channels: (busy(channels) > 1.04 * busy(16), -channels))
