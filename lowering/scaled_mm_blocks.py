"""Provider ``scaled_mm_blocks``: PyTorch's ``torch.nn.functional.scaled_mm`` for operands in block formats.

On sm_100 that is cuBLASLt, for MXFP8 and NVFP4, which wants the scales of blocks in an order of its own
(:func:`swizzle`). On gfx950 it is hipBLASLt, for MXFP4 and MXFP8, and scales lie as in a checkpoint, row by row.
Neither has been run here.

Sources. Of both: torch 2.13, ``torch/_meta_registrations.py: _check_scaled_mm_sizes_v2``. Of cuBLASLt: its
documentation, "1D Block Scaling Factors Layout". Of hipBLASLt: torch 2.13, ``torch/_inductor/utils.py:
_infer_scale_swizzle_impl``; PyTorch's repository, ``aten/src/ATen/native/cuda/ScaledBlas.cpp: _scaled_mxfp4_mxfp4,
_scaled_mxfp8_mxfp8`` at 2bec3bdf (what is refused), and ``test/test_scaled_matmul_cuda.py:
test_blockwise_mxfp8_nvfp4_mxfp4_numerics`` (scales are put in order on CUDA only; on ROCm every K but multiples of 128
is skipped). The first of these, torch's fake kernel, counts scales on ROCm as they are only for MXFP8 where M = N, so
it cannot stand for the call.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quark_inductor.lowering.base import GemmProblem, No, Provider, no_dtype, no_layout, register_provider, tokens
from quark_inductor.lowering.target import Target, rocm_version
from quark_inductor.schemes.numerics.block import BLOCK_FORMATS
from quark_inductor.schemes.ops import NAMESPACE, dtype_of, lib

FORMATS: Mapping[str, tuple[str, ...]] = {"sm_100": ("mxfp8_e4m3", "nvfp4"), "gfx950": ("mxfp4", "mxfp8_e4m3")}
# Of M and N. Of K 128 on both.
MULTIPLES: Mapping[str, tuple[int, int]] = {"sm_100": (1, 16), "gfx950": (32, 32)}
SWIZZLED = ("sm_100",)
ROCM = (7, 0)
# Below, putting scales in order, a kernel for each operand, costs more than a library's tiles can win. On gfx950, where
# they are in order, the same. Not measured.
FEW_TOKENS = 1024
# Rows and scales of a tile of scales.
_ROWS, _SCALES = 128, 4


def swizzle(scales: Tensor) -> Tensor:
    """Scales of blocks in the order of cuBLASLt: tiles of 128 rows by 4 scales, in which rows 32 apart are neighbours.

    Args:
        scales: 8-bit ``[rows, K / B]``, E8M0 or E4M3.

    Returns:
        Flat, of as many rows and scales as fill whole tiles; those that are added are 0. The scale of row ``r`` and
        block ``c`` lies at ``tile * 512 + (r % 32) * 16 + r % 128 // 32 * 4 + c % 4``, tiles in the order of
        ``[rows / 128, K / B / 4]``.
    """
    rows, blocks = scales.shape
    padded = F.pad(scales.view(torch.uint8), (0, -blocks % _SCALES, 0, -rows % _ROWS))
    tiles = padded.unflatten(0, (-1, 4, 32)).unflatten(3, (-1, _SCALES))
    return tiles.permute(0, 3, 2, 1, 4).flatten().view(scales.dtype)


def scaled_mm_blocks(
    x: Tensor,
    x_scale: Tensor,
    x_global: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    weight_global: Tensor | None,
    out_dtype: str,
    swizzled: bool,
) -> Tensor:
    """``[M, N]`` in ``out_dtype``: the product of operands in MXFP8 (E4M3), MXFP4 or, with global scales, NVFP4.

    Args:
        x: codes ``[M, K]``, FP8, or ``[M, K / 2]``, two FP4 a byte.
        x_scale: of its blocks, ``[M, K / 32]`` E8M0 in uint8, or ``[M, K / 16]`` E4M3.
        x_global: float32 ``[]``.
        weight: codes ``[N, ...]``.
        weight_scale: of its blocks.
        weight_global: float32 ``[]``.
        out_dtype: dtype of the result, of a sum in float32.
        swizzled: whether the library wants scales in the order of :func:`swizzle`.
    """
    codes = torch.float4_e2m1fn_x2 if x.dtype == torch.uint8 else torch.float8_e4m3fn
    if swizzled:
        orders, x_scales, weight_scales = [F.SwizzleType.SWIZZLE_32_4_4], [swizzle(x_scale)], [swizzle(weight_scale)]
    else:
        orders, x_scales, weight_scales = [F.SwizzleType.NO_SWIZZLE], [x_scale], [weight_scale]
    if x_global is not None and weight_global is not None:
        recipes, scale_dtype = [F.ScalingType.BlockWise1x16, F.ScalingType.TensorWise], torch.float8_e4m3fn
        orders.append(F.SwizzleType.NO_SWIZZLE)
        x_scales.append(x_global.float())
        weight_scales.append(weight_global.float())
    else:
        recipes, scale_dtype = [F.ScalingType.BlockWise1x32], torch.float8_e8m0fnu
    x_scales[0], weight_scales[0] = x_scales[0].view(scale_dtype), weight_scales[0].view(scale_dtype)
    return F.scaled_mm(
        x.view(codes),
        weight.view(codes).t(),
        x_scales,
        recipes,
        weight_scales,
        recipes,
        orders,
        orders,
        output_dtype=dtype_of(out_dtype),
    )


lib.define(
    "scaled_mm_blocks(Tensor x, Tensor x_scale, Tensor? x_global, Tensor weight, Tensor weight_scale, "
    "Tensor? weight_global, str out_dtype, bool swizzled) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
lib.impl("scaled_mm_blocks", scaled_mm_blocks, "CompositeExplicitAutograd")
torch.library.register_fake(
    f"{NAMESPACE}::scaled_mm_blocks",
    lambda x, x_scale, x_global, weight, weight_scale, weight_global, out_dtype, swizzled: x.new_empty(
        (x.shape[0], weight.shape[0]), dtype=dtype_of(out_dtype)
    ),
    lib=lib,
)


@register_provider
class ScaledMmBlocks(Provider):
    """Both operands in one block format, many tokens."""

    name = "scaled_mm_blocks"

    def can_run(self, target: Target, problem: GemmProblem) -> No | None:
        """A format by itself to bfloat16, M, N and K multiples of what the library wants, from 1024 tokens on."""
        if target.device_type != "cuda":
            return No(f"for GPUs, the device is {target.device_type}")
        if (formats := FORMATS.get(target.arch)) is None:
            return No(f"runs on {', '.join(FORMATS)}, the device is {target.arch}")
        if target.arch.startswith("gfx") and (found := rocm_version()) is not None and found < ROCM:
            return No(f"needs ROCm {_dotted(ROCM)}, torch is built for {_dotted(found)}")
        if problem.op != "quantized_gemm":
            return No(f"multiplies two operands in a block format, which {problem.op} does not give it")
        if problem.x_format != problem.weight_format or problem.weight_format not in formats:
            given = f"{problem.x_format} and {problem.weight_format}"
            return No(
                f"on {target.arch} it multiplies {' and '.join(formats)}, each by itself, the operands are {given}"
            )
        if problem.layout or problem.experts:
            return No(no_layout(problem))
        if problem.rounds and BLOCK_FORMATS[problem.x_format].has_global_scale:
            return No("does not round operands, as emulate_precision_casts asks for: leave it out")
        rows, columns = MULTIPLES[target.arch]
        if problem.n % columns or problem.k % 128:
            return No(f"N = {problem.n} is not a multiple of {columns}, or K = {problem.k} not one of 128")
        if problem.dtype != "bfloat16":
            return No(no_dtype(problem, ("bfloat16",)))
        if problem.m is None or problem.m < FEW_TOKENS:
            return No(f"is for {FEW_TOKENS} tokens and more, M is {tokens(problem.m)}")
        if problem.m % rows:
            return No(f"M = {problem.m} is not a multiple of {rows}")
        return None

    def lower(self, target: Target, problem: GemmProblem, args: Mapping[str, Any]) -> Any:
        """See :class:`Provider`."""
        from quark_inductor.lowering._inductor import called, contiguous, lowered

        names = ("x", "x_scale", "x_scale_2", "weight", "weight_scale", "weight_scale_2")
        tensors = (None if args[name] is None else contiguous(args[name]) for name in names)
        swizzled = target.arch in SWIZZLED
        y = called(torch.ops.quark_inductor.scaled_mm_blocks.default, *tensors, problem.dtype, swizzled)
        bias = args["bias"]
        return y if bias is None else lowered(torch.ops.aten.add.Tensor, y, bias)


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
