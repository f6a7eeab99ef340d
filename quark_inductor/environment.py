"""``quark-inductor env``: what a report of a bug has to say about a machine and what is installed on it."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from quark_inductor import __version__, machine
from quark_inductor.forecast import forms
from quark_inductor.lowering import aiter
from quark_inductor.lowering import target as targets
from quark_inductor.lowering.base import EMULATION, No, answers, provider_names
from quark_inductor.patterns._inductor import default_cache_dir
from quark_inductor.schemes.base import QuarkLinear, scheme_for
from quark_inductor.schemes.errors import QuarkInductorError
from quark_inductor.schemes.spec import PRESETS

PACKAGES = ("transformers", "safetensors", "accelerate", "numpy", "triton", "amd-quark", "torchao")
# What changes what this package or Inductor does.
VARIABLES = ("AITER_", "CXX", "OMP_", "QUARK_INDUCTOR_", "TORCHDYNAMO_", "TORCHINDUCTOR_", "TORCH_", "TRITON_")
# Of each family of formats one, as one token and as a prompt; large enough for every provider.
SCHEMES = (
    "mxfp4",
    "mxfp4_weight_only",
    "mxfp4_fp8",
    "mxfp8",
    "nvfp4",
    "fp8",
    "ptpc_fp8",
    "fp8_block128",
    "int8",
    "ptpc_int8",
    "int4_wo_128",
    "int4_fp8",
)
TOKENS = (1, 2048)
FEATURES = 1024


@dataclass(frozen=True, slots=True)
class Answer:
    """What a provider says to one Linear.

    Attributes:
        scheme: name of its scheme, as ``quantize_`` takes it.
        tokens: in a call.
        op: the fused op that it makes a kernel of; ``""``: none.
        reason: why none, of the op that would do all of the Linear; ``""``: there is one.
    """

    scheme: str
    tokens: int
    op: str
    reason: str


@dataclass(frozen=True, slots=True)
class ProviderAnswers:
    """What a provider says on one device.

    Attributes:
        device: torch's name of its type.
        provider: its name.
        answers: to a Linear of each family.
    """

    device: str
    provider: str
    answers: tuple[Answer, ...]

    @property
    def runs(self) -> tuple[Answer, ...]:
        """Those it says yes to."""
        return tuple(a for a in self.answers if a.op)


@dataclass(frozen=True, slots=True)
class Cache:
    """A folder of files that are made again when they are not there.

    Attributes:
        name: whose.
        path: where.
        bytes: of all files in it; ``None``: there is no such folder.
        files: how many.
    """

    name: str
    path: str
    bytes: int | None
    files: int


@dataclass(frozen=True, slots=True)
class Environment:
    """What :func:`environment` found.

    Attributes:
        versions: of packages, by name; ``None``: not installed.
        aiter: which of its kernels were found, or why none were.
        machine: of :func:`.machine.facts`.
        isa: the level of instruction sets that kernels are made for, or why there is none.
        isa_refusals: why no higher one, by level.
        gpus: each with its name, architecture and bytes of memory.
        variables: environment variables that are set.
        providers: what each says on each device.
        caches: folders.
    """

    versions: Mapping[str, str | None]
    aiter: str
    machine: Mapping[str, Any]
    isa: str
    isa_refusals: Mapping[str, str]
    gpus: tuple[Mapping[str, Any], ...]
    variables: Mapping[str, str]
    providers: tuple[ProviderAnswers, ...]
    caches: tuple[Cache, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON, schema 1: ``quark_inductor/schemas/environment.json``."""
        return {"schema": 1, "kind": "environment", **asdict(self)}

    def __str__(self) -> str:
        """One page."""
        m = self.machine
        there = [f"{name} {version}" for name, version in self.versions.items() if version is not None]
        sections: dict[str, list[str]] = {
            "versions": [
                ", ".join(there),
                f"not installed: {', '.join(name for name, v in self.versions.items() if v is None) or 'nothing'}",
                f"AITER: {self.aiter}",
                f"compiler: {m['compiler'] or 'none'}",
            ],
            "machine": [
                f"{m['system']}, {m['arch']}, {m['cpu']} ({m['cpu_family_model_stepping']})",
                f"{m['cores']} cores ({m['logical_cpus']} logical), {m['memory_bytes'] / 2**30:.1f} GiB of memory, "
                f"last-level cache {m['last_level_cache_bytes'] / 2**20:.0f} MiB, "
                f"huge pages: {m['transparent_huge_pages'] or 'unknown'}, load {m['load_average']}",
                f"instruction sets: {' '.join(m['flags'])}",
                f"kernels for {self.isa}",
                *(f"  not {isa}: {reason}" for isa, reason in self.isa_refusals.items()),
                *(f"GPU: {g['name']}, {g['arch']}, {g['memory_bytes'] / 2**30:.0f} GiB" for g in self.gpus),
                *(["no GPU that torch can use"] if not self.gpus else []),
            ],
            "environment variables": [f"{name}={value}" for name, value in self.variables.items()] or ["none"],
            "providers": [line for provider in self.providers for line in _provider_lines(provider)],
            "caches": [f"{c.name}: {c.path}, {_cache_size(c)}" for c in self.caches],
        }
        return "\n".join(line for title, lines in sections.items() for line in (title, *(f"  {x}" for x in lines)))


def _cache_size(cache: Cache) -> str:
    return "not there" if cache.bytes is None else f"{cache.bytes / 1e6:.1f} MB in {cache.files} files"


def _provider_lines(p: ProviderAnswers) -> list[str]:
    alike: dict[str, dict[str, list[int]]] = {}
    for answer in p.answers:
        said = f"yes, {answer.op}" if answer.op else f"no, {answer.reason}"
        alike.setdefault(said, {}).setdefault(answer.scheme, []).append(answer.tokens)
    lines = [f"{p.provider} on {p.device}: {len(p.runs)} of {len(p.answers)}"]
    for said, schemes in alike.items():
        who = [s if len(t) == len(TOKENS) else f"{s} ({t[0]} token{'s' * (t[0] != 1)})" for s, t in schemes.items()]
        everything = len(alike) == 1
        lines.append(f"  {said}" + ("" if everything else f": {', '.join(who)}"))
    return lines


def environment(variables: Mapping[str, str] = os.environ) -> Environment:
    """Find all of it out; what cannot be found out is said in its place, as this is for when something is wrong.

    Args:
        variables: the environment before torch was imported, which sets some.
    """
    try:
        isa, refusals = targets.current().isa, targets.isa_refusals()
    except QuarkInductorError as e:
        isa, refusals = f"nothing: {e}", {}
    found = aiter.modules()
    return Environment(
        versions={
            "quark-inductor": __version__,
            "torch": torch.__version__,
            **{name: machine.version_of(name) or None for name in PACKAGES},
            "CUDA": torch.version.cuda,
            "ROCm": torch.version.hip,
        },
        aiter=found.reason if isinstance(found, No) else f"has {', '.join(found) or 'none of the kernels used here'}",
        machine=machine.facts(),
        isa=isa,
        isa_refusals=refusals,
        gpus=_gpus(),
        variables={name: value for name, value in sorted(variables.items()) if name.startswith(VARIABLES)},
        providers=tuple(
            ProviderAnswers(device, name, answers)
            for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else []))
            for name, answers in _answers(device).items()
        ),
        caches=_caches(),
    )


def _gpus() -> tuple[Mapping[str, Any], ...]:
    gpus = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        arch = targets.gpu_arch(properties)
        gpus.append({"name": properties.name, "arch": arch, "memory_bytes": properties.total_memory})
    return tuple(gpus)


def _answers(device: str) -> dict[str, tuple[Answer, ...]]:
    """Each provider's answers on a device."""
    found: dict[str, list[Answer]] = {name: [] for name in provider_names() if name != EMULATION}
    for scheme in SCHEMES:
        spec = scheme_for(PRESETS[scheme])
        linear = QuarkLinear(FEATURES, FEATURES, spec, bias=False, dtype=torch.bfloat16, device="meta")
        try:
            target, asked = targets.current(device), zip(TOKENS, forms(linear, TOKENS, device), strict=True)
        except QuarkInductorError as e:  # QUARK_INDUCTOR_ISA names no level of this CPU
            for said in found.values():
                said += [Answer(scheme, tokens, "", str(e)) for tokens in TOKENS]
            continue
        for tokens, problems in asked:
            heard = [(problem.op, answers(target, problem)) for problem in problems]
            for name, said in found.items():
                op = next((op for op, of in heard if of[name] is None), "")
                first = heard[0][1][name]
                said.append(Answer(scheme, tokens, op, first.reason if first is not None and not op else ""))
    return {name: tuple(said) for name, said in found.items()}


def _caches() -> tuple[Cache, ...]:
    inductor = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default_cache_dir()).absolute()
    folders = {
        "Inductor": inductor,
        # Inductor's kernels lie in its own folder, where nothing else is said.
        "Triton": Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache"),
        "quark-inductor": machine.cache_folder(),
    }
    return tuple(_cache(name, path) for name, path in folders.items())


def _cache(name: str, path: Path) -> Cache:
    if not path.is_dir():
        return Cache(name, str(path), None, 0)
    sizes = [size for file in path.rglob("*") if (size := _size(file)) is not None]
    return Cache(name, str(path), sum(sizes), len(sizes))


def _size(file: Path) -> int | None:
    try:
        return file.stat().st_size if file.is_file() else None
    except OSError:  # another process has removed it
        return None
