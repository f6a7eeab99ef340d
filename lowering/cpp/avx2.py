"""Any packed weight with AVX2: FP4 by FP4 and INT8 by INT8 in integers, all else in float32: ``avx2_*.h``."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quark_inductor.lowering.base import GemmProblem
from quark_inductor.lowering.cpp import portable, vnni
from quark_inductor.lowering.cpp.kernel import Kernel


def integers(problem: GemmProblem, inputs: Mapping[str, Any], rounds_to: str | None, channels: int) -> Kernel | None:
    """See :func:`quark_inductor.lowering.cpp.bf16.kernel`; it rounds nothing."""
    found = vnni.kernel(problem, inputs, rounds_to, channels, "avx2")
    if found is None:
        return None
    header = "avx2_int8" if problem.x_format in ("int8", "uint8") else "avx2_fp4"
    return replace(found, headers=("generic", "panels", "avx2", header))


def floats(problem: GemmProblem, inputs: Mapping[str, Any], rounds_to: str | None, channels: int) -> Kernel:
    """The kernel of any problem; ``rounds_to`` may be any type."""
    found = portable.kernel(problem, inputs, channels, "avx2::fp32", "NT / 16, MT", rounds_to or "float")
    return replace(found, headers=("generic", "panels", "portable", "avx2", "avx2_fp32"))
