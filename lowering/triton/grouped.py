"""Which expert's rows a program of a grouped GEMM has.

Where each expert's rows end is known on the device only. So the grid has as many tiles of rows as there can be, and
each program counts the tiles before its own; those that find none left end. The rows of nobody, which come last, count
as those of one more expert. Their sums are computed like any, of the last expert's weight, and are not used: a loop
whose length is not known beforehand takes registers that many kernels do not have.

K is not split: there are as many programs as experts, and more. Operands are swapped as in any GEMM.
"""

from collections.abc import Mapping
from typing import Any

import torch

from quark_inductor.lowering.base import GemmProblem

_ROWS = """    # The tiles of each, and of all up to it.
    e = tl.arange(0, {entries})
    ends = tl.load(OFFSETS + e, e < EXPERTS, M)
    begins = tl.load(OFFSETS + e - 1, (e > 0) & (e <= EXPERTS), tl.where(e > 0, M, 0))
    tiles = (ends - begins + BLOCK_M - 1) // BLOCK_M
    tiles_up_to = tl.cumsum(tiles, 0)
    is_before = tiles_up_to <= pid_m
    expert = tl.sum(is_before.to(tl.int32), 0)
    if expert > EXPERTS:
        return
    is_somebodys = expert < EXPERTS
    tile = pid_m - tl.sum(tl.where(is_before, tiles, 0), 0)
"""
_BEGIN = "    begin = tl.load(OFFSETS + expert - 1, expert > 0, 0) + tile * BLOCK_M\n"
_END = "    end = tl.load(OFFSETS + expert, is_somebodys, M)\n"
_EXPERT = "    of = tl.minimum(expert, EXPERTS - 1).to(tl.int64)\n"


def grid(m: Any, n: Any, meta: Mapping[str, int], *, cdiv: Any, min: Any) -> tuple[Any, int, int]:
    """Programs: each tile has a row at least, and only an expert's last is not full."""
    return min(m, cdiv(m, meta["BLOCK_M"]) + meta["EXPERTS"]) * cdiv(n, meta["BLOCK_N"]), 1, 1


def place(problem: GemmProblem, steps: Mapping[str, int]) -> dict[str, str]:
    """What the source of a kernel says of its place: how many tiles of rows there are, and which rows are its own.

    ``steps``: see :func:`steps_of`.
    """
    moved = "".join(f"    {name.upper()} += of * {step}\n" for name, step in steps.items())
    return {
        "tiles_m": "min(M, (M + BLOCK_M - 1) // BLOCK_M + EXPERTS)",
        "rows": _ROWS.format(entries=1 << problem.experts.bit_length()) + _BEGIN + _EXPERT + moved,
        "again": f"    # Kept, they would take registers in the loop.\n{_BEGIN}{_END}",
        "begin": "begin",
        "end": "end",
    }


def after(has: frozenset[str]) -> list[str]:
    """Lines behind the loop and the scales; ``has`` names the tensors that the kernel gets."""
    bias = ["acc += tl.load(BIAS + n)[None, :].to(tl.float32)"] * ("bias" in has)
    return [*bias, "acc = tl.where(is_somebodys, acc, 0.0)"]


def steps_of(inputs: Mapping[str, Any]) -> dict[str, int]:
    """Entries between those of two experts, of each tensor of Inductor's IR that has some."""

    def is_of_experts(name: str, tensor: Any) -> bool:
        dimensions = len(tensor.get_size())
        return dimensions > 0 if name.startswith(("weight", "bias")) else name.startswith("x_") and dimensions == 1

    return {name: int(t.get_stride()[0]) for name, t in inputs.items() if is_of_experts(name, t)}


def some_offsets(problem: GemmProblem) -> torch.Tensor:
    """Offsets to measure kernels with: every expert has as many rows."""
    assert problem.m is not None
    return torch.arange(1, problem.experts + 1, dtype=torch.int32) * problem.m // problem.experts
