"""Any packed weight by more than one token with AMX: the kernels of ``bf16.py``, and INT8's, with ``amx.h``."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quark_inductor.lowering.base import GemmProblem
from quark_inductor.lowering.cpp import bf16, vnni
from quark_inductor.lowering.cpp.kernel import Kernel

# Of prepared rows, which every panel of the weight reads again: half of the second cache of every CPU with AMX.
_CACHED = 1 << 20
_FEWEST, _MOST = 64, 384


def kernel(problem: GemmProblem, inputs: Mapping[str, Any], channels: int) -> Kernel | None:
    """The kernel for units of so many channels; ``None`` if there is none."""
    if problem.m == 1:
        return None
    integers, size = vnni.kernel(problem, inputs, channels), 1
    if integers is not None and integers.namespace == "vnni::int8":
        base: Kernel | None = integers
    else:
        base, size = bf16.kernel(problem, inputs, channels), 2
    if base is None:
        return None
    rows = min(max(_CACHED // (size * problem.k) // 32 * 32, _FEWEST), _MOST)
    headers = ("generic", "panels", "amx", *base.headers[2:])
    return replace(base, headers=headers, before="quark::amx::permit()", rows=rows, rows_at_a_time=rows)
