"""FP8 against what amd-quark exported and computed, and against numpy with ml_dtypes, bit for bit."""

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from quark_inductor.schemes import registry  # noqa: F401
from quark_inductor.schemes.base import QuarkLinear, scheme_for, set_parameters
from quark_inductor.schemes.errors import CheckpointError, ShapeError
from quark_inductor.schemes.numerics import fp8
from quark_inductor.schemes.spec import PRESETS, LinearSpec
from quark_inductor.schemes.w8a8_fp8 import QuarkW8A8Fp8

CHECKPOINTS = ["fp8", "fp8_fp32", "ptpc_fp8", "ptpc_fp8_fp32"]
FP8 = ["fp8", "fp8_dynamic", "ptpc_fp8"]
Exports = Callable[[str], Any]


def numpy_weight(parameters: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    codes = parameters["weight"].view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    scale = parameters["weight_scale"].float().numpy()
    values = codes * (scale[:, None] if scale.ndim else scale)
    if dtype == torch.bfloat16:
        return torch.from_numpy(values.astype(ml_dtypes.bfloat16).view(np.int16)).view(dtype)
    return torch.from_numpy(values)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_weight_is_amd_quarks(name: str, exported: Exports) -> None:
    checkpoint = exported(name)
    assert len(checkpoint.linears) == 14
    for linear in checkpoint.linears:
        layer = checkpoint.layer(linear)
        weight = fp8.dequantize_weight(layer.weight, layer.weight_scale, checkpoint.dtype)
        assert checkpoint.weight_is_amd_quarks(linear, weight), linear
        assert checkpoint.weight_is_amd_quarks(linear, numpy_weight(checkpoint.parameters(linear), checkpoint.dtype))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_recorded_output_is_amd_quarks(name: str, exported: Exports) -> None:
    exported(name).check_outputs(numpy_weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("preset", FP8)
def test_quantize_weight_is_numpys(preset: str, dtype: torch.dtype) -> None:
    """``scale = amax / 448``, ``code = w / scale``, both quotients rounded to the weight's dtype; row 2 is of zeros."""
    weight = (torch.randn(24, 96, generator=torch.Generator().manual_seed(5)) * torch.logspace(-2, 2, 24)[:, None]).to(
        dtype
    )
    weight[2] = 0.0
    number = ml_dtypes.bfloat16 if dtype == torch.bfloat16 else np.float32
    w = weight.float().numpy()
    amax = np.abs(w).max(-1, keepdims=True) if preset == "ptpc_fp8" else np.abs(w).max()
    scale = (amax / np.float32(448)).astype(number).astype(np.float32)
    scale = np.where(scale == 0, np.float32(2.0**-23), scale)
    codes = np.clip((w / scale).astype(number).astype(np.float32), -448, 448).astype(ml_dtypes.float8_e4m3fn)

    quantized = scheme_for(PRESETS[preset]).quantize_weight(weight)
    assert sorted(quantized) == ["weight", "weight_scale"]
    assert quantized["weight"].dtype == torch.float8_e4m3fn
    assert quantized["weight_scale"].dtype == dtype
    assert quantized["weight_scale"].shape == ((24,) if preset == "ptpc_fp8" else ())
    np.testing.assert_array_equal(quantized["weight_scale"].float().numpy(), scale.squeeze())
    np.testing.assert_array_equal(quantized["weight"].view(torch.uint8).numpy(), codes.view(np.uint8))


def test_a_dynamic_scale_per_tensor_is_that_of_the_whole_input() -> None:
    """Powers of two and small whole numbers: every step is exact, and the expected output is a float64 product."""
    layer = QuarkLinear(32, 8, scheme_for(PRESETS["fp8_dynamic"]), bias=False, dtype=torch.float32)
    generator = torch.Generator().manual_seed(6)
    weight = torch.randint(-8, 9, (8, 32), generator=generator).float()
    set_parameters(layer, weight=weight.to(torch.float8_e4m3fn), weight_scale=torch.tensor(0.5))
    x = torch.randint(-8, 9, (2, 3, 32), generator=generator).float()
    x[1, 2, 4] = 448 * 16.0  # of another row, and it makes the scale 16: steps of 2**-9 * 16 = 1/32
    x[0, 0, 0] = 17 / 64  # between 8/32 and 9/32
    expected = x.double()
    expected[0, 0, 0] = 8 / 32
    assert torch.equal(layer(x).double(), expected @ (weight.double() * 0.5).T)


E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@pytest.mark.parametrize(
    ("preset", "widths", "expected"),
    [
        ("fp8", [64], {"weight": ((64, 40), E4M3), "weight_scale": (), "input_scale": ()}),
        ("fp8", [48, 16], {"weight": ((64, 40), E4M3), "weight_scale": (2,), "input_scale": (2,)}),
        ("fp8_dynamic", [64], {"weight": ((64, 40), E4M3), "weight_scale": ()}),
        ("fp8_weight_only", [48, 16], {"weight": ((64, 40), E4M3), "weight_scale": (2,)}),
        ("fp8_e5m2", [64], {"weight": ((64, 40), E5M2), "weight_scale": (), "input_scale": ()}),
        ("ptpc_fp8", [48, 16], {"weight": ((64, 40), E4M3), "weight_scale": (64,)}),
        ("fp8_block128", [64], {"weight": ((64, 256), E4M3), "weight_scale": ((1, 2), torch.float32)}),
        ("fp8_block128", [256, 66], {"weight": ((322, 384), E4M3), "weight_scale": ((2 + 1, 3), torch.float32)}),
    ],
)
def test_create_weights_has_the_checkpoints_layout(
    preset: str, widths: list[int], expected: dict[str, tuple[Any, ...]]
) -> None:
    layer = torch.nn.Module()
    scheme_for(PRESETS[preset]).create_weights(
        layer,
        output_partition_sizes=widths,
        input_size_per_partition=expected["weight"][0][1],
        params_dtype=torch.float16,
    )
    found = {name: (tuple(p.shape), p.dtype) for name, p in layer.named_parameters()}
    # A scale's dtype is the model's, where the table says nothing else.
    assert found == {n: v if v and isinstance(v[0], tuple) else (v, torch.float16) for n, v in expected.items()}
    assert not any(p.requires_grad for p in layer.parameters())


def ones(preset: str, k: int = 32) -> QuarkLinear:
    """A loaded layer, in whose bias is a NaN: a bias is the model's own, and nobody's to judge."""
    layer = QuarkLinear(k, 4, scheme_for(PRESETS[preset]), bias=True, dtype=torch.bfloat16)
    for name, p in layer.named_parameters():
        p.data = torch.full(p.shape, math.nan if name == "bias" else 1.0).to(p.dtype)
    return layer


@pytest.mark.parametrize("preset", FP8)
@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_nan_code_is_refused_after_loading(preset: str, code: int) -> None:
    layer = ones(preset)
    layer.weight.data.view(torch.uint8)[3, 31] = code - 1  # 448 and -448 are numbers
    layer.scheme.process_weights_after_loading(layer)
    layer.weight.data.view(torch.uint8)[3, 31] = code
    with pytest.raises(CheckpointError, match=r"^weight holds a NaN"):
        layer.scheme.process_weights_after_loading(layer)


@pytest.mark.parametrize(
    ("preset", "scale"),
    [
        ("fp8", "weight_scale"),
        ("fp8", "input_scale"),
        ("fp8_dynamic", "weight_scale"),
        ("ptpc_fp8", "weight_scale"),
    ],
)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_scale_that_is_no_number_is_refused_after_loading(preset: str, scale: str, bad: float) -> None:
    layer = ones(preset)
    layer.scheme.process_weights_after_loading(layer)
    getattr(layer, scale).data.view(-1)[-1] = bad
    with pytest.raises(CheckpointError, match=rf"^{scale} holds a NaN or an infinity"):
        layer.scheme.process_weights_after_loading(layer)


@pytest.mark.parametrize("preset", [*FP8, "fp8_weight_only", "fp8_e5m2", "fp8_block128"])
def test_its_own_specs_are_taken(preset: str) -> None:
    assert QuarkW8A8Fp8.refuses(PRESETS[preset]) is None


def with_weight(**changes: Any) -> LinearSpec:
    return dataclasses.replace(PRESETS["fp8"], weight=dataclasses.replace(PRESETS["fp8"].weight, **changes))


def with_input(**changes: Any) -> LinearSpec:
    return dataclasses.replace(PRESETS["fp8"], input=dataclasses.replace(PRESETS["fp8"].input, **changes))


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (PRESETS["mxfp4"], "takes FP8 weights with floating-point scales"),
        (PRESETS["int8"], "takes FP8 weights with floating-point scales"),
        (PRESETS["mxfp8"], "takes FP8 weights with floating-point scales"),
        (PRESETS["int4_fp8"], "takes FP8 weights with floating-point scales"),
        (LinearSpec(weight=None, output=PRESETS["fp8"].input), "takes FP8 weights with floating-point scales"),
        (with_weight(qscheme="per_group", group_size=64), "takes static weights per tensor, per channel or per block"),
        (with_weight(is_dynamic=True), "takes static weights per tensor, per channel or per block"),
        (with_input(dtype="fp8_e5m2"), "takes one FP8 format for weight and input"),
        (with_input(qscheme="per_channel"), "its input takes per_tensor static scales in floating point"),
        (with_input(dtype="int8"), "its input takes fp8_e4m3 or fp8_e5m2 of one stage"),
    ],
)
def test_other_specs_are_refused_with_a_reason(spec: LinearSpec, reason: str) -> None:
    assert QuarkW8A8Fp8.refuses(spec) == reason


def test_a_k_of_no_whole_groups_is_refused_for_the_inputs_sake() -> None:
    with pytest.raises(ShapeError, match=r"K = 192 .*input needs a multiple of 128; exclude"):
        QuarkLinear(192, 64, scheme_for(PRESETS["fp8_block128"]), bias=False, dtype=torch.bfloat16)


# --- blocks, E5M2, float32 scales, fused shards, fnuz


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_blocks_of_rows_and_columns_are_numpys(dtype: torch.dtype) -> None:
    """Cut off at both edges: 130 rows, 300 columns."""
    weight = (
        torch.randn(130, 384, generator=torch.Generator().manual_seed(3)) * torch.logspace(-2, 2, 130)[:, None]
    ).to(dtype)
    weight[:128, 128:256] = 0.0
    w = weight.float().numpy()
    scheme = scheme_for(PRESETS["fp8_block128"])
    quantized = scheme.quantize_weight(weight)
    assert (quantized["weight_scale"].shape, quantized["weight_scale"].dtype) == ((2, 3), torch.float32)
    expected = np.empty(w.shape, np.float32)
    for i in range(2):
        for j in range(3):
            at = np.s_[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
            scale = np.abs(w[at]).max() / np.float32(448) or np.float32(2.0**-23)
            assert quantized["weight_scale"][i, j].item() == scale
            codes = np.clip(w[at] / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
            np.testing.assert_array_equal(
                quantized["weight"].view(torch.uint8).numpy()[at], codes.view(np.uint8), err_msg=str((i, j))
            )
            expected[at] = codes.astype(np.float32) * scale
    layer = QuarkLinear(384, 130, scheme, bias=False, dtype=dtype)
    set_parameters(layer, **quantized)
    assert torch.equal(scheme.dequantize_weight(layer, torch.float32), torch.from_numpy(expected))
    assert torch.equal(scheme.dequantize_weight(layer, dtype), torch.from_numpy(expected).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_e5m2_is_numpys(dtype: torch.dtype) -> None:
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(5)).to(dtype)
    number = ml_dtypes.bfloat16 if dtype == torch.bfloat16 else np.float32
    w = weight.float().numpy()
    scale = (np.abs(w).max() / np.float32(57344)).astype(number).astype(np.float32)
    quotient = np.clip((w / scale).astype(number).astype(np.float32), -57344, 57344)
    quantized = scheme_for(PRESETS["fp8_e5m2"]).quantize_weight(weight)
    assert quantized["weight_scale"].item() == scale
    np.testing.assert_array_equal(
        quantized["weight"].view(torch.uint8).numpy(), quotient.astype(ml_dtypes.float8_e5m2).view(np.uint8)
    )


@pytest.mark.parametrize("code", [0x7C, 0x7D, 0x7F, 0xFC, 0xFF])
def test_an_infinity_or_a_nan_of_e5m2_is_refused_after_loading(code: int) -> None:
    layer = ones("fp8_e5m2")
    layer.weight.data.view(torch.uint8)[1, 2] = 0x7B  # 57344 is a number
    layer.scheme.process_weights_after_loading(layer)
    layer.weight.data.view(torch.uint8)[1, 2] = code
    with pytest.raises(CheckpointError, match=r"^weight holds a NaN or an infinity"):
        layer.scheme.process_weights_after_loading(layer)


@pytest.mark.parametrize("preset", ["fp8", "fp8_e5m2", "ptpc_fp8", "fp8_block128"])
@pytest.mark.parametrize("bad", [0.0, -1.0])
def test_a_scale_that_is_not_positive_is_refused_after_loading(preset: str, bad: float) -> None:
    layer = ones(preset, k=128)
    layer.scheme.process_weights_after_loading(layer)
    layer.weight_scale.data.view(-1)[-1] = bad
    with pytest.raises(CheckpointError, match=r"^weight_scale holds a scale that is not positive"):
        layer.scheme.process_weights_after_loading(layer)


def test_scales_of_type_float32_are_computed_and_stored_in_float32() -> None:
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    scheme = scheme_for(with_weight(scale_type="float32"))
    amax = weight.abs().amax().float().numpy()
    quantized = scheme.quantize_weight(weight)
    assert quantized["weight_scale"].dtype == torch.float32
    assert quantized["weight_scale"].item() == amax / np.float32(448)
    quotient = (weight.float().numpy() / (amax / np.float32(448))).astype(ml_dtypes.bfloat16).astype(np.float32)
    codes = np.clip(quotient, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(quantized["weight"].view(torch.uint8).numpy(), codes.view(np.uint8))


def quantized_linear(preset: str, n: int, k: int, seed: int, size: float = 1.0) -> QuarkLinear:
    generator = torch.Generator().manual_seed(seed)
    layer = QuarkLinear(k, n, scheme_for(PRESETS[preset]), bias=True, dtype=torch.float32)
    weight = torch.randn(n, k, generator=generator) * size
    set_parameters(layer, **layer.scheme.quantize_weight(weight), bias=torch.randn(n, generator=generator))
    if "input_scale" in layer._parameters:
        set_parameters(layer, input_scale=torch.tensor(size / 100))
    layer.scheme.process_weights_after_loading(layer)
    return layer


def test_fused_shards_per_tensor_are_requantized_to_the_largest_scale() -> None:
    """The values that ml_dtypes gives; the shard with the largest scale keeps its codes."""
    q, k = quantized_linear("fp8", 24, 32, 1, size=2.0), quantized_linear("fp8", 8, 32, 2, size=0.5)
    fused = QuarkLinear.fuse([q, k])
    assert (fused.logical_widths, fused.out_features) == ([24, 8], 32)
    largest = q.weight_scale.numpy()
    assert largest > k.weight_scale.numpy()
    assert fused.weight_scale.shape == fused.input_scale.shape == ()
    assert fused.weight_scale.item() == largest
    assert fused.input_scale.item() == q.input_scale.item()
    codes = fused.weight.view(torch.uint8).numpy()
    np.testing.assert_array_equal(codes[:24], q.weight.view(torch.uint8).numpy())
    values = k.weight.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    again = (values * k.weight_scale.numpy() / largest).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    np.testing.assert_array_equal(codes[24:], again)
    assert torch.equal(fused.bias, torch.cat((q.bias, k.bias)))


@pytest.mark.parametrize("preset", ["ptpc_fp8", "fp8_block128"])
def test_fused_shards_with_scales_of_their_own_are_the_separate_linears(preset: str) -> None:
    """Blocks: 128 rows, then a shard of no whole block at the end."""
    parts = [quantized_linear(preset, n, 128, i, size=3.0**i) for i, n in enumerate((128, 48))]
    fused = QuarkLinear.fuse(parts)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(9))
    weights = [m.scheme.dequantize_weight(m, torch.float32) for m in parts]
    assert torch.equal(fused.scheme.dequantize_weight(fused, torch.float32), torch.cat(weights))
    torch.testing.assert_close(fused(x), torch.cat([m(x) for m in parts], -1))


def test_blocks_that_would_cross_shards_are_refused() -> None:
    """Only the last shard may end in a block that is cut off."""
    parts = [quantized_linear("fp8_block128", n, 128, n) for n in (130, 64)]
    with pytest.raises(ShapeError, match=r"shards of \[130, 64\] output features cannot be fused: blocks have 128"):
        QuarkLinear.fuse(parts)


def test_fused_shards_of_e5m2_are_requantized_in_it() -> None:
    a, b = quantized_linear("fp8_e5m2", 24, 32, 1, size=2.0), quantized_linear("fp8_e5m2", 8, 32, 2, size=0.3)
    fused = QuarkLinear.fuse([a, b])
    assert fused.weight.dtype == E5M2
    assert torch.equal(fused.weight[:24].view(torch.uint8), a.weight.view(torch.uint8))
    values = b.weight.view(torch.uint8).numpy().view(ml_dtypes.float8_e5m2).astype(np.float32)
    again = (values * b.weight_scale.numpy() / a.weight_scale.numpy()).astype(ml_dtypes.float8_e5m2).view(np.uint8)
    np.testing.assert_array_equal(fused.weight[24:].view(torch.uint8).numpy(), again)


@pytest.mark.parametrize("preset", ["fp8", "fp8_dynamic", "ptpc_fp8", "fp8_weight_only"])
def test_fnuz_has_the_same_values(preset: str) -> None:
    """Weights bit by bit; what a Linear makes of an input, too, where no code of it is -0 (its product is 0 anyhow)."""
    layer = quantized_linear(preset, 16, 64, 4)
    scheme, x = layer.scheme, torch.randn(7, 64, generator=torch.Generator().manual_seed(9))
    x[2] *= 1e4  # saturates a static scale
    weight, activation, y = (
        scheme.dequantize_weight(layer, torch.float32),
        scheme.fake_quantize_input(layer, x),
        layer(x),
    )
    scales = {name: p.clone() for name, p in layer.named_parameters() if name.endswith("_scale")}
    for arch in ("gfx950", "gfx1100", "sm_90", "x86_64"):
        scheme.adapt_to(layer, arch)  # changes nothing
        assert layer.weight.dtype == E4M3
    scheme.adapt_to(layer, "gfx942")
    assert layer.weight.dtype == torch.float8_e4m3fnuz
    codes = layer.weight.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fnuz).astype(np.float32)
    assert not np.isnan(codes).any()
    for name, before in scales.items():
        assert torch.equal(getattr(layer, name), before * 2)
    scale = layer.weight_scale.numpy()
    np.testing.assert_array_equal(codes * (scale[:, None] if scale.ndim else scale), weight.numpy())
    assert torch.equal(scheme.dequantize_weight(layer, torch.float32), weight)
    assert torch.equal(scheme.fake_quantize_input(layer, x), activation)
    assert torch.equal(layer(x), y)
    at_load = copy.deepcopy(layer)
    at_load.dequantize_()
    assert torch.equal(at_load(x), y)
    scheme.adapt_to(layer, "gfx942")  # a second time changes nothing
    assert torch.equal(layer(x), y)


def test_fnuz_is_for_e4m3_only() -> None:
    layer = quantized_linear("fp8_e5m2", 16, 64, 4)
    layer.scheme.adapt_to(layer, "gfx942")
    assert layer.weight.dtype == torch.float8_e5m2
