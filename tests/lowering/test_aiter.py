"""AITER without AITER: a package of its name, with its signatures, stands in (``fake_aiter.py``)."""

import dataclasses
import itertools
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

import quark_inductor as qi
from quark_inductor.lowering import aiter, target
from quark_inductor.lowering.aiter import ARCHS, FEW_TOKENS, GROUPED, PACKED, Aiter, Aiter16x16
from quark_inductor.lowering.base import GemmProblem, No, provider_keys
from quark_inductor.lowering.cpp.panel64 import Panel64
from quark_inductor.lowering.target import Target
from quark_inductor.patterns import late_decomposition
from quark_inductor.schemes import experts as of_experts
from quark_inductor.schemes.base import QuarkLinear
from quark_inductor.schemes.errors import QuarkInductorError, ShapeError
from quark_inductor.schemes.experts import QuarkExperts
from quark_inductor.schemes.layout import Stored, layout_for

Q = torch.ops.quark_inductor
FP8 = torch.float8_e4m3fn
GFX942, GFX950 = (Target(device_type="cuda", arch=arch) for arch in ("gfx942", "gfx950"))
M, N, K = 9, 48, 256
URL = "see https://github.com/ROCm/aiter"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Installs a package ``aiter`` of these files, by path; a file is what it says, or the GEMM of its name."""

    def forget() -> None:
        aiter.modules.cache_clear()
        for name in [name for name in sys.modules if name.partition(".")[0] == "aiter"]:
            del sys.modules[name]

    def install(*gemms: str, folder: str = "gemm/basic", init: str = "") -> None:
        root = tmp_path / "aiter"
        (root / "ops/triton" / folder).mkdir(parents=True)
        (root / "__init__.py").write_text(init)
        fake = Path(__file__).with_name("fake_aiter.py")
        shutil.copy(fake, root / "ops/triton/fake_aiter.py")
        (root / "utility").mkdir()
        dtypes = "import torch\nfp4x2, fp8_e8m0 = torch.float4_e2m1fn_x2, torch.float8_e8m0fnu\n"
        (root / "utility/dtypes.py").write_text(dtypes)
        for name in sorted(gemms, key=list(ARCHS).index):
            if name in PACKED:  # in a file with others, which defines it
                file = root.joinpath("ops", *PACKED[name][0].split(".")).with_suffix(".py")
                file.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(fake, file)
                continue
            if name in GROUPED:
                for module in (f"{'moe.' if folder else ''}{GROUPED[name][0]}", "utils.moe_config_utils"):
                    file = root.joinpath("ops/triton", *module.split(".")).with_suffix(".py")
                    file.parent.mkdir(exist_ok=True)
                    shutil.copy(fake, file)
                continue
            line = f"from aiter.ops.triton.fake_aiter import {name}\n"
            (root / "ops/triton" / folder / f"{name}.py").write_text(line)
        forget()

    monkeypatch.syspath_prepend(tmp_path)
    forget()
    yield install
    forget()


@pytest.fixture
def installed(package: Callable[..., None]) -> None:
    """All of it."""
    package(*ARCHS)


def problem(**changes: Any) -> GemmProblem:
    both = {"x_format": "mxfp4", "weight_format": "mxfp4", "weight_scale_ndim": 2, "x_granularity": "per_group"}
    return GemmProblem(**{"op": "quantized_gemm", "m": M, "n": N, "k": K, "dtype": "bfloat16", **both, **changes})


# --- what is installed


def answer(on: Target = GFX950, **changes: Any) -> str | None:
    found = Aiter().can_run(on, problem(**changes))
    return found and found.reason


def test_not_installed(package: Callable[..., None]) -> None:
    assert answer() == f"AITER is not installed: {URL}"
    assert Aiter().found() == ()
    with pytest.raises(QuarkInductorError, match="runs a function of AITER's; AITER is not installed: see https"):
        Q.aiter_gemm_a16wfp4(torch.zeros(1, 32), torch.zeros(1, 16), torch.zeros(1, 1))


@pytest.mark.parametrize("kind", ["a module", "a package"])
def test_somebody_elses(tmp_path: Path, package: Callable[..., None], kind: str) -> None:
    """PyPI's: a library for asynchronous iterators."""
    if kind == "a package":
        (tmp_path / "aiter").mkdir()
        (tmp_path / "aiter/__init__.py").touch()
    else:
        (tmp_path / "aiter.py").touch()
    assert answer() == f"the package aiter that is installed is not AMD's: {URL}"


@pytest.mark.parametrize("triton_only", ["", "1"])
@pytest.mark.parametrize("folder", ["gemm/basic", ""], ids=["new", "old"])
def test_it_is_found_and_not_imported(
    package: Callable[..., None], monkeypatch: pytest.MonkeyPatch, folder: str, triton_only: str
) -> None:
    """Importing it fails where there is no ROCm, unless it is told to be Triton only; both have these kernels."""
    monkeypatch.setenv("AITER_TRITON_ONLY", triton_only)
    package("gemm_afp4wfp4", folder=folder, init="raise RuntimeError('ROCm version file not found')")
    assert answer() is None
    assert "aiter" not in sys.modules
    found = aiter.modules()
    assert not isinstance(found, No)
    assert found == {"gemm_afp4wfp4": f"aiter.ops.triton{'.gemm.basic' if folder else ''}.gemm_afp4wfp4"}


@pytest.mark.parametrize(
    ("old", "new", "missing"),
    [
        ("dtype=torch.bfloat16,\n    alpha", "out=None,\n    alpha", ["gemm_a4w4"]),
        ("prequant=True, ", "", ["gemm_a16wfp4_preshuffle"]),
        (
            "def gemm_afp4wfp4_preshuffle(",
            "def gemm_afp4wfp4_preshuffled_weight_scales(",
            ["gemm_afp4wfp4_preshuffle"],
        ),
        ("def gemm_", "def _gemm_", list(PACKED)),
    ],
)
def test_other_signatures(tmp_path: Path, package: Callable[..., None], old: str, new: str, missing: list[str]) -> None:
    """A file that is there may be of a version whose function takes other arguments, or has another name."""
    package(*ARCHS)
    for file in {
        tmp_path.joinpath("aiter/ops", *module.split(".")).with_suffix(".py") for module, _ in PACKED.values()
    }:
        file.write_text(file.read_text().replace(old, new))
    aiter.modules.cache_clear()
    found = aiter.modules()
    assert not isinstance(found, No)
    assert [name for name in PACKED if name not in found] == missing
    assert "aiter" not in sys.modules


def test_triton_only(package: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the assembler kernels are there, and nothing to call them with."""
    monkeypatch.setenv("AITER_TRITON_ONLY", "1")
    package(*ARCHS)
    assert Aiter().found() == tuple(name for name in ARCHS if name != "gemm_a4w4")
    assert answer(**PACK) == "the AITER that is installed has no gemm_a4w4"


def test_an_older_one(package: Callable[..., None]) -> None:
    package("gemm_afp4wfp4", folder="")
    prologue = {"op": "prologue_gemm", "scale_rule": "even", "x_granularity": ""}
    assert answer(**prologue) == "the AITER that is installed has no gemm_a16wfp4"
    with pytest.raises(QuarkInductorError, match="the AITER that is installed has no gemm_a16wfp4"):
        Q.aiter_gemm_a16wfp4(torch.zeros(1, 32), torch.zeros(1, 16), torch.zeros(1, 1))


def test_the_cache_key_has_it(package: Callable[..., None]) -> None:
    """Code that calls it must not be taken from a cache where it is not."""
    before = provider_keys()
    package(*ARCHS)
    assert before[0] == ("aiter",)
    assert provider_keys() == (("aiter", *ARCHS), *before[1:])


# --- who may


BY_ROWS = {"x_granularity": "per_token", "weight_scale_ndim": 1}
IN_FP8 = {"x_format": "fp8_e4m3", "weight_format": "fp8_e4m3", **BY_ROWS}
IN_FNUZ = {"x_format": "fp8_e4m3fnuz", "weight_format": "fp8_e4m3fnuz", **BY_ROWS}
BLOCKS = {"x_format": "fp8_e4m3", "weight_format": "fp8_e4m3_128x128", "x_columns": 128}
BLOCKS_IN_FNUZ = {"x_format": "fp8_e4m3fnuz", "weight_format": "fp8_e4m3fnuz_128x128", "x_columns": 128}
EXPERTS = {"experts": 8, "grouped": True}
INT8 = {"x_format": "int8", "weight_format": "int8", **BY_ROWS}
PACK = {"layout": "aiter_16x16", "n": 128}
PROLOGUE = {"op": "prologue_gemm", "scale_rule": "even", "x_granularity": ""}


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("on", "changes"),
    [
        (GFX950, {}),
        (GFX950, {"dtype": "float16", "m": None}),
        (GFX950, PROLOGUE),
        (GFX950, PACK),
        (GFX950, {**PACK, "dtype": "float16", "m": None}),
        (GFX950, {**PACK, **PROLOGUE}),
        (GFX950, {"x_format": "fp8_e4m3", "x_granularity": "per_tensor"}),
        (GFX950, {"x_format": "fp8_e4m3", "x_granularity": "per_token"}),
        (GFX950, IN_FP8),
        (GFX942, IN_FNUZ),
        (GFX950, BLOCKS),
        (GFX950, {**BLOCKS, "k": 128, "x_granularity": "per_token", "x_columns": 0}),
        (GFX942, INT8),
        (GFX950, INT8),
        (GFX950, EXPERTS),
        (GFX950, {**EXPERTS, "dtype": "float16", "m": None, "n": 7, "k": 64, "rounds": True}),
        (GFX950, {**EXPERTS, **BLOCKS}),
        (GFX942, {**EXPERTS, **BLOCKS_IN_FNUZ, "dtype": "float16", "m": None}),
    ],
    ids=str,
)
def test_what_it_runs(on: Target, changes: dict[str, Any]) -> None:
    assert answer(on, **changes) is None


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("on", "changes", "reason"),
    [
        (Target(device_type="cpu", arch="x86_64"), {}, "for GPUs, the device is cpu"),
        (Target(device_type="cuda", arch="sm_90"), {}, "runs on gfx942, gfx950, the device is sm_90"),
        (GFX942, {}, "gemm_afp4wfp4 runs on gfx950, the device is gfx942"),
        (GFX942, PROLOGUE, "gemm_a16wfp4 runs on gfx950, the device is gfx942"),
        (GFX942, IN_FP8, "gfx942 multiplies fp8_e4m3fnuz, the activation is fp8_e4m3"),
        (GFX950, IN_FNUZ, "gfx950 multiplies fp8_e4m3, the activation is fp8_e4m3fnuz"),
        (GFX950, {"layout": "panel64"}, "has no kernel for the layout panel64, which unpack_() undoes"),
        (GFX942, {"layout": "aiter_16x16"}, "gemm_a4w4 runs on gfx950, the device is gfx942"),
        (
            GFX950,
            {**PACK, "dtype": "float32"},
            "the result's dtype is float32; it makes bfloat16, float16: choose one with load(dtype=)",
        ),
        (GFX950, {**PACK, **PROLOGUE, "m": 65}, "quantizes up to 64 tokens in the GEMM, M is 65"),
        (
            GFX950,
            {**PACK, "x_format": "fp8_e4m3", "x_granularity": "per_token"},
            "has no kernel for quantized_gemm of fp8_e4m3 and mxfp4 in the layout aiter_16x16, which unpack_() undoes",
        ),
        (
            GFX950,
            {**PACK, **PROLOGUE, "scale_rule": "floor"},
            "has no kernel for prologue_gemm of mxfp4 floor and mxfp4 in the layout aiter_16x16, which unpack_() "
            "undoes",
        ),
        (GFX950, {"experts": 8}, "has no kernel for experts of as many rows each"),
        (GFX942, EXPERTS, "fused_moe_mxfp4 runs on gfx950, the device is gfx942"),
        (GFX950, {**EXPERTS, **PACK}, "has no kernel for experts in the layout aiter_16x16, which unpack_() undoes"),
        (
            GFX950,
            {**EXPERTS, "dtype": "float32"},
            "the result's dtype is float32; it makes bfloat16, float16: choose one with load(dtype=)",
        ),
        (GFX950, {**EXPERTS, "k": 32}, "reads scales past the last of experts where K is 32"),
        (
            GFX950,
            {**EXPERTS, **PROLOGUE},
            "has no kernel for prologue_gemm of mxfp4 even and mxfp4, 8 experts",
        ),
        (
            GFX950,
            {**EXPERTS, "op": "weight_only_gemm", "x_format": ""},
            "has no kernel for weight_only_gemm of bfloat16 and mxfp4, 8 experts",
        ),
        (GFX950, {**EXPERTS, **IN_FP8}, "has no kernel for quantized_gemm of fp8_e4m3 and fp8_e4m3, 8 experts"),
        (GFX950, {**EXPERTS, **INT8}, "has no kernel for quantized_gemm of int8 and int8, 8 experts"),
        (
            GFX950,
            {**EXPERTS, "x_format": "fp8_e4m3", "x_granularity": "per_token"},
            "has no kernel for quantized_gemm of fp8_e4m3 and mxfp4, 8 experts",
        ),
        (
            GFX950,
            {**EXPERTS, **INT8, "zero_points": True},
            "has no kernel for zero points, whose values are not known when compiling",
        ),
        (GFX942, {**EXPERTS, **BLOCKS}, "gfx942 multiplies fp8_e4m3fnuz, the activation is fp8_e4m3"),
        (
            GFX950,
            {**EXPERTS, **BLOCKS, "rounds": True},
            "does not round operands, as emulate_precision_casts asks for: leave it out",
        ),
        (GFX950, {**EXPERTS, **BLOCKS, "x_columns": 64}, "scales 128 elements of a row at a time"),
        (
            GFX950,
            {**EXPERTS, **BLOCKS, "k": 192},
            "has no kernel for quantized_gemm of fp8_e4m3 and fp8_e4m3_128x128, 8 experts",
        ),
        (
            GFX950,
            {"dtype": "float32"},
            "the result's dtype is float32; it makes bfloat16, float16: choose one with load(dtype=)",
        ),
        (
            GFX950,
            {**PROLOGUE, "m": None},
            "quantizes up to 64 tokens in the GEMM, M is not known: compile with dynamic=False",
        ),
        (GFX950, {**PROLOGUE, "m": FEW_TOKENS + 1}, "quantizes up to 64 tokens in the GEMM, M is 65"),
        (GFX950, {**PROLOGUE, "scale_rule": "floor"}, "has no kernel for prologue_gemm of mxfp4 floor and mxfp4"),
        (
            GFX950,
            {"op": "weight_only_gemm", "x_format": ""},
            "has no kernel for weight_only_gemm of bfloat16 and mxfp4",
        ),
        (
            GFX950,
            {"x_format": "fp8_e4m3", "x_columns": 128},
            "has no kernel for quantized_gemm of fp8_e4m3 and mxfp4",
        ),
        (GFX950, {"weight_format": "nvfp4"}, "has no kernel for quantized_gemm of mxfp4 and nvfp4"),
        (GFX950, {**BLOCKS, "x_columns": 64}, "scales 128 elements of a row at a time"),
        (GFX950, {**BLOCKS, "x_columns": 0, "x_granularity": "per_token"}, "scales 128 elements of a row at a time"),
        (GFX950, {**BLOCKS, "k": 192}, "has no kernel for quantized_gemm of fp8_e4m3 and fp8_e4m3_128x128"),
        (
            GFX950,
            {**INT8, "zero_points": True},
            "has no kernel for zero points, whose values are not known when compiling",
        ),
        (GFX950, {**INT8, "weight_scale_ndim": 2}, "has no kernel for quantized_gemm of int8 and int8"),
    ],
    ids=str,
)
def test_what_it_refuses(on: Target, changes: dict[str, Any], reason: str) -> None:
    assert answer(on, **changes) == reason


# --- numbers


def codes(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    if dtype is FP8:
        return torch.randn(*shape).mul(4).to(FP8)
    low, high = (0, 256) if dtype is torch.uint8 else (-127, 128)
    return torch.randint(low, high, shape, dtype=dtype)


def scales(*shape: int) -> Tensor:
    return torch.randint(122, 130, shape, dtype=torch.uint8)


def rand(*shape: int) -> Tensor:
    return torch.rand(shape) + 0.25


def case(gemm: str, dtype: torch.dtype = torch.bfloat16, bias: bool = False) -> tuple[str, list[Any]]:
    """The fused op and arguments that a GEMM of AITER's computes."""
    torch.manual_seed(0)
    name = str(dtype).removeprefix("torch.")
    if gemm.partition(" ")[0] in PACKED:
        return packed_case(gemm, dtype, bias)
    added = torch.randn(N).to(dtype) if bias else None
    weight = codes(N, K // 2), scales(N, K // 32), None, None, added
    if gemm == "gemm_a16wfp4":
        x = torch.randn(M, K).to(dtype)
        return "prologue_gemm", [x, None, None, None, *weight, "mxfp4", "even", 0, "mxfp4"]
    if gemm == "gemm_afp4wfp4":
        return "quantized_gemm", [codes(M, K // 2), scales(M, K // 32), None, None, *weight, "mxfp4", "mxfp4", name]
    if gemm.startswith("gemm_a8wfp4"):
        x_scale = rand() if gemm.endswith("tensor") else rand(M, 1)
        return "quantized_gemm", [codes(M, K, dtype=FP8), x_scale, None, None, *weight, "fp8_e4m3", "mxfp4", name]
    of = torch.int8 if gemm.endswith("int8") else FP8
    x, w, format = codes(M, K, dtype=of), codes(N, K, dtype=of), "int8" if of is torch.int8 else "fp8_e4m3"
    if gemm == "gemm_a8w8_blockscale":
        x_scale, w_scale = rand(M, K // 128), rand(1, K // 128)
        return "quantized_gemm", [
            x,
            x_scale,
            None,
            None,
            w,
            w_scale,
            None,
            None,
            added,
            format,
            f"{format}_128x128",
            name,
        ]
    x_scale, w_scale = (rand(), rand()) if gemm.endswith("tensor") else (rand(M, 1), rand(N))
    return "quantized_gemm", [x, x_scale, None, None, w, w_scale, None, None, added, format, format, name]


# Output features of a packed weight: less than 256, to which its scales are padded.
PACKED_N = 128


def packed_case(gemm: str, dtype: torch.dtype, bias: bool) -> tuple[str, list[Any]]:
    """The same of a weight in the layout."""
    m = int(gemm.partition(" ")[2] or M)
    stored = Stored(format="mxfp4", shape=(PACKED_N, K // 2), activation="mxfp4")
    packed = Aiter16x16().pack((codes(PACKED_N, K // 2), scales(PACKED_N, K // 32)), stored)
    rest = packed, None, None, None, torch.randn(PACKED_N).to(dtype) if bias else None
    where = Aiter16x16.name, *stored.shape
    if gemm == "gemm_a16wfp4_preshuffle":
        x = torch.randn(m, K).to(dtype)
        return "prologue_gemm", [x, None, None, None, *rest, "mxfp4", "even", 0, "mxfp4", *where]
    x, x_scale, name = codes(m, K // 2), scales(m, K // 32), str(dtype).removeprefix("torch.")
    return "quantized_gemm", [x, x_scale, None, None, *rest, "mxfp4", "mxfp4", name, *where]


CASES = [
    "gemm_afp4wfp4",
    "gemm_a16wfp4",
    "gemm_a8wfp4",
    "gemm_a8wfp4 tensor",
    "gemm_a8w8",
    "gemm_a8w8 tensor",
    "gemm_a8w8 int8",
    "gemm_a8w8_blockscale",
    "gemm_a4w4",
    "gemm_a4w4 300",
    "gemm_afp4wfp4_preshuffle",
    "gemm_afp4wfp4_preshuffle 40",
    "gemm_a16wfp4_preshuffle",
]


@pytest.fixture
def mi350(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device says that it is an MI350, whatever it is."""
    monkeypatch.setattr(target, "current", lambda device_type="cpu": GFX950)


def results(gemm: str) -> list[torch.dtype]:
    """The dtypes that a GEMM makes where it is chosen."""
    if gemm.startswith("gemm_a4w4"):
        return [torch.bfloat16]
    return [torch.float16] if gemm.startswith("gemm_afp4wfp4_preshuffle") else [torch.bfloat16, torch.float16]


def close(y: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Within what dequantizing both operands to the dtype may change, and the sums' roundings to it.

    The emulation's values are rounded to the dtype, half an epsilon each, which products of K random signs add up to
    a small part of their largest.
    """
    assert y.dtype is expected.dtype is dtype
    torch.testing.assert_close(y, expected, rtol=0, atol=4 * torch.finfo(dtype).eps * expected.abs().max().item())


@pytest.mark.usefixtures("installed", "mi350")
# A compile takes seconds: each dtype and no bias once.
@pytest.mark.parametrize(
    ("gemm", "dtype", "bias"),
    [(gemm, dtype, bias) for gemm in CASES for dtype, bias in zip(results(gemm) * 2, (True, False), strict=False)],
    ids=str,
)
def test_numbers(compiled: Callable[..., Any], gemm: str, dtype: torch.dtype, bias: bool) -> None:
    """Through the lowering: scales in the shapes and dtypes AITER wants, and the bias."""
    op, args = case(gemm, dtype, bias)
    fused = getattr(Q, op)
    expected = fused(*args)
    y = compiled(lambda: fused(*args))
    assert counters["inductor"][f"quark.{op}.aiter"] == 1
    close(y, expected, dtype)
    assert expected.abs().mean() > 1


@pytest.mark.usefixtures("installed", "mi350")
@pytest.mark.parametrize("gemm", ["gemm_a8wfp4 tensor", "gemm_a4w4"])
def test_tokens_not_known_before_run_time(compiled: Callable[..., Any], gemm: str) -> None:
    op, (x, *rest) = case(gemm)
    torch._dynamo.mark_dynamic(x, 0)
    if gemm == "gemm_a4w4":
        torch._dynamo.mark_dynamic(rest[0], 0)
    close(compiled(lambda: getattr(Q, op)(x, *rest)), getattr(Q, op)(x, *rest), torch.bfloat16)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("gemm", [name for name in ARCHS if name not in GROUPED])
def test_the_ops_are_ops(gemm: str) -> None:
    """Schema, fake, and a trace with symbolic sizes; they compute what AITER's functions do."""
    op, args = case(gemm)
    tensors = [args[0], args[1], args[4], args[5]]
    if "gemm_a16wfp4" in gemm:
        tensors.pop(1)
        rest: list[Any] = []
    if gemm in PACKED:
        tensors.pop()
        rest = [PACKED_N] if gemm == "gemm_a16wfp4_preshuffle" else [PACKED_N, "bfloat16"]
    elif gemm != "gemm_a16wfp4":
        rest = [None, "bfloat16"] if gemm == "gemm_a8w8" else ["bfloat16"]
        if gemm == "gemm_a8w8":
            tensors[3] = tensors[3].unsqueeze(0)
    own = getattr(Q, f"aiter_{gemm}").default
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    # The first compares tensors in a way that torch has not for FP8.
    checks = checks[1:] if FP8 in {tensor.dtype for tensor in tensors} else checks
    torch.library.opcheck(own, (*tensors, *rest), test_utils=checks)
    close(own(*tensors, *rest), getattr(Q, op)(*args), torch.bfloat16)


@pytest.mark.usefixtures("installed", "mi350")
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("gemm", CASES)
def test_the_code_for_a_gpu(gpu_code: Callable[..., str], gemm: str, bias: bool) -> None:
    """A call, and kernels only for a scale that is repeated and a bias that AITER does not add."""
    op, args = case(gemm, results(gemm)[0], bias)
    at = [i for i, a in enumerate(args) if isinstance(a, Tensor)]

    def run(*tensors: Tensor) -> Any:
        given = iter(tensors)
        return getattr(Q, op)(*(next(given) if i in at else a for i, a in enumerate(args)))

    code = gpu_code(run, [args[i] for i in at])
    name, _, tensor = gemm.partition(" ")
    assert code.count(f"torch.ops.quark_inductor.aiter_{name}.default(") == 1
    repeated = 0 if tensor != "tensor" else 2 if name == "gemm_a8w8" else 1
    assert code.count("async_compile.triton(") == repeated + (bias and name != "gemm_a8w8")


# --- experts

NO_OTHER = ", or what chooses its tiles, takes other arguments"


@pytest.mark.parametrize(
    ("file", "old", "new", "missing"),
    [
        ("moe/moe_op_mxfp4", "A_mx_scale,\n", "", ["fused_moe_mxfp4"]),
        ("moe/moe_op_mxfp4", "swizzle_mx_a,\n    swizzle_mx_b", "swizzle_mx_b,\n    swizzle_mx_a", ["fused_moe_mxfp4"]),
        (
            "moe/moe_op_mxfp4",
            "compute_type,\n):\n    assert",
            "compute_type,\n    more,\n):\n    assert",
            ["fused_moe_mxfp4"],
        ),
        ("moe/moe_op_mxfp4", "compute_type,\n):\n    assert", "compute_type,\n    more=None,\n):\n    assert", []),
        (
            "moe/moe_op_mxfp4",
            "compute_type,\n):\n    assert",
            "compute_type,\n    *,\n    more,\n):\n    assert",
            ["fused_moe_mxfp4"],
        ),
        ("moe/moe_op_mxfp4", "compute_type,\n):\n    assert", "compute_type,\n    *,\n    more=1,\n):\n    assert", []),
        ("moe/moe_op", "B_zp", "B_zero", ["fused_moe"]),
        ("utils/moe_config_utils", "use_mxfp4=False", "use_fp4=False", ["fused_moe_mxfp4"]),
        ("utils/moe_config_utils", "get_optimal_moe_config_func", "get_config", ["fused_moe_mxfp4", "fused_moe"]),
    ],
)
def test_other_signatures_for_experts(
    tmp_path: Path, package: Callable[..., None], file: str, old: str, new: str, missing: list[str]
) -> None:
    """All that is given is given by place: in that order, and nothing more may be needed."""
    package(*ARCHS)
    path = tmp_path / f"aiter/ops/triton/{file}.py"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    aiter.modules.cache_clear()
    found = aiter.modules()
    assert not isinstance(found, No)
    assert [name for name in GROUPED if name not in found] == missing
    for name, changes in (("fused_moe_mxfp4", {}), ("fused_moe", BLOCKS)):
        reason = f"{name} of the AITER that is installed{NO_OTHER}" if name in missing else None
        assert answer(**EXPERTS, **changes) == reason
    assert "aiter" not in sys.modules


@pytest.mark.parametrize("folder", ["gemm/basic", ""], ids=["new", "old"])
def test_where_the_kernels_of_experts_are(package: Callable[..., None], folder: str) -> None:
    package(*GROUPED, folder=folder)
    found = aiter.modules()
    assert not isinstance(found, No)
    of = "aiter.ops.triton." + ("moe." if folder else "")
    assert found == {"fused_moe_mxfp4": f"{of}moe_op_mxfp4", "fused_moe": f"{of}moe_op"}


def test_an_aiter_without_experts(package: Callable[..., None]) -> None:
    package(*(ARCHS.keys() - GROUPED.keys()))
    assert answer() is None
    assert answer(**EXPERTS) == "the AITER that is installed has no fused_moe_mxfp4"
    x, scale = codes(1, 32), scales(1, 2)
    message = f"quark_inductor::aiter_fused_moe_mxfp4 .*; the AITER that is installed has no fused_moe_mxfp4: {URL}"
    with pytest.raises(QuarkInductorError, match=message):
        Q.aiter_fused_moe_mxfp4(x, scale, x[None], scale[None], torch.tensor([1], dtype=torch.int32), "bfloat16")


def in_blocks(ends: list[int], rows: int, block: int) -> tuple[list[int], list[int]]:
    """The ids and experts of every block, expert by expert; -1 stands for a place that is no row's."""
    ids, experts = list[int](), list[int]()
    for expert, (begin, end) in enumerate(itertools.pairwise([0, *ends, rows])):
        for first in range(begin, end, block):
            own = list(range(first, min(first + block, end)))
            ids += own + [-1] * (block - len(own))
            experts.append(expert if expert < len(ends) else -1)
    return ids, experts


# Where the rows of experts end, and how many rows there are.
ROWS: list[tuple[list[int], int]] = [
    ([3, 8, 8, 40], 40),  # of unlike sizes, one of none
    ([16, 32, 48], 48),  # whole blocks
    ([17, 34, 51, 68], 80),  # a row more than a block each, and nobody's
    ([0, 0, 5, 5], 5),  # one
    ([0, 0, 0], 7),  # nobody's only
    ([1], 1),
    ([0], 1),
    ([9], 9),
    ([1, 2, 3, 4, 5, 6, 7, 8], 9),  # of one row each, and one that is nobody's
    ([0, 300, 300, 301], 310),
]


@pytest.mark.parametrize("block", [1, 4, 16, 64])
@pytest.mark.parametrize(("ends", "rows"), ROWS)
def test_blocks_of_experts(ends: list[int], rows: int, block: int) -> None:
    """Against a loop over experts; what is past the last block is nobody's, and no row."""
    ids, experts, count = aiter.expert_blocks(torch.tensor(ends, dtype=torch.int32), rows, block)
    assert ids.dtype == experts.dtype == count.dtype == torch.int32
    expected, of = in_blocks(ends, rows, block)
    assert len(ids) == block * len(experts)
    assert count.tolist() == [len(expected)]
    assert ids.tolist() == [i if i >= 0 else rows for i in expected] + [rows] * (len(ids) - len(expected))
    assert experts.tolist() == of + [-1] * (len(experts) - len(of))


@pytest.mark.parametrize("block", [1, 2, 3, 16])
@pytest.mark.parametrize("experts", [1, 2, 3])
def test_there_are_as_many_blocks_as_there_can_be(experts: int, block: int) -> None:
    """The bound is reached by some offsets, whatever the number of rows, and passed by none."""
    for rows in range(1, 9):
        most, bounds = 0, set()
        for ends in itertools.combinations_with_replacement(range(rows + 1), experts):
            ids, _, count = aiter.expert_blocks(torch.tensor(ends, dtype=torch.int32), rows, block)
            bounds.add(len(ids))
            most = max(most, int(count))
        assert bounds == {most}


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("gemm", GROUPED)
def test_the_host_reads_nothing(monkeypatch: pytest.MonkeyPatch, gemm: str) -> None:
    """All sizes follow from those of what is given: an item of a fake tensor cannot be had."""
    called = []
    monkeypatch.setattr(aiter, "_function", lambda name: lambda *args: called.append(name))
    function = getattr(aiter, gemm)
    _, args = grouped_case(gemm, ([3, 8, 8, 40], 40))
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in (args[0], args[1], args[4], args[5], args[-1])]
        y = function(*fake, "bfloat16")
    assert called == [gemm]
    assert (y.shape, y.dtype) == ((40, N), torch.bfloat16)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(("rows", "places"), [(1 << 15, torch.int32), (1 << 16, torch.int64)])
def test_places_that_fit(monkeypatch: pytest.MonkeyPatch, rows: int, places: torch.dtype) -> None:
    """A kernel multiplies places by the length of a row, in their dtype."""
    found = []
    monkeypatch.setattr(aiter, "_function", lambda name: lambda *args: found.append(args[9].dtype))
    with FakeTensorMode():
        weight, weight_scale = (torch.empty(2, (1 << 15), k, dtype=torch.uint8) for k in (32, 2))
        x, x_scale = (torch.empty(rows, k, dtype=torch.uint8) for k in (32, 2))
        offsets = torch.empty(2, dtype=torch.int32)
        aiter.fused_moe_mxfp4(x, x_scale, weight, weight_scale, offsets, "bfloat16")
    assert found[-1] is places


def grouped_case(
    gemm: str, where: tuple[list[int], int], dtype: torch.dtype = torch.bfloat16, bias: bool = False
) -> tuple[str, list[Any]]:
    """:func:`case` of experts."""
    torch.manual_seed(0)
    (ends, s), e, name = where, len(where[0]), str(dtype).removeprefix("torch.")
    offsets, added = torch.tensor(ends, dtype=torch.int32), torch.randn(e, N).to(dtype) if bias else None
    if gemm == "fused_moe_mxfp4":
        x, x_scale, weight = codes(s, K // 2), scales(s, K // 32), (codes(e, N, K // 2), scales(e, N, K // 32))
        formats = "mxfp4", "mxfp4"
    else:
        x, x_scale = codes(s, K, dtype=FP8), rand(s, K // 128)
        weight = codes(e, N, K, dtype=FP8), rand(e, 1, K // 128)
        formats = "fp8_e4m3", "fp8_e4m3_128x128"
    rest = [None, None, *weight, None, None, added, *formats, name, "", 0, 0, offsets]
    return "quantized_gemm", [x, x_scale, *rest]


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(("ends", "rows"), ROWS)
@pytest.mark.parametrize("gemm", GROUPED)
def test_numbers_of_experts(gemm: str, ends: list[int], rows: int) -> None:
    """Each row by its own expert's weight, and zeros in those of nobody; in every dtype of the op."""
    op, args = grouped_case(gemm, (ends, rows))
    expected = getattr(Q, op)(*args)
    own = getattr(Q, f"aiter_{gemm}")
    for name in ("bfloat16", "float16", "float32"):
        y = own(args[0], args[1], args[4], args[5], args[-1], name)
        assert y.dtype is getattr(torch, name)
        close(y.bfloat16(), expected, torch.bfloat16)
        assert not y[ends[-1] :].any()
    assert expected[: ends[-1]].abs().sum() > 0 or ends[-1] == 0


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("gemm", GROUPED)
def test_experts_of_no_rows(gemm: str) -> None:
    _, args = grouped_case(gemm, ([0, 0], 0))
    y = getattr(Q, f"aiter_{gemm}")(args[0], args[1], args[4], args[5], args[-1], "bfloat16")
    assert y.shape == (0, N)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("gemm", GROUPED)
def test_tiles_are_aiters(monkeypatch: pytest.MonkeyPatch, gemm: str) -> None:
    """By the number of rows, as its own tests choose them, in a dict of the call's own: the table stays as it is."""
    import aiter.ops.triton.utils.moe_config_utils as chooser

    table = chooser.MXFP4_TILES if gemm == "fused_moe_mxfp4" else chooser.FP8_TILES
    before = {name: dict(tiles) for name, tiles in table.items()}
    given: list[Any] = []
    monkeypatch.setattr(aiter, "_function", lambda name: lambda *args: given.append(args))
    for rows, name in ((3, "small_M"), (300, "medium_M"), (1500, "large_M")):
        _, args = grouped_case(gemm, ([rows], rows))
        getattr(aiter, gemm)(args[0], args[1], args[4], args[5], args[-1], "bfloat16")
        config = given[-1][-2 if gemm == "fused_moe_mxfp4" else -1]
        # Of blocks of 128, whose scale is read once a step.
        assert config == {**table[name], "BLOCK_SIZE_K": min(table[name]["BLOCK_SIZE_K"], 128)}
    assert table == before


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("gemm", GROUPED)
def test_the_ops_of_experts_are_ops(gemm: str) -> None:
    """Schema, fake, and a trace with symbolic sizes."""
    _, args = grouped_case(gemm, ([3, 8, 8, 40], 45))
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    own = getattr(Q, f"aiter_{gemm}").default
    # The first compares tensors in a way that torch has not for FP8.
    given = args[0], args[1], args[4], args[5], args[-1], "float16"
    torch.library.opcheck(own, given, test_utils=checks[gemm == "fused_moe" :])


@pytest.mark.usefixtures("installed", "mi350")
@pytest.mark.parametrize(
    ("dtype", "bias"), [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, True)], ids=str
)
@pytest.mark.parametrize("gemm", GROUPED)
def test_experts_compiled(compiled: Callable[..., Any], gemm: str, dtype: torch.dtype, bias: bool) -> None:
    """Through the lowering; with a bias of each expert, which nobody's rows have not."""
    op, args = grouped_case(gemm, ([17, 17, 51, 68], 80), dtype, bias)
    fused = getattr(Q, op)
    y = compiled(lambda: fused(*args))
    assert counters["inductor"][f"quark.{op}.aiter"] == 1
    close(y, fused(*args), dtype)
    assert not y[68:].any()


@pytest.mark.usefixtures("installed", "mi350")
def test_rows_not_known_before_run_time(compiled: Callable[..., Any]) -> None:
    op, (x, x_scale, *rest) = grouped_case("fused_moe_mxfp4", ([17, 17, 51, 68], 80), bias=True)
    for tensor in (x, x_scale):
        torch._dynamo.mark_dynamic(tensor, 0)
    close(compiled(lambda: getattr(Q, op)(x, x_scale, *rest)), getattr(Q, op)(x, x_scale, *rest), torch.bfloat16)


@pytest.mark.usefixtures("installed", "mi350")
def test_a_sum_and_its_bias_are_rounded_once(compiled: Callable[..., Any]) -> None:
    """1 + 2^-8 lies between two bfloat16 numbers; with 2^-12 more it is nearer to the upper."""
    x, weight = torch.zeros(1, 32, dtype=torch.uint8), torch.zeros(1, 1, 32, dtype=torch.uint8)
    for t in (x, weight):
        t[..., 0] = t[..., 16] = 2  # 1.0, in either block
    x_scale, weight_scale = torch.full((1, 2), 127, dtype=torch.uint8), torch.tensor([[[127, 119]]], dtype=torch.uint8)
    bias, offsets = torch.tensor([[2.0**-12]]).bfloat16(), torch.tensor([1], dtype=torch.int32)

    def run() -> Any:
        formats = "mxfp4", "mxfp4", "bfloat16", "", 0, 0
        return Q.quantized_gemm(x, x_scale, None, None, weight, weight_scale, None, None, bias, *formats, offsets)

    assert compiled(run).item() == 1 + 2.0**-7
    assert counters["inductor"]["quark.quantized_gemm.aiter"] == 1


@pytest.mark.usefixtures("installed", "mi350")
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("gemm", GROUPED)
def test_the_code_of_experts_for_a_gpu(gpu_code: Callable[..., str], gemm: str, bias: bool) -> None:
    """A call, and with a bias two kernels: one finds each row's expert, the other adds its bias and rounds."""
    op, args = grouped_case(gemm, ([3, 8, 8, 40], 45), bias=bias)
    at = [i for i, a in enumerate(args) if isinstance(a, Tensor)]

    def run(*tensors: Tensor) -> Any:
        given = iter(tensors)
        return getattr(Q, op)(*(next(given) if i in at else a for i, a in enumerate(args)))

    code = gpu_code(run, [args[i] for i in at])
    assert code.count(f"torch.ops.quark_inductor.aiter_{gemm}.default(") == 1
    assert code.count("async_compile.triton(") == 2 * bias


# --- the layout


@pytest.fixture
def on_this_device(monkeypatch: pytest.MonkeyPatch, mi350: None) -> None:
    """The layout is that of the CPU, which says it is an MI350; what quantizes is compiled for what it is."""
    monkeypatch.setattr(Aiter16x16, "device_type", "cpu")
    monkeypatch.setattr(late_decomposition, "quantizes", lambda *args: No("on a CPU"))


def quantized(scheme: str = "mxfp4", n: int = 384, k: int = 512, dtype: torch.dtype = torch.bfloat16) -> QuarkLinear:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(k, n, dtype=dtype))
    linear = qi.quantize_(model, scheme, exclude=(), calibration=[torch.randn(5, k, dtype=dtype)])[0]  # type: ignore[index]
    assert isinstance(linear, QuarkLinear)
    return linear


STORED = Stored(format="mxfp4", shape=(384, 256), activation="mxfp4")


def chosen(stored: Stored = STORED) -> str | None:
    """The layout of a weight on a GPU."""
    layout = layout_for("cuda", (codes(1, 1), scales(1, 1)), stored)
    return layout and layout.name


@pytest.mark.usefixtures("installed", "mi350")
def test_where_weights_are_packed() -> None:
    assert chosen() == "aiter_16x16"
    assert chosen(dataclasses.replace(STORED, shape=(128, 128))) == "aiter_16x16"


@pytest.mark.usefixtures("installed", "mi350")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"activation": "fp8_e4m3"}, "of weight and activation, mxfp4 and fp8_e4m3, both must be mxfp4"),
        ({"activation": ""}, "of weight and activation, mxfp4 and a float, both must be mxfp4"),
        ({"format": "nvfp4", "activation": "nvfp4"}, "of weight and activation, nvfp4 and nvfp4, both must be mxfp4"),
        ({"shape": (416, 256)}, "its 416 x 512 elements are not made of tiles of 128 x 256"),
        ({"shape": (384, 192)}, "its 384 x 384 elements are not made of tiles of 128 x 256"),
    ],
    ids=str,
)
def test_which_weights_are_not_packed(changes: dict[str, Any], reason: str) -> None:
    stored = dataclasses.replace(STORED, **changes)
    assert Aiter16x16().refuses((), stored) == reason
    assert chosen(stored) is None


@pytest.mark.parametrize("on", [GFX942, Target(device_type="cuda", arch="sm_100"), None], ids=str)
def test_which_gpus_have_no_packed_weights(
    package: Callable[..., None], monkeypatch: pytest.MonkeyPatch, on: Target | None
) -> None:
    """Nothing is packed on any other GPU, nor where none is, nor where AITER has not all of the kernels."""
    package(*(set(ARCHS) - {"gemm_a16wfp4_preshuffle"} if on is None else ARCHS))
    monkeypatch.setattr(target, "current", lambda device_type="cpu": on or GFX950)
    lacks = "the AITER that is installed has no gemm_a16wfp4_preshuffle"
    reason = f"its kernels run on gfx950, the device is {on.arch}" if on else lacks
    assert Aiter16x16().refuses((), STORED) == reason
    assert chosen() is None


@pytest.mark.usefixtures("package", "on_this_device")
def test_without_aiter_nothing_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Aiter16x16().refuses((), STORED) == f"AITER is not installed: {URL}"
    monkeypatch.setattr(Panel64, "device_type", "meta")
    linear = quantized()
    assert linear.packed is None
    assert set(dict(linear.named_parameters())) == {"weight", "weight_scale", "bias"}


@pytest.mark.usefixtures("installed", "on_this_device")
@pytest.mark.parametrize("sizes", [(128, 256), (384, 512)])
def test_a_linear_is_packed_and_unpacked(monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int]) -> None:
    """The state dict is that of the Linear which is not packed, and so are the numbers."""
    (n, k), linear = sizes, quantized(n=sizes[0], k=sizes[1])
    assert linear.packed is not None
    assert linear.packed[0].name == "aiter_16x16"
    assert linear.weight_packed.shape == (n * k // 2 + -(-n // 256) * 256 * k // 32,)
    monkeypatch.setattr(Aiter16x16, "device_type", "cuda")
    plain = quantized(n=n, k=k)
    plain.unpack_()
    state, expected = linear.state_dict(), plain.state_dict()
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor), name
        assert state[name].untyped_storage().nbytes() == state[name].nbytes
    x = torch.randn(3, k, dtype=torch.bfloat16)
    assert torch.equal(linear(x), plain(x))
    linear.unpack_()
    assert linear.packed is None
    assert all(torch.equal(p, expected[name]) for name, p in linear.named_parameters())
    again = quantized(n=n, k=k)
    again.load_state_dict(state)
    assert torch.equal(again(x), plain(x))


@pytest.mark.usefixtures("installed", "on_this_device")
def test_other_linears_are_not_packed_so() -> None:
    for linear in (quantized("mxfp4_fp8"), quantized("mxfp4_weight_only"), quantized(n=96), quantized(k=320)):
        assert linear.packed is not None
        assert linear.packed[0].name == "panel64"


@pytest.mark.usefixtures("installed", "on_this_device")
@pytest.mark.parametrize(
    ("m", "dtype", "by"),
    [
        (9, torch.bfloat16, "prologue_gemm"),
        (70, torch.bfloat16, "quantized_gemm"),
        (9, torch.float16, "prologue_gemm"),
        (70, torch.float16, "quantized_gemm"),
        (9, torch.float32, None),
    ],
    ids=str,
)
def test_a_packed_linear_compiled(compiled: Callable[..., Any], m: int, dtype: torch.dtype, by: str | None) -> None:
    """With few tokens, with many, and where AITER has no kernel: then by the emulation, which unpacks."""
    linear, x = quantized(dtype=dtype), torch.randn(m, 512, dtype=dtype)
    assert linear.packed is not None
    expected = linear(x)
    y = compiled(linear, x)
    found = {name: count for name, count in counters["inductor"].items() if name.startswith("quark.")}
    assert found == ({} if by is None else {f"quark.{by}.aiter": 1})
    close(y, expected, dtype) if by else torch.testing.assert_close(y, expected)


# --- a layer of experts


class Gated(nn.Module):
    """What a model's module of experts has besides its weights."""

    has_gate = True

    def _apply_gate(self, y: Tensor) -> Tensor:
        gate, up = y.chunk(2, -1)
        return F.silu(gate) * up


WIDE = {"gate_proj": (128, 256), "up_proj": (128, 256), "down_proj": (256, 128)}


@pytest.fixture
def layer(on_this_device: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., QuarkExperts]:
    """Three experts, each Linear as it is after loading."""
    monkeypatch.setattr(Panel64, "device_type", "meta")
    return make_layer


def make_layer(scheme: str, bias: bool = False) -> QuarkExperts:
    torch.manual_seed(0)
    floats = [{name: nn.Linear(k, n, bias=bias, dtype=torch.bfloat16) for name, (n, k) in WIDE.items()} for _ in "abc"]
    model = nn.ModuleList(nn.ModuleDict(linears) for linears in floats)
    qi.quantize_(model, scheme, exclude=())
    return QuarkExperts([dict(linears.items()) for linears in model], Gated())  # type: ignore[operator]


def routed(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, their two experts each, one of which is nobody, and weights."""
    index = torch.rand(tokens, 3).argsort(1)[:, :2]
    index[0, 0] = 3
    return torch.randn(tokens, 256).bfloat16(), index, torch.rand(tokens, 2).bfloat16()


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_experts_are_not_shuffled(layer: Callable[..., QuarkExperts], bias: bool) -> None:
    """Alone a Linear is; grouped they are as the checkpoint has them, gate and up as one, and so is what is saved."""
    experts = layer("mxfp4", bias)
    linears = [m for m in experts.modules() if isinstance(m, QuarkLinear)]
    assert {m.packed[0].name for m in linears if m.packed is not None} == {"aiter_16x16"}
    # Of 128 x 256 and 256 x 128: the latter is no whole tile.
    assert [m.packed is not None for m in linears] == [True, True, False] * 3
    state = {name: t.clone() for name, t in experts.state_dict().items()}
    x = torch.randn(3, 256).bfloat16()
    expected = [m(x[:, : m.in_features]) for m in linears]
    experts.group_()
    assert (experts.refusal, experts.grouped) == ("", ("gate_up_proj", "down_proj"))
    assert all(m.packed is None for m in linears)
    assert experts.gate_up_proj.weight.shape == (3, 256, 128)
    assert experts.gate_up_proj.weight_scale.shape == (3, 256, 8)
    assert all(torch.equal(m(x[:, : m.in_features]), y) for m, y in zip(linears, expected, strict=True))
    after = experts.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name], t) for name, t in state.items())
    experts.load_state_dict(state)
    assert experts.grouped
    assert all(m.packed is None for m in linears)


@pytest.mark.usefixtures("installed")
def test_experts_that_cannot_be_grouped_stay_shuffled(
    monkeypatch: pytest.MonkeyPatch, layer: Callable[..., QuarkExperts]
) -> None:
    def refuse(linears: Any) -> Any:
        raise ShapeError("no")

    monkeypatch.setattr(of_experts, "GroupedLinear", refuse)
    experts = layer("mxfp4")
    packed = [m.packed is not None for m in experts.modules() if isinstance(m, QuarkLinear)]
    experts.group_()
    assert experts.refusal == "their Linears cannot be grouped: no"
    assert [m.packed is not None for m in experts.modules() if isinstance(m, QuarkLinear)] == packed
    assert True in packed


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("scheme", "bias", "gemm"),
    [
        ("mxfp4", False, "fused_moe_mxfp4"),
        ("mxfp4", True, "fused_moe_mxfp4"),
        ("fp8_block128", False, "fused_moe"),
    ],
)
def test_a_layer_of_experts_compiled(
    compiled: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    layer: Callable[..., QuarkExperts],
    scheme: str,
    bias: bool,
    gemm: str,
) -> None:
    """Both projections, after the rules, by AITER; the emulation quantizes what goes into them."""
    experts = layer(scheme, bias)
    experts.group_()
    found, function = list[str](), aiter._function
    monkeypatch.setattr(aiter, "_function", lambda name: (found.append(name), function(name))[1])
    args = routed(40)
    expected, y = experts(*args), compiled(experts, *args)
    assert {name: n for name, n in counters["inductor"].items() if name.startswith("quark.")} == {
        "quark.quantized_gemm.aiter": 2
    }
    assert set(found) == {gemm}
    # A sum that is rounded otherwise may become another code of the second projection's input.
    assert (y.float() - expected.float()).norm() < 2.0**-4 * expected.float().norm()


@pytest.mark.usefixtures("installed")
def test_the_report_of_a_layer_of_experts(layer: Callable[..., QuarkExperts]) -> None:
    """Who runs it, and what it could not take."""
    experts = layer("mxfp4")
    experts.group_()
    report = qi.explain(experts, *routed(40))
    assert [row.provider for row in report.linears] == ["aiter", "aiter"]
    assert [(row.name, row.shape, row.op, row.fused) for row in report.linears] == [
        ("gate_up_proj", (256, 256), "quantized_gemm", True),
        ("down_proj", (256, 128), "quantized_gemm", True),
    ]
    reason = "prologue_gemm: aiter: has no kernel for prologue_gemm of mxfp4 even and mxfp4, 3 experts"
    assert all(reason in row.refusals for row in report.linears)


# --- the bytes


@pytest.mark.parametrize("shape", [(16, 32), (48, 96), (256, 128)])
def test_shuffled_weights(shape: tuple[int, int]) -> None:
    """A tile of 16 rows and 32 bytes: the first 16 bytes of each row, then the others."""
    weight = codes(*shape)
    shuffled = aiter.shuffle_weight(weight)
    assert shuffled.shape == weight.shape
    first = shuffled.flatten()[:512].view(2, 16, 16)
    assert torch.equal(first[0], weight[:16, :16])
    assert torch.equal(first[1], weight[:16, 16:32])
    if shape[1] > 32:
        assert torch.equal(shuffled.flatten()[512:768].view(16, 16), weight[:16, 32:48])
    assert torch.equal(aiter.unshuffle_weight(shuffled), weight)


@pytest.mark.parametrize("shape", [(17, 32), (16, 48)])
def test_weights_that_cannot_be_shuffled(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"a weight of {shape[0]} x {shape[1]} bytes is not made of tiles of 16 x 32"):
        aiter.shuffle_weight(codes(*shape))


@pytest.mark.parametrize("shape", [(256, 8), (512, 24), (48, 5), (1, 1)])
def test_shuffled_scales(shape: tuple[int, int]) -> None:
    """In a tile of 32 rows and 8 blocks four bytes are rows r and r + 16 of blocks b and b + 4."""
    scale = scales(*shape)
    shuffled = aiter.shuffle_scale(scale)
    assert shuffled.shape == (-(-shape[0] // 256) * 256, -(-shape[1] // 8) * 8)
    tile = torch.zeros(32, 8, dtype=torch.uint8)
    rows, blocks = min(32, shape[0]), min(8, shape[1])
    tile[:rows, :blocks] = scale[:rows, :blocks]
    first = shuffled.flatten()[:256].view(4, 16, 4)
    for b in range(4):
        for r in range(16):
            assert first[b, r].tolist() == [tile[r + 16 * i, b + 4 * j].item() for j in (0, 1) for i in (0, 1)]
    assert torch.equal(aiter.unshuffle_scale(shuffled, *shape), scale)
