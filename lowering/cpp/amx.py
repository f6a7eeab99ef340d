"""Any packed weight by more than one token with AMX: the kernels of ``bf16.py``, and INT8's, with ``amx.h``."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quark_inductor.lowering.base import GemmProblem
from quark_inductor.lowering.cpp import bf16, vnni
from quark_inductor.lowering.cpp.kernel import Kernel

# Bytes of prepared rows, which every panel of the weight reads again: half of the second cache of CPUs with AMX.
_CACHED = 1 << 20
_LEAST, _MOST = 64, 384
# Rows up to which integer dot products of FP4 by FP4 are faster: measured on Emerald Rapids.
_FEW = 16


def kernel(problem: GemmProblem, inputs: Mapping[str, Any], rounds_to: str | None, channels: int) -> Kernel | None:
    """See :func:`quark_inductor.lowering.cpp.bf16.kernel`."""
    if problem.m == 1:
        return None
    integers = vnni.kernel(problem, inputs, rounds_to, channels)
    if integers is not None and integers.namespace == "vnni::int8":
        return _with_tiles(integers, problem.k)
    if integers is not None and problem.m is not None and problem.m <= _FEW:
        return None
    if (floats := bf16.kernel(problem, inputs, rounds_to, channels)) is None:
        return None
    tiles = _with_tiles(floats, 2 * problem.k)
    return tiles if integers is None or problem.m is not None else _by_count(integers, tiles)


def _with_tiles(kernel: Kernel, row_bytes: int) -> Kernel:
    rows = min(max(_CACHED // row_bytes // 32 * 32, _LEAST), _MOST)
    headers = ("generic", "panels", "amx", *kernel.headers[2:])
    return replace(kernel, headers=headers, before="quark::amx::permit()", rows=rows, rows_at_a_time=rows)


def _by_count(few: Kernel, many: Kernel) -> Kernel:
    """Either of two, as the number of rows at run time has it."""
    f, m = f"quark::{few.namespace}::", f"quark::{many.namespace}::"
    return replace(
        many,
        headers=(*many.headers[:3], *few.headers[2:], *many.headers[3:]),
        prepare=f"if (count <= {_FEW}) {{ {f}{few.prepare}; }} else {{ {m}{many.prepare}; }}",
        tile=f"if (count <= {_FEW}) {{ constexpr int64_t MT = {_FEW}; {few.tile}; }} else {{ {many.tile}; }}",
        rows_bytes=f"std::max<int64_t>({f}{few.rows_bytes}, {m}{many.rows_bytes})",
        scratch=f"std::max<int64_t>({f}{few.scratch}, {m}{many.scratch})",
    )
