"""The ops of namespace ``quark_inductor``: the only IR between the schemes, the rules and the lowerings.

Block formats have a quantize and a dequantize op, which stay one node each until the rules have run. FP8 has none: its
emulation is plain aten. The fused ops are made by rules only; their eager implementation is the emulation.

Every op is functional, takes strings and tensors, and has a schema, a fake and an eager implementation.
Legend: M tokens, K input features, N output features. ``out_dtype`` is a torch dtype's bare name (``"bfloat16"``).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from quark_inductor.schemes.errors import TrainingError
from quark_inductor.schemes.numerics import block, fp8

NAMESPACE = "quark_inductor"
# CUDA compute capability times ten from which hardware kernels of a fused op exist; below it the emulation runs.
MIN_CAPABILITY = {"block_gemm": 70, "block_prologue_gemm": 70, "fp8_gemm": 89, "fp8_prologue_gemm": 89}
lib = torch.library.Library(NAMESPACE, "DEF")


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` -> ``"bfloat16"``: how ops and reports spell a dtype."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """``"bfloat16"`` -> ``torch.bfloat16``, the inverse of :func:`dtype_name`."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is not the name of a torch dtype; expected one such as 'bfloat16'")
    return dtype


def block_quantize(
    x: Tensor, format: str, scale_rule: str, global_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Quantize to a block format: ``x [..., K] -> (codes [..., packed(K)], scales [..., K / B])``.

    See :func:`quark_inductor.schemes.numerics.block.quantize`.
    """
    return block.quantize(x, format, scale_rule, global_scale)


def block_dequantize(
    codes: Tensor,
    scales: Tensor,
    format: str,
    out_dtype: str,
    global_scale: Tensor | None = None,
    zero_scale: float = 0.0,
) -> Tensor:
    """The values of a block format, ``[..., K]``. See :func:`quark_inductor.schemes.numerics.block.dequantize`."""
    return block.dequantize_by_table(codes, scales, format, dtype_of(out_dtype), global_scale, zero_scale)


def block_gemm(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    x_format: str,
    weight_format: str,
    out_dtype: str,
) -> Tensor:
    """``[M, N]``: the product of block-quantized operands, plus ``bias [N]``, in ``out_dtype``.

    ``x`` is uint8 ``[M, K/2]`` with E8M0 ``x_scale [M, K/32]``, ``weight`` uint8 ``[N, K/2]`` with ``weight_scale [N,
    K/32]``. This is how the emulation writes it: both operands dequantized to ``out_dtype``, then ``F.linear``.
    """
    dequantize = torch.ops.quark_inductor.block_dequantize
    return F.linear(
        dequantize(x, x_scale, x_format, out_dtype), dequantize(weight, weight_scale, weight_format, out_dtype), bias
    )


def block_prologue_gemm(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    x_format: str,
    scale_rule: str,
    weight_format: str,
) -> Tensor:
    """:func:`block_gemm` of ``block_quantize(x)``: the GEMM quantizes the float ``x [M, K]`` in its prologue."""
    codes, scales = block.quantize(x, x_format, scale_rule)
    return block_gemm(codes, scales, weight, weight_scale, bias, x_format, weight_format, dtype_name(x.dtype))


def fp8_gemm(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out_dtype: str
) -> Tensor:
    """``[M, N]``: the product of FP8 operands ``x [M, K]`` and ``weight [N, K]``, plus ``bias [N]``, in ``out_dtype``.

    This is how the emulation writes it: both operands dequantized to ``out_dtype``, then ``F.linear``. ``x_scale`` is
    ``[]`` (per tensor) or ``[M, 1]`` (per token), ``weight_scale`` ``[]`` or ``[N]`` (per channel).
    """
    dtype = dtype_of(out_dtype)
    return F.linear(fp8.dequantize(x, x_scale, dtype), fp8.dequantize_weight(weight, weight_scale, dtype), bias)


def fp8_prologue_gemm(
    x: Tensor, x_scale: Tensor | None, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, granularity: str
) -> Tensor:
    """:func:`fp8_gemm` of a float activation ``[M, K]`` that is quantized in the GEMM's prologue.

    ``granularity`` is ``"per_tensor"`` (by ``x_scale []``, stored or computed before) or ``"per_token"`` (``x_scale``
    is ``None``: each row's scale is computed in the prologue).
    """
    fp8.check_granularity(granularity)
    scale = fp8.dynamic_scale(x, granularity) if x_scale is None else x_scale
    return fp8_gemm(fp8.quantize(x, scale), scale, weight, weight_scale, bias, dtype_name(x.dtype))


def _fake_block_quantize(
    x: Tensor, format: str, scale_rule: str, global_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    f = block.check(format, scale_rule=scale_rule, global_scale=global_scale)
    *rows, k = x.shape
    torch._check(k % f.size == 0, lambda: f"block_quantize: K = {k} is not a multiple of {f.size}")
    codes = x.new_empty((*rows, f.packed(k)), dtype=f.codes_dtype)
    return codes, x.new_empty((*rows, k // f.size), dtype=f.scales_dtype)


def _fake_block_dequantize(
    codes: Tensor,
    scales: Tensor,
    format: str,
    out_dtype: str,
    global_scale: Tensor | None = None,
    zero_scale: float = 0.0,
) -> Tensor:
    f = block.check(format, global_scale=global_scale)
    return codes.new_empty((*codes.shape[:-1], f.unpacked(codes.shape[-1])), dtype=dtype_of(out_dtype))


def _fake_block_gemm(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    x_format: str,
    weight_format: str,
    out_dtype: str,
) -> Tensor:
    block.check(x_format)
    block.check(weight_format)
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=dtype_of(out_dtype))


def _fake_block_prologue_gemm(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    x_format: str,
    scale_rule: str,
    weight_format: str,
) -> Tensor:
    block.check(x_format, scale_rule=scale_rule)
    block.check(weight_format)
    return x.new_empty((x.shape[0], weight.shape[0]))


def _fake_fp8_gemm(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, out_dtype: str
) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=dtype_of(out_dtype))


def _fake_fp8_prologue_gemm(
    x: Tensor, x_scale: Tensor | None, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, granularity: str
) -> Tensor:
    fp8.check_granularity(granularity)
    return x.new_empty((x.shape[0], weight.shape[0]))


def _register(schema: str, eager: Callable[..., object], fake: Callable[..., object]) -> None:
    name = schema.partition("(")[0]
    lib.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    lib.impl(name, eager, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=lib)


_register(
    "block_quantize(Tensor x, str format, str scale_rule, Tensor? global_scale=None) -> (Tensor, Tensor)",
    block_quantize,
    _fake_block_quantize,
)
_register(
    "block_dequantize(Tensor codes, Tensor scales, str format, str out_dtype, Tensor? global_scale=None, "
    "float zero_scale=0.0) -> Tensor",
    block_dequantize,
    _fake_block_dequantize,
)
_register(
    "block_gemm(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias, str x_format, "
    "str weight_format, str out_dtype) -> Tensor",
    block_gemm,
    _fake_block_gemm,
)
_register(
    "block_prologue_gemm(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, str x_format, str scale_rule, "
    "str weight_format) -> Tensor",
    block_prologue_gemm,
    _fake_block_prologue_gemm,
)
_register(
    "fp8_gemm(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias, str out_dtype) -> Tensor",
    fp8_gemm,
    _fake_fp8_gemm,
)
_register(
    "fp8_prologue_gemm(Tensor x, Tensor? x_scale, Tensor weight, Tensor weight_scale, Tensor? bias, str granularity) "
    "-> Tensor",
    fp8_prologue_gemm,
    _fake_fp8_prologue_gemm,
)


def _refuse_gradient(ctx: object, *grads: object) -> None:
    raise TrainingError(
        "a gradient was asked through quark_inductor::block_quantize, whose result is integer codes: it has none. "
        "Quantized Linears are for inference: call the model under torch.no_grad() or torch.inference_mode(), "
        "or detach() what goes into them"
    )


def _needs_no_gradient(ctx: object, inputs: tuple[object, ...], output: object) -> None:
    if getattr(ctx, "needs_input_grad", (False,))[0]:
        _refuse_gradient(ctx)


# Without this a gradient through the integer codes is cut silently.
torch.library.register_autograd(
    f"{NAMESPACE}::block_quantize", _refuse_gradient, setup_context=_needs_no_gradient, lib=lib
)
