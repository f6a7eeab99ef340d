"""The size of a kernel's tiles, whether its operands are swapped, and how many programs share a tile.

The sizes were chosen by the machine code that Triton 3.7 makes of them: no spills, everything fits, and the fewest
instructions for a product. They are not measured yet: ``max_autotune`` measures those that :func:`tiles_for` gives.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from quark_inductor.lowering.base import GemmProblem, tokens
from quark_inductor.lowering.triton.chips import Chip
from quark_inductor.lowering.triton.forms import Form, is_turned
from quark_inductor.schemes.numerics.block import BLOCK_FORMATS

# Columns of the smallest tile: what a matrix instruction takes of bfloat16.
_LEAST_COLUMNS = 16
_MOST_COLUMNS = 256
_LEAST_ROWS, _LEAST_CHANNELS = 16, 64
# Up to so many tokens a GEMM reads its weights for little else: tiles are as low as they can be, and K is split.
FEW_TOKENS = 64
_MOST_PARTS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """One way to run a kernel.

    Attributes:
        m: rows of the activation.
        n: output channels.
        k: columns of both.
        warps: warps a program.
        stages: tiles in flight between memory and registers.
        swapped: the weight is the left operand.
        parts: programs that share a tile of the result, each with a part of K.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    swapped: bool = False
    parts: int = 1


# By how the operands are multiplied and the chip, for few tokens (whose rows are as many as there are) and for many:
# rows, channels, columns, warps, stages.
_Size = tuple[int, int, int, int, int]
_SIZES: Mapping[str, Mapping[str, tuple[_Size, _Size]]] = {
    "fp4": {
        "gfx950": ((16, 64, 512, 4, 2), (128, 256, 256, 8, 2)),
        "sm_100": ((16, 128, 256, 4, 4), (128, 256, 256, 8, 3)),
        "sm_120": ((16, 128, 256, 4, 4), (128, 128, 128, 4, 3)),
    },
    "mxfp8": {
        "gfx950": ((16, 64, 256, 4, 2), (128, 128, 128, 8, 2)),
        "sm_100": ((16, 128, 128, 4, 4), (128, 128, 128, 4, 3)),
        "sm_120": ((16, 128, 128, 4, 3), (128, 128, 128, 8, 2)),
    },
    "fp8": {
        "gfx942": ((16, 64, 256, 4, 2), (128, 256, 64, 8, 2)),
        "gfx950": ((16, 64, 256, 4, 2), (128, 256, 128, 8, 2)),
        "sm_89": ((16, 128, 128, 4, 3), (128, 128, 64, 8, 3)),
        "sm_90": ((16, 64, 256, 4, 4), (128, 128, 128, 8, 3)),
        "sm_100": ((16, 128, 128, 4, 4), (128, 256, 128, 8, 3)),
        "sm_120": ((16, 128, 128, 4, 3), (128, 128, 128, 4, 3)),
    },
    "int8": {
        "gfx942": ((16, 64, 256, 4, 2), (128, 256, 64, 8, 2)),
        "gfx950": ((16, 64, 256, 4, 2), (128, 128, 128, 8, 2)),
        "gfx1100": ((16, 64, 128, 4, 2), (128, 128, 64, 8, 2)),
        "sm_80": ((16, 64, 128, 4, 4), (128, 128, 64, 8, 3)),
        "sm_89": ((16, 128, 128, 4, 3), (128, 128, 64, 8, 3)),
        "sm_90": ((16, 64, 256, 4, 4), (128, 256, 128, 8, 3)),
        "sm_100": ((16, 64, 256, 4, 3), (128, 128, 128, 8, 3)),
        "sm_120": ((16, 128, 128, 4, 3), (128, 128, 128, 4, 3)),
    },
    "float": {
        "gfx942": ((16, 64, 128, 4, 2), (128, 128, 32, 8, 2)),
        "gfx950": ((16, 64, 128, 4, 2), (128, 128, 64, 8, 2)),
        "gfx1100": ((16, 64, 32, 4, 2), (64, 64, 32, 8, 2)),
        "sm_80": ((16, 64, 64, 4, 3), (128, 64, 64, 8, 3)),
        "sm_89": ((16, 64, 64, 4, 3), (128, 64, 64, 8, 3)),
        "sm_90": ((16, 128, 64, 4, 3), (128, 128, 64, 8, 3)),
        "sm_100": ((16, 128, 64, 4, 3), (128, 128, 64, 8, 3)),
        "sm_120": ((16, 64, 64, 4, 3), (128, 64, 64, 8, 3)),
    },
}


def tiles_for(chip: Chip, problem: GemmProblem, form: Form, most: bool = False) -> list[Tile]:
    """Tiles to choose from, the one to take without measuring first.

    Args:
        chip: where it will run.
        problem: what to compute.
        form: how it is multiplied.
        most: more than one, for somebody who measures; all split K alike.
    """
    few, many = _SIZES[_kind(form)][chip.name]
    crowded = _is_rescaled(problem, form) or _has_fp6(problem) or problem.zero_points
    tokens = _tokens(problem)
    if _may_differ(problem) and problem.op == "prologue_gemm" and (tokens or math.inf) > prologue_tokens(problem):
        tokens = _LEAST_ROWS  # higher tiles that quantize spill, or do not fit
    if tokens is not None and tokens <= FEW_TOKENS:
        _, n, k, warps, stages = few
        m = _rows(tokens)
        if problem.group_size > k or m > 32 or (m > _LEAST_ROWS and crowded and problem.grouped):
            warps = 8
        if is_turned(problem) and form.pieces > 1 and m <= 32:
            n = max(n, form.pieces * _LEAST_CHANNELS)  # so many a piece
        tile = Tile(m=m, n=n, k=_columns(problem, k), warps=warps, stages=stages)
        if crowded and (m > _LEAST_ROWS or problem.grouped):
            tile = replace(tile, n=min(n, _LEAST_CHANNELS), k=min(tile.k, 128))
        tile = _swapped(chip, tile)
        tile = replace(tile, parts=_parts(chip, problem, tile))
    else:
        m, n, k, warps, stages = many
        tile = Tile(m=m, n=n, k=_columns(problem, k), warps=warps, stages=stages)
        if crowded:
            tile = replace(tile, n=max(_LEAST_CHANNELS, n // 2), warps=8)
        while tokens is not None and _programs(problem, tile) < chip.processors and tile.n > _LEAST_CHANNELS:
            tile = replace(tile, n=tile.n // 2)
    # Which rows are an expert's takes registers besides.
    if problem.grouped and _has_fp6(problem) and tile.m > _LEAST_ROWS:
        tile = replace(tile, k=min(tile.k, 64))
    if not most:
        return [tile]
    others = [replace(tile, stages=tile.stages - 1)]
    # Tiles of 8 warps spill with 4, and on RDNA 3 integers with 8.
    if tile.warps == 4 and form.kind != "int8":
        others.append(replace(tile, warps=8))
    if tile.n > max(_LEAST_CHANNELS, chip.left_rows if tile.swapped else 0):
        others.append(replace(tile, n=tile.n // 2))
    return [tile, *others]


def _is_rescaled(problem: GemmProblem, form: Form) -> bool:
    """Whether sums are scaled before they are added up, which takes twice their registers."""
    return form.kind == "fp8" and bool(problem.x_columns or problem.weight_columns)


def _has_fp6(problem: GemmProblem) -> bool:
    return "fp6" in problem.x_format + problem.weight_format


def _kind(form: Form) -> str:
    if form.kind != "block_scaled":
        return form.kind
    return "fp4" if form.x_element == form.weight_element == "e2m1" else "mxfp8"


def _tokens(problem: GemmProblem) -> int | None:
    """How many tokens a weight has, in the mean where several share them; ``None``: not known."""
    return problem.m if problem.m is None or not problem.grouped else -(-problem.m // problem.experts)


def _rows(tokens: int) -> int:
    return max(_LEAST_ROWS, 1 << (tokens - 1).bit_length())


def _swapped(chip: Chip, tile: Tile) -> Tile:
    """The weight on the left, if the activation has too few rows for that side."""
    if tile.m >= chip.left_rows:
        return tile
    return replace(tile, n=max(tile.n, chip.left_rows), swapped=True)


def _programs(problem: GemmProblem, tile: Tile) -> int:
    weights = problem.experts if problem.grouped else 1
    return weights * -(-(_tokens(problem) or 1) // tile.m) * -(-problem.n // tile.n)


def _parts(chip: Chip, problem: GemmProblem, tile: Tile) -> int:
    """How many programs share a tile: enough for the chip, if each still has some steps."""
    if problem.grouped:
        return 1
    parts, steps = 1, problem.k // tile.k
    while 2 * parts * _programs(problem, tile) <= chip.processors and parts < _MOST_PARTS and steps >= 4 * parts:
        parts *= 2
    return parts


def _columns(problem: GemmProblem, most: int) -> int:
    """The largest power of two up to ``most`` that divides K, and whose columns share each scale."""
    if problem.group_size:
        return problem.group_size  # their scale is computed from the tile
    return math.gcd(problem.k, problem.x_columns, problem.weight_columns, most)


def prologue_tokens(problem: GemmProblem) -> int:
    """Up to how many tokens a GEMM quantizes its activation itself; with more, the producer does so.

    Every tile along N quantizes its rows again. By a given scale that takes about 5 instructions a number, to blocks of
    FP4 20; the scale of a row takes a loop over it first. Above this it takes longer than reading the weight does.
    """
    return 64 if problem.scale_rule == "given" else 16


def _may_differ(problem: GemmProblem) -> bool:
    """Whether experts may quantize by scales of their own: then nobody can before the GEMM."""
    x = BLOCK_FORMATS.get(problem.x_format)
    return problem.grouped and (problem.scale_rule == "given" or (x is not None and x.has_global_scale))


def refuse(problem: GemmProblem) -> str | None:
    """``None`` if there is a tile whose columns share each scale, else why not."""
    if problem.k % _LEAST_COLUMNS:
        return f"K = {problem.k} is not a multiple of {_LEAST_COLUMNS}"
    for columns, whose in ((problem.x_columns, "activation"), (problem.weight_columns, "weight")):
        if columns % _LEAST_COLUMNS:
            return f"{columns} columns share a scale of the {whose}; expected a multiple of {_LEAST_COLUMNS}"
    count, most = _tokens(problem), prologue_tokens(problem)
    if problem.op == "prologue_gemm" and not _may_differ(problem) and (count is None or count > most):
        if problem.grouped:
            return f"quantizes up to {most} tokens an expert in the GEMM, their mean is {tokens(count)}"
        return f"quantizes up to {most} tokens in the GEMM, M is {tokens(count)}"
    group = problem.group_size
    if group and (group & (group - 1) or group > _MOST_COLUMNS or problem.weight_columns % group):
        return (
            f"the activation is quantized by groups of {group}; expected a power of two up to {_MOST_COLUMNS} that "
            "divides those of the weight"
        )
    return None
