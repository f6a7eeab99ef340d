"""FP8 by ``aten._scaled_mm``: who may, its numbers by the CPU kernel of that op, and the code for a GPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from quark_inductor.lowering import target
from quark_inductor.lowering.base import GemmProblem, select
from quark_inductor.lowering.scaled_mm import FEW_TOKENS, ScaledMm
from quark_inductor.lowering.target import Target

FP8 = torch.float8_e4m3fn
M, N, K = 96, 48, 160
HOPPER = Target(device_type="cuda", arch="sm_90")
GEMM = torch.ops.quark_inductor.quantized_gemm.default


def problem(**changes: Any) -> GemmProblem:
    both = {"x_format": "fp8_e4m3", "weight_format": "fp8_e4m3", "x_granularity": "per_tensor"}
    return GemmProblem(**{"op": "quantized_gemm", "m": M, "n": N, "k": K, "dtype": "bfloat16", **both, **changes})


ROWS = {"x_granularity": "per_token", "weight_scale_ndim": 1}


@pytest.mark.parametrize("arch", ["sm_89", "sm_90", "sm_100", "sm_120", "gfx950"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": "float16"},
        {"dtype": "float32"},
        {"m": None},
        {"m": FEW_TOKENS},
        ROWS,
        {"x_granularity": "per_token"},
        {"weight_scale_ndim": 1},
    ],
    ids=str,
)
def test_what_it_runs(arch: str, changes: dict[str, Any]) -> None:
    assert ScaledMm().can_run(Target(device_type="cuda", arch=arch), problem(**changes)) is None


def test_fnuz_on_gfx942() -> None:
    gfx942 = Target(device_type="cuda", arch="gfx942")
    fnuz = {"x_format": "fp8_e4m3fnuz", "weight_format": "fp8_e4m3fnuz"}
    assert ScaledMm().can_run(gfx942, problem(**fnuz)) is None
    assert ScaledMm().can_run(HOPPER, problem(**fnuz)) is not None


@pytest.mark.parametrize(
    ("arch", "changes", "reason"),
    [
        ("sm_80", {}, "runs on sm_89, sm_90, sm_100, sm_120, gfx942, gfx950, the device is sm_80"),
        (
            "gfx942",
            {},
            "on gfx942 it multiplies fp8_e4m3fnuz by fp8_e4m3fnuz, the operands are fp8_e4m3 and fp8_e4m3",
        ),
        ("sm_90", {"op": "prologue_gemm"}, "multiplies two operands in FP8, which prologue_gemm does not give it"),
        (
            "sm_90",
            {"op": "weight_only_gemm", "x_format": ""},
            "multiplies two operands in FP8, which weight_only_gemm does not give it",
        ),
        *(
            ("sm_90", {name: format}, "on sm_90 it multiplies fp8_e4m3 by fp8_e4m3, the operands are ")
            for name in ("x_format", "weight_format")
            for format in ("fp8_e5m2", "mxfp8_e4m3", "int8", "fp8_e4m3_128x128")
        ),
        ("sm_90", {"layout": "panel64"}, "has no kernel for the layout panel64, which unpack_() undoes"),
        ("sm_90", {"experts": 4}, "has no kernel for experts"),
        ("sm_90", {"x_granularity": "per_group"}, "has no kernel for an activation scaled by groups"),
        ("sm_90", {"n": 40}, "N = 40 and K = 160 are not both multiples of 16"),
        ("sm_90", {"k": 40}, "N = 48 and K = 40 are not both multiples of 16"),
        (
            "sm_90",
            {"dtype": "float64"},
            "the result's dtype is float64; with such scales it makes bfloat16, float16, float32: "
            "choose one with load(dtype=)",
        ),
        (
            "sm_90",
            {"dtype": "float32", **ROWS},
            "the result's dtype is float32; with such scales it makes bfloat16: choose one with load(dtype=)",
        ),
        (
            "sm_90",
            {"dtype": "float16", "weight_scale_ndim": 1},
            "the result's dtype is float16; with such scales it makes bfloat16: choose one with load(dtype=)",
        ),
        ("sm_90", {"m": FEW_TOKENS - 1}, "is for 64 tokens and more, M is 63"),
    ],
    ids=str,
)
def test_what_it_refuses(arch: str, changes: dict[str, Any], reason: str) -> None:
    answer = ScaledMm().can_run(Target(device_type="cuda", arch=arch), problem(**changes))
    assert answer is not None
    assert answer.reason.startswith(reason)


def test_not_on_cpu() -> None:
    chosen = select(Target(device_type="cpu", arch="x86_64", isa="portable"), problem(), "scaled_mm")
    assert "scaled_mm: for GPUs, the device is cpu" in chosen.refusals


# --- numbers


def operands(x_scale: str, weight_scale: str, scale_dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {"tensor": (), "token": (M, 1), "channel": (N,)}
    return {
        "x": (torch.randn(M, K) * 40).to(FP8),
        "x_scale": (torch.rand(shapes[x_scale]) + 0.25).to(scale_dtype),
        "weight": (torch.randn(N, K) * 40).to(FP8),
        "weight_scale": (torch.rand(shapes[weight_scale]) + 0.25).to(scale_dtype),
    }


def gemm(named: dict[str, Tensor], bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    x, x_scale, weight, weight_scale = (named[name] for name in ("x", "x_scale", "weight", "weight_scale"))
    name = str(dtype).removeprefix("torch.")
    return GEMM(x, x_scale, None, None, weight, weight_scale, None, None, bias, "fp8_e4m3", "fp8_e4m3", name)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device says that it is an H100, whatever it is."""
    monkeypatch.setattr(target, "current", lambda device_type="cpu": HOPPER)


SCALES = [("tensor", "tensor"), ("token", "channel"), ("tensor", "channel"), ("token", "tensor")]


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize(
    ("scales", "dtype"),
    [
        *((scales, torch.bfloat16) for scales in SCALES),
        (SCALES[0], torch.float16),
        (SCALES[0], torch.float32),
    ],
    ids=str,
)
def test_numbers(compiled: Callable[..., Any], scales: tuple[str, str], dtype: torch.dtype, bias: bool) -> None:
    """Against float64: K sums in float32, and two roundings to the dtype, of the product and of it with the bias."""
    scale_dtype = torch.bfloat16 if dtype is torch.bfloat16 else torch.float32
    named = operands(*scales, scale_dtype)
    named["x"], named["weight"] = (named[name].float().div(16).to(FP8) for name in ("x", "weight"))
    added = torch.randn(N).to(dtype) if bias else None
    y = compiled(lambda: gemm(named, added, dtype))
    assert counters["inductor"]["quark.quantized_gemm.scaled_mm"] == 1
    assert y.dtype is dtype
    a, b = named["x"].double() * named["x_scale"].double(), named["weight"].double()
    b = b * (named["weight_scale"].double().unsqueeze(-1) if named["weight_scale"].ndim else named["weight_scale"])
    expected, magnitude = a @ b.t(), a.abs() @ b.abs().t()
    total = expected if added is None else expected + added.double()
    half = torch.finfo(dtype).eps / 2
    bound = magnitude * (K + 4) * 2.0**-24 + half * 1.01 * (expected.abs() + total.abs())
    assert ((y.double() - total).abs() <= bound).all()
    assert total.abs().mean() > 1


@pytest.mark.usefixtures("hopper")
def test_tokens_not_known_before_run_time(compiled: Callable[..., Any]) -> None:
    named = operands("tensor", "channel", torch.float32)
    expected = gemm(named, None, torch.bfloat16)
    torch._dynamo.mark_dynamic(named["x"], 0)
    y = compiled(lambda: gemm(named, None, torch.bfloat16))
    assert counters["inductor"]["quark.quantized_gemm.scaled_mm"] == 1
    torch.testing.assert_close(y, expected, rtol=2**-6, atol=2**-6 * expected.abs().max().item())


# --- the code on a GPU


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("scales", "scale_dtype", "bias", "dtype", "kernels"),
    [
        # Scales in float32, as a per-tensor weight has them, or a quantize makes them: nothing but the call.
        (("tensor", "tensor"), torch.float32, True, torch.bfloat16, 0),
        (("token", "channel"), torch.float32, True, torch.bfloat16, 0),
        # Each scale that is converted or repeated: a kernel of a few elements.
        (("token", "channel"), torch.bfloat16, False, torch.bfloat16, 2),
        (("tensor", "channel"), torch.float32, False, torch.bfloat16, 1),
        (("token", "tensor"), torch.float32, False, torch.bfloat16, 1),
        # The bias.
        (("tensor", "tensor"), torch.float32, True, torch.float32, 1),
    ],
    ids=str,
)
def test_the_code_for_a_gpu(
    gpu_code: Callable[..., str],
    scales: tuple[str, str],
    scale_dtype: torch.dtype,
    bias: bool,
    dtype: torch.dtype,
    kernels: int,
) -> None:
    named = operands(*scales, scale_dtype)
    tensors = [*named.values(), *([torch.zeros(N, dtype=dtype)] if bias else [])]
    code = gpu_code(lambda *t: gemm(dict(zip(named, t[:4], strict=True)), t[4] if bias else None, dtype), tensors)
    assert code.count("extern_kernels._scaled_mm(") == 1
    assert "use_fast_accum=False" in code
    assert code.count("async_compile.triton(") == kernels
