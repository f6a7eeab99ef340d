"""MXFP8 and NVFP4 by ``torch.nn.functional.scaled_mm``: no CPU has it, so torch's own checks and its arguments."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from quark_inductor.lowering.base import GemmProblem, select
from quark_inductor.lowering.providers import scaled_mm_blocks
from quark_inductor.lowering.target import Target

q = torch.ops.quark_inductor
B200 = Target(device_type="cuda", arch="sm_100")
PROBLEM = GemmProblem(
    op="quantized_gemm",
    m=2048,
    n=48,
    k=256,
    dtype="bfloat16",
    weight_format="mxfp8_e4m3",
    weight_scale_ndim=2,
    x_format="mxfp8_e4m3",
    x_granularity="per_group",
)
NVFP4 = {"x_format": "nvfp4", "weight_format": "nvfp4"}


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
            torch.empty(rows, k, dtype=torch.float8_e4m3fn, device=device),
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
        y = scaled_mm_blocks.scaled_mm_blocks(*tensors, "bfloat16")
    assert (y.shape, y.dtype) == ((m, 48), torch.bfloat16)


@pytest.mark.parametrize("format", ["mxfp8_e4m3", "nvfp4"])
def test_what_is_called(format: str) -> None:
    """Codes and scales in torch's dtypes; the weight turned, not copied; the global scales of NVFP4 besides."""
    tensors = operands(format, 5, 48, 256)
    with patch.object(F, "scaled_mm", return_value=torch.zeros(5, 48)) as called:
        q.scaled_mm_blocks(*tensors, "bfloat16")
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


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_the_code_for_a_gpu(gpu_code: Callable[..., str], bias: bool) -> None:
    x, x_scale, _, weight, weight_scale, _ = operands("mxfp8_e4m3", 1024, 48, 256)
    added = [torch.empty(48, dtype=torch.bfloat16)] if bias else []

    def gemm(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, *bias: Tensor) -> tuple[Tensor]:
        by_weight = weight, weight_scale, None, None, *(bias or [None])
        names = "mxfp8_e4m3", "mxfp8_e4m3", "bfloat16"
        return (q.quantized_gemm(x, x_scale, None, None, *by_weight, *names),)

    code = gpu_code(gemm, (x, x_scale, weight, weight_scale, *added), arch="sm_100")
    assert code.count("torch.ops.quark_inductor.scaled_mm_blocks.default(") == 1
    assert len(re.findall(r"^triton_\w+ = async_compile\.triton\(", code, re.MULTILINE)) == bias


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"op": "prologue_gemm"}, "multiplies two operands in a block format, which prologue_gemm does not give it"),
        ({"x_format": "mxfp4"}, "multiplies mxfp8_e4m3 and nvfp4, each by itself, the operands are mxfp4 and .*"),
        ({"layout": "panel64"}, "has no kernel for the layout panel64"),
        ({"experts": 4}, "has no kernel for experts"),
        ({**NVFP4, "rounds": True}, "does not round operands, as emulate_precision_casts asks for"),
        ({"n": 40}, "N = 40 is not a multiple of 16, or K = 256 not one of 128"),
        ({"k": 192}, "N = 48 is not a multiple of 16, or K = 192 not one of 128"),
        ({"dtype": "float32"}, "the result's dtype is float32; it makes bfloat16"),
        ({"m": 1023}, "is for 1024 tokens and more, M is 1023"),
        ({"m": None}, "is for 1024 tokens and more, M is not known"),
    ],
)
def test_refusals(changes: dict[str, Any], reason: str) -> None:
    provider = scaled_mm_blocks.ScaledMmBlocks()
    answer = provider.can_run(B200, dataclasses.replace(PROBLEM, **changes))
    assert answer is not None
    assert re.fullmatch(reason, answer.reason)


@pytest.mark.parametrize("changes", [{}, {"rounds": True}, NVFP4], ids=["mxfp8", "mxfp8_rounds", "nvfp4"])
def test_who_is_asked_first(changes: dict[str, Any]) -> None:
    """On other chips our own kernels run."""
    problem = dataclasses.replace(PROBLEM, **changes)
    chosen = [select(Target(device_type="cuda", arch=arch), problem).provider for arch in ("sm_100", "sm_90", "sm_120")]
    assert [provider.name for provider in chosen if provider] == ["scaled_mm_blocks", "triton", "triton"]
