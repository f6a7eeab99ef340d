"""A report or a profile as one HTML document that needs nothing else: no network, no other file.

All that is said is in the markup, so that it can be read without JavaScript; the script of ``page.html`` draws the
timeline and makes the tables sort and filter. Files of other versions are shown as far as they are understood: a key
that is missing is left out, a phase that is unknown gets a colour of its own.
"""

import functools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

from quark_inductor import __version__
from quark_inductor.words import number, plain, plural, seconds, share, size, three_digits

# Phases in the order a compile goes through them. The colour of each is its place here (see page.html).
PHASES = (
    "dynamo",
    "aot_autograd",
    "quark_passes",
    "inductor_passes",
    "lowering",
    "templates",
    "codegen",
    "autotuning",
    "kernel_compile",
    "cache",
    "first_run",
    "other",
)
# page.html has this many more colours, for phases that are not in the list.
_SPARE_COLOURS = 4
# More of a run's time than this without a phase deserves a warning.
_UNATTRIBUTED = 0.05


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: what it shows.
        value: what it is sorted by, if that is a number.
        style: a class of page.html's style sheet.
        bar: length of the bar behind it, from 0 to 1.
        colour: which phase's colour is shown beside it.
    """

    text: str
    value: float | None = None
    style: str = ""
    bar: float | None = None
    colour: int | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """A table, and what is told of each of its rows beside the cells.

    Attributes:
        name: what it is called in the markup.
        columns: titles, with whether the column holds numbers.
        rows: their cells.
        foot: rows that stay below the others, however they are sorted.
        tags: for each row what it can be picked by, if by anything.
    """

    name: str
    columns: tuple[tuple[str, bool], ...]
    rows: tuple[tuple[Cell, ...], ...]
    foot: tuple[tuple[Cell, ...], ...] = ()
    tags: tuple[Mapping[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Fact:
    """A number of the summary: what it is, the number, and a remark on it."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that a user should look at: what and how often, the table that shows it, and why."""

    text: str
    section: str
    details: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Node:
    """An event of the main thread, and those inside of it."""

    name: str
    colour: int | None
    time: str
    remark: str
    children: tuple["Node", ...]


@dataclass(frozen=True, slots=True)
class Section:
    """A run in the page.

    Attributes:
        name: what it is called.
        wall: how long it took.
        legend: colour, name, time and share of each phase.
        tree: events of the main thread.
        tracks: titles of the timeline's parts, with how many rows they have.
        data: what the script draws.
    """

    name: str
    wall: str
    legend: tuple[tuple[int, str, str, str], ...]
    tree: tuple[Node, ...]
    tracks: tuple[tuple[str, int], ...]
    data: Mapping[str, Any]


# --- what may be in a file of another version


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _items(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    return [item for item in _items(value) if isinstance(item, Mapping)]


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "; ".join(map(str, value))
    return "" if value is None else str(value)


def _count(value: Any, default: int = 0) -> int:
    found = number(value)
    return default if found is None else int(found)


def _number_cell(value: Any, shown: str | None = None, **more: Any) -> Cell:
    """A cell that sorts by its number; ``shown``: how it is written, if not as it is."""
    found = number(value)
    text = "" if found is None else shown if shown is not None else f"{found:,}"
    return Cell(text, found, "number", **more)


def _table(name: str, columns: Iterable[tuple[str, bool]], rows: Iterable[Sequence[Cell]], **more: Any) -> Table | None:
    """A table without the columns that are empty in every row; none if there is no row."""
    rows = list(rows)
    used = [i for i in range(len(rows[0])) if any(row[i].text for row in rows)] if rows else []
    columns = tuple(columns)
    kept = tuple(tuple(row[i] for i in used) for row in rows)
    return Table(name, tuple(columns[i] for i in used), kept, **more) if rows else None


# --- compile runs

_Runs = Mapping[str, Mapping[str, Any]]


def _phase_times(run: Mapping[str, Any]) -> dict[str, float]:
    times: dict[str, float] = {}
    for phase in _mappings(run.get("phases")):
        times[_text(phase.get("name"))] = times.get(_text(phase.get("name")), 0) + (number(phase.get("s")) or 0)
    return times


def _colours(runs: _Runs) -> dict[str, int]:
    """Phase to number of its colour; known phases first, in the order of a compile."""
    met = [name for run in runs.values() for name in _phase_times(run)]
    met += [_text(span.get("phase")) for run in runs.values() for span in _mappings(run.get("spans"))]
    unknown = list(dict.fromkeys(name for name in met if name not in PHASES))
    known = {name: i for i, name in enumerate(PHASES) if name in met}
    return known | {name: len(PHASES) + i % _SPARE_COLOURS for i, name in enumerate(unknown)}


def _phase_table(runs: _Runs, colours: Mapping[str, int]) -> Table | None:
    """Phases of all runs side by side, with unattributed and wall time below."""
    times = {name: _phase_times(run) for name, run in runs.items()}
    walls = {name: number(run.get("wall_s")) for name, run in runs.items()}
    phases = [name for name in colours if any(name in found for found in times.values())]
    longest = max((s for found in times.values() for s in found.values()), default=0) or 1
    columns: list[tuple[str, bool]] = [("phase", False)]
    for name in runs:
        columns += [(name, True), ("share", True)]

    def row(first: Cell, of_run: Mapping[str, float | None], bars: bool) -> tuple[Cell, ...]:
        cells = [first]
        for name in runs:
            s, wall = of_run.get(name), walls[name]
            bar = s / longest if bars and s is not None else None
            cells.append(_number_cell(s, seconds(s), bar=bar, colour=first.colour if bar is not None else None))
            cells.append(_number_cell(s / wall, share(s / wall)) if s is not None and wall else Cell(""))
        return tuple(cells)

    rows = [
        row(Cell(phase, style="name", colour=colours[phase]), {n: times[n].get(phase) for n in runs}, True)
        for phase in phases
    ]
    unattributed = {name: number(run.get("unattributed_s")) for name, run in runs.items()}
    foot = [row(Cell("unattributed"), unattributed, False), row(Cell("wall time"), walls, False)]
    shown = tuple(cells for cells in foot if any(cell.text for cell in cells[1:]))
    return Table("phases", tuple(columns), tuple(rows), shown) if rows else None


def _timeline(run: Mapping[str, Any], colours: Mapping[str, int]) -> dict[str, Any]:
    """Spans as the script takes them, ``[name, phase, start, end, row]``, in the order of time.

    Each lane and depth has a row of its own. ``"main"`` and ``"beside"``: how many are of the main thread, which come
    first, and of the compilers; ``"end"``: when all is over.
    """
    found = []
    for span in _mappings(run.get("spans")):
        start, end = number(span.get("start_s")), number(span.get("end_s"))
        if start is None or end is None or end < start:
            continue
        place = _count(span.get("lane")), _count(span.get("depth"))
        found.append((start, place, end, _text(span.get("name")), _text(span.get("phase"))))
    places = sorted({place for _, place, *_ in found})
    phases = list(colours)
    main = sum(lane == 0 for lane, _ in places)
    return {
        "end": max([number(run.get("wall_s")) or 0, *(end for _, _, end, *_ in found)]),
        "main": main,
        "beside": len(places) - main,
        "spans": [
            [name, phases.index(phase), start, end, places.index(place)]
            for start, place, end, name, phase in sorted(found)
        ],
    }


def _nodes(events: Any, colours: Mapping[str, int]) -> tuple[Node, ...]:
    found = []
    for event in _mappings(events):
        children = _nodes(event.get("children"), colours)
        count = _count(event.get("count"), 1)
        remarks = [f"{count:,} times"] if count > 1 else []
        if children and number(event.get("self_s")):
            remarks.append(f"{seconds(event['self_s'])} of its own")
        colour = colours.get(_text(event.get("phase")))
        found.append(Node(_text(event.get("name")), colour, seconds(event.get("s")), ", ".join(remarks), children))
    return tuple(found)


def _section(name: str, run: Mapping[str, Any], colours: Mapping[str, int]) -> Section:
    wall = number(run.get("wall_s"))
    times = {phase: s for phase, s in _phase_times(run).items() if s > 0}
    legend = tuple(
        (colour, phase, seconds(times[phase]), share(times[phase] / wall) if wall else "")
        for phase, colour in colours.items()
        if phase in times
    )
    data = _timeline(run, colours)
    tracks = [("Main thread", data["main"]), ("Compilers beside it", data["beside"])]
    shown = tuple((title, rows) for title, rows in tracks if rows)
    return Section(name, seconds(wall), legend, _nodes(run.get("tree"), colours), shown, data)


def _events(runs: _Runs, key: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Items of a list that each run may have, each with the name of its run."""
    return [(name, item) for name, run in runs.items() for item in _mappings(run.get(key))]


def _run_tables(runs: _Runs) -> list[tuple[str, Table | None]]:
    """What interrupted the compile, what answered from a cache, and what was compiled, each with its heading."""
    # Whose row it is needs no column where there is one run.
    name_of = {name: Cell(name if len(runs) > 1 else "") for name in runs}
    breaks = [
        (
            name_of[name],
            Cell(_text(item.get("where")), style="name"),
            _number_cell(item.get("count")),
            Cell(_text(item.get("reason")), style="long"),
        )
        for name, item in _events(runs, "graph_breaks")
    ]
    recompiles = [
        (name_of[name], Cell(_text(item.get("where")), style="name"), Cell(_text(item.get("reason")), style="long"))
        for name, item in _events(runs, "recompiles")
    ]
    caches = [
        (
            name_of[name],
            Cell(_text(item.get("cache")), style="name"),
            *(_number_cell(item.get(key)) for key in ("hits", "misses", "bypasses", "disabled")),
            Cell(_text(item.get("reasons")), style="long"),
        )
        for name, item in _events(runs, "caches")
    ]
    kernels = [
        (name, kernel) for name, run in runs.items() for kernel in _mappings(_mapping(run.get("kernels")).get("built"))
    ]
    kernels.sort(key=lambda named: -(number(named[1].get("s")) or 0))
    longest = max((number(kernel.get("s")) or 0 for _, kernel in kernels), default=0) or 1
    compiled = [
        (
            name_of[name],
            Cell(_text(kernel.get("name")), style="name"),
            Cell(_text(kernel.get("compiler"))),
            _number_cell(kernel.get("s"), seconds(kernel.get("s")), bar=(number(kernel.get("s")) or 0) / longest),
            _number_cell(kernel.get("calls")),
        )
        for name, kernel in kernels
    ]
    run_, where, reason = ("run", False), ("where", False), ("reason", False)
    numbers = [(title, True) for title in ("hits", "misses", "bypasses", "disabled")]
    kernel_columns = [("kernel", False), ("compiler", False), ("time", True), ("calls", True)]
    return [
        ("Graph breaks", _table("breaks", [run_, where, ("count", True), reason], breaks)),
        ("Recompiles", _table("recompiles", [run_, where, reason], recompiles)),
        ("Caches", _table("caches", [run_, ("cache", False), *numbers, ("reasons", False)], caches)),
        ("Kernels by compile time", _table("kernels", [run_, *kernel_columns], compiled)),
    ]


def _run_facts(runs: _Runs) -> list[Fact]:
    facts = []
    walls = {name: number(run.get("wall_s")) for name, run in runs.items()}
    first = next(iter(walls.values()), None)
    for name, run in runs.items():
        wall, left = walls[name], number(run.get("unattributed_s"))
        if not wall:
            continue
        notes = [f"{three_digits(first / wall)} times as fast"] if first and wall != first else []
        notes += [f"{share(left / wall)} unattributed"] if left is not None else []
        facts.append(Fact(f"{name}, wall time", seconds(wall), ", ".join(notes)))
    for name, run in runs.items():
        kernels = _mapping(run.get("kernels"))
        if number(kernels.get("compiled")) is not None:
            notes = [
                f"{_count(kernels[key]):,} {key}" for key in ("deduplicated", "reused") if number(kernels.get(key))
            ]
            facts.append(Fact(f"kernels compiled, {name}", f"{_count(kernels['compiled']):,}", ", ".join(notes)))
    for key, label in (("peak_memory_bytes", "peak memory"), ("peak_gpu_memory_bytes", "peak memory, GPU")):
        peaks = [peak for run in runs.values() if (peak := number(run.get(key))) is not None]
        if peaks:
            facts.append(Fact(label, size(max(peaks))))
    return facts


def _by_run(counts: Mapping[str, int], what: str, runs: _Runs) -> str:
    """``"2 graph breaks"``; with more runs than one ``"2 graph breaks (cold), 1 (warm)"``."""
    first, *others = counts.items()
    if len(runs) == 1:
        return plural(first[1], what)
    return ", ".join([f"{plural(first[1], what)} ({first[0]})", *(f"{count:,} ({name})" for name, count in others)])


def _most_common(reasons: Iterable[str], most: int = 3) -> tuple[str, ...]:
    """The most frequent ones, each with how often it was there."""
    counts = Counter(reason for reason in reasons if reason)
    lines = [f"{count:,} × {reason}" if count > 1 else reason for reason, count in counts.most_common(most)]
    more = len(counts) - len(lines)
    return (*lines, f"and {plural(more, 'other reason')}") if more > 0 else tuple(lines)


def _run_notices(runs: _Runs) -> list[Notice]:
    found = []

    def warn(counts: Counter[str], what: str, section: str, reasons: Iterable[str]) -> None:
        if sum(counts.values()):
            found.append(Notice(_by_run(counts, what, runs), section, _most_common(reasons)))

    for key, what, section in (
        ("graph_breaks", "graph break", "breaks"),
        ("recompiles", "recompile", "recompiles"),
    ):
        counts = Counter[str]()
        for name, item in _events(runs, key):
            counts[name] += _count(item.get("count"), 1)
        warn(counts, what, section, dict.fromkeys(_text(item.get("reason")) for _, item in _events(runs, key)))
    bypasses, reasons = Counter[str](), []
    for name, item in _events(runs, "caches"):
        if _count(item.get("bypasses")):
            bypasses[name] += _count(item["bypasses"])
            reasons.append(f"{_text(item.get('cache'))}: {_text(item.get('reasons')) or 'no reason given'}")
    warn(bypasses, "cache bypass", "caches", dict.fromkeys(reasons))
    for name, run in runs.items():
        left, wall = number(run.get("unattributed_s")), number(run.get("wall_s"))
        if left is not None and wall and left / wall > _UNATTRIBUTED:
            found.append(Notice(f"{share(left / wall)} of the time of {name} is in no phase", "phases"))
    return found


# --- Linears

_LINEAR_COLUMNS: tuple[tuple[str, bool], ...] = (
    ("layer", False),
    ("scheme", False),
    ("N × K", True),
    ("tokens", True),
    ("provider", False),
    ("fused", False),
    ("prologue", False),
    ("producer", False),
    ("epilogue", False),
    ("time", True),
    ("of the ceiling", True),
    ("GB/s", True),
    ("GFLOP/s", True),
    ("bound by", False),
    ("calls", True),
    ("weight", True),
    ("activation", True),
    ("output", True),
    ("why not", False),
    ("rules", False),
    ("op", False),
    ("graph", True),
)


def _linear_cells(linear: Mapping[str, Any], has_graphs: bool) -> tuple[Cell, ...]:
    """The cells of one Linear, as ``_LINEAR_COLUMNS`` says; ``has_graphs``: there are several to tell apart."""
    sides = [_count(side) for side in _items(linear.get("shape"))]
    size_of, runtime = _mapping(linear.get("bytes")), _mapping(linear.get("runtime"))
    fused, graph = bool(linear.get("fused")), number(linear.get("graph"))
    us, ceiling = number(runtime.get("us")), number(runtime.get("of_ceiling"))
    return (
        Cell(_text(linear.get("name")) or "(unnamed)", style="name"),
        Cell(_text(linear.get("scheme"))),
        _number_cell(math.prod(sides) if sides else None, " × ".join(f"{side:,}" for side in sides)),
        _number_cell(linear.get("tokens")),
        Cell(_text(linear.get("provider")), style="" if fused else "bad"),
        Cell("fused" if fused else "not fused", style="good" if fused else "bad"),
        Cell(_text(linear.get("prologue"))),
        Cell(_text(linear.get("producer"))),
        Cell(" → ".join(map(_text, _items(linear.get("epilogue"))))),
        _number_cell(us, seconds(us * 1e-6) if us is not None else None),
        _number_cell(ceiling, share(ceiling)),
        _number_cell(runtime.get("gb_s"), plain(runtime.get("gb_s"))),
        _number_cell(runtime.get("gflop_s"), plain(runtime.get("gflop_s"))),
        Cell(_text(runtime.get("bound"))),
        _number_cell(runtime.get("calls")),
        *(_number_cell(size_of.get(key), size(size_of.get(key))) for key in ("weight", "activation", "output")),
        Cell(_text(linear.get("refusals")), style="long"),
        Cell(" + ".join(map(_text, _items(linear.get("rules"))))),
        # Reports of schema 1 name it, and say nothing of prologues and producers.
        Cell("" if "prologue" in linear else _text(linear.get("op"))),
        _number_cell(graph if has_graphs and graph is not None and graph >= 0 else None),
    )


def _linear_table(report: Mapping[str, Any]) -> Table | None:
    linears = _mappings(report.get("linears"))
    tags = tuple(
        {"provider": _text(linear.get("provider")), "fused": "fused" if linear.get("fused") else "not fused"}
        for linear in linears
    )
    has_graphs = len({number(linear.get("graph")) for linear in linears}) > 1
    rows = [_linear_cells(linear, has_graphs) for linear in linears]
    return _table("linears", _LINEAR_COLUMNS, rows, tags=tags)


def _left_table(report: Mapping[str, Any]) -> Table | None:
    rows = []
    for kind in _mappings(report.get("left")):
        layers = [_text(layer) for layer in _items(kind.get("layers"))]
        named = ", ".join(layers[:3]) + (f" and {len(layers) - 3:,} more" if len(layers) > 3 else "")
        reason = Cell(_text(kind.get("reason")), style="long")
        rows.append((_number_cell(kind.get("count")), reason, Cell(named, style="name long")))
    return _table("left", [("count", True), ("why it stays", False), ("layers", False)], rows)


def _rule_table(report: Mapping[str, Any]) -> Table | None:
    rows = [
        (Cell(str(name), style="name"), _number_cell(count))
        for name, count in _mapping(report.get("rules")).items()
        if count
    ]
    return _table("rules", [("rule", False), ("matches", True)], rows)


def _report_facts(report: Mapping[str, Any]) -> list[Fact]:
    linears = _mappings(report.get("linears"))
    fused = sum(bool(linear.get("fused")) for linear in linears)
    providers = Counter(_text(linear.get("provider")) or "unknown" for linear in linears)
    facts = [Fact("Linears fused", f"{fused:,} of {len(linears):,}", share(fused / len(linears)) if linears else "")]
    if providers:
        (most, count), *others = providers.most_common()
        note = ", ".join(f"{name} {n:,}" for name, n in others)
        facts.append(Fact("provider", f"{most} {count:,}" if others else most, note))
    return facts


def _report_notices(report: Mapping[str, Any]) -> list[Notice]:
    found = []
    linears = _mappings(report.get("linears"))
    not_fused = sum(not linear.get("fused") for linear in linears)
    refused = [linear for linear in linears if linear.get("refusals")]
    if refused or not_fused:
        reasons = [_text(linear["refusals"]) for linear in refused]
        text = f"{not_fused:,} of {plural(len(linears), 'Linear')} not fused, {len(refused):,} with a refusal"
        found.append(Notice(text, "linears", _most_common(reasons)))
    left = Counter[str]()
    for kind in _mappings(report.get("left")):
        left[_text(kind.get("reason"))] += _count(kind.get("count"), 1)
    if left:
        what = "cast or (de)quantize" if left.total() == 1 else "casts or (de)quantizes"
        found.append(Notice(f"{left.total():,} {what} left in the graphs", "left", _most_common(left.elements())))
    return found


def _machine(report: Mapping[str, Any]) -> str:
    """The ceilings that the rows are measured against, in one sentence."""
    machine = _mapping(report.get("machine"))
    parts = [_text(machine.get("cpu"))]
    if number(machine.get("threads")) is not None:
        parts.append(plural(_count(machine["threads"]), "thread"))
    ceilings = [
        f"{plain(machine.get(key))} {unit}"
        for key, unit in (("read_gb_s", "GB/s read"), ("gflop_s", "GFLOP/s"))
        if plain(machine.get(key))
    ]
    if ceilings:
        parts.append(f"ceilings: {' and '.join(ceilings)}")
    return ", ".join(part for part in parts if part)


@functools.cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))


def page(
    title: str,
    summary: str,
    *,
    report: Mapping[str, Any] | None = None,
    runs: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
    """One HTML document of a report, of compile runs, or of both.

    Args:
        title: its title.
        summary: what it says in a sentence or two.
        report: a report as JSON holds it.
        runs: compile runs by name, ``"cold"`` and ``"warm"`` for one; those of a report, if it has one and none is
            given.

    Returns:
        The document. It loads nothing.
    """
    report = _mapping(report)
    if runs is None:
        runs = {"compile": report["compile"]} if _mapping(report.get("compile")) else {}
    runs = {name: _mapping(run) for name, run in _mapping(runs).items()}
    colours = _colours(runs)
    sections = [_section(name, run, colours) for name, run in runs.items()]
    linears = _linear_table(report)
    providers = sorted({tags["provider"] for tags in linears.tags} - {""}) if linears is not None else []
    fine = ["Every quantized Linear is fused, and nothing is left in the graphs."] if report else []
    fine += ["No graph break, no recompile, no cache bypass."] if runs else []
    return _template().render(
        title=title,
        summary=summary,
        facts=[*(_report_facts(report) if report else []), *_run_facts(runs)],
        notices=[*_report_notices(report), *_run_notices(runs)],
        nothing=" ".join(fine),
        phases=_phase_table(runs, colours),
        runs=sections,
        tables=[*_run_tables(runs), ("Rules", _rule_table(report))],
        after=[("Left in the graphs", _left_table(report))],
        linears=linears,
        providers=providers,
        machine=_machine(report),
        version=__version__,
        data={
            "phases": list(colours),
            "colours": list(colours.values()),
            "runs": [section.data for section in sections],
        },
    )
