"""What became of a model's quantized Linears: which rules matched, who runs them, and why not."""

import html
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quark_inductor.schemes.base import QuarkLinear
from quark_inductor.schemes.experts import GroupedLinear, QuarkExperts

if TYPE_CHECKING:
    from quark_inductor.patterns.selection import LinearResult

NOT_COMPILED = "eager"


@dataclass(frozen=True, slots=True)
class LinearReport:
    """One GEMM of a quantized weight in one compiled graph.

    Attributes:
        name: the module it comes from, as the model names it; ``""`` if unknown.
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


@dataclass(frozen=True, slots=True)
class Left:
    """Quantizes, dequantizes and casts to or from 8 bits that stay in a graph, for one reason."""

    reason: str
    count: int
    layers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """What :func:`explain` found. ``print`` it, or take :meth:`to_json` or :meth:`to_html`.

    Attributes:
        graphs: how many graphs were compiled.
        linears: every GEMM of a quantized weight.
        rules: matches by rule.
        left: what stays beside the fused ops.
    """

    graphs: int
    linears: tuple[LinearReport, ...]
    rules: Mapping[str, int]
    left: tuple[Left, ...]

    def to_json(self) -> str:
        """This report, schema 1.

        ``{"schema": 1, "graphs": 1, "linears": [{"name", "scheme", "shape", "rules", "op", "x_format",
        "weight_format", "provider", "fused", "refusals", "graph"}], "rules": {name: matches}, "left": [{"reason",
        "count", "layers"}]}``
        """
        linears = [
            {
                "name": r.name,
                "scheme": r.scheme,
                "shape": list(r.shape),
                "rules": list(r.rules),
                "op": r.op,
                "x_format": r.formats[0],
                "weight_format": r.formats[1],
                "provider": r.provider,
                "fused": r.fused,
                "refusals": list(r.refusals),
                "graph": r.graph,
            }
            for r in self.linears
        ]
        left = [{"reason": kind.reason, "count": kind.count, "layers": list(kind.layers)} for kind in self.left]
        report = {"schema": 1, "graphs": self.graphs, "linears": linears, "rules": dict(self.rules), "left": left}
        return json.dumps(report, indent=1)

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (
                r.name or "(unnamed)",
                r.scheme,
                f"{r.shape[0]} x {r.shape[1]}",
                r.provider,
                r.op,
                " + ".join(r.rules),
                "; ".join(r.refusals),
            )
            for r in self.linears
        ]

    @property
    def summary(self) -> str:
        """One line."""
        fused = sum(r.fused for r in self.linears)
        return f"{fused} of {len(self.linears)} quantized Linears fused, in {self.graphs} graphs"

    def __str__(self) -> str:
        """A table: Linears that fared alike on one line, with the first one's name."""
        alike: dict[tuple[str, ...], list[str]] = {}
        for name, *rest in self._rows():
            alike.setdefault(tuple(rest), []).append(name)
        lines = [self.summary]
        for (scheme, shape, provider, op, rules, refusals), names in alike.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            who = f"{provider} {op}".strip()
            lines.append(f"  {names[0]}{more}: {scheme} {shape}, {who} ({rules or 'no rule'})")
            if refusals:
                lines.append(f"    {refusals}")
        for kind in self.left:
            where = f", first in {kind.layers[0]}" if kind.layers else ""
            lines.append(f"  {kind.count} casts or (de)quantizes left{where}: {kind.reason}")
        return "\n".join(lines)

    def to_html(self) -> str:
        """A page with one row a Linear."""
        titles = ("name", "scheme", "N x K", "provider", "op", "rules", "refusals")

        def row(cells: tuple[str, ...], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        rows = [row(titles, "th"), *(row(cells, "td") for cells in self._rows())]
        left = [f"<li>{html.escape(f'{kind.count}: {kind.reason}')}</li>" for kind in self.left]
        return (
            f"<!doctype html><meta charset=utf-8><title>quark-inductor</title><h1>{html.escape(self.summary)}</h1>"
            f"<table border=1>{''.join(rows)}</table><h2>Left in the graphs</h2><ul>{''.join(left)}</ul>"
        )


def explain(
    model: Any, *args: Any, dynamic: bool | None = None, options: Mapping[str, Any] | None = None, **kwargs: Any
) -> Report:
    """Compile a model with this backend, run it once, and tell what became of its quantized Linears.

    Args:
        model: a module or function; one that is compiled already is compiled again.
        *args: what it is called with.
        dynamic: as in ``torch.compile``.
        options: as in ``torch.compile(backend="quark")``.
        **kwargs: what it is called with.

    Returns:
        The report. A quantized Linear that is in no compiled graph (not called, or after a graph break) is in it too.

    Raises:
        OptionError: an unknown option.
        NotFusedError: ``quark.strict`` is set and a quantized Linear was not fused.
    """
    from quark_inductor.backend import unwrapped_errors
    from quark_inductor.lowering.base import EMULATION
    from quark_inductor.patterns._inductor import graphs_not_cached
    from quark_inductor.patterns.pipeline import collect_results

    model = getattr(model, "_orig_mod", model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="quark", dynamic=dynamic, options=dict(options or {}))
    with torch.no_grad(), graphs_not_cached(), collect_results() as results, unwrapped_errors():
        compiled(*args, **kwargs)
    named = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    quantized: dict[str, QuarkLinear | GroupedLinear] = {
        name: m
        for name, m in named.items()
        if isinstance(m, QuarkLinear | GroupedLinear) and m.scheme.spec.weight is not None
    }
    # Those of grouped experts are one GEMM a projection.
    grouped = [m for m in named.values() if isinstance(m, QuarkExperts) and m.grouped]
    parts = {part for experts in grouped for expert in experts.experts for part in expert.modules()}
    quantized = {name: m for name, m in quantized.items() if m not in parts}

    def name_of(linear: "LinearResult") -> str:
        # Merged Linears are one GEMM: here under the name of the first.
        return linear.layer.removesuffix(".merged[0]")

    def scheme_of(layer: str) -> str:
        module = named.get(layer)
        return module.scheme.name if isinstance(module, QuarkLinear | GroupedLinear) else ""

    linears = [
        LinearReport(
            name=name_of(linear),
            scheme=scheme_of(name_of(linear)),
            shape=linear.shape,
            rules=linear.rules,
            op=linear.problem.op if linear.problem is not None and linear.provider != EMULATION else "",
            formats=(linear.problem.x_format, linear.problem.weight_format) if linear.problem is not None else ("", ""),
            provider=linear.provider,
            fused=linear.fused,
            refusals=linear.refusals,
            graph=index,
        )
        for index, result in enumerate(results)
        for linear in result.linears
    ]
    seen = {linear.name for linear in linears}
    merged = {n: id(m.merged[0]) for n, m in quantized.items() if isinstance(m, QuarkLinear) and m.merged is not None}
    wide = {whole for name, whole in merged.items() if name in seen}
    seen |= {name for name, whole in merged.items() if whole in wide}
    reason = "it is in no compiled graph: not called, or run by Python after a graph break"
    linears += [
        LinearReport(
            name, m.scheme.name, (m.out_features, m.in_features), (), "", ("", ""), NOT_COMPILED, False, (reason,), -1
        )
        for name, m in quantized.items()
        if name not in seen
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
    return Report(len(results), tuple(linears), dict(rules), kinds)
