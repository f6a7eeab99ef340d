"""What the rules of one stage have in common: a GEMM's weight, then its activation, then the activation's quantize.

A quantized Linear is recognized in up to three steps, each by the rule of a family of formats, so that N kinds of
weights and M kinds of activations need N + M rules and not N * M::

    mm(x, dequantize(weight).T)                  ->  weight_only_gemm(x, weight)        stage "weight"
    weight_only_gemm(dequantize(codes), weight)  ->  quantized_gemm(codes, weight)      stage "activation"
    quantized_gemm(quantize(x), weight)          ->  prologue_gemm(x, weight)           stage "prologue"

The leaves of the first two are the quantized tensors: the quantize stays outside and is shared by q, k and v.
"""

import operator
from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from quark_inductor.patterns.base import (
    FLOAT_DTYPES,
    GEMMS,
    VIEWS,
    Found,
    Rule,
    Variant,
    arguments,
    call,
    same_shape,
    value,
)
from quark_inductor.schemes.numerics import fp8
from quark_inductor.schemes.numerics.block import BLOCK_FORMATS
from quark_inductor.schemes.operands import features
from quark_inductor.schemes.ops import dtype_name

_ops = torch.ops.quark_inductor
_grouped_mm = torch.ops.aten._grouped_mm.default
# What to trace with: sizes that no constant of a pattern equals.
M, N, K = 3, 5, 64


def dtypes_and_scales() -> Iterable[tuple[torch.dtype, torch.dtype]]:
    """Each dtype of a result with each dtype that its scales may have: the same, or float32.

    In this order: a scale of the same dtype is cast first, and the pattern of float32 takes the cast for the scale.
    """
    for dtype in FLOAT_DTYPES:
        yield dtype, dtype
        if dtype != torch.float32:
            yield dtype, torch.float32


def source_of(node: Node) -> Node:
    """What a node is a view of."""
    while (node.target in VIEWS or node.target is torch.ops.aten.permute.default) and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


class OperandRule(Rule):
    """A rule whose check makes the new op's arguments."""

    @abstractmethod
    def operands(self, found: Found) -> dict[str, Any] | str:
        """The arguments of the new op that come from the match, or why it is none, as :meth:`check` says it."""

    def check(self, found: Found) -> str | None:
        """The match's dtypes and shapes are those of a format."""
        operands = self.operands(found)
        return operands if isinstance(operands, str) else self.refuse_shapes(found, operands)

    def refuse_shapes(self, found: Found, operands: dict[str, Any]) -> str | None:
        """What else must hold."""
        return None

    def made_of(self, found: Found) -> dict[str, Any]:
        """:meth:`operands` of a match that passed the check."""
        operands = self.operands(found)
        assert not isinstance(operands, str)
        return operands


class WeightRule(OperandRule):
    """``mm(x, w)``, ``addmm(bias, x, w)``, ``bmm(x, w)``, ``_grouped_mm(x, w, offsets)``: the pattern is that of ``w``.

    It is ``[K, N]``, or ``[E, K, N]`` in the latter two.
    """

    stage = "weight"
    targets = tuple(GEMMS)

    def operand(self, node: Node) -> Node | None:
        """What a GEMM multiplies by."""
        weight = node.args[GEMMS[node.target][1]]
        # A float parameter, as it is or transposed: nothing to look for.
        return weight if isinstance(weight, Node) and source_of(weight).all_input_nodes else None

    def check(self, found: Found) -> str | None:
        """A weight whose sizes are constants, too."""
        if found.node.target is _grouped_mm and (reason := _refuse_grouped(found.node)) is not None:
            return reason
        shape = _transposed_shape(found)
        if not all(isinstance(size, int) for size in shape):
            return (
                f"the weight's shape {list(shape)} is not known when compiling: parameters and buffers have known ones"
            )
        return super().check(found)

    def refuse_shapes(self, found: Found, operands: dict[str, Any]) -> str | None:
        """N and K are those of the codes, and the bias is ``[N]``."""
        *experts, k, n = _transposed_shape(found)
        weight, scale = value(operands["weight"]), value(operands["weight_scale"])
        known = features(weight.shape, scale.ndim, operands["weight_format"]) == (n, k)
        if not known or not same_shape(weight.shape[:-2], experts):
            return f"the dequantized weight is {[*experts, n, k]}, which is not the shape of its codes"
        bias = _bias(found.node)
        if bias is not None and not same_shape(value(bias).shape, (n,)):
            return f"what is added has shape {tuple(value(bias).shape)}, expected a bias [{n}]"
        return None

    def rewrite(self, found: Found) -> Node:
        """One ``weight_only_gemm``."""
        x = found.node.args[GEMMS[found.node.target][0]]
        named = {"x": x, "bias": _bias(found.node), **_packed(self.made_of(found))}
        if found.node.target is _grouped_mm:
            named |= {"offsets": found.node.args[2], "weight_scale": _by_expert(named["weight_scale"])}
        return call(found.node.graph, _ops.weight_only_gemm.default, named)


def _refuse_grouped(node: Node) -> str | None:
    """``None`` if a ``_grouped_mm`` is of rows sorted by expert, and adds and casts nothing."""
    x, weight, *more = node.args
    ndims = [value(n).ndim if isinstance(n, Node) else 0 for n in (x, weight)]
    if ndims != [2, 3] or not more or more[0] is None:
        return f"it multiplies tensors of {ndims} dimensions, a grouped GEMM has 2, 3 and offsets"
    bias, out_dtype, *_ = (*more[1:], None, None)
    if bias is not None or out_dtype not in (None, value(node).dtype):
        return "it adds a bias, or has another dtype than its operands"
    return None


def _by_expert(scale: Node) -> Node:
    """A scale ``[E, N, 1]`` as ``[E, N]``."""
    if value(scale).ndim != 3 or value(scale).shape[-1] != 1:
        return scale
    squeezed = scale.graph.call_function(torch.ops.aten.squeeze.dim, (scale, -1))
    squeezed.meta = {**scale.meta, "val": value(scale).squeeze(-1)}
    return squeezed


def _packed(operands: dict[str, Any]) -> dict[str, Any]:
    """The operands of a weight, read where they are packed if they are."""
    weight, scale = operands["weight"], operands["weight_scale"]
    transposed = weight.target is torch.ops.aten.permute.default
    codes = weight.args[0] if transposed else weight
    if codes.target is not operator.getitem or codes.args[0].target is not _ops.unpack_weight.default:
        return operands
    unpack = codes.args[0]
    packed, layout, _, shape, _ = unpack.args
    of_blocks = len(value(unpack)) > 1
    if of_blocks and (scale.target is not operator.getitem or scale.args != (unpack, 1)):
        return operands
    rows, columns = reversed(shape) if transposed else shape
    named = {"weight": packed, "weight_layout": layout, "weight_rows": rows, "weight_columns": columns}
    return {**operands, **named, "weight_scale": None if of_blocks else scale}


def _transposed_shape(found: Found) -> torch.Size:
    """``[K, N]`` or ``[E, K, N]``."""
    weight = found.node.args[GEMMS[found.node.target][1]]
    assert isinstance(weight, Node)
    return value(weight).shape


def _bias(gemm: Node) -> Node | None:
    index = GEMMS[gemm.target][2]
    bias = None if index is None else gemm.args[index]
    assert bias is None or isinstance(bias, Node)
    return bias


class ActivationRule(OperandRule):
    """``weight_only_gemm(x, ...)``: the pattern is that of ``x``, ``[M, K]``."""

    stage = "activation"
    targets = (_ops.weight_only_gemm.default,)

    def operand(self, node: Node) -> Node | None:
        """What a GEMM of a quantized weight multiplies."""
        x = node.args[0]
        return x if isinstance(x, Node) else None

    def refuse_shapes(self, found: Found, operands: dict[str, Any]) -> str | None:
        """As many values as codes."""
        return _refuse_values(value(arguments(found.node)["x"]), value(operands["x"]), operands["x_format"])

    def rewrite(self, found: Found) -> Node:
        """One ``quantized_gemm``."""
        named = {**arguments(found.node), **self.made_of(found), "out_dtype": dtype_name(value(found.node).dtype)}
        return call(found.node.graph, _ops.quantized_gemm.default, named)


class PrologueRule(OperandRule):
    """``quantized_gemm(quantize(x), ...)``: the pattern is all of it, made by :func:`gemm_of`."""

    stage = "prologue"
    targets = (_ops.quantized_gemm.default,)

    def may_be(self, variant: Variant, end: Node) -> bool:
        """Of the format in which the GEMM reads its activation, if the variant's facts name one as ``"read"``."""
        read = variant.facts.get("read")
        return super().may_be(variant, end) and read in (None, arguments(end)["x_format"])

    def refuse_shapes(self, found: Found, operands: dict[str, Any]) -> str | None:
        """One dtype throughout, and as many codes as values."""
        x, y, gemm = found.value("x"), value(found.node), arguments(found.node)
        if (reason := _refuse_values(x, value(gemm["x"]), gemm["x_format"])) is not None:
            return reason
        if x.dtype != y.dtype:
            return f"the activation is {x.dtype}, the result {y.dtype}: a GEMM with a prologue keeps one dtype"
        return None

    def rewrite(self, found: Found) -> Node:
        """One ``prologue_gemm``."""
        gemm = arguments(found.node)
        named = {**gemm, "x_scale": None, "x_zero_point": None, "x": found["x"], "group_size": 0}
        return call(found.node.graph, _ops.prologue_gemm.default, {**named, **self.made_of(found)})


def some_weight() -> dict[str, Tensor]:
    """What the example of a prologue's pattern must have besides: it takes any weight, and bytes match any dtype.

    Grouped, or tracing would leave out the last argument: a pattern has as many arguments as what it matches.
    """
    return {
        "weight": torch.zeros(1, N, K, dtype=fp8.DTYPE),
        "weight_scale": torch.zeros(1, dtype=torch.uint8),
        "offsets": torch.tensor([M], dtype=torch.int32),
    }


def gemm_of(
    x: Tensor,
    x_scale: Tensor,
    x_scale_2: Tensor | None,
    x_zero_point: Tensor | None,
    format: str,
    dtype: torch.dtype,
    weight: Tensor,
    weight_scale: Tensor,
    offsets: Tensor,
) -> Tensor:
    """A ``quantized_gemm`` by :func:`some_weight`, to trace the pattern of a prologue with."""
    result: Tensor = _ops.quantized_gemm(
        x,
        x_scale,
        x_scale_2,
        x_zero_point,
        weight,
        weight_scale,
        None,
        None,
        None,
        format,
        "fp8_e4m3",
        dtype_name(dtype),
        "",
        N,
        K,
        offsets,
    )
    return result


def _refuse_values(values: Tensor, codes: Tensor, format: str) -> str | None:
    entries = codes.shape[-1]
    k = BLOCK_FORMATS[format].unpacked(int(entries)) if format in BLOCK_FORMATS else entries
    if same_shape(values.shape, (*codes.shape[:-1], k)):
        return None
    return f"the activation is {list(values.shape)}, its codes are {list(codes.shape)}"


def refuse_scale(x: Tensor, scale: Tensor) -> str | None:
    """``None`` if a scale (or zero point) has a shape that the ops know for an activation ``x [M, K]``."""
    if scale.ndim == 0:
        return None
    (*rows, k), groups = x.shape, scale.shape[-1]
    if same_shape(scale.shape[:-1], rows) and isinstance(groups, int) and isinstance(k, int) and k % groups == 0:
        return None
    return f"the activation's scale has shape {tuple(scale.shape)}, expected [], [M, 1] or [M, K / group]"
