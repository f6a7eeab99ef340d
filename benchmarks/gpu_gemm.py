"""Quantized Linears on a GPU, beside bfloat16, PyTorch's FP8 GEMM and the compiled emulation, in one run.

    python benchmarks/gpu_gemm.py [--scheme NAME ...] [--shape NxK ...] [--tokens M ...] [--minutes 8] [--resume]
    python benchmarks/gpu_gemm.py --dry-run [--chip H200]

Rows that come first in these lists are measured first. After each the CSV and the Markdown file are written, and
``--resume`` goes on with them. Times are medians of replays of a CUDA graph, which leaves out what a call costs the
host, over weights that no cache holds together, of one Linear; quantizing its activation is part of it.
"""

import argparse
import copy
import csv
import functools
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import quark_inductor as qi
from quark_inductor.lowering import scaled_mm
from quark_inductor.lowering.target import current
from quark_inductor.lowering.triton import tiles
from quark_inductor.patterns._inductor import graphs_not_cached
from quark_inductor.patterns.pipeline import collect_results
from quark_inductor.schemes import registry  # noqa: F401
from quark_inductor.schemes.base import QuarkLinear, scheme_for
from quark_inductor.schemes.ops import dtype_of
from quark_inductor.schemes.spec import PRESETS

HERE = Path(__file__).parent
# In order of importance, as a run that is out of time has the first ones.
SCHEMES = ("mxfp4", "ptpc_fp8", "nvfp4", "fp8", "ptpc_int8", "mxfp4_weight_only", "fp8_block128", "mxfp4_fp8", "mxfp8")
SCHEMES += ("int4_wo_128",)
TOKENS = (1, 4096, 16, 256)
ALL_TOKENS = (*TOKENS, 64, 1024, 8)
# Gate and up of Llama 3 8B. Then all of its Linears, q, k and v as one, and those of 70B.
SHAPES = ((28672, 4096),)
ALL_SHAPES = (
    *SHAPES,
    (8192, 8192),
    (4096, 14336),
    (57344, 8192),
    (6144, 4096),
    (8192, 28672),
    (10240, 8192),
    (4096, 4096),
)
# Four times the largest last-level cache, which is that of MI300X.
COLD_BYTES = 1 << 30
# With more the weights are read in a small part of the time.
FEW_TOKENS = 64
MOST_COPIES = 64
# A kernel that quantizes its activation is measured up to here, where it is not what the provider chooses.
PROLOGUE_TOKENS = 256
# Of a product of random numbers; 4 bits on both sides cost 0.16.
TOLERANCE = 0.3
REPLAY_MS = 60
# The exit code where the GPU cannot be used by this process any more: --resume goes on behind the row that did it.
LOST = 86
BASELINES = ("bf16-eager", "bf16-inductor")


class LostError(Exception):
    """A kernel failed so that no other runs in this process."""


@dataclass(frozen=True)
class Chip:
    """What a data sheet says: bytes a second, and 10^12 operations a second, dense, by bits of the operands."""

    bytes_per_s: float
    tflops: Mapping[int, float]


# By a pattern of the name that torch gives: not of a variant with other numbers, such as H200 NVL or GB200.
CHIPS = {
    r"\bH200(?! NVL)\b": Chip(4.8e12, {16: 989, 8: 1979}),
    r"\bMI300X\b": Chip(5.3e12, {16: 1307, 8: 2615}),
    r"\bMI355X\b": Chip(8e12, {16: 2500, 8: 5000, 4: 10000}),
    r"\bB200\b": Chip(8e12, {16: 2250, 8: 4500, 4: 9000}),
}


def chip_of(name: str) -> Chip | None:
    """The chip of this name, if its numbers are known."""
    return next((chip for pattern, chip in CHIPS.items() if re.search(pattern, name)), None)


@dataclass(frozen=True)
class Cell:
    """A Linear ``[N, K]`` of a scheme, and a number of tokens."""

    scheme: str
    n: int
    k: int
    m: int

    def __str__(self) -> str:
        return f"{self.scheme} {self.n}x{self.k} M={self.m}"


@dataclass(kw_only=True)
class Row:
    """One measurement, or the reason why there is none.

    Attributes:
        scheme: what was asked for: a line without it is for all schemes.
        n: output features.
        k: input features.
        m: tokens.
        name: who computes.
        provider: of this package's, who made the kernel.
        op: of this package's, the fused op: ``prologue_gemm`` quantizes the activation itself.
        copies: Linears a graph.
        weight_bytes: of one, scales included.
        us: microseconds of one, the median.
        q1_us: a quarter is faster.
        q3_us: a quarter is slower.
        floor_us: what the chip needs at least to move the bytes and to multiply; NaN: unknown.
        speedup: time of the faster bfloat16 over this one.
        error: why it was not measured.
    """

    scheme: str
    n: int
    k: int
    m: int
    name: str
    provider: str = ""
    op: str = ""
    copies: int = 0
    weight_bytes: int = 0
    us: float = math.nan
    q1_us: float = math.nan
    q3_us: float = math.nan
    floor_us: float = math.nan
    speedup: float = math.nan
    error: str = ""

    @property
    def cell(self) -> tuple[str, int, int, int]:
        """Where it belongs."""
        return self.scheme, self.n, self.k, self.m


def plan(schemes: Sequence[str], shapes: Sequence[tuple[int, int]], tokens: Sequence[int]) -> list[Cell]:
    """All combinations, those first that are near the beginning of their lists."""
    ranked = [
        (i + j + 2 * h, Cell(scheme, n, k, m))
        for i, scheme in enumerate(schemes)
        for h, (n, k) in enumerate(shapes)
        for j, m in enumerate(tokens)
    ]
    return [cell for _, cell in sorted(ranked, key=lambda pair: pair[0])]


def weight_bytes(scheme: str, n: int, k: int) -> int:
    """Codes, scales and zero points of a weight; ``""``: bfloat16."""
    if not scheme:
        return 2 * n * k
    linear = QuarkLinear(k, n, scheme_for(PRESETS[scheme]), bias=False, dtype=torch.bfloat16, device="meta")
    return sum(getattr(linear, name).nbytes for name in linear.weight_names())


def operand_bits(scheme: str) -> int:
    """Bits of what is multiplied at best: 4 if both operands are FP4, 16 if one is not quantized."""
    spec = PRESETS.get(scheme)
    if spec is None or spec.input is None or spec.weight is None:
        return 16
    return 4 if spec.input.dtype == spec.weight.dtype == "fp4" else 8


def floor_us(chip: Chip | None, bits: int, size: int, n: int, k: int, m: int) -> float:
    """Microseconds in which a chip reads weight and activation (bfloat16) and writes the result, and multiplies.

    Where it has no instructions for operands of so few bits, it is that of the next wider ones.
    """
    if chip is None:
        return math.nan
    moves = (size + 2 * m * (n + k)) / chip.bytes_per_s
    peak = next(tflops for wide, tflops in sorted(chip.tflops.items()) if wide >= bits)
    return 1e6 * max(moves, 2 * m * n * k / (peak * 1e12))


# --- what is measured

# The i-th product.
Call = Callable[[int], Tensor]
Timer = Callable[[Callable[[], None]], tuple[float, float, float]]


def replayed(calls: Callable[[], None]) -> tuple[float, float, float]:
    """First quartile, median and third one of the milliseconds of a CUDA graph."""
    import triton

    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    q1, median, q3 = triton.testing.do_bench(graph.replay, rep=REPLAY_MS, quantiles=[0.25, 0.5, 0.75])
    return q1, median, q3


class Bench:
    """Makes and measures candidates on one device.

    Args:
        device: where.
        chip: what it can, if that is known.
        timer: measures.
        cold_bytes: a call goes through so many bytes of weights.
    """

    def __init__(self, device: str, chip: Chip | None, timer: Timer = replayed, cold_bytes: int = COLD_BYTES) -> None:
        self.device, self.chip, self.timer, self.cold_bytes = device, chip, timer, cold_bytes
        self.done: dict[tuple[str, int, int, int], list[Row]] = {}

    @functools.lru_cache(maxsize=1)  # noqa: B019 - one object a process
    def weight(self, n: int, k: int) -> Tensor:
        """bfloat16 ``[N, K]`` of the size real ones have."""
        generator = torch.Generator(self.device).manual_seed(0)
        return torch.randn(n, k, generator=generator, device=self.device, dtype=torch.bfloat16) / math.sqrt(k)

    @functools.lru_cache(maxsize=1)  # noqa: B019
    def linear(self, scheme: str, n: int, k: int) -> QuarkLinear:
        """That weight, quantized."""
        linear = nn.Linear(k, n, bias=False, device="meta")
        linear.weight = nn.Parameter(self.weight(n, k).clone(), requires_grad=False)
        quantized = qi.quantize_(nn.Sequential(linear), scheme, exclude=(), calibration=[self.activation(64, k)])
        return quantized[0]  # type: ignore[index, no-any-return]

    def activation(self, m: int, k: int, seed: int = 1) -> Tensor:
        """bfloat16 ``[M, K]``."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(m, k, generator=generator, device=self.device, dtype=torch.bfloat16)

    def rows(self, cell: Cell) -> list[Row]:
        """All candidates of a cell; those without a scheme once for each shape and number of tokens.

        Raises:
            LostError: with all rows up to the one that did it in :attr:`done`.
        """
        everywhere = Cell("", cell.n, cell.k, cell.m)
        for key in (everywhere, cell):
            where = key.scheme, key.n, key.k, key.m
            if where not in self.done:
                self.done[where] = []
                for row in self.floats(key) if not key.scheme else self.quantized(key):
                    self.done[where].append(row)
        return self.done[cell.scheme, cell.n, cell.k, cell.m]

    def floats(self, cell: Cell) -> Iterable[Row]:
        """bfloat16, and FP8 as PyTorch has it: a scale a token and a channel, computed; and a given one a tensor."""

        def bf16(compiled: bool) -> Callable[[int], Call]:
            def make(copies: int) -> Call:
                weights = [self.weight(cell.n, cell.k).roll(i, 0) for i in range(copies)]
                run = torch.compile(F.linear, dynamic=False) if compiled else F.linear
                return lambda i: run(self.inputs[i], weights[i])

            return make

        yield self.measured(cell, "bf16-eager", bf16(False))
        yield self.measured(cell, "bf16-inductor", bf16(True))
        format = scaled_mm.FORMATS.get(current(self.device).arch, "fp8_e4m3" if self.device == "cpu" else "")
        if not format:
            return
        dtype = dtype_of({"fp8_e4m3": "float8_e4m3fn", "fp8_e4m3fnuz": "float8_e4m3fnuz"}[format])
        yield self.measured(
            cell, "scaled_mm-row", functools.partial(self.scaled, cell, dtype, True), size=cell.n * cell.k
        )
        yield self.measured(
            cell, "scaled_mm-tensor", functools.partial(self.scaled, cell, dtype, False), size=cell.n * cell.k
        )

    def scaled(self, cell: Cell, dtype: torch.dtype, row_wise: bool, copies: int) -> Call:
        """``torch._scaled_mm`` behind a quantize that stock Inductor compiles; sums in few bits if that is faster."""
        largest = torch.finfo(dtype).max
        weight = self.weight(cell.n, cell.k).float()
        amax = weight.abs().amax(1, keepdim=True) if row_wise else weight.abs().amax()
        codes = [(weight / (amax / largest)).clamp(-largest, largest).to(dtype).roll(i, 0) for i in range(copies)]
        scale = (amax / largest).t().contiguous() if row_wise else amax / largest
        given = self.inputs[0].abs().amax().float() / largest

        def product(x: Tensor, codes: Tensor, scale: Tensor, given: Tensor) -> Tensor:
            x_scale = x.abs().amax(-1, keepdim=True).float() / largest if row_wise else given
            x_codes = (x.float() / x_scale).clamp(-largest, largest).to(dtype)
            return torch._scaled_mm(
                x_codes, codes.t(), scale_a=x_scale, scale_b=scale, out_dtype=x.dtype, use_fast_accum=True
            )

        compiled = torch.compile(product, dynamic=False)
        # Channels are rolled with the codes, their scales are not: only the first product is checked.
        return lambda i: compiled(self.inputs[i], codes[i], scale, given)

    def quantized(self, cell: Cell) -> Iterable[Row]:
        """This package's kernel, the other way to quantize the activation, and the emulation compiled as it is."""
        own = functools.partial(self.measured, cell, size=weight_bytes(cell.scheme, cell.n, cell.k))
        chosen = own("quark", functools.partial(self.compiled, cell, backend="quark"))
        yield chosen
        if chosen.provider not in ("", "triton", "emulation"):
            options = {"quark.provider": "triton"}
            yield own("quark-triton", functools.partial(self.compiled, cell, backend="quark", options=options))
        if chosen.op == "prologue_gemm":
            yield own("quark-producer", functools.partial(self.compiled, cell, backend="quark"), prologue_tokens=0)
        elif chosen.op == "quantized_gemm" and cell.m <= PROLOGUE_TOKENS:
            made = functools.partial(self.compiled, cell, backend="quark")
            yield own("quark-prologue", made, prologue_tokens=cell.m)
        yield own("emulation", functools.partial(self.compiled, cell, backend="inductor"))

    def compiled(self, cell: Cell, copies: int, **how: Any) -> Call:
        """Linears with weights of their own; all run the code that is compiled for the first."""
        first = self.linear(cell.scheme, cell.n, cell.k)
        linears = [first, *(copy.deepcopy(first) for _ in range(copies - 1))]
        run = torch.compile(lambda linear, x: linear(x), fullgraph=True, dynamic=False, **how)
        return lambda i: run(linears[i], self.inputs[i])

    def measured(
        self,
        cell: Cell,
        name: str,
        make: Callable[[int], Call],
        size: int = 0,
        prologue_tokens: int | None = None,
    ) -> Row:
        """Compile a candidate, check what it computes, and measure it.

        Args:
            cell: what.
            name: who.
            make: the call, for a number of copies.
            size: bytes of its weight; 0: bfloat16.
            prologue_tokens: up to how many tokens the activation is quantized in the GEMM, instead of the provider's.
        """
        size = size or 2 * cell.n * cell.k
        wanted = math.ceil(self.cold_bytes / size) if cell.m <= FEW_TOKENS else 2
        copies = min(max(wanted, 2), MOST_COPIES)
        row = Row(**asdict(cell), name=name, copies=copies, weight_bytes=size)
        bits = 8 if name.startswith("scaled_mm") else operand_bits(cell.scheme)
        row.floor_us = floor_us(self.chip, bits, size, cell.n, cell.k, cell.m)
        try:
            torch._dynamo.reset()
            self.inputs = [self.activation(cell.m, cell.k, seed=i + 1) for i in range(copies)]
            with torch.no_grad(), ExitStack() as stack:
                stack.enter_context(graphs_not_cached())
                if prologue_tokens is not None:
                    stack.enter_context(patch.object(tiles, "prologue_tokens", lambda problem: prologue_tokens))
                found = stack.enter_context(collect_results())
                call = make(copies)
                self.check(call(0), cell)
                for linear in (linear for result in found for linear in result.linears):
                    row.provider = linear.provider
                    row.op = linear.problem.op if linear.problem is not None and linear.fused else ""
                with torch.compiler.set_stance("fail_on_recompile"):
                    _all(call, copies)
                    times = self.timer(functools.partial(_all, call, copies))
            row.q1_us, row.us, row.q3_us = (ms * 1e3 / copies for ms in times)
        except Exception as e:
            row.error = f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}"[:200]
        finally:
            self.inputs = []
        if row.error and self.device == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError as e:
                self.done.setdefault(row.cell, []).append(row)
                raise LostError(f"{cell} {name}: {row.error}") from e
        return row

    def check(self, y: Tensor, cell: Cell) -> None:
        """That it is the product, but for the quantization of both operands: a few rows.

        Raises:
            ValueError: it is something else, whose speed says nothing.
        """
        expected = self.inputs[0][:4].float() @ self.weight(cell.n, cell.k).float().T
        error = float((y[:4].float() - expected).norm() / expected.norm())
        if not error < TOLERANCE:
            raise ValueError(f"what it computes is off by {error:.0%} of the product")


def _all(call: Call, copies: int) -> None:
    for i in range(copies):
        call(i)


# --- results


def with_speedups(rows: Sequence[Row]) -> list[Row]:
    """Each with its speedup over the faster bfloat16 of its shape and tokens."""
    best: dict[tuple[int, int, int], float] = {}
    for row in rows:
        if row.name in BASELINES and row.us == row.us:
            best[row.cell[1:]] = min(row.us, best.get(row.cell[1:], math.inf))
    for row in rows:
        row.speedup = best.get(row.cell[1:], math.nan) / row.us
    return list(rows)


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """A line a row."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)])
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{v:.6g}" if isinstance(v, float) else v for key, v in asdict(row).items()})


def read_csv(path: Path) -> list[Row]:
    """What :func:`write_csv` wrote."""
    kinds = {f.name: f.type for f in fields(Row)}
    with path.open(newline="", encoding="utf-8") as file:
        return [Row(**{key: kinds[key](value) for key, value in line.items()}) for line in csv.DictReader(file)]


def tables(rows: Sequence[Row]) -> str:
    """A Markdown table a shape: microseconds, in brackets the speedup over bfloat16 and the share of the floor."""
    parts = []
    for n, k in dict.fromkeys((row.n, row.k) for row in rows):
        here = [row for row in rows if (row.n, row.k) == (n, k)]
        columns = sorted({row.m for row in here})
        lines = [f"N = {n}, K = {k}:", "", "| | " + " | ".join(f"M = {m}" for m in columns) + " |"]
        lines.append("|---|" + "---|" * len(columns))
        for label in dict.fromkeys((row.scheme, row.name) for row in here):
            found = {row.m: row for row in here if (row.scheme, row.name) == label}
            texts = (_text(found[m]) if m in found else "" for m in columns)
            lines.append(f"| {' '.join(reversed(label)).strip()} | " + " | ".join(texts) + " |")
        parts.append("\n".join(lines))
    failed = [f"- {row.name} {row.scheme} {row.n}x{row.k} M={row.m}: {row.error}" for row in rows if row.error]
    return "\n\n".join([*parts, *(["Not measured:\n\n" + "\n".join(failed)] if failed else [])])


def _text(row: Row) -> str:
    if row.error:
        return "failed"
    notes = [f"{row.speedup:.2f}x"] if row.speedup == row.speedup and row.name not in BASELINES else []
    notes += [f"{row.floor_us / row.us:.0%}"] if row.floor_us == row.floor_us else []
    kernel = f" {row.provider}" if row.provider not in ("", "triton") else ""
    return f"{row.us:.1f}{kernel}" + (f" ({', '.join(notes)})" if notes else "")


def page(rows: Sequence[Row], facts: Mapping[str, str], command: str, left: Sequence[Cell]) -> str:
    """The Markdown file."""
    what = ", ".join(f"{name} {value}" for name, value in facts.items())
    rest = f"\n\nOut of time: {len(left)} rows are left, first {left[0]}. `--resume` goes on." if left else ""
    return f"""# Quantized Linears on GPU

Microseconds of one Linear, medians of CUDA graphs over weights that no cache holds; quantizing the activation is part
of it. In brackets: how many times faster than the faster one of bfloat16 `F.linear`, eager and compiled, and the share
of the floor: the time in which the chip, by its data sheet, moves the bytes and multiplies. `quark` is what the package
chooses, `quark-prologue` and `quark-producer` quantize the activation in the GEMM and before it, `quark-triton` is the
package's own kernel where it chooses another provider's, `emulation` the same module compiled by stock Inductor,
`scaled_mm` PyTorch's FP8 GEMM behind a quantize by Inductor (a computed scale a token, a given one a tensor).

{what}: `{command}`{rest}

{tables(rows)}
"""


def run(
    cells: Sequence[Cell],
    bench: Bench,
    deadline: float,
    done: Callable[[list[Row], list[Cell]], None],
    clock: Callable[[], float] = time.monotonic,
) -> list[Cell]:
    """Measure until it is done, or the time is over: no cell is begun that would take longer than is left.

    Args:
        cells: what, the most important first.
        bench: with the rows that are there already.
        deadline: when the time is over, by ``clock``.
        done: told all rows so far, and the cells that are left, after each.
        clock: seconds.

    Returns:
        The cells that are left.
    """
    slowest, left = 0.0, [cell for cell in cells if (cell.scheme, cell.n, cell.k, cell.m) not in bench.done]
    while left:
        start = clock()
        if start + slowest > deadline:
            break
        cell = left.pop(0)
        try:
            bench.rows(cell)
        finally:
            done(with_speedups([row for rows in bench.done.values() for row in rows]), left)
        slowest = max(slowest, clock() - start)
    return left


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what was asked for; returns the exit code."""
    parser = argparse.ArgumentParser(description="Quantized Linears on a GPU, against bfloat16 and PyTorch's FP8.")
    parser.add_argument("--scheme", nargs="+", choices=list(PRESETS), default=SCHEMES)
    parser.add_argument(
        "--shape", nargs="+", default=[f"{n}x{k}" for n, k in SHAPES], help="N x K; all: of Llama 3 too"
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, help=f"all that are meant: {ALL_TOKENS}")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--csv", type=Path, default=HERE / "gpu_gemm.csv")
    parser.add_argument("--markdown", type=Path, default=HERE / "gpu_gemm.md")
    parser.add_argument("--resume", action="store_true", help="keep the rows of the CSV file, and measure the others")
    parser.add_argument("--dry-run", action="store_true", help="say what would be measured, with floors; needs no GPU")
    parser.add_argument("--chip", default="", help="of which --dry-run says the floors, H200 for instance")
    asked = parser.parse_args(arguments)
    end = time.monotonic() + 60 * asked.minutes
    shapes = ALL_SHAPES if asked.shape == ["all"] else [tuple(map(int, shape.split("x"))) for shape in asked.shape]
    cells = plan(asked.scheme, shapes, asked.tokens)
    if asked.dry_run:
        for cell in cells:
            size = weight_bytes(cell.scheme, cell.n, cell.k)
            floor = floor_us(chip_of(asked.chip), operand_bits(cell.scheme), size, cell.n, cell.k, cell.m)
            print(
                f"{cell}: {size / 1e6:.1f} MB, at least {floor:.1f} us"
                if floor == floor
                else f"{cell}: {size / 1e6:.1f} MB"
            )
        return 0
    if not torch.cuda.is_available():
        print(
            "benchmarks/gpu_gemm.py needs a GPU that torch can use; --dry-run says what it would measure",
            file=sys.stderr,
        )
        return 2
    import triton

    name = torch.cuda.get_device_name()
    facts = {
        f"{datetime.now(UTC):%Y-%m-%d},": f"{name} ({current('cuda').arch})",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "quark-inductor": qi.__version__,
    }
    command = " ".join(["python benchmarks/gpu_gemm.py", *(sys.argv[1:] if arguments is None else arguments)])
    bench = Bench("cuda", chip_of(name))
    for row in read_csv(asked.csv) if asked.resume and asked.csv.is_file() else []:
        bench.done.setdefault(row.cell, []).append(row)

    def done(rows: list[Row], left: list[Cell]) -> None:
        write_csv(asked.csv, rows)
        asked.markdown.write_text(page(rows, facts, command, left), encoding="utf-8")
        print(f"{len(rows)} rows, {len(left)} of {len(cells)} cells left", file=sys.stderr, flush=True)

    try:
        left = run(cells, bench, end, done)
    except LostError as e:
        print(f"the GPU cannot be used by this process any more after {e}; --resume goes on", file=sys.stderr)
        return LOST
    print(tables(with_speedups([row for rows in bench.done.values() for row in rows])))
    if left:
        print(f"\nout of time: {len(left)} of {len(cells)} cells are left, first {left[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
