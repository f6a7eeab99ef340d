"""QuarkLinear and the choice of a scheme. Nothing here depends on one scheme's numbers."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quark_inductor.schemes import base, registry  # noqa: F401
from quark_inductor.schemes.base import QuarkLinear, QuarkScheme, register_scheme, registered_schemes, scheme_for
from quark_inductor.schemes.errors import ConfigError, QuarkInductorError, ShapeError
from quark_inductor.schemes.spec import PRESETS, LinearSpec, TensorSpec

K, N = 64, 48
INT8 = LinearSpec(weight=TensorSpec(dtype="int8", qscheme="per_channel"), input=None)


def quark_linear(preset: str, *, bias: bool = True, dtype: torch.dtype = torch.bfloat16) -> QuarkLinear:
    generator = torch.Generator().manual_seed(7)
    layer = QuarkLinear(K, N, scheme_for(PRESETS[preset]), bias=bias, dtype=dtype)
    base.set_parameters(layer, **layer.scheme.quantize_weight(torch.randn(N, K, generator=generator).to(dtype)))
    for name in ("bias", "input_scale"):
        if getattr(layer, name, None) is not None:
            parameter = getattr(layer, name)
            parameter.data = torch.rand(parameter.shape, generator=generator).add(0.01).div(8).to(dtype)
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


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("features", [K - 1, K + 1, 2 * K, K // 2, 1])
def test_a_wrong_number_of_features_is_refused(preset: str, features: int) -> None:
    # 64 tokens: without the check a reshape would take them.
    with pytest.raises(ShapeError, match=rf"\(64, {features}\).* {K} features"):
        quark_linear(preset)(random_input(64, features))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("rows", [(), (1,), (6,), (2, 3), (1, 2, 3), (3, 1, 2, 1)])
def test_any_number_of_dimensions(preset: str, rows: tuple[int, ...]) -> None:
    layer, x = quark_linear(preset), random_input(*rows, K)
    y = layer(x)
    assert y.shape == (*rows, N)
    assert y.dtype == x.dtype
    assert torch.equal(y.reshape(-1, N), layer(x.reshape(-1, K)))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
def test_the_result_is_near_the_float_linears(preset: str, dtype: torch.dtype, bias: bool) -> None:
    """That the right operands meet, in every dtype; a scheme's numbers have tests of their own.

    The exact result has a standard deviation of sqrt(64) = 8 and a bias of up to 36. FP4 rounds a value by about 12 %
    (root mean square), FP8 by 2.6 %, each in both operands: 1.3 and 0.3 are measured, the bounds are 1.6 times that.
    """
    layer, x = quark_linear(preset, bias=bias, dtype=dtype), random_input(32, K, dtype=dtype)
    if preset == "fp8":
        layer.input_scale.data.fill_(4 / 448)  # the input lies between -4 and 4
    if layer.bias is not None:
        layer.bias.data.mul_(256)
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(7)).to(dtype).double()
    exact = x.double() @ weight.T + (layer.bias.double() if layer.bias is not None else 0)
    error = (layer(x).double() - exact).square().mean().sqrt()
    assert error < (2.0 if preset == "mxfp4" else 0.5)


@pytest.mark.parametrize("preset", PRESETS)
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


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_is_refused_and_changes_nothing(preset: str, cast: str) -> None:
    layer = quark_linear(preset)
    before = {name: (p.dtype, p.data_ptr()) for name, p in layer.named_parameters()}
    with pytest.raises(QuarkInductorError, match=r"(weight|bias|weight_scale) from \w+ into float.*dtype="):
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
        f"QuarkLinear(in_features=64, out_features=48, bias=False, {PRESETS['fp8']})"
    )


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
        scheme_for(INT8)
    message = str(caught.value)
    assert str(INT8) in message
    for name, cls in registered_schemes().items():
        assert f"{name}: {cls.refuses(INT8)}" in message


class Fake(QuarkScheme):
    """Takes INT8, does nothing."""

    name = "fake"

    @classmethod
    def refuses(cls, spec: LinearSpec) -> str | None:
        return None if spec == INT8 else "only INT8"

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    def create_weights(self, layer: nn.Module, **sizes: Any) -> None:
        pass

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        pass

    def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        return x

    def quantize_weight(self, weight: Tensor) -> dict[str, Tensor]:
        return {}


@pytest.mark.usefixtures("no_other_schemes")
def test_a_registered_scheme_is_chosen() -> None:
    assert register_scheme(Fake) is Fake
    assert type(scheme_for(INT8)) is Fake
    assert scheme_for(INT8).spec == INT8
    assert scheme_for(PRESETS["mxfp4"]).name == "w4a4_mxfp4"


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
        incomplete(INT8)
