"""What became of a model's quantized Linears: which rules matched, who runs them, how fast, and why not better."""

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quark_inductor import words
from quark_inductor.documents import read_document
from quark_inductor.schemes.base import QuarkLinear
from quark_inductor.schemes.errors import DocumentError
from quark_inductor.schemes.experts import GroupedLinear, QuarkExperts

if TYPE_CHECKING:
    from quark_inductor.lowering._inductor import GemmKernel
    from quark_inductor.patterns.selection import LinearResult

NOT_COMPILED = "eager"
SCHEMA = 2
_NO_GRAPH = (
    "it is in no compiled graph: not called, or run by Python after a graph break; TORCH_LOGS=graph_breaks says where"
)


@dataclass(frozen=True, slots=True)
class Bytes:
    """What one call of a GEMM reads and writes; ``None``: not known, or not known before run time.

    Attributes:
        weight: codes, scales and zero points as the kernel reads them, and the bias. Of grouped experts that is what a
            call reads if every expert has rows. Where no kernel of ours runs, it is what the module holds.
        activation: codes and scales of an activation that is quantized before the GEMM, else its values.
        output: what the GEMM computes, before its epilogue.
    """

    weight: int | None = None
    activation: int | None = None
    output: int | None = None


@dataclass(frozen=True, slots=True)
class Runtime:
    """How fast a GEMM ran, with its epilogue.

    Attributes:
        us: microseconds a call, the median.
        calls: how many were measured.
        gb_s: the row's bytes by that time; of grouped experts no more weights than there are rows, which is a bound.
        gflop_s: ``2 M N K`` by that time; ``None``: M is not known.
        bound: the machine's ceiling that is nearer: ``"memory"`` or ``"compute"``.
        of_ceiling: how near: 1 is all that the machine can do.
    """

    us: float
    calls: int
    gb_s: float
    gflop_s: float | None
    bound: str
    of_ceiling: float


@dataclass(frozen=True, slots=True)
class LinearReport:
    """One GEMM of a quantized weight in one compiled graph.

    Attributes:
        name: the module it comes from, as the model names it; ``""`` if unknown. Merged Linears are one GEMM, under the
            name of the first.
        scheme: name of the module's scheme; ``""`` if it is none of ours.
        shape: ``(N, K)``.
        rules: the rules that made the fused op, in the order they ran; none: not fused.
        op: the fused op; ``""``: none.
        formats: formats of activation and weight, as the op names them; ``""``: not quantized, or not known.
        provider: who runs it: a provider's name, ``"emulation"`` (Inductor compiles the emulation) or ``"eager"`` (it
            was in no compiled graph).
        fused: whether the provider runs all of it: not where the emulation quantizes and dequantizes the activation.
        refusals: why it is no more than that.
        graph: which of the compiled graphs, from 0; -1: none.
        tokens: M, of grouped experts that of all of them; ``None``: not known before run time.
        prologue: what the GEMM quantizes itself, as format and rule of the scales; ``""``: nothing.
        producer: names of the aten ops of the kernels that quantize the activation before the GEMM; ``""``: none do.
        epilogue: names of the aten ops that run in the GEMM's kernel after it.
        bytes: what one call reads and writes.
        runtime: how fast it is, if that was measured; ``None`` too for what is emulated or not compiled.
    """

    name: str
    scheme: str
    shape: tuple[int, int]
    rules: tuple[str, ...]
    op: str
    formats: tuple[str, str]
    provider: str
    fused: bool
    refusals: tuple[str, ...]
    graph: int
    tokens: int | None = None
    prologue: str = ""
    producer: str = ""
    epilogue: tuple[str, ...] = ()
    bytes: Bytes = Bytes()
    runtime: Runtime | None = None


@dataclass(frozen=True, slots=True)
class Left:
    """Quantizes, dequantizes and casts to or from 8 bits that stay in a graph, for one reason."""

    reason: str
    count: int
    layers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Call:
    """How long the whole model takes, measured together with its Linears.

    Attributes:
        us: microseconds a call, the median.
        linears_us: those of them that are in kernels of quantized Linears.
        calls: how many were measured.
    """

    us: float
    linears_us: float
    calls: int


# What a report of schema 1 holds, and what schema 2 adds; the JSON types of each.
_NUMBER, _NO_NUMBER = (int, float), (int, type(None))
_LINEAR_1: Mapping[str, tuple[type, ...]] = {
    "name": (str,),
    "scheme": (str,),
    "shape": (list,),
    "rules": (list,),
    "op": (str,),
    "x_format": (str,),
    "weight_format": (str,),
    "provider": (str,),
    "fused": (bool,),
    "refusals": (list,),
    "graph": (int,),
}
_LINEAR_2: Mapping[str, tuple[type, ...]] = {
    **_LINEAR_1,
    "tokens": _NO_NUMBER,
    "prologue": (str,),
    "producer": (str,),
    "epilogue": (list,),
    "bytes": (dict,),
    "runtime": (dict, type(None)),
}
_LEFT: Mapping[str, tuple[type, ...]] = {"reason": (str,), "count": (int,), "layers": (list,)}
_REPORT_1: Mapping[str, tuple[type, ...]] = {"graphs": (int,), "linears": (list,), "rules": (dict,), "left": (list,)}
_REPORT_2: Mapping[str, tuple[type, ...]] = {
    **_REPORT_1,
    **dict.fromkeys(("call", "machine", "compile"), (dict, type(None))),
}
_BYTES: Mapping[str, tuple[type, ...]] = dict.fromkeys(("weight", "activation", "output"), _NO_NUMBER)
_CALL: Mapping[str, tuple[type, ...]] = {"us": _NUMBER, "linears_us": _NUMBER, "calls": (int,)}
_RUNTIME: Mapping[str, tuple[type, ...]] = {
    "us": _NUMBER,
    "calls": (int,),
    "gb_s": _NUMBER,
    "gflop_s": (*_NUMBER, type(None)),
    "bound": (str,),
    "of_ceiling": _NUMBER,
}
_HOW = "write a new one with quark_inductor.explain(...).to_json()"


def _checked(where: str, found: Any, wanted: Mapping[str, tuple[type, ...]]) -> dict[str, Any]:
    """The wanted entries of a JSON object; others are left out."""
    if not isinstance(found, dict):
        raise DocumentError(f"{where} is a {type(found).__name__}, expected an object; {_HOW}")
    if missing := [name for name in wanted if name not in found]:
        raise DocumentError(f"{where} has no {missing[0]!r}, expected {', '.join(wanted)}; {_HOW}")
    for name, types in wanted.items():
        if not isinstance(found[name], types):
            expected = " or ".join("null" if t is type(None) else t.__name__ for t in types)
            raise DocumentError(f"{where}.{name} is {found[name]!r}, expected {expected}; {_HOW}")
    return {name: found[name] for name in wanted}


def _linear(where: str, found: Any, schema: int) -> LinearReport:
    row = _checked(where, found, _LINEAR_1 if schema == 1 else _LINEAR_2)
    formats = row.pop("x_format"), row.pop("weight_format")
    if schema == 1:
        row |= {"prologue": formats[0] if row["op"] == "prologue_gemm" else "", "epilogue": []}
    else:
        row["bytes"] = Bytes(**_checked(f"{where}.bytes", row["bytes"], _BYTES))
        if row["runtime"] is not None:
            row["runtime"] = Runtime(**_checked(f"{where}.runtime", row["runtime"], _RUNTIME))
    if len(row["shape"]) != 2 or not all(isinstance(size, int) for size in row["shape"]):
        raise DocumentError(f"{where}.shape is {row['shape']}, expected N and K; {_HOW}")
    lists = {name: tuple(row[name]) for name in ("shape", "rules", "refusals", "epilogue")}
    return LinearReport(formats=formats, **{**row, **lists})


@dataclass(frozen=True, slots=True)
class Report:
    """What :func:`explain` found. ``print`` it, or take :meth:`to_json` or :meth:`to_html`.

    Attributes:
        graphs: how many graphs were compiled.
        linears: every GEMM of a quantized weight.
        rules: matches by rule.
        left: what stays beside the fused ops.
        call: how long the model takes, if that was measured.
        machine: what it was measured on, see :meth:`quark_inductor.ceiling.Ceilings.facts`.
        compile: where the time of compiling went, with a timeline; as a run in ``schemas/profile.json``.
    """

    graphs: int
    linears: tuple[LinearReport, ...]
    rules: Mapping[str, int]
    left: tuple[Left, ...]
    call: Call | None = None
    machine: Mapping[str, Any] | None = None
    compile: Mapping[str, Any] | None = None

    def to_json(self) -> str:
        """This report, schema 2: what programs may rely on is in ``schemas/report.json`` of this package."""
        report = asdict(self)
        for row in report["linears"]:
            row["x_format"], row["weight_format"] = row.pop("formats")
        return json.dumps({"schema": SCHEMA, "kind": "report", **report}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """The report that :meth:`to_json` wrote, of this version or an older one: schema 2 or 1.

        Raises:
            DocumentError: it is something else.
        """
        # One of schema 1 does not say its kind.
        found = read_document(text, "report", SCHEMA, nameless=True)
        schema = found["schema"]
        report = _checked("report", found, _REPORT_1 if schema == 1 else _REPORT_2)
        report["linears"] = tuple(_linear(f"linears[{i}]", row, schema) for i, row in enumerate(report["linears"]))
        kinds = [_checked(f"left[{i}]", kind, _LEFT) for i, kind in enumerate(report["left"])]
        report["left"] = tuple(Left(kind["reason"], kind["count"], tuple(kind["layers"])) for kind in kinds)
        if report.get("call") is not None:
            report["call"] = Call(**_checked("call", report["call"], _CALL))
        return cls(**report)

    @property
    def headline(self) -> str:
        """One line."""
        fused = sum(r.fused for r in self.linears)
        graphs = f"{self.graphs} graph{'s' if self.graphs != 1 else ''}"
        return f"{fused} of {len(self.linears)} quantized Linears fused, in {graphs}"

    @property
    def summary(self) -> str:
        """What all Linears have together, in a few lines."""
        lines = [self.headline]
        for title, of in (("provider", lambda r: r.provider), ("scheme", lambda r: r.scheme or "not ours")):
            if counts := Counter(of(r) for r in self.linears):
                lines.append(f"  by {title}: {', '.join(f'{name} {count}' for name, count in counts.most_common())}")
        totals = {name: self._total(name) for name in _BYTES}
        if any(totals.values()):
            known = [f"{words.size(total)} of {name}s" for name, total in totals.items() if total]
            lines.append(f"  bytes of a call: {', '.join(known)}")
        if self.call is not None:
            inside, share = _time(self.call.linears_us), self.call.linears_us / self.call.us
            lines.append(f"  time of a call: {_time(self.call.us)}, in fused GEMMs {inside} ({share:.0%})")
            if others := sum(r.runtime is None for r in self.linears):
                lines.append(f"  without a time: {others}, which no kernel of ours runs")
        for reason, count in Counter(refusal for r in self.linears for refusal in r.refusals).most_common():
            lines.append(f"  {count} x {reason}")
        return "\n".join(lines)

    def _total(self, name: str) -> int:
        return sum(getattr(r.bytes, name) or 0 for r in self.linears)

    def __str__(self) -> str:
        """The summary, then a table: Linears that fared alike in one entry, with the first one's name."""
        alike: dict[Any, list[LinearReport]] = {}
        for r in self.linears:
            key = r.scheme, r.shape, r.provider, r.op, r.rules, r.refusals, r.tokens, r.prologue, r.producer, r.epilogue
            alike.setdefault((*key, r.bytes), []).append(r)
        lines = [self.summary]
        for first, *others in alike.values():
            more = f" and {len(others)} more" if others else ""
            n, k = first.shape
            who = f"{first.provider} {first.op}".strip()
            scheme = f"{first.scheme} " if first.scheme else ""
            rules = " + ".join(first.rules) or "no rule"
            lines.append(f"  {first.name or '(unnamed)'}{more}: {scheme}{n} x {k}, {who} ({rules})")
            lines += [f"    {line}" for line in (*_details(first), *_times([first, *others]), *first.refusals)]
        for kind in self.left:
            where = f", first in {kind.layers[0]}" if kind.layers else ""
            lines.append(f"  {kind.count} casts or (de)quantizes left{where}: {kind.reason}")
        return "\n".join(lines)

    def to_html(self) -> str:
        """A page for a browser: the summary, the timeline of the compilation, and a row a Linear."""
        from quark_inductor.page import page

        return page("Quantized Linears", self.headline, report=json.loads(self.to_json()))


def _time(us: float) -> str:
    return f"{us / 1e3:.3g} ms" if us >= 1e3 else f"{us:.3g} us"


def _details(r: LinearReport) -> list[str]:
    """How a GEMM is fed, what it does after, and its bytes; nothing where that is not known."""
    if r.bytes.weight is None or not r.op:
        return []
    parts = ["any number of tokens" if r.tokens is None else f"{r.tokens} token{'s' if r.tokens != 1 else ''}"]
    if r.prologue:
        parts.append(f"quantizes its activation ({r.prologue})")
    if r.producer:
        parts.append(f"activation quantized before ({r.producer})")
    if r.epilogue:
        parts.append(f"then {', '.join(r.epilogue)}")
    sizes = [f"{name} {words.size(count)}" for name, count in asdict(r.bytes).items() if count is not None]
    return ["; ".join((*parts, ", ".join(sizes)))]


def _times(rows: Sequence[LinearReport]) -> list[str]:
    """The times of Linears that fared alike, the slowest's fraction of the ceiling."""
    measured = sorted((r.runtime for r in rows if r.runtime is not None), key=lambda runtime: runtime.us)
    if not measured:
        return []
    fastest, middle, slowest = measured[0], measured[len(measured) // 2], measured[-1]
    spread = f" ({_time(fastest.us)} to {_time(slowest.us)})" if len(measured) > 1 else ""
    flops = f", {middle.gflop_s:.3g} GFLOP/s" if middle.gflop_s is not None else ""
    return [
        f"{_time(middle.us)}{spread}, {middle.gb_s:.3g} GB/s{flops}: {middle.of_ceiling:.0%} of what "
        f"{'memory' if middle.bound == 'memory' else 'arithmetic'} allows"
    ]


def explain(
    model: Any,
    *args: Any,
    dynamic: bool | None = None,
    options: Mapping[str, Any] | None = None,
    measure: bool = False,
    **kwargs: Any,
) -> Report:
    """Compile a model with this backend, run it, and tell what became of its quantized Linears.

    Args:
        model: a module or function; one that is compiled already is compiled again.
        *args: what it is called with.
        dynamic: as in ``torch.compile``.
        options: as in ``torch.compile(backend="quark")``.
        measure: also measure each GEMM in some more calls with the same arguments, which must not change from call to
            call as a growing cache would. It is compiled with Inductor's Python wrapper and without CUDA graphs then,
            which leave no room for a range around each GEMM. See :mod:`quark_inductor.runtime`.
        **kwargs: what it is called with.

    Returns:
        The report. A quantized Linear that is in no compiled graph (not called, or after a graph break) is in it too.

    Raises:
        OptionError: an unknown option.
        NotFusedError: ``quark.strict`` is set and a quantized Linear was not fused.
    """
    from quark_inductor.backend import unwrapped_errors
    from quark_inductor.lowering._inductor import watch_gemms
    from quark_inductor.patterns._inductor import graphs_not_cached
    from quark_inductor.patterns.base import layer_of
    from quark_inductor.patterns.pipeline import collect_results
    from quark_inductor.patterns.selection import KEY
    from quark_inductor.profile import Run, compiler_of, recorded
    from quark_inductor.recorder import Recorder
    from quark_inductor.runtime import OPTIONS, Measured, Ranges

    model = getattr(model, "_orig_mod", model)
    torch._dynamo.reset()
    options = {**(options or {}), **(OPTIONS if measure else {})}
    recorder, ranges = Recorder(), Ranges()
    compiled = torch.compile(model, backend=recorded(compiler_of("quark", options), recorder), dynamic=dynamic)

    def range_of(gemm: Any) -> str:
        return ranges.name(gemm.meta[KEY], _name(layer_of(gemm))) if measure and KEY in gemm.meta else ""

    with (
        torch.no_grad(),
        graphs_not_cached(),
        collect_results() as results,
        watch_gemms(range_of) as kernels,
        unwrapped_errors(),
    ):
        with recorder:
            compiled(*args, **kwargs)
        of_key: dict[int, list[GemmKernel]] = {}
        for kernel in kernels:
            of_key.setdefault(kernel.node.meta.get(KEY, -1), []).append(kernel)
        linears = [linear for result in results for linear in result.linears]
        measured = Measured()
        if measure:
            measured = Measured.of(lambda: compiled(*args, **kwargs), linears, of_key, ranges)

    named = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    rows = [
        _row(linear, index, named.get(_name(linear.layer)), of_key.get(linear.key, ()), measured.rows.get(linear.key))
        for index, result in enumerate(results)
        for linear in result.linears
    ]
    rules = Counter[str]()
    left: dict[str, list[str]] = {}
    for result in results:
        rules.update({p.name: p.matches for p in result.passes})
        for refusal in result.left:
            left.setdefault(refusal.reason, []).append(refusal.layer)
    kinds = tuple(
        Left(reason, len(layers), tuple(dict.fromkeys(layer for layer in layers if layer)))
        for reason, layers in left.items()
    )
    everything = *rows, *_not_compiled(named, {row.name for row in rows})
    compilation = Run.of(recorder).to_dict()
    return Report(len(results), everything, dict(rules), kinds, measured.call, measured.machine, compilation)


def _name(layer: str) -> str:
    """Merged Linears are one GEMM: here under the name of the first."""
    return layer.removesuffix(".merged[0]")


def _row(
    linear: "LinearResult", graph: int, module: Any, kernels: Sequence["GemmKernel"], runtime: Runtime | None
) -> LinearReport:
    """What is known of one GEMM in a compiled graph: its module, if the model has it, and the kernels made for it."""
    from quark_inductor.lowering.base import EMULATION

    ours = module if isinstance(module, QuarkLinear | GroupedLinear) else None
    problem, traffic = linear.problem, linear.traffic
    runs = problem if linear.provider != EMULATION else None
    known = runs is not None and runs.m is not None
    quantized_before = runs is not None and (runs.op == "quantized_gemm" or linear.partly)
    names = {op: None for kernel in kernels for op in kernel.producers}
    return LinearReport(
        name=_name(linear.layer),
        scheme=ours.scheme.name if ours is not None else "",
        shape=linear.shape,
        rules=linear.rules,
        op=runs.op if runs is not None else "",
        formats=(problem.x_format, problem.weight_format) if problem is not None else ("", ""),
        provider=linear.provider,
        fused=linear.fused,
        refusals=linear.refusals,
        graph=graph,
        tokens=traffic.tokens if known else None,
        prologue=f"{runs.x_format} {runs.scale_rule}" if runs is not None and runs.op == "prologue_gemm" else "",
        producer=", ".join(names) if quantized_before else "",
        epilogue=tuple(dict.fromkeys(op for kernel in kernels for op in kernel.epilogue)),
        bytes=Bytes(
            weight=_weight_bytes(ours) if traffic.weight is None and ours is not None else traffic.weight,
            activation=traffic.activation if known else None,
            output=traffic.output if known else None,
        ),
        runtime=runtime,
    )


def _weight_bytes(module: QuarkLinear | GroupedLinear) -> int:
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return sum(t.nbytes for t in tensors)


def _not_compiled(named: Mapping[str, nn.Module], seen: Collection[str]) -> Iterator[LinearReport]:
    """The quantized Linears of a model that are in no compiled graph."""
    quantized: dict[str, QuarkLinear | GroupedLinear] = {
        name: m
        for name, m in named.items()
        if isinstance(m, QuarkLinear | GroupedLinear) and m.scheme.spec.weight is not None
    }
    # Those of grouped experts are one GEMM a projection.
    grouped = [m for m in named.values() if isinstance(m, QuarkExperts) and m.grouped]
    parts = {part for experts in grouped for expert in experts.experts for part in expert.modules()}
    merged = {n: id(m.merged[0]) for n, m in quantized.items() if isinstance(m, QuarkLinear) and m.merged is not None}
    wide = {whole for name, whole in merged.items() if name in seen}
    for name, m in quantized.items():
        if m in parts or name in seen or merged.get(name) in wide:
            continue
        yield LinearReport(
            name=name,
            scheme=m.scheme.name,
            shape=(m.out_features, m.in_features),
            rules=(),
            op="",
            formats=("", ""),
            provider=NOT_COMPILED,
            fused=False,
            refusals=(_NO_GRAPH,),
            graph=-1,
            bytes=Bytes(weight=_weight_bytes(m)),
        )
