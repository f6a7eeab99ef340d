"""QuarkLinear and the choice of a scheme. Nothing here depends on one scheme's numbers."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quark_inductor.schemes import base, registry  # noqa: F401
from quark_inductor.schemes.base import QuarkLinear, QuarkScheme, register_scheme, registered_schemes, scheme_for
from quark_inductor.schemes.errors import ConfigError, QuarkInductorError, ShapeError
from quark_inductor.schemes.spec import PRESETS, LinearSpec, TensorSpec

K, N = 128, 48  # whole groups of every preset
TOY8 = LinearSpec(weight=TensorSpec(dtype="toy8", qscheme="per_channel"), input=None)
# One of each scheme and kind of activation, where all of them would only take longer.
SOME = ["mxfp4", "mxfp4_fp8", "mxfp6_e3m2", "mxfp8", "nvfp4", "amdfp4", "fp8", "fp8_dynamic", "ptpc_fp8"]
SOME += ["fp8_block128", "int8", "ptpc_int8", "uint4_wo_per_channel", "int4_wa_64", "int4_fp8"]
# For an input between -4 and 4: over the largest code, or the largest code times the largest block scale.
STATIC = {"fp8_e4m3": 4 / 448, "fp8_e5m2": 4 / 57344, "int8": 4 / 127.5, "fp4": 4 / (6 * 448)}


def quark_linear(preset: str, *, bias: bool = True, dtype: torch.dtype = torch.bfloat16) -> QuarkLinear:
    generator = torch.Generator().manual_seed(7)
    layer = QuarkLinear(K, N, scheme_for(PRESETS[preset]), bias=bias, dtype=dtype)
    base.set_parameters(layer, **layer.scheme.quantize_weight(torch.randn(N, K, generator=generator).to(dtype)))
    for name, p in layer.named_parameters():
        if name in ("input_scale", "input_scale_2"):
            p.data.fill_(STATIC[layer.scheme.spec.input.dtype])
        elif name == "input_zero_point":
            p.data.zero_()
        elif name == "bias":
            p.data = torch.rand(N, generator=generator).add(0.01).div(8).to(dtype)
    layer.scheme.process_weights_after_loading(layer)
    return layer


def random_input(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(8)).to(dtype)


@pytest.fixture
def no_other_schemes() -> Iterator[None]:
    """What a test registers is forgotten."""
    before = dict(base._SCHEMES)
    yield
    base._SCHEMES.clear()
    base._SCHEMES.update(before)


# --- the forward


@pytest.mark.parametrize("preset", SOME)
@pytest.mark.parametrize("features", [K - 1, K + 1, 2 * K, K // 2, 1])
def test_a_wrong_number_of_features_is_refused(preset: str, features: int) -> None:
    # 64 tokens: without the check a reshape would take them.
    with pytest.raises(ShapeError, match=rf"\(64, {features}\).* {K} features"):
        quark_linear(preset)(random_input(64, features))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("rows", [(), (2, 3), (3, 1, 2, 1)])
def test_any_number_of_dimensions(preset: str, rows: tuple[int, ...]) -> None:
    layer, x = quark_linear(preset), random_input(*rows, K)
    y = layer(x)
    assert y.shape == (*rows, N)
    assert y.dtype == x.dtype
    assert torch.equal(y.reshape(-1, N), layer(x.reshape(-1, K)))


# Root mean square of the relative error of one operand, drawn from a normal distribution.
ERRORS = {"fp4": 0.12, "fp6_e2m3": 0.032, "fp6_e3m2": 0.053, "fp8_e4m3": 0.026, "fp8_e5m2": 0.053}
ERRORS |= {"int8": 0.01, "int4": 0.12, "uint4": 0.12}


@pytest.mark.parametrize(
    ("preset", "dtype", "bias"),
    [(preset, torch.bfloat16, True) for preset in PRESETS]
    + [(preset, dtype, False) for preset in SOME for dtype in (torch.float16, torch.float32)],
)
def test_the_result_is_near_the_float_linears(preset: str, dtype: torch.dtype, bias: bool) -> None:
    """That the right operands meet, in every dtype; a scheme's numbers have tests of their own.

    The exact result has a standard deviation of sqrt(128) = 11 and a bias of up to 36. FP4 rounds a value by about 12 %
    (root mean square), FP8 by 2.6 %, ...: the bound is 1.6 times what that makes of both operands, and 0.1 for the
    rounding of the result to bfloat16.
    """
    layer, x = quark_linear(preset, bias=bias, dtype=dtype), random_input(32, K, dtype=dtype)
    if layer.bias is not None:
        layer.bias.data.mul_(256)
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(7)).to(dtype).double()
    exact = x.double() @ weight.T + (layer.bias.double() if layer.bias is not None else 0)
    error = (layer(x).double() - exact).square().mean().sqrt()
    spec = PRESETS[preset]
    stages = [t.dtype for t in (spec.weight, spec.input) if t is not None]
    if preset == "int4_fp8":
        stages.append("int4")
    assert error < 1.6 * math.sqrt(K * sum(ERRORS[dtype] ** 2 for dtype in stages)) + 0.1
    assert error > 0  # something was quantized


@pytest.mark.parametrize("preset", SOME)
@pytest.mark.parametrize("shape", [(0, K), (2, 0, K), (0, 3, K)])
def test_an_empty_batch_gives_an_empty_result(preset: str, shape: tuple[int, ...]) -> None:
    y = quark_linear(preset)(random_input(*shape))
    assert y.shape == (*shape[:-1], N)
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("preset", PRESETS)
def test_a_non_contiguous_input_is_read_by_its_strides(preset: str) -> None:
    layer, x = quark_linear(preset), random_input(5, K, 3)
    for view in (
        x.transpose(1, 2),
        random_input(K, 6).T,
        random_input(6, 2 * K)[:, ::2],
        random_input(1, K).expand(4, K),
    ):
        assert not view.is_contiguous()
        assert torch.equal(layer(view), layer(view.contiguous()))


# --- the module


@pytest.mark.parametrize(
    ("preset", "names"),
    [
        ("mxfp4", ["weight", "weight_scale"]),
        ("fp8", ["input_scale", "weight", "weight_scale"]),
        ("fp8_dynamic", ["weight", "weight_scale"]),
        ("ptpc_fp8", ["weight", "weight_scale"]),
        ("mxfp6_e2m3", ["weight", "weight_scale"]),
        ("nvfp4", ["input_scale_2", "weight", "weight_scale", "weight_scale_2"]),
        ("nvfp4_weight_only", ["weight", "weight_scale", "weight_scale_2"]),
        ("amdfp4", ["weight", "weight_scale"]),
        ("int8", ["input_scale", "input_zero_point", "weight", "weight_scale", "weight_zero_point"]),
        ("int8_dynamic", ["weight", "weight_scale", "weight_zero_point"]),
        ("int4_wo_32", ["weight", "weight_scale", "weight_zero_point"]),
        ("int4_fp8", ["weight", "weight_scale", "weight_scale_2", "weight_zero_point_2"]),
    ],
)
def test_the_state_dict_has_the_checkpoints_names(preset: str, names: list[str]) -> None:
    assert sorted(quark_linear(preset, bias=False).state_dict()) == names
    assert sorted(quark_linear(preset, bias=True).state_dict()) == sorted([*names, "bias"])
    assert quark_linear(preset, bias=False).bias is None


@pytest.mark.parametrize("preset", PRESETS)
def test_no_parameter_wants_a_gradient(preset: str) -> None:
    assert [name for name, p in quark_linear(preset).named_parameters() if p.requires_grad] == []


@pytest.mark.parametrize("preset", PRESETS)
def test_a_state_dict_is_loaded_back(preset: str) -> None:
    layer, other = quark_linear(preset), QuarkLinear(K, N, scheme_for(PRESETS[preset]), bias=True, dtype=torch.bfloat16)
    other.load_state_dict(layer.state_dict())
    x = random_input(4, K)
    assert torch.equal(other(x), layer(x))


CASTS = {
    "half": lambda m: m.half(),
    "float": lambda m: m.float(),
    "double": lambda m: m.double(),
    "to(dtype)": lambda m: m.to(torch.float16),
    "to(device, dtype)": lambda m: m.to("cpu", torch.float32),
}


@pytest.mark.parametrize("preset", SOME)
@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_is_refused_and_changes_nothing(preset: str, cast: str) -> None:
    layer = quark_linear(preset)
    before = {name: (p.dtype, p.data_ptr()) for name, p in layer.named_parameters()}
    with pytest.raises(QuarkInductorError, match=r"(weight|bias|weight_scale|input_scale) from \w+ into float.*dtype="):
        CASTS[cast](nn.Sequential(layer))
    assert {name: (p.dtype, p.data_ptr()) for name, p in layer.named_parameters()} == before


@pytest.mark.parametrize("preset", PRESETS)
def test_a_move_to_another_device_is_not_a_cast(preset: str) -> None:
    layer = quark_linear(preset)
    dtypes = {name: p.dtype for name, p in layer.named_parameters()}
    x = random_input(4, K)
    before = layer(x)
    assert torch.equal(layer.to("cpu")(x), before)
    assert torch.equal(layer.cpu().share_memory()(x), before)
    moved = layer.to("meta")
    assert {name: p.dtype for name, p in moved.named_parameters()} == dtypes
    assert all(p.is_meta for p in moved.parameters())
    assert moved(x.to("meta")).shape == (4, N)


def test_it_is_made_on_the_device_it_is_asked_for() -> None:
    layer = QuarkLinear(1 << 20, 1 << 20, scheme_for(PRESETS["mxfp4"]), bias=True, dtype=torch.bfloat16, device="meta")
    assert all(p.is_meta for p in layer.parameters())
    with torch.device("meta"):
        assert QuarkLinear(64, 64, scheme_for(PRESETS["fp8"]), bias=True, dtype=torch.bfloat16).weight.is_meta


def test_it_prints_its_sizes_and_its_spec() -> None:
    assert repr(quark_linear("fp8", bias=False)) == (
        f"QuarkLinear(in_features=128, out_features=48, bias=False, {PRESETS['fp8']})"
    )


# --- dequantized at load, fused, with a quantized output


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dequantized_at_load_gives_the_same_bits(preset: str, dtype: torch.dtype) -> None:
    layer, x = quark_linear(preset, dtype=dtype), random_input(6, K, dtype=dtype)
    y, stored = layer(x), {name for name, _ in layer.named_parameters() if name.startswith("input_")}
    weight = layer.scheme.dequantize_weight(layer, dtype)
    layer.dequantize_()
    assert layer.emulation == "at_load"
    assert torch.equal(layer(x), y)
    assert {name for name, _ in layer.named_parameters()} == {"weight", "bias"} | stored
    assert (layer.weight.shape, layer.weight.dtype) == ((N, K), dtype)
    assert torch.equal(layer.weight, weight)
    assert not layer.weight.requires_grad
    assert repr(layer).endswith(f"{PRESETS[preset]}, dequantized at load)")
    layer.dequantize_()  # a second time changes nothing
    assert torch.equal(layer(x), y)


OUTPUTS = {
    "fp8": TensorSpec(dtype="fp8_e4m3", qscheme="per_tensor"),
    "int8": TensorSpec(dtype="int8", qscheme="per_tensor"),
}


@pytest.mark.parametrize("preset", SOME)
@pytest.mark.parametrize("output", OUTPUTS)
def test_a_quantized_output_is_that_of_the_same_linear_without_one(preset: str, output: str) -> None:
    """Also dequantized at load. The step of FP8 is a sixteenth of the value at most, that of INT8 its scale."""
    without = quark_linear(preset, dtype=torch.float32)
    spec = dataclasses.replace(PRESETS[preset], output=OUTPUTS[output])
    layer = QuarkLinear(K, N, scheme_for(spec), bias=True, dtype=torch.float32)
    added = {"fp8": {"output_scale"}, "int8": {"output_scale", "output_zero_point"}}[output]
    assert layer.state_dict().keys() == without.state_dict().keys() | added
    parameters = {name: p.data for name, p in without.named_parameters()}
    base.set_parameters(layer, **parameters, output_scale=torch.tensor(0.5))
    if output == "int8":
        base.set_parameters(layer, output_zero_point=torch.tensor(0, dtype=torch.int8))
    layer.scheme.process_weights_after_loading(layer)
    x = random_input(6, K, dtype=torch.float32)
    y, exact = layer(x), without(x)
    bound = exact.abs() / 16 + 0.5 * 2.0**-10 if output == "fp8" else torch.tensor(0.25)
    inside = exact.abs() < 0.5 * (448 if output == "fp8" else 127)
    assert inside.float().mean() > 0.9
    assert ((y - exact).abs() <= bound)[inside].all()
    assert (y != exact).any()
    assert layer.scheme.output.role == "output"
    layer.dequantize_()
    assert torch.equal(layer(x), y)


def test_a_dynamic_output_needs_no_parameter() -> None:
    spec = dataclasses.replace(PRESETS["mxfp4"], output=PRESETS["ptpc_fp8"].input)
    layer = QuarkLinear(K, N, scheme_for(spec), bias=False, dtype=torch.float32)
    assert sorted(layer.state_dict()) == ["weight", "weight_scale"]


@pytest.mark.parametrize("preset", PRESETS)
def test_one_linear_fused_is_itself(preset: str) -> None:
    layer, x = quark_linear(preset), random_input(6, K)
    fused = QuarkLinear.fuse([layer])
    assert fused.logical_widths == [N]
    assert torch.equal(fused(x), layer(x))
    assert {n: (p.shape, p.dtype) for n, p in fused.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in layer.named_parameters()
    }


@pytest.mark.parametrize("preset", PRESETS)
def test_a_linear_fused_with_itself_gives_everything_twice(preset: str) -> None:
    """Every number of one stage or two: like shards have like scales, so nothing is rounded again."""
    layer, x = quark_linear(preset, dtype=torch.float32), random_input(6, K, dtype=torch.float32)
    if PRESETS[preset].weight.block_size is not None:
        with pytest.raises(ShapeError, match="cannot be fused"):
            QuarkLinear.fuse([layer, layer])
        return
    fused = QuarkLinear.fuse([layer, layer])
    assert (fused.logical_widths, fused.out_features) == ([N, N], 2 * N)
    weight = layer.scheme.dequantize_weight(layer, torch.float32)
    assert torch.equal(fused.scheme.dequantize_weight(fused, torch.float32), torch.cat((weight, weight)))
    assert torch.equal(fused.scheme.fake_quantize_input(fused, x), layer.scheme.fake_quantize_input(layer, x))
    assert torch.equal(fused.bias, torch.cat((layer.bias, layer.bias)))
    torch.testing.assert_close(fused(x), layer(x).repeat(1, 2), rtol=2**-20, atol=2**-12)


def test_only_linears_of_one_kind_are_fused() -> None:
    mxfp4 = quark_linear("mxfp4")
    at_load = quark_linear("mxfp4")
    at_load.dequantize_()
    others = [quark_linear("mxfp8"), quark_linear("mxfp4", bias=False), quark_linear("mxfp4", dtype=torch.float32)]
    others.append(QuarkLinear(2 * K, N, mxfp4.scheme, bias=True, dtype=torch.bfloat16))
    for other in (*others, at_load):
        with pytest.raises(ShapeError, match="only Linears of one kind, dequantized per call, can be fused"):
            QuarkLinear.fuse([mxfp4, other])
    with pytest.raises(ShapeError, match="only Linears of one kind"):
        QuarkLinear.fuse([at_load, at_load])


def test_replace_module_finds_a_nested_name() -> None:
    model = nn.Sequential(nn.ModuleDict({"a": nn.Linear(2, 2)}), nn.Linear(2, 2))
    new = nn.Identity()
    base.replace_module(model, "0.a", new)
    base.replace_module(model, "1", new)
    assert model[0]["a"] is new
    assert model[1] is new


# --- the choice of a scheme


def test_scheme_for_lists_every_refusal() -> None:
    with pytest.raises(ConfigError) as caught:
        scheme_for(TOY8)
    message = str(caught.value)
    assert str(TOY8) in message
    for name, cls in registered_schemes().items():
        assert f"{name}: {cls.refuses(TOY8)}" in message


class Fake(QuarkScheme):
    """Takes TOY8, does nothing."""

    name = "fake"

    @classmethod
    def refuses(cls, spec: LinearSpec) -> str | None:
        return None if spec == TOY8 else "only TOY8"

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    def weight_tensors(self, widths: list[int], k: int, params_dtype: torch.dtype) -> Mapping[str, Tensor]:
        return {}

    def dequantize_weight(self, layer: Any, dtype: torch.dtype) -> Tensor:
        return torch.zeros(0, dtype=dtype)

    def quantize_weight(self, weight: Tensor) -> dict[str, Tensor]:
        return {}


@pytest.mark.usefixtures("no_other_schemes")
def test_a_registered_scheme_is_chosen() -> None:
    assert register_scheme(Fake) is Fake
    assert type(scheme_for(TOY8)) is Fake
    assert scheme_for(TOY8).spec == TOY8
    assert scheme_for(PRESETS["mxfp4"]).name == "w4a4_mxfp4"


@pytest.mark.usefixtures("no_other_schemes")
@pytest.mark.parametrize("base_first", [True, False])
def test_a_subclass_wins_over_its_base_in_either_order(base_first: bool) -> None:
    class Special(Fake):
        name = "special"

    class Stranger(QuarkScheme):
        name = "stranger"
        refuses = Fake.refuses
        get_min_capability = Fake.get_min_capability
        weight_tensors, dequantize_weight = Fake.weight_tensors, Fake.dequantize_weight
        quantize_weight = Fake.quantize_weight

    for cls in (Fake, Special) if base_first else (Special, Fake):
        register_scheme(cls)
    register_scheme(Stranger)
    assert type(scheme_for(TOY8)) is Special


@pytest.mark.usefixtures("no_other_schemes")
def test_a_second_scheme_of_a_name_is_refused() -> None:
    class Taken(Fake):
        name = "w8a8_fp8"

    before = registered_schemes()
    with pytest.raises(QuarkInductorError, match=r"'w8a8_fp8'.*QuarkW8A8Fp8.*Taken"):
        register_scheme(Taken)
    assert registered_schemes() == before
    assert register_scheme(before["w8a8_fp8"]) is before["w8a8_fp8"]  # the same one again is fine


def test_registered_schemes_is_a_copy() -> None:
    registered_schemes().clear()  # type: ignore[attr-defined]
    assert registered_schemes()


@pytest.mark.parametrize("method", sorted(QuarkScheme.__abstractmethods__))
def test_a_scheme_without_one_of_its_methods_cannot_be_made(method: str) -> None:
    methods = {name: getattr(Fake, name) for name in QuarkScheme.__abstractmethods__ if name != method}
    incomplete = type("Incomplete", (QuarkScheme,), {"name": "incomplete", **methods})
    with pytest.raises(TypeError, match=method):
        incomplete(TOY8)
