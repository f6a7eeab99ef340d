"""The plot of ``quark-inductor bench``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quark_inductor.bench import BASELINE, RAW_READ, Result, Row
from quark_inductor.peers import OURS

# From few tokens to many, light to dark: numbers of one kind.
_LIGHTEST, _DARKEST = 0.35, 1.0


def plot(result: Result, path: Path) -> None:
    """Draw how much faster than ``F.linear`` in bfloat16 everybody is: a line each, a dot for each number of tokens.

    Dots are medians, whiskers quartiles; without that baseline the axis is milliseconds a Linear.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in result.rows if row.name != RAW_READ]
    relative = any(row.name == BASELINE for row in rows)
    rows = [row for row in rows if not (relative and (row.name == BASELINE or row.speedup_over_bf16 is None))]
    labels = list(dict.fromkeys(row.label for row in sorted(rows, key=lambda row: row.name != OURS.name)))
    shapes, threads = result.settings.shapes, result.settings.threads
    ours = sum(label.startswith(f"{OURS.name} ") for label in labels)
    figure, axes = plt.subplots(
        len(threads),
        len(shapes),
        figsize=(3.2 + 3.6 * len(shapes), (1.6 + 0.2 * len(labels)) * len(threads)),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    handles: dict[str, Any] = {}
    for line, t in zip(axes, threads, strict=True):
        for ax, (n, k) in zip(line, shapes, strict=True):
            mine = [row for row in rows if row.threads == t and (row.n, row.k) == (n, k)]
            handles |= _panel(ax, mine, labels, result.settings.tokens, relative, plt.get_cmap("Blues"))
            ax.set_title(f"N = {n}, K = {k}, {t} thread{'s' * (t > 1)}", fontsize=10)
            ax.axhline(ours - 0.5, color="0.6", linewidth=0.8)
    for line in axes:
        line[0].set_yticks(range(len(labels)), labels, fontsize=8)
    axes[0][0].set_ylim(len(labels) - 0.5, -0.5)
    cpu, torch_version, date = result.machine["cpu"], result.machine["torch"], result.started[:10]
    what = "times as fast as F.linear in bfloat16" if relative else "ms a Linear"
    where = f"{cpu}, {result.machine['cores']} cores, torch {torch_version}, {date}"
    figure.supxlabel(f"{what}; dots: medians, whiskers: quartiles\n{where}", fontsize=9)
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _panel(
    ax: Any, rows: Sequence[Row], labels: list[str], tokens: Sequence[int], relative: bool, colors: Any
) -> dict[str, Any]:
    ax.set_xscale("log")
    ax.grid(axis="x", which="both", color="0.92", linewidth=0.6)
    ax.set_axisbelow(True)
    if relative:
        ax.axvline(1, color="0.3", linewidth=0.8)
    handles = {}
    for i, m in enumerate(tokens):
        chosen = [row for row in rows if row.m == m]
        if not chosen:
            continue
        # What F.linear took, so that the whiskers are those of the row alone.
        scale = [row.median_ms * (row.speedup_over_bf16 or 1) for row in chosen]
        middle, low, high = (
            [s / ms if relative else ms for s, ms in zip(scale, times, strict=True)]
            for times in ([r.median_ms for r in chosen], [r.q3_ms for r in chosen], [r.q1_ms for r in chosen])
        )
        whiskers = [[abs(a - b) for a, b in zip(middle, end, strict=True)] for end in (low, high)]
        shade = _LIGHTEST + (_DARKEST - _LIGHTEST) * i / max(1, len(tokens) - 1)
        handles[f"M = {m}"] = ax.errorbar(
            middle,
            [labels.index(row.label) for row in chosen],
            xerr=whiskers if relative else whiskers[::-1],
            fmt="o",
            markersize=4.5,
            markeredgecolor="white",
            markeredgewidth=0.5,
            elinewidth=1,
            color=colors(shade),
        )
    return handles
