"""Profiles and comparisons as text for a terminal."""

import io
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from quark_inductor.profile import Comparison, Profile, Run
from quark_inductor.recorder import Break, Node

# Lines that take less of the clock are left out of the tree; of what is ours, less than so many seconds.
LEAST, LEAST_S = 0.01, 0.001
MOST_KERNELS, LONGEST_NAME = 10, 80


def table(profile: Profile) -> str:
    """Summary, phases of both runs, the tree of the cold run, the slowest kernels, and what went wrong."""
    out = _Text()
    out.line(f"{profile.model}, backend {profile.backend}, torch {profile.versions.get('torch', '?')}, {profile.cpu}")
    out.line(profile.summary)
    out.table(_phases(profile))
    out.table(_tree(profile.cold))
    if profile.cold.kernels.built:
        out.table(_kernels(profile.cold))
    for name, run in profile.runs.items():
        for line in _troubles(run):
            out.line(f"{name}: {line}")
    return out.text()


def comparison(found: Comparison) -> str:
    """Figures of a hundredth of a second or more, and counts; those that got worse are marked."""
    out = _Text()
    base, now = found.base, found.now
    if (base.model, base.cpu) != (now.model, now.cpu):
        out.line(f"these are not alike: {base.model} on {base.cpu}, and {now.model} on {now.cpu}")
    titles = [
        f"{p.backend} {p.versions.get('quark-inductor', '')}, torch {p.versions.get('torch', '?')}" for p in (base, now)
    ]
    rows = Table("", *titles, "delta", "ratio", "")
    for delta in found.deltas:
        if delta.worse or max(delta.base, delta.now) >= (0.01 if delta.unit == "s" else 1):
            ratio = f"{delta.now / delta.base:.2f}" if delta.base else "new"
            figures = (f"{x:.3f} s" if delta.unit == "s" else f"{x:.0f} {delta.unit}".strip() for x in _of(delta))
            rows.add_row(f"{delta.run}: {delta.name}", *figures, ratio, "worse" if delta.worse else "")
    out.table(rows)
    return out.text()


def _of(delta: Any) -> tuple[float, float, float]:
    return delta.base, delta.now, delta.now - delta.base


class _Text:
    def __init__(self) -> None:
        # As wide as it needs: names of rules and kernels are not cut.
        self._console = Console(file=io.StringIO(), width=200, highlight=False, markup=False, emoji=False)

    def line(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)

    def table(self, rows: Table) -> None:
        rows.box = None
        rows.pad_edge = False
        for column in rows.columns[1:]:
            column.justify = "right" if rows.row_count else "left"
        self._console.print()
        self._console.print(rows)

    def text(self) -> str:
        file = self._console.file
        assert isinstance(file, io.StringIO)
        return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def _phases(profile: Profile) -> Table:
    rows = Table("phase", *(cell for name in profile.runs for cell in (f"{name}, s", "share")))
    names = dict.fromkeys(phase for run in profile.runs.values() for phase in run.phases)

    def cells(run: Run, s: float) -> tuple[str, str]:
        return (f"{s:.3f}", f"{s / run.wall_s:.1%}") if s else ("", "")

    for name in names:
        rows.add_row(name, *(cell for run in profile.runs.values() for cell in cells(run, run.phases.get(name, 0.0))))
    rows.add_row("(unattributed)", *(c for run in profile.runs.values() for c in cells(run, run.unattributed_s)))
    rows.add_row("(on the clock)", *(c for run in profile.runs.values() for c in cells(run, run.wall_s)))
    return rows


def _tree(run: Run) -> Table:
    rows = Table("cold run", "s", "own s", "times", "phase")

    def lines(nodes: "tuple[Node, ...] | list[Node]", depth: int) -> Iterator[tuple[Node, int]]:
        for node in nodes:
            ours = any(n.name.startswith("quark.") and n.s >= LEAST_S for n in node.walk())
            if ours or node.s >= LEAST * run.wall_s:
                yield node, depth
                yield from lines(node.children, depth + 1)

    for node, depth in lines(run.tree, 0):
        rows.add_row("  " * depth + node.name, f"{node.s:.3f}", f"{node.self_s:.3f}", str(node.count), node.phase)
    return rows


def _kernels(run: Run) -> Table:
    rows = Table("built", "by", "s", "calls")
    for kernel in run.kernels.built[:MOST_KERNELS]:
        rows.add_row(
            _short(kernel.name), kernel.compiler, f"{kernel.s:.3f}", "" if kernel.calls is None else str(kernel.calls)
        )
    if more := run.kernels.built[MOST_KERNELS:]:
        rows.add_row(f"and {len(more)} more", "", f"{sum(kernel.s for kernel in more):.3f}", "")
    return rows


def _short(name: str) -> str:
    # Both ends tell: where a kernel begins, and its number.
    half = LONGEST_NAME // 2
    return name if len(name) <= LONGEST_NAME else f"{name[:half]}...{name[-half:]}"


def _troubles(run: Run) -> Iterator[str]:
    def said(kind: str, one: Break) -> str:
        times = f" ({one.count} times)" if one.count > 1 else ""
        return f"{kind} at {one.where or 'an unknown place'}{times}: {one.reason.strip()}"

    yield from (said("graph break", one) for one in run.graph_breaks)
    yield from (said("recompiled", one) for one in run.recompiles)
    for cache in run.caches:
        counts = {"hits": cache.hits, "misses": cache.misses, "bypasses": cache.bypasses, "disabled": cache.disabled}
        yield f"cache {cache.cache}: " + ", ".join(f"{n} {what}" for what, n in counts.items() if n)
        yield from (f"cache {cache.cache} bypassed: {reason}" for reason in cache.reasons)
    kernels = run.kernels
    if kernels.calls is not None:
        yield (
            f"{kernels.calls} kernel calls of {kernels.distinct} kernels ({kernels.deduplicated} calls deduplicated): "
            f"{kernels.compiled} compiled, {kernels.reused} reused"
        )
