"""The Triton source of a fused GEMM, as a template of Inductor's.

A kernel is a loop over K: read a tile of the activation and one of the weight, each made what the matrix cores take,
and multiply. Scales that do not change along K, and the epilogue, come after the loop.
"""

import ast
import functools
import re
from dataclasses import replace
from pathlib import Path

from quark_inductor.lowering.base import GemmProblem
from quark_inductor.lowering.triton import grouped
from quark_inductor.lowering.triton.activation import activation
from quark_inductor.lowering.triton.forms import Form, cut, is_turned
from quark_inductor.lowering.triton.operand import FLOATS, Operand
from quark_inductor.lowering.triton.tiles import FEW_TOKENS, Tile
from quark_inductor.lowering.triton.weight import Strides, weight
from quark_inductor.schemes.numerics.int4 import FORMATS as INT4_FORMATS

_HEAD = """{{{{def_kernel({names})}}}}
    M = {{{{size("X", 0)}}}}
    N: tl.constexpr = {n}
    K: tl.constexpr = {k}
    if M * N == 0:
        return
    STEPS: tl.constexpr = K // BLOCK_K
    pid = tl.program_id(0).to(INDEX_DTYPE)
    tiles_m = {tiles_m}
    tiles_n = (N + BLOCK_N - 1) // BLOCK_N
    # Programs that run together share what they read: GROUP_M tiles of rows, then the next columns.
    width = GROUP_M * tiles_n
    group = pid // width
    height = min(tiles_m - group * GROUP_M, GROUP_M)
    pid_m = group * GROUP_M + (pid % width) % height
    pid_n = (pid % width) // height
{rows}    # Rows and columns past the end read others, and are not stored.
    m = ({begin} + tl.arange(0, BLOCK_M).to(INDEX_DTYPE)) % M
    n = (pid_n * BLOCK_N + tl.arange(0, BLOCK_N).to(INDEX_DTYPE)) % N
"""

_TAIL = """{again}    rows = {begin} + tl.arange(0, BLOCK_M).to(INDEX_DTYPE)
    columns = pid_n * BLOCK_N + tl.arange(0, BLOCK_N).to(INDEX_DTYPE)
    idx_m = rows[:, None]
    idx_n = columns[None, :]
    mask = (idx_m < {end}) & (idx_n < N)
"""
# Of a GEMM of one weight, for both; of several: :mod:`.grouped`.
_PLACE = {
    "tiles_m": "(M + BLOCK_M - 1) // BLOCK_M",
    "rows": "",
    "again": "",
    "begin": "pid_m * BLOCK_M",
    "end": "M",
}


def kernel(problem: GemmProblem, form: Form, tile: Tile, strides: Strides, names: tuple[str, ...]) -> str:
    """The source of a kernel, for ``TritonTemplate``.

    Args:
        problem: what it computes.
        form: how it multiplies.
        tile: whether operands are swapped, and K is split; its sizes are constants that the template gets besides.
        strides: how the operands lie in memory.
        names: of the tensors it gets, those of the op: ``"x"``, ``"weight"``, ...
    """
    has, form = frozenset(names), cut(form, problem, tile.m, tile.n, tile.k)
    many = problem.m is None or problem.m > FEW_TOKENS
    # Small tiles have up to 6 percent more instructions that way.
    form = replace(form, turns=form.turns and many)
    # Triton 3.7 takes no more than four scales a lane.
    form = replace(form, orders_blocks=form.orders_blocks and tile.k in (256, 512))
    a, b = activation(problem, form, has), weight(problem, form, strides, has, tile.n)
    place = grouped.place(problem, strides.experts) if problem.grouped else _PLACE
    quoted = ", ".join(f'"{name.upper()}"' for name in names)
    head = _HEAD.format(names=quoted, n=problem.n, k=problem.k, **place)
    if form.kind == "float":
        head += f"    DOT: tl.constexpr = {FLOATS[form.dot]}\n"
    if form.pieces > 1:
        head += f"    PTX: tl.constexpr = {form.ptx}\n"
    integers = form.kind == "int8"
    shape = "(BLOCK_N, BLOCK_M)" if tile.swapped else "(BLOCK_M, BLOCK_N)"
    loop = ["k = step * BLOCK_K", *_tiles(form, tile, a, b), *_product(problem, form, a, b, tile.swapped)]
    before, late = [*a.before, *b.before], list[str]()
    if many and form.kind != "float" and not problem.grouped:
        # With few tokens waiting for them would take longer than it is worth. Elsewhere the loop becomes longer, and
        # what a grouped GEMM knows of its rows is held over it as well.
        before, late = _late(before, loop)
    before += [f"acc = tl.zeros({shape}, dtype={'tl.int32' if integers else 'tl.float32'})"]
    sums_b, sums_a = integers and bool(a.zero), integers and bool(b.zero)
    before += ["sum_b = tl.zeros((BLOCK_N,), dtype=tl.int32)"] * sums_b
    before += ["sum_a = tl.zeros((BLOCK_M,), dtype=tl.int32)"] * sums_a
    before += ["first = 0", "last = STEPS"]
    loop += [f"sum_b += tl.sum(b.to(tl.int32), {0 if b.is_turned else 1})"] * sums_b
    loop += ["sum_a += tl.sum(a.to(tl.int32), 1)"] * sums_a
    after = ["acc = tl.trans(acc)"] * tile.swapped
    if form.pieces > 1 and is_turned(problem):
        sums = [f"acc_{i}" for i in range(form.pieces)]
        at = next(i for i, line in enumerate(before) if line.startswith("acc = "))
        shape = shape.replace("BLOCK_N", "BLOCK_N // 4")
        before[at : at + 1] = [f"{acc} = tl.zeros({shape}, dtype=tl.float32)" for acc in sums]
        accs = ", ".join(f"tl.trans({acc})" if tile.swapped else acc for acc in sums)
        reordered = INT4_FORMATS[problem.weight_format][1] == "reorder"
        after = [f"acc = join_quarters({accs}, BLOCK_M, BLOCK_N, {reordered})"]
    if sums_b:
        after.append(f"acc -= {a.zero} * sum_b[None, :]")
    if sums_a:
        after.append(f"acc -= {b.zero} * sum_a[:, None]")
    if sums_a and sums_b:
        after.append(f"acc += {a.zero} * {b.zero} * ((last - first) * BLOCK_K)")
    after += ["acc = acc.to(tl.float32)"] * integers
    after += [f"acc = acc * {factor}" for factor in (*a.factors, *b.factors)]
    if problem.grouped:
        after += grouped.after(has)
    lines = [*before, "for step in range(first, last):", *(f"    {line}" for line in loop), *late, *after]
    if tile.parts > 1:
        at = lines.index("first = 0")
        lines[at : at + 2] = [
            "part = tl.program_id(1)",
            "first = part * STEPS_A_PART",
            "last = min(first + STEPS_A_PART, STEPS)",
        ]
    body = "".join(f"    {line}\n" for line in lines)
    indices = '("part", "idx_m", "idx_n")' if tile.parts > 1 else '("idx_m", "idx_n")'
    store = f'    {{{{store_output({indices}, "acc", "mask", val_shape=("BLOCK_M", "BLOCK_N"))}}}}\n'
    return head + body + _TAIL.format(**place) + store + functions(body)


def _tiles(form: Form, tile: Tile, a: Operand, b: Operand) -> list[str]:
    """The lines that load the tiles, or compute them, in the order of which Triton 3.7 makes the fewest waits."""
    if b.is_turned and form.kind == "block_scaled" and tile.stages > 2:
        return [*a.scales, *b.scales, *b.loop, *a.loop]
    if b.is_turned and (form.kind != "block_scaled" or form.weight_element == "e2m1"):
        return [*a.scales, *b.loop, *a.loop, *b.scales]
    return [*a.scales, *a.loop, *b.scales, *b.loop]


def _late(before: list[str], loop: list[str]) -> tuple[list[str], list[str]]:
    """Lines before the loop: those to keep there, and those of rows or columns that it does not need.

    After it the latter hold no registers.
    """
    of_rows, needed, kept, late = {"m", "n"}, _names(loop), list[str](), list[str]()
    for line in before:
        if _names([line]) & of_rows:
            of_rows.add(line.partition(" = ")[0])
    for line in reversed(before):
        name = line.partition(" = ")[0]
        if name in of_rows and name.isidentifier() and name not in needed:
            late.insert(0, line)
        else:
            kept.insert(0, line)
            needed |= _names([line])
    return kept, late


def _names(lines: list[str]) -> set[str]:
    return {name for line in lines for name in re.findall(r"[A-Za-z_]\w*", line)}


def _product(problem: GemmProblem, form: Form, a: Operand, b: Operand, swapped: bool) -> list[str]:
    """The lines that multiply the tiles."""
    if form.kind == "block_scaled":
        x, w = f'{a.scale}, "{form.x_element}"', f'{b.scale}, "{form.weight_element}"'
        right = "b" if b.is_turned else "tl.trans(b)"
        product = f"b, {w}, tl.trans(a), {x}" if swapped else f"a, {x}, {right}, {w}"
        return [f"acc = tl.dot_scaled({product}, acc)"]
    if form.pieces > 1 and is_turned(problem):
        tiles = "tl.trans(b_{0}), tl.trans(a)" if swapped else "a, b_{0}"
        return [f"acc_{i} = tl.dot({tiles.format(i)}, acc_{i})" for i in range(form.pieces)]
    if form.pieces > 1:
        tiles = "b_{0}, tl.trans(a_{0})" if swapped else "a_{0}, tl.trans(b_{0})"
        return [f"acc = tl.dot({tiles.format(i)}, acc)" for i in range(form.pieces)]
    turned = b.is_turned or is_turned(problem)
    if swapped:
        tiles = "tl.trans(b), tl.trans(a)" if turned else "b, tl.trans(a)"
    else:
        tiles = "a, b" if turned else "a, tl.trans(b)"
    if form.kind == "int8":
        return [f"acc = tl.dot({tiles}, acc, out_dtype=tl.int32)"]
    options = ', input_precision="ieee"' if form.dot == "float32" else ""
    if form.kind == "fp8":
        # Hopper sums FP8 products in 14 bits: no more than those of a tile before they are added in float32.
        options = ", max_num_imprecise_acc=BLOCK_K"
    partial, numbers = [*a.partial, *b.partial], b.partial_numbers
    if numbers and partial:
        # With those of rows first: fewer products than of the tile.
        numbers = [f"{partial[0]} * {number}" for number in numbers]
        partial[0] = f"({numbers[0]})" if len(numbers) == 1 else _of_halves(numbers)
    elif len(numbers) > 1:
        partial = [_of_halves(numbers)]
    factors = [f"tl.trans({factor})" if swapped else factor for factor in partial] or numbers
    if factors:
        return [f"acc += tl.dot({tiles}) * " + " * ".join(factors)]
    return [f"acc = tl.dot({tiles}, acc{options})"]


def _of_halves(factors: list[str]) -> str:
    """A factor for either half of the tile's columns. LLVM sees which one a register needs, and selects nothing."""
    return f"tl.where((tl.arange(0, BLOCK_N) < BLOCK_N // 2)[None, :], {', '.join(factors)})"


@functools.cache
def _device_functions() -> dict[str, tuple[str, frozenset[str]]]:
    """Source of each device function, and the names in it."""
    found = {}
    for file in ("decode", "encode"):
        text = Path(__file__).with_name(f"{file}.py").read_text()
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef):
                names = frozenset(n.id for n in ast.walk(node) if isinstance(n, ast.Name))
                lines = text.splitlines()[node.decorator_list[0].lineno - 1 : node.end_lineno]
                found[node.name] = "\n".join(lines), names
    return found


def functions(body: str) -> str:
    """The device functions that a kernel calls, and those that they call."""
    known = _device_functions()
    wanted = [name for name in known if f"{name}(" in body]
    for name in wanted:
        wanted += sorted((known[name][1] & known.keys()) - set(wanted))
    return "".join(f"\n\n{known[name][0]}\n" for name in known if name in wanted)
