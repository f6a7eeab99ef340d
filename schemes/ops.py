"""The ops of namespace ``quark_inductor``: the only IR between the schemes, the rules and the lowerings.

Block formats have a quantize and a dequantize op, packed 4-bit integers one that unpacks them, and so have weights that
are packed for kernels (:mod:`.layout`); they stay one node each until the rules have run. FP8 and integers have none:
their emulation is plain aten. The three fused ops are made by
rules only, for every format of their operands (:mod:`.operands` says what a format means); their eager implementation
is the emulation.

Every op is functional, takes strings, ints and tensors, and has a schema, a fake and an eager implementation.
Legend: M tokens, K input features, N output features. ``out_dtype`` is a torch dtype's bare name (``"bfloat16"``).
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from quark_inductor.schemes import layout, operands
from quark_inductor.schemes.errors import TrainingError
from quark_inductor.schemes.numerics import block, int4

NAMESPACE = "quark_inductor"
# Bare names of the ops that rules make, each a GEMM that some provider must have a kernel for.
FUSED_OPS = {"weight_only_gemm", "quantized_gemm", "prologue_gemm"}
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


def int4_unpack(packed: Tensor, format: str) -> Tensor:
    """4-bit integers out of int32. See :func:`quark_inductor.schemes.numerics.int4.unpack`."""
    return int4.unpack(packed, format)


def unpack_weight(
    packed: Tensor, weight_layout: str, weight_format: str, weight_shape: Sequence[int], transposed: bool
) -> list[Tensor]:
    """What a packed weight was packed from: its codes, and a block format's scales. See :class:`.layout.Layout`."""
    stored = layout.Stored(format=weight_format, shape=tuple(weight_shape), transposed=transposed)
    own = packed.untyped_storage()._cdata
    # An op's result is not a view of what it got, even where the bytes are in order already.
    tensors = layout.named(weight_layout).unpack(packed, stored)
    return [t.clone() if t.untyped_storage()._cdata == own else t for t in tensors]


def hit_experts(offsets: Tensor) -> Iterator[tuple[int, int, int]]:
    """Each expert that has rows, and where they begin and end; ``offsets [E]``: where each one's end."""
    begin = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > begin:
            yield expert, begin, end
        begin = end


def _of_expert(name: str, tensor: Tensor, expert: int, begin: int, end: int) -> Tensor:
    if name == "x" or (name in ("x_scale", "x_zero_point") and tensor.ndim == 2):
        return tensor[begin:end]
    return tensor[expert] if tensor.ndim else tensor


def _grouped(gemm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Give a GEMM a last argument ``offsets [E]``: with it, it is one of E experts.

    Rows of the activation up to ``offsets[0]`` are those of the first expert, and so on; rows from the last offset on
    are nobody's, and give zeros. Weight, its scales, its zero points and the bias have a first dimension of E, and so
    has a scale of the activation that is given per expert, ``[E]``. Only weights of experts that have rows are read.
    """
    own = inspect.signature(gemm)
    last = inspect.Parameter("offsets", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None)
    signature = own.replace(parameters=[*own.parameters.values(), last])

    @functools.wraps(gemm)
    def run(*args: Any, **kwargs: Any) -> Tensor:
        named = dict(signature.bind(*args, **kwargs).arguments)
        offsets = named.pop("offsets", None)
        if offsets is None:
            return gemm(**named)
        x, (n, _) = named["x"], operands.features_of(named, lambda tensor: tensor.shape[1:])
        y = x.new_zeros((x.shape[0], n), dtype=dtype_of(named["out_dtype"]) if "out_dtype" in named else x.dtype)
        for expert, begin, end in hit_experts(offsets):
            of_one = {
                name: _of_expert(name, value, expert, begin, end) if isinstance(value, Tensor) else value
                for name, value in named.items()
            }
            y[begin:end] = gemm(**of_one)
        return y

    run.__signature__ = signature  # type: ignore[attr-defined]
    return run


@_grouped
def weight_only_gemm(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    weight_scale_2: Tensor | None,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    weight_format: str,
    weight_layout: str = "",
    weight_rows: int = 0,
    weight_columns: int = 0,
) -> Tensor:
    """``[M, N]``: the product of ``x [M, K]`` and a quantized weight, plus ``bias [N]``, in the dtype of ``x``.

    This is how the emulation writes it: the weight dequantized to that dtype, then ``F.linear``. With a
    ``weight_layout`` the weight is packed, the scales of its blocks with it; rows and columns are those of its codes.
    """
    if weight_layout:
        transposed = weight_scale is not None and operands.is_transposed(weight_scale.ndim, weight_format)
        shape = weight_rows, weight_columns
        weight, *scales = unpack_weight(weight, weight_layout, weight_format, shape, transposed)
        weight_scale = scales[0] if scales else weight_scale
    if weight_scale is None:
        raise ValueError("a weight that is not packed has its scales beside it")
    values = operands.dequantize_weight(weight, weight_scale, weight_scale_2, weight_zero_point, weight_format, x.dtype)
    return operands.matmul(x, values, bias)


@_grouped
def quantized_gemm(
    x: Tensor,
    x_scale: Tensor,
    x_scale_2: Tensor | None,
    x_zero_point: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor | None,
    weight_scale_2: Tensor | None,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    x_format: str,
    weight_format: str,
    out_dtype: str,
    weight_layout: str = "",
    weight_rows: int = 0,
    weight_columns: int = 0,
) -> Tensor:
    """``[M, N]``: the product of quantized operands, plus ``bias [N]``, in ``out_dtype``.

    This is how the emulation writes it: both operands dequantized to ``out_dtype``, then ``F.linear``.
    """
    values = operands.dequantize_activation(x, x_scale, x_scale_2, x_zero_point, x_format, dtype_of(out_dtype))
    return weight_only_gemm(
        values,
        weight,
        weight_scale,
        weight_scale_2,
        weight_zero_point,
        bias,
        weight_format,
        weight_layout,
        weight_rows,
        weight_columns,
    )


@_grouped
def prologue_gemm(
    x: Tensor,
    x_scale: Tensor | None,
    x_scale_2: Tensor | None,
    x_zero_point: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor | None,
    weight_scale_2: Tensor | None,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    x_format: str,
    scale_rule: str,
    group_size: int,
    weight_format: str,
    weight_layout: str = "",
    weight_rows: int = 0,
    weight_columns: int = 0,
) -> Tensor:
    """:func:`quantized_gemm` of a float activation ``[M, K]`` that the GEMM quantizes in its prologue.

    The result has the dtype of ``x``. ``x_scale`` and ``x_zero_point`` are given where ``scale_rule`` is ``"given"``,
    ``x_scale_2`` where the format has a global scale; the rest is computed from ``x``.
    """
    codes, scale, zero_point = operands.quantize_activation(
        x, x_scale, x_scale_2, x_zero_point, x_format, scale_rule, group_size
    )
    return quantized_gemm(
        codes,
        scale,
        x_scale_2,
        zero_point,
        weight,
        weight_scale,
        weight_scale_2,
        weight_zero_point,
        bias,
        x_format,
        weight_format,
        dtype_name(x.dtype),
        weight_layout,
        weight_rows,
        weight_columns,
    )


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


def _fake_int4_unpack(packed: Tensor, format: str) -> Tensor:
    int4.check(format)
    return packed.new_empty((*packed.shape[:-1], packed.shape[-1] * 8))


def _fake_unpack_weight(
    packed: Tensor, weight_layout: str, weight_format: str, weight_shape: Sequence[int], transposed: bool
) -> list[Tensor]:
    codes = packed.new_empty(weight_shape, dtype=operands.codes_dtype(weight_format))
    if weight_format not in block.BLOCK_FORMATS:
        return [codes]
    f = block.named(weight_format)
    n, k = weight_shape[0], f.unpacked(weight_shape[1])
    return [codes, packed.new_empty((n, k // f.size), dtype=f.scales_dtype)]


def _fake_of(gemm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    signature = inspect.signature(gemm)

    def fake(*args: object, **kwargs: object) -> Tensor:
        named: dict[str, Any] = dict(signature.bind(*args, **kwargs).arguments)
        x, weight_format = named["x"], named["weight_format"]
        operands.check_weight(weight_format)
        if "x_format" in named:
            operands.check_activation(named["x_format"], named.get("scale_rule"))
        (*rows, k), group_size = x.shape, named.get("group_size", 0)
        torch._check(
            not group_size or k % group_size == 0,
            lambda: f"{gemm.__name__}: K = {k} is not a multiple of {group_size}",
        )
        grouped = named.get("offsets") is not None
        n, _ = operands.features_of(named, lambda tensor: tensor.shape[grouped:])
        return x.new_empty((*rows, n), dtype=dtype_of(named["out_dtype"]) if "out_dtype" in named else x.dtype)

    return fake


def register(schema: str, eager: Callable[..., object], fake: Callable[..., object]) -> None:
    """Define an op of this namespace by its schema, its eager implementation and its fake."""
    name = schema.partition("(")[0]
    lib.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    lib.impl(name, eager, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=lib)


register(
    "block_quantize(Tensor x, str format, str scale_rule, Tensor? global_scale=None) -> (Tensor, Tensor)",
    block_quantize,
    _fake_block_quantize,
)
register(
    "block_dequantize(Tensor codes, Tensor scales, str format, str out_dtype, Tensor? global_scale=None, "
    "float zero_scale=0.0) -> Tensor",
    block_dequantize,
    _fake_block_dequantize,
)
register("int4_unpack(Tensor packed, str format) -> Tensor", int4_unpack, _fake_int4_unpack)
register(
    "unpack_weight(Tensor packed, str weight_layout, str weight_format, int[] weight_shape, bool transposed) "
    "-> Tensor[]",
    unpack_weight,
    _fake_unpack_weight,
)
_WEIGHT = "Tensor weight, Tensor? weight_scale, Tensor? weight_scale_2, Tensor? weight_zero_point, Tensor? bias"
_PACKED = 'str weight_layout="", int weight_rows=0, int weight_columns=0, Tensor? offsets=None'
register(
    f"weight_only_gemm(Tensor x, {_WEIGHT}, str weight_format, {_PACKED}) -> Tensor",
    weight_only_gemm,
    _fake_of(weight_only_gemm),
)
register(
    f"quantized_gemm(Tensor x, Tensor x_scale, Tensor? x_scale_2, Tensor? x_zero_point, {_WEIGHT}, str x_format, "
    f"str weight_format, str out_dtype, {_PACKED}) -> Tensor",
    quantized_gemm,
    _fake_of(quantized_gemm),
)
register(
    f"prologue_gemm(Tensor x, Tensor? x_scale, Tensor? x_scale_2, Tensor? x_zero_point, {_WEIGHT}, str x_format, "
    f"str scale_rule, int group_size, str weight_format, {_PACKED}) -> Tensor",
    prologue_gemm,
    _fake_of(prologue_gemm),
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
