"""Every kernel is compiled for every chip: what its machine code multiplies with, that nothing spills, that it fits.

What is compiled is what Inductor generates for the chip. How many instructions a loop takes is compared with a file for
each minor version of Triton; ``EXPECTTEST_ACCEPT=1`` writes it anew.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from quark_inductor.lowering.base import forcing
from quark_inductor.lowering.triton import template, tiles
from quark_inductor.lowering.triton.chips import CHIPS
from quark_inductor.schemes import registry  # noqa: F401

q = torch.ops.quark_inductor
N, K = 4096, 4096
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Case:
    """A fused GEMM.

    Attributes:
        weight: format of the weight.
        scale: shape of its scale: ``"block"``, ``"tensor"``, ``"channel"``, ``"group"``.
        x: format of the activation, ``""``: a weight alone is quantized.
        rule: scale rule of a prologue.
        group: columns that share a computed scale, or one of a weight.
        zero_points: of both operands.
    """

    weight: str
    scale: str = "block"
    x: str = ""
    rule: str = ""
    group: int = 0
    zero_points: bool = False


CASES = {
    "mxfp4": Case("mxfp4", x="mxfp4", rule="even"),
    "mxfp4_weight_only": Case("mxfp4"),
    "mxfp4_fp8": Case("mxfp4", x="fp8_e4m3", rule="given"),
    "mxfp4_mxfp8": Case("mxfp4", x="mxfp8_e4m3", rule="even"),
    "mxfp6_e2m3": Case("mxfp6_e2m3", x="mxfp6_e2m3", rule="even"),
    "mxfp8": Case("mxfp8_e4m3", x="mxfp8_e4m3", rule="rceil"),
    "nvfp4": Case("nvfp4", x="nvfp4", rule="sequential"),
    "nvfp4_weight_only": Case("nvfp4"),
    "amdfp4": Case("amdfp4_g16", x="amdfp4_g16", rule="nearest"),
    "fp8": Case("fp8_e4m3", "tensor", "fp8_e4m3", "given"),
    "ptpc_fp8": Case("fp8_e4m3", "channel", "fp8_e4m3", "amax"),
    "fp8_block128": Case("fp8_e4m3_128x128", "block", "fp8_e4m3", "amax", 128),
    "fp8_weight_only": Case("fp8_e4m3", "tensor"),
    "int8": Case("int8", "tensor", "int8", "given", zero_points=True),
    "ptpc_int8": Case("int8", "channel", "int8", "symmetric"),
    "int8_wo_128": Case("int8", "group", group=128),
    "uint4_wo_128": Case("uint4", "group", group=128),
    "int4_wo_per_channel": Case("int4", "channel"),
}
# Of what is multiplied as floating point, by chip: all matrix instructions of a kernel must be of this kind.
FLOAT = {
    "gfx942": r"v_mfma_f32_\d+x\d+x\d+_b?f16",
    "gfx950": r"v_mfma_f32_\d+x\d+x\d+_b?f16",
    "gfx1100": r"v_wmma_f32_16x16x16_b?f16",
    "sm_80": r"HMMA\.16816\.F32(\.BF16)?",
    "sm_90": r"HGMMA\.64x\d+x16\.F32(\.BF16)?",
    "sm_100": r"UTCHMMA",
    "sm_120": r"HMMA\.16816\.F32(\.BF16)?",
}
_MFMA_SCALE = r"v_mfma_scale_f32_(16x16x128|32x32x64)_f8f6f4\."
_SM_120_MX = r"QMMA\.SF\.16832\.F32\.E4M3\.E4M3\.E8"
_FP8 = {
    "gfx942": r"v_mfma_f32_\d+x\d+x\d+_fp8_fp8",
    "gfx950": r"v_mfma_f32_(16x16x128|32x32x64)_f8f6f4\.fp8\.fp8",
    "sm_90": r"QGMMA\.64x\d+x32\.F32\.E4M3\.E4M3",
    "sm_100": "UTCQMMA",
    "sm_120": r"QMMA\.16832\.F32\.E4M3\.E4M3",
}
_INT8 = {
    "gfx942": r"v_mfma_i32_\d+x\d+x\d+_i8",
    "gfx950": r"v_mfma_i32_\d+x\d+x\d+_i8",
    "gfx1100": r"v_wmma_i32_16x16x16_iu8",
    "sm_90": r"IGMMA\.64x\d+x32\.S8\.S8",
    **dict.fromkeys(("sm_80", "sm_100", "sm_120"), r"IMMA\.16832\.S8\.S8\.SAT"),
}
NATIVE = {
    "mxfp4": {
        "gfx950": _MFMA_SCALE + "fp4.fp4",
        "sm_100": "UTCOMMA",
        "sm_120": r"OMMA\.SF\.16864\.F32\.E2M1\.E2M1\.E8",
    },
    "mxfp4_fp8": {"gfx950": _MFMA_SCALE + "fp4.fp8", "sm_100": "UTCQMMA", "sm_120": _SM_120_MX},
    "mxfp4_mxfp8": {"gfx950": _MFMA_SCALE + "fp4.fp8", "sm_100": "UTCQMMA", "sm_120": _SM_120_MX},
    "mxfp6_e2m3": {"gfx950": _MFMA_SCALE + "fp8.fp8", "sm_100": "UTCQMMA", "sm_120": _SM_120_MX},
    "mxfp8": {"gfx950": _MFMA_SCALE + "fp8.fp8", "sm_100": "UTCQMMA", "sm_120": _SM_120_MX},
    "nvfp4": {"sm_100": r"UTCOMMA\.4X", "sm_120": r"OMMA\.SF\.16864\.F32\.E2M1\.E2M1\.UE4M3\.4X"},
    "fp8": _FP8,
    "ptpc_fp8": _FP8,
    "fp8_block128": _FP8,
    "int8": _INT8,
    "ptpc_int8": _INT8,
}
MAIN = ("gfx942", "gfx950", "sm_90", "sm_100", "sm_120")
OTHERS = ("gfx1100", "sm_80")


def block_tensors(format: str, rows: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and a global scale ``[rows, K]`` of a block format, not filled."""
    size = 16 if format in ("nvfp4", "amdfp4_g16") else 32
    bits = 8 if "fp8" in format else 6 if "fp6" in format else 4
    codes = torch.empty(rows, K * bits // 8, dtype=FP8 if bits == 8 else torch.uint8)
    scales = torch.empty(rows, K // size, dtype=FP8 if format == "nvfp4" else torch.uint8)
    return codes, scales, torch.empty(()) if format == "nvfp4" else None


def weight_tensors(case: Case, fp8: torch.dtype) -> tuple[Tensor | None, ...]:
    """Codes, scale, second scale and zero point of the weight."""
    name = case.weight
    if case.scale == "block" and "x" not in name.removeprefix("mxf"):
        return *block_tensors(name, N), None
    if name.endswith("128x128"):
        return torch.empty(N, K, dtype=fp8), torch.empty(N // 128, K // 128), None, None
    shape = {"tensor": (), "channel": (N,), "group": (N, K // (case.group or K))}[case.scale]
    scale = torch.empty(shape, dtype=torch.bfloat16)
    if name.startswith("fp8"):
        return torch.empty(N, K, dtype=fp8), scale, None, None
    if name == "int8":
        zero_point = torch.empty(shape, dtype=torch.int8) if case.zero_points else None
        codes = torch.empty(N, K, dtype=torch.int8)
        if case.scale == "group":  # stored [K, N]
            return torch.empty(K, N, dtype=torch.int8).t(), torch.empty(K // case.group, N).bfloat16().t(), None, None
        return codes, scale, None, zero_point
    if case.scale == "group":
        groups = K // case.group
        words = [torch.empty(rows, N // 8, dtype=torch.int32) for rows in (K, groups)]
        return words[0], torch.empty(groups, N, dtype=torch.bfloat16), None, words[1]
    return torch.empty(N, K // 8, dtype=torch.int32), scale, None, torch.empty(N // 8, dtype=torch.int32)


def call(case: Case, m: int, arch: str, experts: int = 0) -> tuple[Callable[..., Any], list[Tensor]]:
    """A function that calls the op, and its tensors. With few tokens it quantizes in its prologue."""
    tokens = m // (experts or 1)
    fnuz = arch == "gfx942" and case.weight.startswith("fp8")
    fp8 = torch.float8_e4m3fnuz if fnuz else FP8
    names = [name.replace("fp8_e4m3", "fp8_e4m3fnuz") if fnuz else name for name in (case.x, case.weight)]
    by_weight = (*weight_tensors(case, fp8), None)
    if experts:
        held = [None if t is None else torch.empty((experts, *t.shape), dtype=t.dtype) for t in by_weight]
        by_weight = (*held[:-1], torch.empty(experts, N, dtype=torch.bfloat16))
    offsets = torch.empty(experts, dtype=torch.int32) if experts else None
    x: tuple[Tensor | None, ...]
    if case.x == "":
        x = (torch.empty(m, K, dtype=torch.bfloat16),)
        return _of(lambda *t: q.weight_only_gemm(*t[:-1], names[1], offsets=t[-1]), (*x, *by_weight, offsets))
    zero_point = torch.empty((), dtype=torch.int8) if case.zero_points else None
    if tokens <= (64 if case.rule == "given" else 16):
        scale = torch.empty((), dtype=torch.bfloat16) if case.rule == "given" else None
        second = torch.empty(()) if case.x == "nvfp4" else None
        x = torch.empty(m, K, dtype=torch.bfloat16), scale, second, zero_point
        rest = (names[0], case.rule, case.group, names[1])
        return _of(lambda *t: q.prologue_gemm(*t[:-1], *rest, offsets=t[-1]), (*x, *by_weight, offsets))
    if case.x in ("fp8_e4m3", "int8"):
        groups = (m, K // case.group) if case.group else () if case.rule == "given" else (m, 1)
        codes = torch.empty(m, K, dtype=fp8 if case.x == "fp8_e4m3" else torch.int8)
        x = codes, torch.empty(groups, dtype=torch.bfloat16), None, zero_point
    else:
        x = *block_tensors(case.x, m), None
    return _of(lambda *t: q.quantized_gemm(*t[:-1], *names, "bfloat16", offsets=t[-1]), (*x, *by_weight, offsets))


def _of(op: Callable[..., Any], arguments: tuple[Tensor | None, ...]) -> tuple[Callable[..., Any], list[Tensor]]:
    """The op as a function of those arguments that are tensors."""

    def function(*tensors: Tensor) -> Any:
        given = iter(tensors)
        return (op(*(None if a is None else next(given) for a in arguments)),)

    return function, [a for a in arguments if a is not None]


def jobs(
    name: str,
    m: int,
    arch: str,
    generated: ModuleType,
    fake_gpu: ModuleType,
    offline_module: Any,
    experts: int = 0,
) -> list[Any]:
    """What the offline compiler gets: the GEMMs that Inductor generates."""
    function, tensors = call(CASES[name], m, arch, experts)
    graph = generated.graph_of(function, *tensors).graph
    with forcing("triton"):
        code = fake_gpu.gpu_code(graph, arch)
    return [
        offline_module.Job(
            source=kernel.source,
            name=kernel.name,
            signature=kernel.signature,
            constants={},
            target=arch,
            options={"num_warps": kernel.warps, "num_stages": kernel.stages},
            divisible=tuple(a for a in kernel.divisible if not kernel.signature[a].startswith("*")),
        )
        for kernel in generated.kernels(code)
        if kernel.kind == "template"
    ]


def has_kernel(name: str, m: int, arch: str) -> bool:
    """Triton has no FP8 on sm_80."""
    case = CASES[name]
    return arch != "sm_80" or not ("fp8" in case.weight + case.x or "nvfp4" in case.weight)


class Golden:
    """Instructions per matrix instruction, by chip, case and tokens, as they were with this minor version of Triton."""

    def __init__(self, version: str) -> None:
        minor = ".".join(version.split(".")[:2])
        self.path = Path(__file__).parent / "golden" / f"triton_{minor}.json"
        self.known: dict[str, float] = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.accepts = os.environ.get("EXPECTTEST_ACCEPT") == "1"

    def check(self, key: str, figures: Any) -> None:
        """Within 2 percent of the file, if there is one for this version."""
        # A loop that is unrolled to its end is none.
        per_mma = figures.instructions_per_mma or figures.instructions / sum(figures.mma.values())
        found = round(per_mma, 2)
        if self.accepts:
            self.known = json.loads(self.path.read_text()) if self.path.exists() else {}
            self.known[key] = found
            self.path.parent.mkdir(exist_ok=True)
            self.path.write_text(json.dumps(self.known, indent=0, sort_keys=True) + "\n")
        elif self.known:
            assert key in self.known, f"{key} is not in {self.path.name}: EXPECTTEST_ACCEPT=1 writes it"
            expected = self.known[key]
            assert abs(found / expected - 1) <= 0.02, (
                f"{key}: {found} instructions a matrix instruction, not {expected}"
            )


@pytest.fixture(scope="module")
def golden() -> Golden:
    triton = pytest.importorskip("triton", reason="compiles Triton kernels: pip install triton")
    return Golden(triton.__version__)


@pytest.fixture(scope="module")
def offline_module(offline: Any) -> Any:
    """``offline.py``."""
    import sys

    return sys.modules["offline"]


def parameters() -> Iterator[Any]:
    for arch in (*MAIN, *OTHERS):
        for m in (16, 64, 4096):
            # Few tokens on every chip, where a prologue is part of the kernel, and many on one.
            main = arch in MAIN if m == 16 else (arch, m) == ("gfx950", 4096)
            slow = [] if main else [pytest.mark.fuzz]
            yield pytest.param(arch, m, marks=slow)


@pytest.mark.parametrize(("arch", "m"), list(parameters()))
def test_machine_code(
    offline: Any,
    offline_module: Any,
    generated: ModuleType,
    fake_gpu: ModuleType,
    golden: Golden,
    arch: str,
    m: int,
) -> None:
    names = [name for name in CASES if has_kernel(name, m, arch)]
    all_jobs = [jobs(name, m, arch, generated, fake_gpu, offline_module) for name in names]
    check_machine_code(offline, offline_module, golden, arch, f"M={m}", names, all_jobs)


def check_machine_code(
    offline: Any, offline_module: Any, golden: Golden, arch: str, size: str, names: list[str], all_jobs: list[list[Any]]
) -> None:
    chip = offline_module.TARGETS[arch]
    assert [len(found) for found in all_jobs] == [1] * len(names)
    wrong = []
    for name, result in zip(names, offline.compile([found[0] for found in all_jobs]), strict=True):
        if isinstance(result, offline_module.Failure):
            wrong.append(f"{name}: {result.reason}")
            continue
        wrong += [f"{name}: {problem}" for problem in result.problems(chip)]
        expected = NATIVE.get(name, {}).get(arch, FLOAT[arch])
        others = [opcode for opcode in result.mma if not re.fullmatch(expected, opcode)]
        if others or not result.mma:
            wrong.append(f"{name}: multiplies by {result.mma}, expected {expected}")
            continue
        try:
            golden.check(f"{arch} {name} {size}", result)
        except AssertionError as error:
            wrong.append(str(error))
    assert not wrong, "\n".join(wrong)


EXPERTS = 8
# One of each way to multiply, and to read a weight, of which a chip has half, with few tokens or with many.
GROUPED = ("mxfp4", "mxfp4_weight_only", "fp8", "nvfp4", "ptpc_int8", "int4_wo_per_channel")


def grouped_parameters() -> Iterator[Any]:
    """Two tokens an expert in the mean, more that are still few, and many."""
    for i, arch in enumerate((*MAIN, *OTHERS)):
        for m in (16, 256, 4096):
            main = GROUPED[i // 2 % 2 :: 2] if arch in MAIN and m == (16, 4096)[i % 2] else ()
            if main:
                yield pytest.param(arch, m, main, id=f"{arch}-{m}")
            others = [name for name in CASES if name not in main and has_kernel(name, m, arch)]
            yield pytest.param(arch, m, others, id=f"{arch}-{m}-others", marks=pytest.mark.fuzz)


@pytest.mark.parametrize(("arch", "m", "names"), list(grouped_parameters()))
def test_machine_code_of_experts(
    offline: Any,
    offline_module: Any,
    generated: ModuleType,
    fake_gpu: ModuleType,
    golden: Golden,
    arch: str,
    m: int,
    names: list[str],
) -> None:
    all_jobs = [jobs(name, m, arch, generated, fake_gpu, offline_module, EXPERTS) for name in names]
    check_machine_code(offline, offline_module, golden, arch, f"E={EXPERTS} M={m}", names, all_jobs)


@pytest.mark.fuzz
@pytest.mark.parametrize("arch", [*MAIN, *OTHERS])
@pytest.mark.parametrize("m", [16, 64, 4096])
def test_every_tile_that_is_measured(
    offline: Any, offline_module: Any, generated: ModuleType, fake_gpu: ModuleType, arch: str, m: int
) -> None:
    """Those of max_autotune compile, fit and do not spill."""
    wrong = []
    chip = offline_module.TARGETS[arch]
    choose = tiles.tiles_for
    for name in (name for name in CASES if has_kernel(name, m, arch)):
        for i in range(1, 4):

            def one(*arguments: Any, i: int = i, **options: Any) -> list[tiles.Tile]:
                found = choose(*arguments, most=True)
                return found[i : i + 1] or found[:1]  # not all problems have as many

            with patch.object(template, "tiles_for", one):
                found = jobs(name, m, arch, generated, fake_gpu, offline_module)
            (result,) = offline.compile(found)
            failed = isinstance(result, offline_module.Failure)
            problems = [result.reason] if failed else result.problems(chip)
            wrong += [f"{name}, tile {i}: {problem}" for problem in problems]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(("m", "is_late"), [(64, False), (4096, True)])
def test_scales_of_rows_are_loaded_after_the_loop(
    generated: ModuleType, fake_gpu: ModuleType, offline_module: Any, m: int, is_late: bool
) -> None:
    """Where there are many tokens: in the loop they hold registers."""
    (job,) = jobs("ptpc_fp8", m, "gfx950", generated, fake_gpu, offline_module)
    loop = job.source.index("for step in range(first, last)")
    for load in ("tl.load(X_SCALE + m)", "tl.load(WEIGHT_SCALE + n)"):
        assert (job.source.index(load) > loop) == is_late


@pytest.mark.parametrize("name", ["ptpc_fp8", "ptpc_int8"])
def test_no_rows_share_banks_of_lds(
    generated: ModuleType,
    fake_gpu: ModuleType,
    offline_module: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """On gfx942 both tiles lie there in an order in which neighbouring rows begin at different banks."""
    pytest.importorskip("triton", reason="compiles Triton kernels: pip install triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    (job,) = jobs(name, 4096, "gfx942", generated, fake_gpu, offline_module)
    compiled = offline_module.compile_source(**vars(job))
    phases = re.findall(r"#ttg\.swizzled_shared<\{[^}]*maxPhase = (\d+)", compiled.asm["ttgir"])
    assert len(phases) == 2
    assert "1" not in phases


def test_limits_are_those_of_the_chips(offline_module: Any) -> None:
    """The provider's and the compiler's facts."""
    for name, chip in offline_module.TARGETS.items():
        assert CHIPS[name].shared == chip.shared_limit, name
        assert CHIPS[name].warp == chip.warp_size, name
