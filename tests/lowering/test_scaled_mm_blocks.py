"""Block formats by ``torch.nn.functional.scaled_mm``: no CPU has it, so torch's own checks and its arguments.

No number was computed on a GPU.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.utils import infer_scale_swizzle
from torch._subclasses.fake_tensor import FakeTensorMode

from quark_inductor.lowering.base import GemmProblem, select
from quark_inductor.lowering.providers import scaled_mm_blocks
from quark_inductor.lowering.target import Target

q = torch.ops.quark_inductor
B200, MI350 = (Target(device_type="cuda", arch=arch) for arch in ("sm_100", "gfx950"))
PROBLEM = GemmProblem(
    op="quantized_gemm",
    m=2048,
    n=96,
    k=256,
    dtype="bfloat16",
    weight_format="mxfp8_e4m3",
    weight_scale_ndim=2,
    x_format="mxfp8_e4m3",
    x_granularity="per_group",
)
NVFP4, MXFP4 = ({"x_format": format, "weight_format": format} for format in ("nvfp4", "mxfp4"))
BLOCKS, NO_ORDER = F.ScalingType.BlockWise1x32, F.SwizzleType.NO_SWIZZLE


def operands(format: str, m: int, n: int, k: int, device: str = "cpu") -> tuple[Tensor | None, ...]:
    """Codes, scales and a global scale of both, not filled."""
    if format == "nvfp4":
        made = [
            (torch.empty(rows, k // 2, dtype=torch.uint8, device=device), torch.empty(rows, k // 16, device=device))
            for rows in (m, n)
        ]
        scales = [(codes, scale.to(torch.float8_e4m3fn), torch.empty((), device=device)) for codes, scale in made]
        return *scales[0], *scales[1]
    pairs = [
        (
            torch.empty(rows, k // 2, dtype=torch.uint8, device=device)
            if format == "mxfp4"
            else torch.empty(rows, k, dtype=torch.float8_e4m3fn, device=device),
            torch.empty(rows, k // 32, dtype=torch.uint8, device=device),
            None,
        )
        for rows in (m, n)
    ]
    return *pairs[0], *pairs[1]


@pytest.mark.parametrize(("rows", "blocks"), [(128, 4), (256, 8), (5, 3), (300, 17)])
def test_the_order_of_scales(rows: int, blocks: int) -> None:
    """By the formula of cuBLAS's documentation, a scale at a time; what is added is 0."""
    scales = torch.randint(1, 256, (rows, blocks), dtype=torch.uint8)
    flat = scaled_mm_blocks.swizzle(scales)
    tiles_of_a_row = -(-blocks // 4)
    assert flat.shape == (-(-rows // 128) * tiles_of_a_row * 512,)
    for r in range(rows):
        for c in range(blocks):
            tile = r // 128 * tiles_of_a_row + c // 4
            assert flat[tile * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4] == scales[r, c]
    assert (flat == 0).sum() == len(flat) - rows * blocks


@pytest.mark.parametrize("format", ["mxfp8_e4m3", "nvfp4"])
@pytest.mark.parametrize("m", [1024, 1030])
def test_torch_takes_the_operands(format: str, m: int) -> None:
    """What torch checks of dtypes, shapes, strides and scales on a GPU, which need not be there for that."""
    with FakeTensorMode():
        tensors = operands(format, m, 48, 256, "cuda")
        y = scaled_mm_blocks.scaled_mm_blocks(*tensors, "bfloat16", True)
    assert (y.shape, y.dtype) == ((m, 48), torch.bfloat16)


def test_torch_takes_the_operands_on_rocm(monkeypatch: pytest.MonkeyPatch) -> None:
    """MXFP8 where M is N: elsewhere torch's fake kernel counts the scales of the weight by M, its real one by N."""
    monkeypatch.setattr(torch.version, "hip", "7.1.0")
    with FakeTensorMode():
        y = scaled_mm_blocks.scaled_mm_blocks(*operands("mxfp8_e4m3", 1024, 1024, 256, "cuda"), "bfloat16", False)
        assert (y.shape, y.dtype) == ((1024, 1024), torch.bfloat16)
        tensors = operands("mxfp8_e4m3", 1024, 1024, 256, "cuda")
        with pytest.raises(RuntimeError, match=r"Must have swizzle type .*NO_SWIZZLE"):
            scaled_mm_blocks.scaled_mm_blocks(*tensors, "bfloat16", True)


@pytest.mark.parametrize("format", ["mxfp4", "mxfp8_e4m3"])
def test_what_is_called_on_rocm(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors themselves, nothing copied, and what torch infers of codes and scales there."""
    monkeypatch.setattr(torch.version, "hip", "7.1.0")
    tensors = operands(format, 1024, 96, 256)
    with patch.object(F, "scaled_mm", return_value=torch.zeros(1024, 96)) as called:
        q.scaled_mm_blocks(*tensors, "bfloat16", False)
    x, weight, x_scales, x_recipes, weight_scales, weight_recipes, x_orders, weight_orders = called.call_args.args
    for given, passed in zip(tensors, (x, *x_scales, None, weight, *weight_scales, None), strict=True):
        assert (given is None) == (passed is None)
        assert given is None or given.data_ptr() == passed.data_ptr()
    assert [scale.shape for scale in (*x_scales, *weight_scales)] == [(1024, 8), (96, 8)]
    assert [scale.dtype for scale in (*x_scales, *weight_scales)] == [torch.float8_e8m0fnu] * 2
    assert all(scale.is_contiguous() for scale in (*x_scales, *weight_scales))
    assert x.is_contiguous()
    assert weight.t().is_contiguous()
    assert (x_recipes, x_orders, weight_recipes, weight_orders) == ([BLOCKS], [NO_ORDER], [BLOCKS], [NO_ORDER])
    for codes, scales in ((x, *x_scales), (weight, *weight_scales)):
        assert infer_scale_swizzle(codes, scales) == (BLOCKS, NO_ORDER)
    assert called.call_args.kwargs == {"output_dtype": torch.bfloat16}


@pytest.mark.parametrize("format", ["mxfp8_e4m3", "nvfp4"])
def test_what_is_called(format: str) -> None:
    """Codes and scales in torch's dtypes; the weight turned, not copied; the global scales of NVFP4 besides."""
    tensors = operands(format, 5, 48, 256)
    with patch.object(F, "scaled_mm", return_value=torch.zeros(5, 48)) as called:
        q.scaled_mm_blocks(*tensors, "bfloat16", True)
    x, weight, x_scales, x_recipes, _, weight_recipes, x_orders, _ = called.call_args.args
    codes = torch.float4_e2m1fn_x2 if format == "nvfp4" else torch.float8_e4m3fn
    assert x.dtype == weight.dtype == codes
    assert weight.data_ptr() == tensors[3].data_ptr()  # type: ignore[union-attr]
    assert x_recipes == weight_recipes
    assert x_orders[0] == F.SwizzleType.SWIZZLE_32_4_4
    if format == "nvfp4":
        assert x_recipes == [F.ScalingType.BlockWise1x16, F.ScalingType.TensorWise]
        assert [scale.dtype for scale in x_scales] == [torch.float8_e4m3fn, torch.float32]
    else:
        assert x_recipes == [F.ScalingType.BlockWise1x32]
        assert [scale.dtype for scale in x_scales] == [torch.float8_e8m0fnu]


@pytest.mark.parametrize(("arch", "format"), [("sm_100", "mxfp8_e4m3"), ("gfx950", "mxfp8_e4m3"), ("gfx950", "mxfp4")])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_the_code_for_a_gpu(gpu_code: Callable[..., str], arch: str, format: str, bias: bool) -> None:
    x, x_scale, _, weight, weight_scale, _ = operands(format, 1024, 96, 256)
    added = [torch.empty(96, dtype=torch.bfloat16)] if bias else []

    def gemm(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, *bias: Tensor) -> tuple[Tensor]:
        by_weight = weight, weight_scale, None, None, *(bias or [None])
        names = format, format, "bfloat16"
        return (q.quantized_gemm(x, x_scale, None, None, *by_weight, *names),)

    code = gpu_code(gemm, (x, x_scale, weight, weight_scale, *added), arch=arch)
    call = rf"torch\.ops\.quark_inductor\.scaled_mm_blocks\.default\(.*'bfloat16', {arch == 'sm_100'}\)"
    assert len(re.findall(call, code)) == 1
    assert len(re.findall(r"^triton_\w+ = async_compile\.triton\(", code, re.MULTILINE)) == bias


@pytest.mark.parametrize(
    ("target", "changes", "reason"),
    [
        (Target(device_type="cpu", arch="x86_64"), {}, "for GPUs, the device is cpu"),
        (Target(device_type="cuda", arch="gfx942"), {}, "runs on sm_100, gfx950, the device is gfx942"),
        (B200, {"op": "prologue_gemm"}, "multiplies two operands in a block format, which prologue_gemm does not .*"),
        (
            B200,
            {"x_format": "mxfp4"},
            "on sm_100 it multiplies mxfp8_e4m3 and nvfp4, each by itself, .*",
        ),
        (B200, MXFP4, "on sm_100 it multiplies .*, each by itself, the operands are mxfp4 and mxfp4"),
        (
            MI350,
            NVFP4,
            "on gfx950 it multiplies .*, each by itself, the operands are nvfp4 and nvfp4",
        ),
        (MI350, {"x_format": "mxfp4"}, "on gfx950 it multiplies mxfp4 and mxfp8_e4m3, each by itself, .*"),
        (B200, {"layout": "panel64"}, "has no kernel for the layout panel64, which unpack_\\(\\) undoes"),
        (B200, {"experts": 4}, "has no kernel for experts"),
        (B200, {**NVFP4, "rounds": True}, "does not round operands, as emulate_precision_casts asks for: leave it out"),
        (B200, {"n": 40}, "N = 40 is not a multiple of 16, or K = 256 not one of 128"),
        (MI350, {"n": 48}, "N = 48 is not a multiple of 32, or K = 256 not one of 128"),
        (B200, {"k": 192}, "N = 96 is not a multiple of 16, or K = 192 not one of 128"),
        (
            B200,
            {"dtype": "float32"},
            "the result's dtype is float32; it makes bfloat16: choose one with load\\(dtype=\\)",
        ),
        (
            MI350,
            {"dtype": "float16"},
            "the result's dtype is float16; it makes bfloat16: choose one with load\\(dtype=\\)",
        ),
        (B200, {"m": 1023}, "is for 1024 tokens and more, M is 1023"),
        (B200, {"m": None}, "is for 1024 tokens and more, M is not known: compile with dynamic=False"),
        (MI350, {"m": 1040}, "M = 1040 is not a multiple of 32"),
    ],
)
def test_refusals(target: Target, changes: dict[str, Any], reason: str) -> None:
    provider = scaled_mm_blocks.ScaledMmBlocks()
    answer = provider.can_run(target, dataclasses.replace(PROBLEM, **changes))
    assert answer is not None
    assert re.fullmatch(reason, answer.reason)


@pytest.mark.parametrize(
    ("hip", "reason"),
    [("6.4.43482-0f2d60242", "needs ROCm 7.0, torch is built for 6.4"), ("7.0.51831", None), (None, None)],
)
def test_the_version_of_rocm(hip: str | None, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    answer = scaled_mm_blocks.ScaledMmBlocks().can_run(MI350, PROBLEM)
    assert (answer and answer.reason) == reason


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({}, {"sm_100", "gfx950"}),
        ({"rounds": True}, {"sm_100", "gfx950"}),
        ({"m": 1040}, {"sm_100"}),
        (NVFP4, {"sm_100"}),
        (MXFP4, {"gfx950"}),
    ],
    ids=["mxfp8", "mxfp8_rounds", "mxfp8_ragged", "nvfp4", "mxfp4"],
)
def test_who_is_asked_first(changes: dict[str, Any], first: set[str]) -> None:
    """On other chips our own kernels run."""
    problem = dataclasses.replace(PROBLEM, **changes)
    for arch in ("sm_100", "sm_90", "sm_120", "gfx942", "gfx950"):
        provider = select(Target(device_type="cuda", arch=arch), problem).provider
        assert provider is not None
        assert provider.name == ("scaled_mm_blocks" if arch in first else "triton")
