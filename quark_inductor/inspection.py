"""``quark-inductor inspect``: what a checkpoint holds and who would run it here, from its headers alone."""

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quark_inductor import files, loading, words
from quark_inductor.experts import experts_of
from quark_inductor.forecast import forecast, forecast_experts, kind_of
from quark_inductor.lowering import target as targets
from quark_inductor.patterns.selection import LinearResult
from quark_inductor.schemes.base import QuarkLinear
from quark_inductor.schemes.errors import QuarkInductorError
from quark_inductor.schemes.experts import QuarkExperts
from quark_inductor.schemes.ops import dtype_name

# Tokens in a call while a model answers, and while it reads a prompt.
PHASES: Mapping[str, int] = {"decode": 1, "prefill": 512}
FLOAT, REFUSED = "float", "refused"
# Problems that the text shows unless it shall show all.
_SHOWN = 10


@dataclass(frozen=True, slots=True)
class Run:
    """Who would run a Linear in one phase.

    Attributes:
        tokens: in a call.
        provider: as in a report; ``"inductor"``: it is a float GEMM like any other.
        op: the fused op; ``""``: none.
        fused: whether the provider runs all of it.
        refusals: why it is no more than that.
    """

    tokens: int
    provider: str
    op: str
    fused: bool
    refusals: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """Linears that are alike and, but for numbers, have one name.

    Attributes:
        names: of all.
        scheme: name of their scheme; ``"float"``: they are not quantized; ``"refused"``: no scheme takes them.
        quantized: whether their weights are.
        spec: how they are quantized, in words; ``""``: not.
        shape: ``(N, K)`` of each.
        bias: whether they have one.
        experts: whether they are experts' of a mixture, all of a layer's one GEMM where ``projection`` says which.
        projection: see ``experts``; else ``""``.
        codes: bytes of the weights of one.
        scales: bytes of its weight's scales and zero points.
        other: bytes of its bias and of what its activations are quantized with.
        runs: by device, then by phase.
    """

    names: tuple[str, ...]
    scheme: str
    quantized: bool
    spec: str
    shape: tuple[int, int]
    bias: bool
    experts: bool
    projection: str
    codes: int
    scales: int
    other: int
    runs: Mapping[str, Mapping[str, Run]]

    @property
    def name(self) -> str:
        """All names in one: ``model.layers.{0-29}.self_attn.q_proj``."""
        return collapsed(self.names)


@dataclass(frozen=True, slots=True)
class Inspection:
    """What :func:`inspect` found. ``print`` it, or take :meth:`to_json`.

    Attributes:
        path: where the checkpoint is.
        architecture: the model's class, as the checkpoint names it.
        layers: how many it has.
        dtype: of what is not quantized.
        quark: the version that the checkpoint says it was written by; ``""``: it does not say.
        devices: those of this machine, by torch's name.
        groups: every Linear; none if the model could not be built.
        quantized_outputs: Linears whose output is quantized, such as those of an FP8 KV cache, and how.
        rest: bytes of everything but Linears.
        total: bytes of all tensors.
        tensors: how many there are.
        files: in how many files.
        problems: what :func:`.loading.load` would raise, each of them.
    """

    path: str
    architecture: str
    layers: int | None
    dtype: str
    quark: str
    devices: Mapping[str, str]
    groups: tuple[Group, ...]
    quantized_outputs: Mapping[str, str]
    rest: int
    total: int
    tensors: int
    files: int
    problems: tuple[str, ...]

    def to_json(self) -> str:
        """This inspection, schema 1: ``quark_inductor/schemas/inspection.json``."""
        content = dataclasses.asdict(self)
        for group, of in zip(content["groups"], self.groups, strict=True):
            group["name"] = of.name
        return json.dumps({"schema": 1, "kind": "inspection", **content}, indent=1)

    def __str__(self) -> str:
        """Alike Linears on one line."""
        return self.text()

    def text(self, all: bool = False) -> str:
        """For people.

        Args:
            all: a line for each Linear and each problem.
        """
        by = f", quantized by AMD Quark {self.quark}".rstrip()
        layers = f", {_count(self.layers, 'layer')}" if self.layers is not None else ""
        lines = [f"{self.path}: {self.architecture}{layers}, {self.dtype}{by}", *self._sizes()]
        schemes: dict[tuple[str, str], int] = {}
        for g in self.groups:
            schemes[g.scheme, g.spec] = schemes.get((g.scheme, g.spec), 0) + len(g.names)
        for (scheme, spec), count in schemes.items():
            lines.append(f"{_count(count, 'Linear')} {scheme}" + (f": {spec}" if spec else ""))
        for spec in dict.fromkeys(self.quantized_outputs.values()):
            names = [name for name, its in self.quantized_outputs.items() if its == spec]
            of = ", ".join(map(collapsed, by_template(names)))
            lines.append(f"{_count(len(names), 'quantized output')} ({spec}): {of}")
        if self.groups:
            lines += ["", *self._table(all)]
        if self.problems:
            lines += ["", f"qi.load would refuse it: {_count(len(self.problems), 'problem')}"]
            lines += [f"  {problem}" for problem in (self.problems if all else _without_likes(self.problems))]
        return "\n".join(lines)

    def _sizes(self) -> Iterable[str]:
        quantized = [g for g in self.groups if g.quantized]
        codes = sum(len(g.names) * g.codes for g in quantized)
        scales = sum(len(g.names) * g.scales for g in quantized)
        other = sum(len(g.names) * g.other for g in quantized)
        floats = self.total - self.rest - codes - scales - other
        yield (
            f"{words.size(self.total)} in {_count(self.tensors, 'tensor')} and {_count(self.files, 'file')}: quantized "
            f"weights {words.size(codes)}, their scales {words.size(scales)}, "
            f"biases and activation scales {words.size(other)}, float Linears {words.size(floats)}, "
            f"the rest {words.size(self.rest)}"
        )

    def _table(self, all: bool) -> list[str]:
        rows = [("Linears", "", "scheme", "N x K", "bytes each", *(f"{d} ({t})" for d, t in self.devices.items()))]
        notes: dict[str, str] = {}
        for g in self.groups:
            for name in g.names if all else (g.name,):
                size = words.size(g.codes + g.scales + g.other)
                cells = [_cell(g, g.runs.get(d, {}), notes) for d in self.devices]
                count = "" if all else str(len(g.names))
                rows.append((name, count, g.scheme, f"{g.shape[0]} x {g.shape[1]}", size, *cells))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return [*table, *(f"  {mark} {reason}" for reason, mark in notes.items())]


def _cell(group: Group, runs: Mapping[str, Run], notes: dict[str, str]) -> str:
    def who(run: Run) -> str:
        text = f"{run.provider} {run.op}".strip()
        # Of one that is fused they say why a neighbour quantizes for it.
        for reason in () if run.fused else run.refusals:
            text += notes.setdefault(reason, f"[{len(notes) + 1}]")
        return text

    texts = {run.tokens: who(run) for run in runs.values()}
    grouped = f", all experts' {group.projection} at once" if group.projection else ""
    if len(set(texts.values())) <= 1:
        return "".join(list(texts.values())[:1]) + grouped
    return ", ".join(f"{_count(tokens, 'token')}: {text}" for tokens, text in texts.items()) + grouped


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _without_likes(problems: Sequence[str]) -> Iterable[str]:
    """One of those that differ in nothing but a layer's name and what is in it."""
    alike: dict[str, list[str]] = {}
    for problem in problems:
        alike.setdefault(re.sub(r"\S+\.\d+\.\S+|\[[\d, ]+\]", "", problem), []).append(problem)
    for i, (first, *others) in enumerate(alike.values()):
        if i == _SHOWN:
            yield f"and {_count(len(alike) - i, 'more kind')}; --all shows them"
            return
        yield first + (f" (and {len(others)} more like it; --all shows them)" if others else "")


def _template(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def by_template(names: Iterable[str]) -> list[list[str]]:
    """Names that differ in nothing but numbers, together."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(_template(name), []).append(name)
    return list(found.values())


def collapsed(names: Sequence[str]) -> str:
    """Names that differ in nothing but numbers, in one: ``model.layers.{0-3,5}.mlp.up_proj``."""
    parts = [name.split(".") for name in names]
    shown = []
    for column in zip(*parts, strict=True):
        values = list(dict.fromkeys(column))
        shown.append(values[0] if len(values) == 1 else "{" + _ranges(sorted(map(int, values))) + "}")
    return ".".join(shown)


def _ranges(numbers: Sequence[int]) -> str:
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1][1:] = [number]
        else:
            ranges.append([number])
    return ",".join("-".join(map(str, r)) for r in ranges)


def devices() -> dict[str, str]:
    """The kinds of devices that torch can use here, by its name, and what each is."""
    names = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {name: str(targets.current(name)).removeprefix(f"{name} ") for name in names}


def inspect(path: str | Path) -> Inspection:
    """Look into a checkpoint, without reading a tensor.

    Args:
        path: as :func:`.loading.load` takes it; a model of the hub is downloaded.

    Returns:
        What is in it. What is wrong with the model, its configuration or its tensors is among the ``problems``; what
        only the numbers say (a NaN) is not.

    Raises:
        CheckpointError: it is no checkpoint: there is no such directory, or no ``config.json``, or no readable
            safetensors files in it.
        ConfigError: it is not quantized, or ``config.json`` is not JSON.
    """
    directory = loading.folder_of(path)
    raw = files.read_json(directory / files.CONFIG)
    quantization = loading.quantization_of(raw, directory)
    errors: list[QuarkInductorError] = []
    found, groups, outputs = None, list[Group](), dict[str, str]()
    try:
        found = loading.skeleton(directory, problems=errors)
    except QuarkInductorError as e:
        errors.append(e)
    stored = found.stored if found is not None else files.stored_tensors(directory)
    here = devices()
    if found is not None:
        if not errors:  # what an unknown layer has would be one problem more
            _account(found, errors)
        groups = _groups(found, tuple(here))
        specs = {name: m.scheme.spec.output for name, m in found.linears.items()}
        outputs = {name: str(spec) for name, spec in specs.items() if spec is not None}
    total = sum(map(_size, stored.values()))
    version = quantization.get("version") if isinstance(quantization, dict) else None
    architectures = raw.get("architectures")
    layers = raw.get("num_hidden_layers")
    return Inspection(
        path=str(path),
        architecture=str(architectures[0]) if isinstance(architectures, list) and architectures else "unknown model",
        layers=layers if type(layers) is int else None,
        dtype=dtype_name(found.stored_dtype) if found is not None else str(raw.get("dtype") or raw.get("torch_dtype")),
        quark=str(version or ""),
        devices=here,
        groups=tuple(groups),
        quantized_outputs=outputs,
        rest=total - sum(len(g.names) * (g.codes + g.scales + g.other) for g in groups),
        total=total,
        tensors=len(stored),
        files=len({tensor.file for tensor in stored.values()}),
        problems=tuple(map(str, errors)),
    )


def _account(found: loading.Skeleton, errors: list[QuarkInductorError]) -> None:
    """Find what is missing, unexpected or misshapen, and give the model the dtypes that it would have."""
    accounting = loading.account(found.model, found.stored, found.stored_dtype, strict=True, problems=errors)
    state = found.model.state_dict(keep_vars=True)
    for name, target in accounting.targets.items():
        if state[name].dtype != target.dtype:
            loading.assign(found.model, name, target)


def _size(tensor: files.StoredTensor) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _groups(found: loading.Skeleton, here: Sequence[str]) -> list[Group]:
    sizes: dict[str, Counter[str]] = {}
    for name, tensor in found.stored.items():
        module, _, parameter = name.rpartition(".")
        kind = "scales" if parameter.startswith("weight_") else "codes" if parameter == "weight" else "other"
        sizes.setdefault(module, Counter())[kind] += _size(tensor)
    forecasts = _Forecasts(found.model, here)
    alike: dict[Hashable, tuple[list[str], Group]] = {}
    experts = {name: module for name, module in found.model.named_modules() if isinstance(module, QuarkExperts)}
    for name, module in found.model.named_modules(remove_duplicate=False):
        if type(module) is not nn.Linear and not isinstance(module, QuarkLinear):
            continue
        owner = name.rsplit(".", 2)[0]
        projection, runs = forecasts.of(name, module, experts.get(owner))
        size = sizes.get(name, Counter())
        spec = module.scheme.spec if isinstance(module, QuarkLinear) else None
        # A Linear that was left alone though there are scales for its weight is one of the problems.
        refused = spec is None and bool(size["scales"])
        group = Group(
            names=(),
            scheme=module.scheme.name if isinstance(module, QuarkLinear) else REFUSED if refused else FLOAT,
            quantized=refused or (spec is not None and spec.weight is not None),
            spec="" if spec is None else str(spec),
            shape=(module.out_features, module.in_features),
            bias=module.bias is not None,
            experts=owner in experts,
            projection=projection,
            codes=size["codes"],
            scales=size["scales"],
            other=size["other"],
            runs={} if refused else runs,
        )
        key = (
            _template(name),
            group.scheme,
            group.spec,
            group.shape,
            group.bias,
            tuple(sorted(size.items())),
            repr(runs),
        )
        alike.setdefault(key, ([], group))[0].append(name)
    groups = [dataclasses.replace(group, names=tuple(names)) for names, group in alike.values()]
    return groups + _float_experts(found, here)


def _float_experts(found: loading.Skeleton, here: Sequence[str]) -> list[Group]:
    """Experts that a checkpoint has as one parameter: ``[E, N, K]``, or ``[E, K, N]`` in some models."""
    runs = {device: _inductor() for device in here}
    alike: dict[Hashable, tuple[list[str], Group]] = {}
    for owner, module in experts_of(found.model):
        for parameter, p in module.named_parameters(recurse=False):
            if p.ndim != 3:
                continue
            name = f"{owner}.{parameter}"
            weight, bias = found.stored.get(name), found.stored.get(f"{name}_bias")
            group = Group(
                names=(),
                scheme=FLOAT,
                quantized=False,
                spec="",
                shape=(p.shape[1], p.shape[2]),
                bias=bias is not None,
                experts=True,
                projection=parameter,
                codes=0 if weight is None else _size(weight),
                scales=0,
                other=0 if bias is None else _size(bias),
                runs=runs,
            )
            alike.setdefault((_template(name), group.shape, group.other), ([], group))[0].append(name)
    return [dataclasses.replace(group, names=tuple(names)) for names, group in alike.values()]


def _inductor() -> dict[str, Run]:
    return {phase: Run(tokens, "inductor", "", False, ()) for phase, tokens in PHASES.items()}


class _Forecasts:
    """Who runs each Linear of a model on each device; each kind is asked for once."""

    def __init__(self, model: Any, here: Sequence[str]) -> None:
        self.here = here
        self.top_k = int(getattr(model.config.get_text_config(), "num_experts_per_tok", None) or 1)
        self._linears: dict[Hashable, Mapping[str, Mapping[str, Run]]] = {}
        self._experts: dict[Hashable, dict[str, tuple[str, Mapping[str, Mapping[str, Run]]]]] = {}
        self._of: dict[int, Any] = {}

    def of(
        self, name: str, linear: nn.Module, experts: QuarkExperts | None
    ) -> tuple[str, Mapping[str, Mapping[str, Run]]]:
        """The projection of which it is a part, of experts, and its runs."""
        if not isinstance(linear, QuarkLinear) or linear.scheme.spec.weight is None:
            return "", {device: _inductor() for device in self.here}
        if experts is not None:
            return self._of_experts(experts)[name.rpartition(".")[2]]
        kind = kind_of(linear)
        if kind not in self._linears:
            self._linears[kind] = {
                device: _runs(forecast(linear, list(PHASES.values()), device)) for device in self.here
            }
        return "", self._linears[kind]

    def _of_experts(self, experts: QuarkExperts) -> dict[str, tuple[str, Mapping[str, Mapping[str, Run]]]]:
        if id(experts) in self._of:
            return self._of[id(experts)]  # type: ignore[no-any-return]
        kinds = frozenset(
            (name, kind_of(m) if isinstance(m, QuarkLinear) else None)
            for expert in experts.experts
            for name, m in expert.named_children()
        )
        key = experts.count, kinds
        if key not in self._experts:
            names = [name for name, _ in experts.experts[0].named_children()]
            found: dict[str, tuple[str, dict[str, Mapping[str, Run]]]] = {name: ("", {}) for name in names}
            rows = [tokens * self.top_k for tokens in PHASES.values()]
            for device in self.here:
                told = forecast_experts(experts, rows, device)
                for name in names:
                    if isinstance(told, str):
                        runs = {phase: Run(m, "eager", "", False, (told,)) for phase, m in PHASES.items()}
                        found[name][1][device] = runs
                    else:
                        found[name] = told[name][0], {**found[name][1], device: _runs(told[name][1])}
            self._experts[key] = dict(found)
        self._of[id(experts)] = self._experts[key]
        return self._experts[key]


def _runs(results: Sequence[LinearResult]) -> dict[str, Run]:
    runs = {}
    for (phase, tokens), r in zip(PHASES.items(), results, strict=True):
        op = r.problem.op if r.problem is not None and r.fused else ""
        runs[phase] = Run(tokens, r.provider, op, r.fused, r.refusals)
    return runs
