"""``quark-inductor bench``: GEMMs of quantized Linears on this CPU, and those of peers, interleaved in one run."""

import csv
import functools
import importlib.util
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from quark_inductor import __version__, machine
from quark_inductor.peers import OURS, PEERS
from quark_inductor.peers.base import Peer, Place
from quark_inductor.peers.host import SETTLE_SECONDS, Died, Host
from quark_inductor.schemes.errors import QuarkInductorError
from quark_inductor.schemes.spec import PRESETS

# The Linears of Llama 3 8B: attention, gate and up, down.
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
TOKENS = (1, 4, 16, 128, 512)
SECONDS = 0.5
QUICK_SCHEMES, QUICK_SHAPES, QUICK_TOKENS = ("mxfp4", "ptpc_fp8"), ((128, 256),), (1, 16)
QUICK_PEERS, QUICK_SECONDS = ("bf16-linear",), 0.02
RAW_READ = "raw-read"
BASELINE = "bf16-linear"
# Its compilation and its calls are slow; these say enough.
EMULATED_TOKENS = (1, 128, 512)
LEAST_SAMPLES = 5
# Load average from which a warning is due: of two threads one waits for whoever else runs.
BUSY = 0.5


@functools.cache
def cold_bytes() -> int:
    """So many bytes come from memory each time they are read: four times what all caches hold."""
    return max(160_000_000, 4 * machine.last_level_cache())


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What to measure.

    Attributes:
        schemes: names of this package's schemes.
        shapes: pairs (N, K).
        tokens: numbers of tokens M.
        threads: numbers of threads.
        peers: names of :data:`quark_inductor.peers.PEERS`.
        all_emulated: the emulation too everywhere, not only for :data:`EMULATED_TOKENS` of the first shape.
        seconds: of a row; at least :data:`LEAST_SAMPLES` samples are taken.
        cold_bytes: with few tokens a call goes through so many bytes of weights.
    """

    schemes: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]
    threads: tuple[int, ...]
    peers: tuple[str, ...]
    all_emulated: bool
    seconds: float
    cold_bytes: int


def settings(
    *,
    quick: bool,
    schemes: Sequence[str] | None,
    shapes: Sequence[tuple[int, int]] | None,
    tokens: Sequence[int] | None,
    threads: Sequence[int] | None,
    peers: Sequence[str] | None,
    seconds: float | None,
) -> Settings:
    """What was asked for, and defaults for the rest: everything, or with ``quick`` next to nothing."""
    return Settings(
        schemes=tuple(schemes or (QUICK_SCHEMES if quick else PRESETS)),
        shapes=tuple(shapes or (QUICK_SHAPES if quick else SHAPES)),
        tokens=tuple(sorted(set(tokens or (QUICK_TOKENS if quick else TOKENS)))),
        threads=tuple(sorted(set(threads or ((1,) if quick else (1, machine.cores()))))),
        peers=tuple((QUICK_PEERS if quick else PEERS) if peers is None else peers),
        all_emulated=peers is not None,
        seconds=seconds or (QUICK_SECONDS if quick else SECONDS),
        cold_bytes=0 if quick else cold_bytes(),
    )


@dataclass(kw_only=True, slots=True)
class Row:
    """One candidate at one place: a line of the CSV file. Times are of one Linear.

    Attributes:
        threads: that it may use.
        n: output features.
        k: input features.
        m: tokens.
        name: ``"quark"``, ``"raw-read"`` or a peer's name.
        scheme: the scheme; ``""``: the candidate has none.
        provider: who computes; ``"emulation"``: no kernel takes this problem, or none was allowed.
        linears: products in a call.
        weights: of how many weights they are.
        weight_bytes: of one weight, scales included.
        huge_pages: how much of the memory around them is in huge pages, from 0 to 1, where that was asked.
        from_memory: whether those of a call are more than caches hold.
        samples: calls that were timed.
        median_ms: of the samples.
        q1_ms: a quarter is faster.
        q3_ms: a quarter is slower.
        gb_per_s: weight bytes over the median.
        gop_per_s: ``2 M N K`` over the median.
        raw_read_fraction: time of reading the same weights over this time.
        speedup_over_bf16: time of ``F.linear`` in bfloat16 over this time.
    """

    threads: int
    n: int
    k: int
    m: int
    name: str
    scheme: str
    provider: str
    linears: int
    weights: int
    weight_bytes: int
    huge_pages: float | None
    from_memory: bool
    samples: int = 0
    median_ms: float = math.nan
    q1_ms: float = math.nan
    q3_ms: float = math.nan
    gb_per_s: float = math.nan
    gop_per_s: float | None = None
    raw_read_fraction: float | None = None
    speedup_over_bf16: float | None = None

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.name} {self.scheme}".strip()


@dataclass(frozen=True, kw_only=True, slots=True)
class Missing:
    """A peer that was asked for and is not in some or all rows.

    Attributes:
        peer: its name, with the scheme if it has one.
        where: at which threads, shape and tokens; ``""``: everywhere.
        reason: why.
        get: how to get it; ``""``: that would not help.
    """

    peer: str
    where: str
    reason: str
    get: str


@dataclass(kw_only=True, slots=True)
class Result:
    """All of a run."""

    settings: Settings
    machine: dict[str, Any]
    versions: dict[str, str]
    started: str
    rows: list[Row] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)

    def write_csv(self, path: Path) -> None:
        """A line a row."""
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Row)])
            writer.writeheader()
            writer.writerows(
                {key: f"{v:.6g}" if isinstance(v, float) else v for key, v in asdict(row).items()} for row in self.rows
            )

    def write_json(self, path: Path) -> None:
        """Rows, what is missing, settings and machine."""
        path.write_text(
            json.dumps({"schema": 1, "kind": "benchmark", **asdict(self)}, indent=1) + "\n", encoding="utf-8"
        )


class _Candidate:
    """One row in the making, and that of the raw read beside it."""

    def __init__(self, host: Host, peer: type[Peer], scheme: str) -> None:
        self.host, self.peer, self.scheme = host, peer, scheme
        self.times: dict[str, list[float]] = {}

    @property
    def label(self) -> str:
        return f"{self.peer.name} {self.scheme}".strip()

    def prepare(self, m: int) -> None:
        """Make the call for ``m`` tokens."""
        self.m = m
        answer = self.host.ask("prepare", self.scheme, m)
        self.linears, self.weights, self.weight_bytes, self.provider, self.huge_pages, reads = answer
        self.times = {"read": [], "turn": []} if reads else {"turn": []}

    def turn(self) -> None:
        """Take some samples."""
        for question, times in self.times.items():
            time.sleep(SETTLE_SECONDS)
            times += self.host.ask(question, self.scheme)

    def has_enough(self, seconds: float) -> bool:
        """Whether that was long enough."""
        mine = self.times["turn"]
        return len(mine) >= LEAST_SAMPLES and sum(mine) * self.linears >= seconds * 1e3

    def rows(self) -> list[Row]:
        """Of all samples."""
        place, made = self.host.place, []
        medians = {question: statistics.median(times) for question, times in self.times.items()}
        for question, times in self.times.items():
            q1, median, q3 = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
            reading = question == "read"
            row = Row(
                threads=place.threads,
                n=place.n,
                k=place.k,
                m=self.m,
                name=RAW_READ if reading else self.peer.name,
                scheme=self.scheme,
                provider="" if reading else self.provider,
                linears=self.linears,
                weights=self.weights,
                weight_bytes=self.weight_bytes,
                huge_pages=self.huge_pages,
                from_memory=self.weights * self.weight_bytes >= cold_bytes(),
                samples=len(times),
                median_ms=median,
                q1_ms=q1,
                q3_ms=q3,
                gb_per_s=self.weight_bytes / median / 1e6,
            )
            if not reading:
                row.gop_per_s = 2 * self.m * place.n * place.k / median / 1e6
                if "read" in medians:
                    row.raw_read_fraction = medians["read"] / median
            made.append(row)
        return made


def measure(settings: Settings, say: Callable[[str], None], done: Callable[[Result], None]) -> Result:
    """Measure everything.

    Args:
        settings: what.
        say: told what happens, a line each time.
        done: given the result so far after each group of rows.

    Raises:
        QuarkInductorError: the process of this package's own kernels crashed.
    """
    used = [PEERS[name] for name in settings.peers]
    reasons = {peer: peer.missing() for peer in used}
    there = [peer for peer in used if reasons[peer] is None]
    result = Result(
        settings=settings,
        machine=machine.facts(),
        versions={"quark-inductor": __version__, **{peer.package: peer.version() for peer in there if peer.package}},
        started=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    if (load := result.machine["load_average"]) > BUSY:
        say(f"something else is running (load average {load}): the numbers will say so")
    for peer, reason in reasons.items():
        if reason is not None:
            result.missing.append(Missing(peer=peer.name, where="", reason=reason, get=peer.get))
            say(f"{peer.name} is missing: {reason}; to get it: {peer.get}")
    for threads in settings.threads:
        for n, k in settings.shapes:
            place = Place(n=n, k=k, threads=threads, cold_bytes=settings.cold_bytes)
            _measure_place(place, [OURS, *there], settings, result, say, done)
    return result


def _measure_place(
    place: Place,
    peers: Sequence[type[Peer]],
    settings: Settings,
    result: Result,
    say: Callable[[str], None],
    done: Callable[[Result], None],
) -> None:
    first = (place.n, place.k) == settings.shapes[0]
    emulated = [m for m in settings.tokens if settings.all_emulated or (first and m in EMULATED_TOKENS)]
    hosts = {peer: Host(peer.name, place) for peer in peers if peer.name != "emulation" or emulated}
    try:
        candidates = [
            _Candidate(host, peer, scheme)
            for peer, host in hosts.items()
            for scheme in (settings.schemes if peer.per_scheme else ("",))
        ]
        for m in settings.tokens:
            where = f"{place.threads} threads, {place.n}x{place.k}, M={m}"
            ready = []
            for candidate in candidates:
                if candidate.peer.name == "emulation" and m not in emulated:
                    continue
                start = time.perf_counter()
                if _tried(candidate, functools.partial(candidate.prepare, m), where, result, say):
                    say(f"{where}: {candidate.label} is ready after {time.perf_counter() - start:.1f} s")
                    ready.append(candidate)
            rows = _interleaved(ready, settings.seconds, where, result, say)
            baseline = next((row.median_ms for row in rows if row.name == BASELINE), None)
            for row in rows:
                if baseline is not None and row.name != RAW_READ:
                    row.speedup_over_bf16 = baseline / row.median_ms
                say(f"{where}: {_sentence(row)}")
            result.rows += rows
            done(result)
    finally:
        for host in hosts.values():
            host.hang_up()
        for host in hosts.values():
            host.close()


def _tried(
    candidate: _Candidate, do: Callable[[], Any], where: str, result: Result, say: Callable[[str], None]
) -> bool:
    """Whether it worked; where a peer does not, that is written down and the rest goes on."""
    try:
        do()
    except QuarkInductorError as e:
        if candidate.peer is OURS and isinstance(e, Died):
            raise QuarkInductorError(f"{where}: {candidate.label}: {e}") from e
        result.missing.append(Missing(peer=candidate.label, where=where, reason=str(e), get=""))
        say(f"{where}: {candidate.label} is missing: {e}")
        return False
    return True


def _interleaved(
    ready: list[_Candidate], seconds: float, where: str, result: Result, say: Callable[[str], None]
) -> list[Row]:
    """Turns in rounds until each candidate has had its seconds: what disturbs the machine disturbs all."""
    waiting = list(ready)
    failed = set()
    while waiting:
        for candidate in list(waiting):
            if not _tried(candidate, candidate.turn, where, result, say):
                waiting.remove(candidate)
                failed.add(candidate)
            elif candidate.has_enough(seconds):
                waiting.remove(candidate)
    return [row for candidate in ready if candidate not in failed for row in candidate.rows()]


def _sentence(row: Row) -> str:
    parts = [f"{row.label}: {row.median_ms:.4g} ms ({row.q1_ms:.4g} to {row.q3_ms:.4g})", f"{row.gb_per_s:.3g} GB/s"]
    if row.gop_per_s is not None:
        parts.append(f"{row.gop_per_s:.4g} GOP/s")
    if row.raw_read_fraction is not None:
        parts.append(f"{row.raw_read_fraction:.0%} of raw read")
    return ", ".join(parts)


def _table(rows: list[Row]) -> Any:
    """Milliseconds of all candidates at one place."""
    from rich.table import Table

    tokens = sorted({row.m for row in rows})
    table = Table(title=f"{rows[0].threads} threads, N = {rows[0].n}, K = {rows[0].k}: ms a Linear")
    table.add_column("")
    for m in tokens:
        table.add_column(f"M = {m}", justify="right")
    by_label: dict[str, dict[int, Row]] = {}
    for row in rows:
        by_label.setdefault(row.label, {})[row.m] = row
    for label, cells in by_label.items():
        table.add_row(label, *(f"{cells[m].median_ms:.3f}" if m in cells else "-" for m in tokens))
    return table


def run(settings: Settings, csv_path: Path | None, json_path: Path | None, plot_path: Path | None) -> int:
    """Measure, print tables, write files; returns the exit code: 1 if something of ours could not be measured."""
    from rich.console import Console

    if plot_path is not None and importlib.util.find_spec("matplotlib") is None:
        raise QuarkInductorError("the plot needs matplotlib: pip install 'quark-inductor[bench]'")
    out, err = Console(), Console(stderr=True)
    start = time.perf_counter()

    def say(line: str) -> None:
        seconds = f"{time.perf_counter() - start:6.1f} s"
        err.print(f"{seconds}  {line}", highlight=False, markup=False, soft_wrap=True)

    def write(result: Result) -> None:
        # After each group: a run takes hours.
        if csv_path is not None:
            result.write_csv(csv_path)
        if json_path is not None:
            result.write_json(json_path)

    result = measure(settings, say, write)
    write(result)
    for threads in settings.threads:
        for shape in settings.shapes:
            if rows := [r for r in result.rows if r.threads == threads and (r.n, r.k) == shape]:
                out.print(_table(rows))
    for one in result.missing:
        get = f"; to get it: {one.get}" if one.get else ""
        place = f" ({one.where})" if one.where else ""
        out.print(f"missing: {one.peer}{place}: {one.reason}{get}", highlight=False, markup=False, soft_wrap=True)
    if plot_path is not None:
        from quark_inductor.bench_plot import plot

        plot(result, plot_path)
    return int(any(one.peer.split()[0] == OURS.name for one in result.missing))
