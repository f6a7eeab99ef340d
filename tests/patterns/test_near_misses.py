"""Graphs that are nearly those of a rule: each stays right, and the reason names the node or the check that differs.

A case is a function of the tensors of :func:`tensors` that it names. How far the rules may go with it is written beside
its reason: nothing (the emulation), ``weight_only_gemm`` (the activation is the near miss), ``quantized_gemm`` (its
quantize is).
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from quark_inductor.schemes.numerics import fp8, integer

M, K, N = 5, 64, 48
E4M3 = torch.float8_e4m3fn
q = torch.ops.quark_inductor


def tensors() -> dict[str, Tensor]:
    """Everything that a case may name; ``x`` and the like are ``[M, K]``, weights ``[N, K]`` or ``square [K, K]``."""
    g = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=g) + 0.125

    def randint(low: int, high: int, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=g).to(dtype)

    return {
        "x": randn(M, K),
        "other": randn(M, K),
        "row": randn(1, K),
        "vector": randn(K),
        "bias": randn(N),
        "matrix": randn(M, N),
        "one": rand(),
        "one_entry": rand(1),
        "one_by_one": rand(1, 1),
        "per_token": rand(M, 1),
        "per_token_2": rand(M, 1),
        "of_groups": rand(M, 4),
        "one_row_of_groups": rand(1, 4),
        "per_k": rand(K),
        "row_per_k": rand(1, K),
        "channel": rand(N),
        "of_blocks": rand(3, 4),
        "of_weight_groups": rand(N, 4),
        "w_fp8": randn(N, K).to(E4M3),
        "square": randn(K, K),
        "w_square": randn(K, K).to(E4M3),
        "w_batch": randn(2, N, K).to(E4M3),
        "x_batch": randn(2, M, K),
        "codes": randn(M, K).to(E4M3),
        "codes_2": randn(M, K).to(E4M3),
        "codes_square": randn(K, K).to(E4M3),
        "w_int8": randint(-128, 128, torch.int8, N, K),
        "w_int8_square": randint(-128, 128, torch.int8, K, K),
        "w_uint8": randint(0, 256, torch.uint8, N, K),
        "w_int16": randint(-128, 128, torch.int16, N, K),
        "codes_int8": randint(-128, 128, torch.int8, M, K),
        "zero": randint(-9, 9, torch.int32),
        "zero_channel": randint(-9, 9, torch.int8, N),
        "zero_token": randint(-9, 9, torch.int32, M, 1),
        "zero_per_k": randint(-9, 9, torch.int8, K),
        "zero_groups": randint(-9, 9, torch.int8, N, 4),
        "zero_2_groups": randint(-9, 9, torch.int8, N, 2),
        "half_zero": torch.tensor(0.5),
        "w_int4": randint(-(2**31), 2**31 - 1, torch.int32, N, K // 8),
        "w_int4_groups": randint(-(2**31), 2**31 - 1, torch.int32, K, N // 8),
        "int4_scale": rand(4, N),
        "int4_zero": randint(-(2**31), 2**31 - 1, torch.int32, N // 8),
        "int4_zero_groups": randint(-(2**31), 2**31 - 1, torch.int32, 4, N // 8),
        "w_mx": randint(0, 256, torch.uint8, N, K // 2),
        "w_mx_scale": randint(120, 130, torch.uint8, N, K // 32),
        "w_mx_square": randint(0, 256, torch.uint8, K, K // 2),
        "w_mx_square_scale": randint(120, 130, torch.uint8, K, K // 32),
        "w_mx_batch": randint(0, 256, torch.uint8, 2, N, K // 2),
        "w_mx_batch_scale": randint(120, 130, torch.uint8, 2, N, K // 32),
        "codes_mx": randint(0, 256, torch.uint8, M, K // 2),
        "codes_mx_scale": randint(120, 130, torch.uint8, M, K // 32),
        "codes_mx_square": randint(0, 256, torch.uint8, K, K // 2),
        "codes_mx_square_scale": randint(120, 130, torch.uint8, K, K // 32),
        "w_nv_scale": rand(N, K // 16).to(E4M3),
    }


@dataclass(frozen=True)
class NearMiss:
    """A case: what runs, what the reason says (either part around a bar), and the fused ops there are nevertheless."""

    fn: Callable[..., Tensor]
    reason: str
    fused: dict[str, int]
    dynamic: bool | None


CASES: dict[str, NearMiss] = {}


def near_miss(reason: str, *, dynamic: bool | None = None, **fused: int) -> Callable[[Callable[..., Tensor]], None]:
    def register(fn: Callable[..., Tensor]) -> None:
        assert fn.__name__ not in CASES
        CASES[fn.__name__] = NearMiss(fn, reason, fused, dynamic)

    return register


def fp8_values(w: Tensor, scale: Tensor) -> Tensor:
    """As the rule has it: ``[N, K]`` in float32."""
    return w.float() * scale.unsqueeze(-1)


def mx(codes: Tensor, scales: Tensor, dtype: str = "float32", **more: Any) -> Tensor:
    return q.block_dequantize(codes, scales, "mxfp4", dtype, **more)


def spread(scale: Tensor) -> Tensor:
    """Of blocks of 16 x 16."""
    return scale.repeat_interleave(16, 0).repeat_interleave(16, 1)


# --- FP8 weights


@near_miss("the weight's scale has shape (64,)")
def fp8_scale_along_k(x: Tensor, w_square: Tensor, per_k: Tensor) -> Tensor:
    return x @ (w_square.float() * per_k).t()


@near_miss("the weight's scale has shape (1,)")
def fp8_scale_of_one_entry(x: Tensor, w_fp8: Tensor, one_entry: Tensor) -> Tensor:
    return x @ (w_fp8.float() * one_entry).t()


@near_miss("where this graph has aten.div.Tensor")
def fp8_scale_divides(x: Tensor, w_fp8: Tensor, channel: Tensor) -> Tensor:
    return x @ (w_fp8.float() / channel.unsqueeze(-1)).t()


@near_miss("where this graph has aten.mul.Tensor|where this graph has prims.convert_element_type")
def fp8_scaled_twice(x: Tensor, w_fp8: Tensor, channel: Tensor, one: Tensor) -> Tensor:
    return x @ (fp8_values(w_fp8, channel) * one).t()


@near_miss("where this graph has aten.add.Tensor")
def fp8_scale_is_added(x: Tensor, w_fp8: Tensor, channel: Tensor) -> Tensor:
    return x @ (w_fp8.float() + channel.unsqueeze(-1)).t()


@near_miss("where this graph has prims.convert_element_type")
def fp8_unscaled(x: Tensor, w_fp8: Tensor) -> Tensor:
    return x @ w_fp8.float().t()


@near_miss("where this graph has aten.relu")
def fp8_relu_of_the_weight(x: Tensor, w_fp8: Tensor, channel: Tensor) -> Tensor:
    return x @ fp8_values(w_fp8, channel).relu().t()


@near_miss("where this graph has aten.add.Tensor")
def fp8_weight_plus_one(x: Tensor, w_fp8: Tensor, channel: Tensor) -> Tensor:
    return x @ (fp8_values(w_fp8, channel) + 1).t()


@near_miss("where this graph has prims.convert_element_type")
def fp8_weight_rounded_between(x: Tensor, w_fp8: Tensor, channel: Tensor) -> Tensor:
    return x @ fp8_values(w_fp8, channel).bfloat16().float().t()


@near_miss("float64")
def fp8_weight_in_float64(x: Tensor, w_fp8: Tensor, channel: Tensor) -> Tensor:
    return x.double() @ (w_fp8.double() * channel.double().unsqueeze(-1)).t()


@near_miss("complex64")
def fp8_weight_of_complex_numbers(x: Tensor, w_fp8: Tensor, channel: Tensor) -> Tensor:
    return (x.to(torch.complex64) @ fp8_values(w_fp8, channel).to(torch.complex64).t()).abs()


@near_miss("which has aten.permute where this graph has aten.mul.Tensor")
def fp8_weight_not_transposed(x: Tensor, w_square: Tensor, per_k: Tensor) -> Tensor:
    return x @ fp8_values(w_square, per_k)


@near_miss("which has aten.permute where this graph has aten.mul.Tensor")
def fp8_codes_transposed_before(x: Tensor, w_fp8: Tensor, channel: Tensor) -> Tensor:
    return x @ (w_fp8.t().float() * channel)


@near_miss("where this graph has prims.rev")
def fp8_weight_flipped(x: Tensor, w_fp8: Tensor, channel: Tensor) -> Tensor:
    return x @ fp8_values(w_fp8, channel).flip(0).t()


@near_miss("where this graph has aten.slice.Tensor")
def fp8_some_rows_of_the_weight(x: Tensor, w_fp8: Tensor, channel: Tensor) -> Tensor:
    return x @ fp8_values(w_fp8, channel)[:16].t()


@near_miss("{'beta': 0.5}, which no fused GEMM computes")
def fp8_addmm_with_beta(x: Tensor, w_fp8: Tensor, channel: Tensor, bias: Tensor) -> Tensor:
    return torch.addmm(bias, x, fp8_values(w_fp8, channel).t(), beta=0.5)


@near_miss("{'alpha': 2.0}, which no fused GEMM computes")
def fp8_addmm_with_alpha(x: Tensor, w_fp8: Tensor, channel: Tensor, bias: Tensor) -> Tensor:
    return torch.addmm(bias, x, fp8_values(w_fp8, channel).t(), alpha=2.0)


@near_miss("is not known when compiling", dynamic=True)
def fp8_weight_of_any_size(x: Tensor, w_fp8: Tensor, channel: Tensor) -> Tensor:
    return x @ fp8_values(w_fp8, channel).t()


@near_miss("the weight's scale has shape (48, 64)")
def fp8_block_scales_are_tiled(x: Tensor, w_fp8: Tensor, of_blocks: Tensor) -> Tensor:
    """Repeated as a whole, not one by one."""
    return x @ (w_fp8.float() * of_blocks.repeat(16, 16)).t()


@near_miss("the weight's scale has shape (40, 64)")
def fp8_block_scales_cut_at_the_start(x: Tensor, w_fp8: Tensor, of_blocks: Tensor) -> Tensor:
    return x @ (w_fp8[:40].float() * spread(of_blocks)[8:]).t()


@near_miss("scale")
def fp8_block_scales_of_the_first_row(x: Tensor, w_fp8: Tensor, of_blocks: Tensor) -> Tensor:
    """Spread over N by broadcasting."""
    scale = of_blocks.repeat_interleave(16, 0)[:1].repeat_interleave(16, 1)
    return x @ (w_fp8.float() * scale).t()


@near_miss("the weight's scale has shape (48, 64)")
def fp8_blocks_of_another_size(x: Tensor, w_fp8: Tensor, of_blocks: Tensor) -> Tensor:
    """Of 20 x 20, the last ones cut: the first 3 x 4 blocks would do, but 3 x 4 are of 16 x 16."""
    scale = of_blocks.repeat_interleave(20, 0)[:N].repeat_interleave(20, 1)[:, :K]
    return x @ (w_fp8.float() * scale.exp()).t()


# --- integer weights


@near_miss("where this graph has aten.add.Tensor")
def int8_zero_point_added(x: Tensor, w_int8: Tensor, channel: Tensor, zero_channel: Tensor) -> Tensor:
    return x @ ((w_int8.float() + zero_channel.unsqueeze(-1).float()) * channel.unsqueeze(-1)).t()


@near_miss("where this graph has aten.sub.Tensor")
def int8_zero_point_after_the_scale(x: Tensor, w_int8: Tensor, channel: Tensor, zero_channel: Tensor) -> Tensor:
    return x @ (w_int8.float() * channel.unsqueeze(-1) - zero_channel.unsqueeze(-1).float()).t()


@near_miss("the weight's zero point has shape (), its scale (48, 1)")
def int8_zero_point_of_another_shape(x: Tensor, w_int8: Tensor, channel: Tensor, zero: Tensor) -> Tensor:
    return x @ ((w_int8.float() - zero.float()) * channel.unsqueeze(-1)).t()


@near_miss("the weight's zero point has shape (64,), its scale (64, 1)")
def int8_zero_point_along_k(x: Tensor, w_int8_square: Tensor, per_k: Tensor, zero_per_k: Tensor) -> Tensor:
    return x @ ((w_int8_square.float() - zero_per_k.float()) * per_k.unsqueeze(-1)).t()


@near_miss("the weight's scale has shape (64,)")
def int8_scale_along_k(x: Tensor, w_int8_square: Tensor, per_k: Tensor, zero: Tensor) -> Tensor:
    return x @ ((w_int8_square.float() - zero.float()) * per_k).t()


@near_miss("the weight's zero point has shape (48, 1), its scale (48, 4)")
def int8_zero_points_of_other_groups(
    x: Tensor, w_int8: Tensor, of_weight_groups: Tensor, zero_channel: Tensor
) -> Tensor:
    """One a channel."""
    groups = w_int8.unflatten(-1, (4, -1)).float() - zero_channel.unsqueeze(-1).unsqueeze(-1).float()
    return x @ (groups * of_weight_groups.unsqueeze(-1)).flatten(1).t()


@near_miss("where this graph has aten.mul.Tensor|where this graph has prims.convert_element_type")
def int8_scaled_twice(x: Tensor, w_int8: Tensor, channel: Tensor, one: Tensor) -> Tensor:
    return x @ (w_int8.float() * channel.unsqueeze(-1) * one).t()


@near_miss("int16")
def uint8_codes_read_as_signed(x: Tensor, w_uint8: Tensor, channel: Tensor) -> Tensor:
    """By a subtraction in integers, where a zero point would be subtracted in float32."""
    return x @ ((w_uint8.to(torch.int16) - 128).float() * channel.unsqueeze(-1)).t()


@near_miss("int32")
def int4_nibbles_without_the_op(x: Tensor, w_int4: Tensor, channel: Tensor) -> Tensor:
    nibbles = torch.stack([(w_int4 >> (4 * i)) & 15 for i in range(8)], -1).flatten(-2)
    return x @ (nibbles.float() * channel.unsqueeze(-1)).t()


@near_miss("where this graph has aten.unsqueeze")
def int4_without_a_zero_point(x: Tensor, w_int4: Tensor, channel: Tensor) -> Tensor:
    return x @ (q.int4_unpack(w_int4, "int4").float() * channel.unsqueeze(-1)).t()


@near_miss("which has quark_inductor.int4_unpack where this graph has an input")
def int4_zero_point_not_packed(x: Tensor, w_int4: Tensor, channel: Tensor, zero_channel: Tensor) -> Tensor:
    codes = q.int4_unpack(w_int4, "int4")
    return x @ integer.dequantize(codes, channel.unsqueeze(-1), zero_channel.unsqueeze(-1), torch.float32).t()


@near_miss("format")
def int4_zero_point_of_another_format(x: Tensor, w_int4: Tensor, channel: Tensor, int4_zero: Tensor) -> Tensor:
    """The codes are signed, the zero points are not."""
    codes, zero = q.int4_unpack(w_int4, "int4"), q.int4_unpack(int4_zero, "uint4")
    return x @ integer.dequantize(codes, channel.unsqueeze(-1), zero.unsqueeze(-1), torch.float32).t()


@near_miss("the weight's codes are uint4, under an FP8 stage expected int4")
def int4_unsigned_under_fp8(x: Tensor, w_int4: Tensor, channel: Tensor, int4_zero: Tensor, one: Tensor) -> Tensor:
    codes, zero = q.int4_unpack(w_int4, "uint4"), q.int4_unpack(int4_zero, "uint4")
    stage = integer.dequantize(codes, channel.unsqueeze(-1), zero.unsqueeze(-1), torch.float32)
    return x @ (stage * one).t()


@near_miss("where this graph has quark_inductor.int4_unpack")
def int4_groups_not_transposed(x: Tensor, w_int4: Tensor, of_weight_groups: Tensor, zero_groups: Tensor) -> Tensor:
    codes = q.int4_unpack(w_int4, "int4")
    return x @ integer.dequantize_groups(codes, of_weight_groups, zero_groups, torch.float32).t()


@near_miss("where this graph has prims.convert_element_type")
def int4_groups_rounded_between(
    x: Tensor, w_int4_groups: Tensor, int4_scale: Tensor, int4_zero_groups: Tensor
) -> Tensor:
    codes, zero = (q.int4_unpack(t, "uint4").t() for t in (w_int4_groups, int4_zero_groups))
    return x @ integer.dequantize_groups(codes, int4_scale.t(), zero, torch.bfloat16).float().t()


# --- block-quantized weights


@near_miss("which has aten.permute where this graph has quark_inductor.block_dequantize")
def block_weight_not_transposed(x: Tensor, w_mx_square: Tensor, w_mx_square_scale: Tensor) -> Tensor:
    return x @ mx(w_mx_square, w_mx_square_scale)


@near_miss("where this graph has aten.mul.Tensor|where this graph has quark_inductor.block_dequantize")
def block_weight_scaled_again(x: Tensor, w_mx: Tensor, w_mx_scale: Tensor, one: Tensor) -> Tensor:
    return x @ (mx(w_mx, w_mx_scale) * one).t()


@near_miss("where this graph has aten.relu")
def block_weight_relu(x: Tensor, w_mx: Tensor, w_mx_scale: Tensor) -> Tensor:
    return x @ mx(w_mx, w_mx_scale).relu().t()


@near_miss("where this graph has prims.convert_element_type")
def block_weight_cast(x: Tensor, w_mx: Tensor, w_mx_scale: Tensor) -> Tensor:
    return x @ mx(w_mx, w_mx_scale, "bfloat16").float().t()


@near_miss("float64")
def block_weight_in_float64(x: Tensor, w_mx: Tensor, w_mx_scale: Tensor) -> Tensor:
    return x.double() @ mx(w_mx, w_mx_scale, "float64").t()


@near_miss("block_weight, whose quark_inductor.block_dequantize has other arguments")
def block_weight_where_a_scale_of_0_is_not_0(x: Tensor, w_mx: Tensor, w_mx_scale: Tensor) -> Tensor:
    return x @ mx(w_mx, w_mx_scale, zero_scale=0.5).t()


@near_miss("where this graph has aten.view|where this graph has aten.clone")
def block_weights_joined(x: Tensor, w_mx: Tensor, w_mx_scale: Tensor) -> Tensor:
    values = mx(w_mx, w_mx_scale)
    return x @ torch.cat([values, values]).t()


@near_miss("{'beta': 0.5}, which no fused GEMM computes")
def block_addmm_with_beta(x: Tensor, w_mx: Tensor, w_mx_scale: Tensor, bias: Tensor) -> Tensor:
    return torch.addmm(bias, x, mx(w_mx, w_mx_scale).t(), beta=0.5)


@near_miss("is not known when compiling", dynamic=True)
def block_weight_of_any_size(x: Tensor, w_mx: Tensor, w_mx_scale: Tensor) -> Tensor:
    return x @ mx(w_mx, w_mx_scale).t()


# --- activations


@near_miss("the activation's scale has shape (64,)", weight_only_gemm=1)
def fp8_activation_scale_along_k(codes: Tensor, per_k: Tensor, w_fp8: Tensor, channel: Tensor) -> Tensor:
    return (codes.float() * per_k) @ fp8_values(w_fp8, channel).t()


@near_miss("the activation's scale has shape (1, 64)", weight_only_gemm=1)
def fp8_activation_scale_a_row_along_k(codes: Tensor, row_per_k: Tensor, w_fp8: Tensor, channel: Tensor) -> Tensor:
    return (codes.float() * row_per_k) @ fp8_values(w_fp8, channel).t()


@near_miss("the activation's scale has shape (5, 64)", weight_only_gemm=1)
def fp8_activation_scale_of_every_element(codes: Tensor, x: Tensor, w_fp8: Tensor, channel: Tensor) -> Tensor:
    return (codes.float() * x) @ fp8_values(w_fp8, channel).t()


@near_miss("the activation's scale has shape (1,)", weight_only_gemm=1)
def fp8_activation_scale_one_entry(codes: Tensor, one_entry: Tensor, w_fp8: Tensor, channel: Tensor) -> Tensor:
    return (codes.float() * one_entry) @ fp8_values(w_fp8, channel).t()


@near_miss("the activation's scale has shape (1, 1)", weight_only_gemm=1)
def fp8_activation_scale_one_by_one(codes: Tensor, one_by_one: Tensor, w_fp8: Tensor, channel: Tensor) -> Tensor:
    """A kernel would read it as [M, 1], past its end."""
    return (codes.float() * one_by_one) @ fp8_values(w_fp8, channel).t()


@near_miss("where this graph has prims.convert_element_type", weight_only_gemm=1)
def fp8_activation_unscaled(codes: Tensor, w_fp8: Tensor, channel: Tensor) -> Tensor:
    return codes.float() @ fp8_values(w_fp8, channel).t()


@near_miss("where this graph has aten.div.Tensor", weight_only_gemm=1)
def fp8_activation_scale_divides(codes: Tensor, one: Tensor, w_fp8: Tensor, channel: Tensor) -> Tensor:
    return (codes.float() / one) @ fp8_values(w_fp8, channel).t()


@near_miss("where this graph has aten.relu", weight_only_gemm=1)
def fp8_activation_relu(codes: Tensor, one: Tensor, w_fp8: Tensor, channel: Tensor) -> Tensor:
    return (codes.float() * one).relu() @ fp8_values(w_fp8, channel).t()


@near_miss("where this graph has aten.add.Tensor", weight_only_gemm=1)
def fp8_activation_plus_another(codes: Tensor, one: Tensor, other: Tensor, w_fp8: Tensor, channel: Tensor) -> Tensor:
    return (codes.float() * one + other) @ fp8_values(w_fp8, channel).t()


@near_miss("where this graph has prims.convert_element_type", weight_only_gemm=1)
def fp8_activation_rounded_between(codes: Tensor, one: Tensor, w_fp8: Tensor, channel: Tensor) -> Tensor:
    return (codes.float() * one).bfloat16().float() @ fp8_values(w_fp8, channel).t()


@near_miss("where this graph has aten.mul.Tensor", weight_only_gemm=1)
def fp8_activation_scaled_twice(
    codes: Tensor, one: Tensor, per_token: Tensor, w_fp8: Tensor, channel: Tensor
) -> Tensor:
    return (codes.float() * one * per_token) @ fp8_values(w_fp8, channel).t()


@near_miss("where this graph has aten.permute", weight_only_gemm=1)
def fp8_activation_transposed(codes_square: Tensor, one: Tensor, w_square: Tensor, per_k: Tensor) -> Tensor:
    return (codes_square.float() * one).t() @ fp8_values(w_square, per_k).t()


@near_miss("the activation's scale has shape (1, 4)", weight_only_gemm=1)
def fp8_activation_groups_of_one_row(
    codes: Tensor, one_row_of_groups: Tensor, w_fp8: Tensor, channel: Tensor
) -> Tensor:
    x = (codes.float().unflatten(-1, (4, -1)) * one_row_of_groups.unsqueeze(-1)).flatten(1)
    return x @ fp8_values(w_fp8, channel).t()


@near_miss("fp8_activation, whose aten.unsqueeze has -1 where this graph has 1", weight_only_gemm=1)
def fp8_activation_scales_interleaved(codes: Tensor, of_groups: Tensor, w_fp8: Tensor, channel: Tensor) -> Tensor:
    """Each scale for every fourth element, where it should be for 16 neighbours."""
    x = (codes.float().unflatten(-1, (-1, 4)) * of_groups.unsqueeze(1)).flatten(1)
    return x @ fp8_values(w_fp8, channel).t()


@near_miss("the activation is [20, 64], its codes are [5, 64]", weight_only_gemm=1)
def fp8_activation_with_more_rows_than_codes(
    codes: Tensor, of_groups: Tensor, w_fp8: Tensor, channel: Tensor
) -> Tensor:
    """Every row by each of its four scales."""
    x = (codes.float().view(M, 1, K) * of_groups.unsqueeze(-1)).view(4 * M, K)
    return x @ fp8_values(w_fp8, channel).t()


@near_miss("x_scale is torch.bfloat16, expected torch.float32", weight_only_gemm=1)
def fp8_activation_scale_of_lower_precision(codes: Tensor, one: Tensor, w_fp8: Tensor, channel: Tensor) -> Tensor:
    """A scale of no dimension does not make the product bfloat16; that of a fused GEMM's operand is rounded to it."""
    return (codes.float() * one.bfloat16()) @ fp8_values(w_fp8, channel).t()


@near_miss("x_scale is torch.float64, expected torch.float32", weight_only_gemm=1)
def fp8_activation_scale_of_float64(codes: Tensor, one: Tensor, w_fp8: Tensor, channel: Tensor) -> Tensor:
    return (codes.float() * (one.double() / 3)) @ fp8_values(w_fp8, channel).t()


@near_miss("where this graph has aten.mul.Tensor|where this graph has prims.convert_element_type", weight_only_gemm=1)
def int8_activation_without_a_zero_point(codes_int8: Tensor, one: Tensor, w_fp8: Tensor, channel: Tensor) -> Tensor:
    return (codes_int8.float() * one) @ fp8_values(w_fp8, channel).t()


@near_miss("where this graph has aten.add.Tensor", weight_only_gemm=1)
def int8_activation_zero_point_added(
    codes_int8: Tensor, one: Tensor, zero: Tensor, w_fp8: Tensor, channel: Tensor
) -> Tensor:
    return ((codes_int8.float() + zero.float()) * one) @ fp8_values(w_fp8, channel).t()


@near_miss("has shape (64,)", weight_only_gemm=1)
def int8_activation_zero_point_along_k(
    codes_int8: Tensor, one: Tensor, zero_per_k: Tensor, w_fp8: Tensor, channel: Tensor
) -> Tensor:
    return ((codes_int8.float() - zero_per_k.float()) * one) @ fp8_values(w_fp8, channel).t()


@near_miss("zero point", weight_only_gemm=1)
def int8_activation_zero_point_a_token_scale_a_tensor(
    codes_int8: Tensor, one: Tensor, zero_token: Tensor, w_fp8: Tensor, channel: Tensor
) -> Tensor:
    return ((codes_int8.float() - zero_token.float()) * one) @ fp8_values(w_fp8, channel).t()


@near_miss("zero point", weight_only_gemm=1)
def int8_activation_zero_point_a_tensor_scale_a_token(
    codes_int8: Tensor, per_token: Tensor, zero: Tensor, w_fp8: Tensor, channel: Tensor
) -> Tensor:
    return ((codes_int8.float() - zero.float()) * per_token) @ fp8_values(w_fp8, channel).t()


@near_miss("integer_activation, which has prims.convert_element_type where this graph has an input", weight_only_gemm=1)
def int8_activation_zero_point_not_an_integer(
    codes_int8: Tensor, one: Tensor, half_zero: Tensor, w_fp8: Tensor, channel: Tensor
) -> Tensor:
    return ((codes_int8.float() - half_zero) * one) @ fp8_values(w_fp8, channel).t()


@near_miss(
    "where this graph has aten.mul.Tensor|where this graph has quark_inductor.block_dequantize", weight_only_gemm=1
)
def block_activation_scaled_again(
    codes_mx: Tensor, codes_mx_scale: Tensor, one: Tensor, w_mx: Tensor, w_mx_scale: Tensor
) -> Tensor:
    return (mx(codes_mx, codes_mx_scale) * one) @ mx(w_mx, w_mx_scale).t()


@near_miss("a scale of 0 stands for 0.5, in mxfp4 for 0.0", weight_only_gemm=1)
def block_activation_where_a_scale_of_0_is_not_0(
    codes_mx: Tensor, codes_mx_scale: Tensor, w_mx: Tensor, w_mx_scale: Tensor
) -> Tensor:
    return mx(codes_mx, codes_mx_scale, zero_scale=0.5) @ mx(w_mx, w_mx_scale).t()


@near_miss("a scale of 0 stands for 0.0, in amdfp4_g32 for 1.19", weight_only_gemm=1)
def block_activation_where_a_scale_of_0_is_0(x: Tensor, w_mx: Tensor, w_mx_scale: Tensor) -> Tensor:
    """In AMDFP4 it is not."""
    codes, scales = q.block_quantize(x, "amdfp4_g32", "nearest")
    return q.block_dequantize(codes, scales, "amdfp4_g32", "float32") @ mx(w_mx, w_mx_scale).t()


@near_miss("where this graph has aten.permute", weight_only_gemm=1)
def block_activation_transposed(
    codes_mx_square: Tensor, codes_mx_square_scale: Tensor, w_mx_square: Tensor, w_mx_square_scale: Tensor
) -> Tensor:
    return mx(codes_mx_square, codes_mx_square_scale).t() @ mx(w_mx_square, w_mx_square_scale).t()


# --- quantizes


def fp8_quantized(x: Tensor, scale: Tensor) -> Tensor:
    """As the rule has it."""
    return (x / scale).clamp(-448.0, 448.0).to(E4M3)


@near_miss("fp8_prologue, whose aten.clamp_min has -448.0 where this graph has -447.0", quantized_gemm=1)
def fp8_limits_off_by_one(x: Tensor, one: Tensor, w_fp8: Tensor, channel: Tensor) -> Tensor:
    codes = (x / one).clamp(-447.0, 447.0).to(E4M3)
    return (codes.float() * one) @ fp8_values(w_fp8, channel).t()


@near_miss("fp8_prologue, which has aten.clamp_min where this graph has aten.div.Tensor", quantized_gemm=1)
def fp8_one_limit(x: Tensor, one: Tensor, w_fp8: Tensor, channel: Tensor) -> Tensor:
    codes = (x / one).clamp(max=448.0).to(E4M3)
    return (codes.float() * one) @ fp8_values(w_fp8, channel).t()


@near_miss("fp8_prologue, which has aten.clamp_max where this graph has aten.div.Tensor", quantized_gemm=1)
def fp8_no_limits(x: Tensor, one: Tensor, w_fp8: Tensor, channel: Tensor) -> Tensor:
    return ((x / one).to(E4M3).float() * one) @ fp8_values(w_fp8, channel).t()


@near_miss("fp8_prologue, which has aten.clamp_max where this graph has aten.div.Tensor", quantized_gemm=1)
def fp8_limits_before_the_scale(x: Tensor, one: Tensor, w_fp8: Tensor, channel: Tensor) -> Tensor:
    codes = (x.clamp(-448.0, 448.0) / one).to(E4M3)
    return (codes.float() * one) @ fp8_values(w_fp8, channel).t()


@near_miss("fp8_prologue, which has aten.div.Tensor where this graph has aten.mul.Tensor", quantized_gemm=1)
def fp8_times_the_reciprocal(x: Tensor, one: Tensor, w_fp8: Tensor, channel: Tensor) -> Tensor:
    """It rounds differently."""
    codes = (x * (1 / one)).clamp(-448.0, 448.0).to(E4M3)
    return (codes.float() * one) @ fp8_values(w_fp8, channel).t()


@near_miss("fp8_prologue, which has aten.div.Tensor where this graph has aten.round", quantized_gemm=1)
def fp8_rounded_before_the_cast(x: Tensor, one: Tensor, w_fp8: Tensor, channel: Tensor) -> Tensor:
    codes = (x / one).round().clamp(-448.0, 448.0).to(E4M3)
    return (codes.float() * one) @ fp8_values(w_fp8, channel).t()


@near_miss("fp8_prologue, which reads one value twice where this graph reads two", quantized_gemm=1)
def fp8_dequantized_by_another_scale(
    x: Tensor, per_token: Tensor, per_token_2: Tensor, w_fp8: Tensor, channel: Tensor
) -> Tensor:
    return (fp8_quantized(x, per_token).float() * per_token_2) @ fp8_values(w_fp8, channel).t()


@near_miss("where this graph has prims.convert_element_type", quantized_gemm=1)
def fp8_quantized_from_bfloat16(x: Tensor, one: Tensor, w_fp8: Tensor, channel: Tensor) -> Tensor:
    codes = fp8_quantized(x.bfloat16(), one.bfloat16())
    return (codes.float() * one) @ fp8_values(w_fp8, channel).t()


@near_miss("x is torch.float64, expected torch.float32", quantized_gemm=1)
def fp8_quantized_from_float64(x: Tensor, one: Tensor, w_fp8: Tensor, channel: Tensor) -> Tensor:
    codes = fp8_quantized(x.double(), one)
    return (codes.float() * one) @ fp8_values(w_fp8, channel).t()


@near_miss("the activation", quantized_gemm=1)
def fp8_vector_by_many_scales(vector: Tensor, per_token: Tensor, w_fp8: Tensor, channel: Tensor) -> Tensor:
    return (fp8_quantized(vector, per_token).float() * per_token) @ fp8_values(w_fp8, channel).t()


@near_miss("the activation", quantized_gemm=1)
def fp8_one_row_by_many_scales(row: Tensor, per_token: Tensor, w_fp8: Tensor, channel: Tensor) -> Tensor:
    """The codes have more rows than what is quantized."""
    return (fp8_quantized(row, per_token).float() * per_token) @ fp8_values(w_fp8, channel).t()


@near_miss("fp8_prologue, which has aten.add.Tensor where this graph has aten.clamp_min", quantized_gemm=1)
def fp8_groups_of_another_eps(x: Tensor, w_fp8: Tensor, channel: Tensor) -> Tensor:
    groups = x.unflatten(-1, (4, -1))
    scale = (groups.abs().amax(-1) / 448.0).clamp(min=1e-3)
    codes = fp8_quantized(groups, scale.unsqueeze(-1)).flatten(1)
    return fp8.dequantize_groups(codes, scale, torch.float32) @ fp8_values(w_fp8, channel).t()


def int8_case(codes: Tensor, scale: Tensor, zero_point: Tensor, weight: Tensor, channel: Tensor) -> Tensor:
    return integer.dequantize(codes, scale, zero_point, torch.float32) @ fp8_values(weight, channel).t()


@near_miss("integer_prologue, which has aten.round where this graph has aten.floor", quantized_gemm=1)
def int8_floor(x: Tensor, one: Tensor, zero: Tensor, w_fp8: Tensor, channel: Tensor) -> Tensor:
    codes = (torch.floor(x * (1.0 / one)) + zero.float()).clamp(-128, 127).to(torch.int8)
    return int8_case(codes, one, zero, w_fp8, channel)


@near_miss("integer_prologue, whose aten.clamp_min has -128 where this graph has -127", quantized_gemm=1)
def int8_narrow_range(x: Tensor, one: Tensor, zero: Tensor, w_fp8: Tensor, channel: Tensor) -> Tensor:
    codes = (torch.round(x * (1.0 / one)) + zero.float()).clamp(-127, 127).to(torch.int8)
    return int8_case(codes, one, zero, w_fp8, channel)


@near_miss("integer_prologue, which has aten.clamp_max where this graph has aten.add.Tensor", quantized_gemm=1)
def int8_no_limits(x: Tensor, one: Tensor, zero: Tensor, w_fp8: Tensor, channel: Tensor) -> Tensor:
    codes = (torch.round(x * (1.0 / one)) + zero.float()).to(torch.int8)
    return int8_case(codes, one, zero, w_fp8, channel)


@near_miss(
    "integer_prologue, which has aten.add.Tensor where this graph has prims.convert_element_type", quantized_gemm=1
)
def int8_limits_after_the_cast(x: Tensor, one: Tensor, zero: Tensor, w_fp8: Tensor, channel: Tensor) -> Tensor:
    codes = (torch.round(x * (1.0 / one)) + zero.float()).to(torch.int32).clamp(-128, 127).to(torch.int8)
    return int8_case(codes, one, zero, w_fp8, channel)


@near_miss("integer_prologue, which has aten.add.Tensor where this graph has aten.round", quantized_gemm=1)
def int8_zero_point_before_rounding(x: Tensor, one: Tensor, zero: Tensor, w_fp8: Tensor, channel: Tensor) -> Tensor:
    """As amd-quark quantizes weights."""
    codes = torch.round(x * (1.0 / one) + zero.float()).clamp(-128, 127).to(torch.int8)
    return int8_case(codes, one, zero, w_fp8, channel)


@near_miss("integer_prologue, which has aten.mul.Tensor where this graph has aten.div.Tensor", quantized_gemm=1)
def int8_divided_by_the_scale(x: Tensor, one: Tensor, zero: Tensor, w_fp8: Tensor, channel: Tensor) -> Tensor:
    """It rounds differently."""
    codes = (torch.round(x / one) + zero.float()).clamp(-128, 127).to(torch.int8)
    return int8_case(codes, one, zero, w_fp8, channel)


@near_miss("integer_prologue, which has aten.add.Tensor where this graph has aten.round", quantized_gemm=1)
def int8_without_adding_the_zero_point(x: Tensor, one: Tensor, zero: Tensor, w_fp8: Tensor, channel: Tensor) -> Tensor:
    codes = torch.round(x * (1.0 / one)).clamp(-128, 127).to(torch.int8)
    return int8_case(codes, one, zero, w_fp8, channel)


@near_miss("integer_prologue, which reads one value twice where this graph reads two", quantized_gemm=1)
def int8_dequantized_by_another_zero_point(
    x: Tensor, one: Tensor, zero: Tensor, w_fp8: Tensor, channel: Tensor
) -> Tensor:
    codes = integer.quantize(x, one, zero, "int8")
    return int8_case(codes, one, zero + 1, w_fp8, channel)


@near_miss("x_scale is torch.bfloat16, expected torch.float32", weight_only_gemm=1)
def int8_reciprocal_of_lower_precision(x: Tensor, one: Tensor, zero: Tensor, w_fp8: Tensor, channel: Tensor) -> Tensor:
    """Of a scale of no dimension, which does not make the product bfloat16."""
    scale = one.bfloat16()
    codes = (torch.round(x * 50 * (1.0 / scale)) + zero.float()).clamp(-128, 127).to(torch.int8)
    return ((codes.float() - zero.float()) * scale) @ fp8_values(w_fp8, channel).t()


@near_miss("the activation's scale has shape (), its zero point (5, 1)", weight_only_gemm=1)
def int8_one_row_by_many_zero_points(
    row: Tensor, one: Tensor, zero_token: Tensor, w_fp8: Tensor, channel: Tensor
) -> Tensor:
    codes = integer.quantize(row, one, zero_token, "int8")
    return integer.dequantize(codes, one, zero_token, torch.float32) @ fp8_values(w_fp8, channel).t()


@near_miss("integer_prologue, whose aten.clamp_max has 255 where this graph has 127", quantized_gemm=1)
def uint8_in_the_range_of_int8(x: Tensor, one: Tensor, zero: Tensor, w_fp8: Tensor, channel: Tensor) -> Tensor:
    codes = (torch.round(x * (1.0 / one)) + zero.float()).clamp(0, 127).to(torch.uint8)
    return int8_case(codes, one, zero, w_fp8, channel)


@near_miss("the activation is quantized to amdfp4_g32 and read as mxfp4", quantized_gemm=1)
def block_quantized_to_another_format(x: Tensor, w_mx: Tensor, w_mx_scale: Tensor) -> Tensor:
    """Of the same shape."""
    codes, scales = q.block_quantize(x, "amdfp4_g32", "nearest")
    return mx(codes, scales) @ mx(w_mx, w_mx_scale).t()


@near_miss("block_prologue, which reads one value twice where this graph reads two", quantized_gemm=1)
def block_scales_of_another(x: Tensor, other: Tensor, w_mx: Tensor, w_mx_scale: Tensor) -> Tensor:
    codes, scales = q.block_quantize(x, "mxfp4", "even")[0], q.block_quantize(other, "mxfp4", "even")[1]
    return mx(codes, scales) @ mx(w_mx, w_mx_scale).t()


@near_miss("where this graph has aten.bitwise_xor.Scalar", quantized_gemm=1)
def block_codes_changed(x: Tensor, w_mx: Tensor, w_mx_scale: Tensor) -> Tensor:
    codes, scales = q.block_quantize(x, "mxfp4", "even")
    return mx(codes ^ 8, scales) @ mx(w_mx, w_mx_scale).t()


@near_miss("block_prologue, which has getitem where this graph has aten.view", quantized_gemm=1)
def block_quantized_in_three_dimensions(x: Tensor, w_mx: Tensor, w_mx_scale: Tensor) -> Tensor:
    codes, scales = q.block_quantize(x.unsqueeze(1), "mxfp4", "even")
    return mx(codes.flatten(0, 1), scales.flatten(0, 1)) @ mx(w_mx, w_mx_scale).t()


@near_miss("x is torch.bfloat16, expected torch.float32", quantized_gemm=1)
def block_quantized_from_bfloat16(x: Tensor, w_mx: Tensor, w_mx_scale: Tensor) -> Tensor:
    codes, scales = q.block_quantize(x.bfloat16(), "mxfp4", "even")
    return mx(codes, scales) @ mx(w_mx, w_mx_scale).t()


@near_miss("scale rule 'floor'", quantized_gemm=1)
def block_scale_rule_without_a_kernel(x: Tensor, w_mx: Tensor, w_mx_scale: Tensor) -> Tensor:
    return mx(*q.block_quantize(x, "mxfp4", "floor")) @ mx(w_mx, w_mx_scale).t()


@near_miss("block_prologue, which reads one value twice where this graph reads two", quantized_gemm=1)
def block_global_scales_differ(x: Tensor, one: Tensor, w_mx: Tensor, w_nv_scale: Tensor) -> Tensor:
    codes, scales = q.block_quantize(x, "nvfp4", "sequential", one)
    values = q.block_dequantize(codes, scales, "nvfp4", "float32", one * 2)
    return values @ q.block_dequantize(w_mx, w_nv_scale, "nvfp4", "float32", one).t()


@pytest.mark.parametrize("name", CASES)
def test_near_miss(rewrite: Callable[..., Any], name: str) -> None:
    case = CASES[name]
    known = tensors()
    args = [known[parameter] for parameter in inspect.signature(case.fn).parameters]
    expected = case.fn(*args)
    done = rewrite(case.fn, *args, dynamic=case.dynamic)
    assert {op: count for op, count in done.fused().items() if op.endswith("gemm")} == case.fused
    # A quantize that stays outside of its GEMM is no Linear left to the emulation.
    refusals = done.result.unfused or done.result.left
    assert (done.result.unfused == ()) is ("quantized_gemm" in case.fused)
    assert refusals
    for refusal in refusals:
        assert any(reason in refusal.reason for reason in case.reason.split("|")), refusal.reason
    assert done.output.shape == expected.shape
    assert torch.equal(done.output, expected)


def codes_by_a_cast(x: Tensor, square: Tensor, per_k: Tensor) -> Tensor:
    """A weight that is quantized in the graph."""
    return x @ fp8_values(square.to(E4M3), per_k).t()


def scale_of_two_dimensions(x: Tensor, w_fp8: Tensor, channel: Tensor) -> Tensor:
    return x @ (w_fp8.float() * channel.reshape(N, 1)).t()


def scale_from_elsewhere(x: Tensor, other: Tensor, w_fp8: Tensor, channel: Tensor) -> Tensor:
    """Of another tensor, and by another formula: it is given to the GEMM."""
    scale = other.abs().amax(-1, keepdim=True) / 240.0 + 1e-3
    return (fp8_quantized(x, scale).float() * scale) @ fp8_values(w_fp8, channel).t()


def scale_of_the_whole_other(x: Tensor, x_batch: Tensor, w_fp8: Tensor, channel: Tensor) -> Tensor:
    scale = x_batch.abs().amax() / 448.0
    return (fp8_quantized(x, scale).float() * scale) @ fp8_values(w_fp8, channel).t()


def zero_points_from_elsewhere(
    x: Tensor, per_token: Tensor, zero_token: Tensor, w_fp8: Tensor, channel: Tensor
) -> Tensor:
    codes = integer.quantize(x, per_token, zero_token, "int8")
    return int8_case(codes, per_token, zero_token, w_fp8, channel)


def unsigned_without_a_zero_point(x: Tensor, w_uint8: Tensor, channel: Tensor) -> Tensor:
    return x @ (w_uint8.float() * channel.unsqueeze(-1)).t()


def another_format_than_the_weights(x: Tensor, w_mx: Tensor, w_mx_scale: Tensor) -> Tensor:
    codes, scales = q.block_quantize(x, "mxfp8_e4m3", "rceil")
    return q.block_dequantize(codes, scales, "mxfp8_e4m3", "float32") @ mx(w_mx, w_mx_scale).t()


@pytest.mark.parametrize(
    ("fn", "op"),
    [
        (codes_by_a_cast, "weight_only_gemm"),
        (scale_of_two_dimensions, "weight_only_gemm"),
        (unsigned_without_a_zero_point, "weight_only_gemm"),
        (scale_from_elsewhere, "prologue_gemm"),
        (scale_of_the_whole_other, "prologue_gemm"),
        (zero_points_from_elsewhere, "prologue_gemm"),
        (another_format_than_the_weights, "prologue_gemm"),
    ],
    ids=lambda p: getattr(p, "__name__", None),
)
def test_what_is_no_miss(rewrite: Callable[..., Any], fn: Callable[..., Tensor], op: str) -> None:
    """It looks as strange as a near miss, and is what the op means."""
    known = tensors()
    args = [known[parameter] for parameter in inspect.signature(fn).parameters]
    done = rewrite(fn, *args)
    assert {name: count for name, count in done.fused().items() if name.endswith("gemm")} == {op: 1}
    assert done.result.unfused == ()
    assert torch.equal(done.output, fn(*args))


def test_there_are_many() -> None:
    """Of every family and stage."""
    assert len(CASES) >= 60
    for fused in ({}, {"weight_only_gemm": 1}, {"quantized_gemm": 1}):
        assert sum(case.fused == fused for case in CASES.values()) >= 20
