"""INT8 and UINT8 weights. ``test_exported.py`` has amd-quark's own numbers."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from quark_inductor.schemes import registry  # noqa: F401
from quark_inductor.schemes.base import QuarkLinear, scheme_for, set_parameters
from quark_inductor.schemes.errors import CheckpointError, ShapeError
from quark_inductor.schemes.numerics import integer
from quark_inductor.schemes.spec import PRESETS, LinearSpec, TensorSpec
from quark_inductor.schemes.w8a8_int8 import QuarkW8A8Int8

Make = Callable[..., Any]
I8, U8, F16, F32 = torch.int8, torch.uint8, torch.float16, torch.float32
OWN = ["int8", "int8_dynamic", "int8_weight_only", "int8_wo_128", "ptpc_int8"]
ASYMMETRIC = {"dtype": "uint8", "symmetric": False}


def per(shape: tuple[int, ...], weight: tuple[int, ...], scale: torch.dtype) -> dict[str, Any]:
    return {"weight": (weight, I8), "weight_scale": (shape, scale), "weight_zero_point": (shape, I8)}


@pytest.mark.parametrize(
    ("preset", "widths", "expected"),
    [
        ("int8", [64], per((), (64, 256), F32) | {"input_scale": ((), F32), "input_zero_point": ((), I8)}),
        ("int8", [48, 16], per((2,), (64, 256), F32) | {"input_scale": ((2,), F32), "input_zero_point": ((2,), I8)}),
        ("int8_dynamic", [64], per((), (64, 256), F32)),
        ("int8_weight_only", [48, 16], per((64,), (64, 256), F16)),
        ("ptpc_int8", [64], per((64,), (64, 256), F16)),
        ("int8_wo_128", [48, 16], per((2, 64), (256, 64), F16)),
    ],
)
def test_create_weights_has_the_checkpoints_layout(
    layout: Make, preset: str, widths: list[int], expected: dict[str, Any]
) -> None:
    assert layout(preset, widths, 256) == expected


def test_unsigned_ones_are_uint8(layout: Make, spec_with: Make) -> None:
    found = layout(spec_with(PRESETS["int8"], ASYMMETRIC, ASYMMETRIC), [64], 256)
    assert {name: dtype for name, (_, dtype) in found.items()} == {
        "weight": U8,
        "weight_scale": F32,
        "weight_zero_point": U8,
        "input_scale": F32,
        "input_zero_point": U8,
    }


def test_a_k_of_no_whole_groups_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"K = 192 input features: needs a multiple of 128; exclude this layer"):
        QuarkLinear(192, 64, scheme_for(PRESETS["int8_wo_128"]), bias=False, dtype=torch.bfloat16)
    QuarkLinear(33, 7, scheme_for(PRESETS["int8"]), bias=False, dtype=torch.bfloat16)  # any size else


def test_its_own_specs_are_taken_and_others_refused_with_a_reason(spec_with: Make) -> None:
    for preset in PRESETS:
        assert QuarkW8A8Int8.refuses(PRESETS[preset]) == (None if preset in OWN else "takes int8 or uint8 weights")
    int8 = PRESETS["int8"]
    for changes, reason in (
        ({"is_dynamic": True}, "takes static weights per tensor, per channel or per group"),
        ({"qscheme": "per_block"}, "takes static weights per tensor, per channel or per group"),
        ({"scale_format": "e8m0"}, "takes int8 or uint8 weights"),
    ):
        assert QuarkW8A8Int8.refuses(spec_with(int8, changes)) == reason
    for changes in ({"dtype": "int4"}, {"dtype": "fp8_e4m3"}, {"qscheme": "per_group", "group_size": 32}):
        reason = QuarkW8A8Int8.refuses(spec_with(int8, None, changes))
        assert reason == "takes int8 or uint8 inputs per tensor or per token"
    per_row = QuarkW8A8Int8.refuses(spec_with(int8, None, {"qscheme": "per_channel"}))
    assert per_row == "takes per_tensor static scales in floating point"
    assert QuarkW8A8Int8.refuses(LinearSpec(weight=None, output=int8.input)) == "takes int8 or uint8 weights"


@pytest.mark.parametrize("preset", OWN)
@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_quantize_and_dequantize_are_within_a_step(
    spec_with: Make, preset: str, unsigned: bool, dtype: torch.dtype
) -> None:
    """Half a step of the code; half of the zero point's; 255 times what the dtype rounds a scale and a weight by."""
    spec = spec_with(PRESETS[preset], ASYMMETRIC if unsigned else {})
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    layer = QuarkLinear(256, 64, scheme_for(spec), bias=False, dtype=dtype)
    for name, tensor in layer.scheme.quantize_weight(weight).items():
        empty = getattr(layer, name)
        assert (tensor.shape, tensor.dtype) == (empty.shape, empty.dtype)
        assert tensor.is_contiguous()
        set_parameters(layer, **{name: tensor})
    values = layer.scheme.dequantize_weight(layer, torch.float64)
    scale = layer.weight_scale.double()
    step = scale.t().repeat_interleave(128, 1) if scale.ndim == 2 else scale.view(-1, 1)
    unit = torch.finfo(dtype).eps
    bound = step * (0.5 + 0.5 * unsigned + 1.5 * 255 * unit * (1 if dtype != torch.float32 else 2))
    error = (values - weight.double()).abs()
    assert (error <= bound).all()
    assert error.max() > 0.4 * step.min()


def test_fused_shards_per_tensor_become_per_channel_and_exactly_the_separate_linears(
    linear: Make, spec_with: Make
) -> None:
    for spec in (PRESETS["int8"], spec_with(PRESETS["int8"], ASYMMETRIC, ASYMMETRIC)):
        parts = [linear(spec, n, seed=n, size=float(n)) for n in (48, 16, 8)]
        fused = QuarkLinear.fuse(parts)
        assert fused.weight_scale.shape == fused.weight_zero_point.shape == (72,)
        assert fused.input_scale.shape == fused.input_zero_point.shape == ()
        weights = [m.scheme.dequantize_weight(m, F32) for m in parts]
        assert torch.equal(fused.scheme.dequantize_weight(fused, F32), torch.cat(weights))
        x = torch.randint(-4, 5, (5, 128), generator=torch.Generator().manual_seed(9)).float()
        assert torch.equal(fused.scheme.fake_quantize_input(fused, x), parts[0].scheme.fake_quantize_input(parts[0], x))
        # The matmuls may add up in another order.
        torch.testing.assert_close(fused(x), torch.cat([m(x) for m in parts], -1), rtol=2**-20, atol=2**-10)


@pytest.mark.parametrize("preset", ["int8_weight_only", "int8_wo_128", "ptpc_int8"])
def test_fused_shards_with_scales_of_their_own_are_the_separate_linears(linear: Make, preset: str) -> None:
    parts = [linear(preset, n, 256, seed=n, size=float(n)) for n in (48, 16, 8)]
    fused = QuarkLinear.fuse(parts)
    weights = [m.scheme.dequantize_weight(m, F32) for m in parts]
    assert torch.equal(fused.scheme.dequantize_weight(fused, F32), torch.cat(weights))


def test_fused_static_inputs_take_a_range_that_holds_all_of_theirs(linear: Make, spec_with: Make) -> None:
    """Ranges -3.2 to 22.3 and -25.5 to 25.5: the union is the second; each shard's zero stays zero."""
    parts = [linear(spec_with(PRESETS["int8"], ASYMMETRIC, ASYMMETRIC), n, seed=n) for n in (48, 16)]
    for part, scale, zero_point in zip(parts, (0.1, 0.2), (32, 127), strict=True):
        set_parameters(part, input_scale=torch.tensor(scale), input_zero_point=torch.tensor(zero_point, dtype=U8))
    fused = QuarkLinear.fuse(parts)
    assert fused.input_scale.item() == pytest.approx(0.2, rel=1e-6)
    assert (fused.input_zero_point.item(), fused.input_zero_point.dtype) == (127, U8)
    set_parameters(parts[1], input_zero_point=torch.tensor(0, dtype=U8))  # 0 to 51: the union is -3.2 to 51
    fused = QuarkLinear.fuse(parts)
    assert fused.input_scale.item() == pytest.approx(54.2 / 255, rel=1e-6)
    assert fused.input_zero_point.item() == round(3.2 / (54.2 / 255))


def test_symmetric_fused_static_inputs_take_the_largest_scale(linear: Make) -> None:
    parts = [linear("int8", n, seed=n) for n in (48, 16)]
    parts[1].input_scale.data.fill_(0.5)
    fused = QuarkLinear.fuse(parts)
    assert (fused.input_scale.item(), fused.input_zero_point.item()) == (0.5, 0)


GROUPS = {"qscheme": "per_group", "group_size": 32}


@pytest.mark.parametrize("weight", [{}, {"qscheme": "per_channel"}, ASYMMETRIC, GROUPS])
def test_azp_adj_takes_the_zero_point_out_of_the_product(linear: Make, spec_with: Make, weight: dict[str, Any]) -> None:
    """``sum((x - zp) * (w - wzp)) = sum(x * (w - wzp)) - zp * azp_adj``, in whole numbers."""
    layer = linear(spec_with(PRESETS["int8"], weight, ASYMMETRIC))
    assert (layer.azp_adj.shape, layer.azp_adj.dtype) == ((1, 48), torch.int32)
    assert "azp_adj" not in layer.state_dict()
    w, zero_point = layer.weight.long(), layer.weight_zero_point.long()
    if "group_size" in weight:
        integers = w.t() - zero_point.t().repeat_interleave(32, 1)
    else:
        integers = w - (zero_point[:, None] if zero_point.ndim else zero_point)
    assert integers.shape == (48, 128)
    x = torch.randint(0, 256, (9, 128), generator=torch.Generator().manual_seed(4))
    azp = layer.input_zero_point.long()
    assert azp == 3
    assert torch.equal((x - azp) @ integers.t(), x @ integers.t() - azp * layer.azp_adj.long())
    assert torch.equal(layer.azp_adj.long()[0], integers.sum(1))


def test_a_symmetric_input_has_no_azp_adj(linear: Make) -> None:
    for preset in OWN:
        assert not hasattr(linear(preset), "azp_adj")


@pytest.mark.parametrize("qscheme", ["per_tensor", "per_channel"])
def test_a_dynamic_asymmetric_input_is_quantized_by_row_or_tensor(linear: Make, qscheme: str) -> None:
    """Steps of a power of two, so that all is exact: rows from 0 to 255 and from 0 to 510."""
    x_spec = TensorSpec(dtype="uint8", qscheme=qscheme, symmetric=False, is_dynamic=True)
    layer = linear(LinearSpec(weight=PRESETS["int8"].weight, input=x_spec))
    x = torch.arange(128).repeat(2, 1).float()
    x[0, 0], x[1, 0] = 255.0, 510.0
    x[:, 1] = 1.0
    values = layer.scheme.fake_quantize_input(layer, x)
    assert values[1, :4].tolist() == [510.0, 0.0, 2.0, 4.0]  # steps of 2: 1 and 3 are ties, to even
    assert values[0, :4].tolist() == ([255.0, 1.0, 2.0, 3.0] if qscheme == "per_channel" else [256.0, 0.0, 2.0, 4.0])


@pytest.mark.parametrize("preset", OWN)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0, 0.0])
def test_damaged_scales_are_refused_after_loading(linear: Make, preset: str, bad: float) -> None:
    names = [name for name, _ in linear(preset).named_parameters() if name.endswith("_scale")]
    assert "weight_scale" in names
    for name in names:
        layer = linear(preset)
        getattr(layer, name).data.view(-1)[-1] = bad
        with pytest.raises(CheckpointError, match=rf"^{name} holds a"):
            layer.scheme.process_weights_after_loading(layer)


def test_every_zero_point_is_a_number(linear: Make) -> None:
    layer = linear("int8")
    for zero_point in (-128, -1, 127):
        layer.weight_zero_point.data.fill_(zero_point)
        layer.scheme.process_weights_after_loading(layer)
        values = layer.scheme.dequantize_weight(layer, torch.float64).numpy()
        expected = (layer.weight.numpy().astype(np.float32) - zero_point) * layer.weight_scale.numpy()
        np.testing.assert_array_equal(values, expected.astype(np.float64))
    assert integer.BOUNDS["int8"] == (-128, 127)
