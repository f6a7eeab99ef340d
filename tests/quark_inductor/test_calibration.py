"""``quantize_(calibration=)``: what is passed, what is measured, and what is refused."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quark_inductor as qi
from quark_inductor.errors import ConfigError
from quark_inductor.schemes.base import QuarkLinear
from quark_inductor.schemes.spec import PRESETS

STATIC = ["fp8", "fp8_e5m2", "int8", "mxfp4_fp8", "nvfp4"]
Llama = Callable[..., Any]
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


def raw_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def state(model: nn.Module) -> dict[str, tuple[torch.dtype, bytes]]:
    return {name: (t.dtype, raw_bytes(t)) for name, t in model.state_dict().items()}


@pytest.fixture
def data() -> list[Tensor]:
    return list(torch.randint(0, 80, (4, 9), generator=torch.Generator().manual_seed(13)).split(2))


def test_the_schemes_that_need_data_are_these() -> None:
    """In amd-quark's words: an input that is not dynamic, or whose second stage is not."""
    static = []
    for name, spec in PRESETS.items():
        x = spec.input
        if x is not None and (not x.is_dynamic or (x.second is not None and not x.second.is_dynamic)):
            static.append(name)
    assert sorted(static) == STATIC


# --- what is measured


def test_the_scale_is_of_the_largest_input_of_all_the_data(llama: Llama, data: list[Tensor]) -> None:
    """Computed here from the inputs that hooks of our own see."""
    model, largest = llama(), dict[str, float]()

    def hook(name: str) -> Any:
        def write(module: nn.Module, args: tuple[Tensor]) -> None:
            largest[name] = max(largest.get(name, 0.0), args[0].abs().max().item())

        return write

    for name, module in model.named_modules():
        if type(module) is nn.Linear and name != "lm_head":
            module.register_forward_pre_hook(hook(name))
    with torch.no_grad():
        for ids in data:
            model(ids)
    assert len(largest) == 14
    fp8, int8, nvfp4 = (qi.quantize_(llama(), name, calibration=data) for name in ("fp8", "int8", "nvfp4"))
    for name, amax in largest.items():
        assert fp8.get_submodule(name).input_scale == torch.tensor(amax / 448).bfloat16()
        assert int8.get_submodule(name).input_scale == torch.tensor(2 * amax / 255).bfloat16().float()
        assert int8.get_submodule(name).input_zero_point == 0
        torch.testing.assert_close(nvfp4.get_submodule(name).input_scale_2.data, torch.tensor(amax / 448 / 6))


@pytest.mark.parametrize("scheme", STATIC)
def test_every_form_of_data_gives_the_same(scheme: str, llama: Llama, data: list[Tensor]) -> None:
    def generator() -> Iterator[Tensor]:
        yield from data

    expected = state(qi.quantize_(llama(), scheme, calibration=data))
    for form in (
        tuple(data),
        generator(),
        [{"input_ids": ids} for ids in data],
        [data[1], {"input_ids": data[0], "use_cache": False}],
        torch.utils.data.DataLoader(torch.cat(data), batch_size=2),  # type: ignore[arg-type]
    ):
        assert state(qi.quantize_(llama(), scheme, calibration=form)) == expected


@pytest.mark.parametrize("scheme", ["mxfp4", "ptpc_fp8", "int4_wo_32"])
def test_data_changes_nothing_where_none_is_needed(scheme: str, llama: Llama, data: list[Tensor]) -> None:
    assert state(qi.quantize_(llama(), scheme, calibration=data)) == state(qi.quantize_(llama(), scheme))


def test_data_runs_through_the_float_model_in_eval_mode_and_leaves_no_hook(llama: Llama, data: list[Tensor]) -> None:
    model = llama().train()
    training, grad = [], []
    model.register_forward_pre_hook(lambda m, args: training.append(m.training), prepend=True)
    model.model.norm.register_forward_hook(lambda m, args, out: grad.append(out.requires_grad))
    qi.quantize_(model, "fp8", calibration=data)
    assert training == [False] * 2
    assert grad == [False] * 2
    assert not any(m._forward_pre_hooks for m in model.modules() if isinstance(m, QuarkLinear))


def test_linears_that_read_one_activation_share_nvfp4s_global_scale(llama: Llama, data: list[Tensor]) -> None:
    """q, k and v; gate and up; as amd-quark does, which gives them the largest of theirs."""
    alone, together = qi.quantize_(llama(), "nvfp4_weight_only"), qi.quantize_(llama(), "nvfp4", calibration=data)
    groups = [[f"model.layers.{i}.{n}_proj" for n in names] for i in (0, 1) for names in GROUPS]
    for names in groups:
        own = [alone.get_submodule(n).weight_scale_2.item() for n in names]
        assert {together.get_submodule(n).weight_scale_2.item() for n in names} == {max(own)}
        assert len(set(own)) == len(names)


GROUPS = (
    ("self_attn.q", "self_attn.k", "self_attn.v"),
    ("self_attn.o",),
    ("mlp.gate", "mlp.up"),
    ("mlp.down",),
)


# --- what is refused: each leaves the model as it was


def check_refused(model: Any, scheme: Any, calibration: Any, *named: str) -> None:
    before = state(model), {n: (type(m), m.training) for n, m in model.named_modules()}
    with pytest.raises(ConfigError) as caught:
        qi.quantize_(model, scheme, calibration=calibration)
    for text in named:
        assert text in str(caught.value)
    assert (state(model), {n: (type(m), m.training) for n, m in model.named_modules()}) == before
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("scheme", STATIC)
def test_no_data_is_refused(scheme: str, llama: Llama) -> None:
    check_refused(llama().train(), scheme, None, Q, "static activation scales", "pass calibration=")


@pytest.mark.parametrize("scheme", STATIC)
def test_data_of_nothing_is_refused(scheme: str, llama: Llama) -> None:
    check_refused(llama().train(), scheme, [], Q, "never reached")


def test_a_layer_that_no_data_reaches_is_named(llama: Llama, data: list[Tensor]) -> None:
    model = llama()
    model.model.spare = nn.Linear(64, 64, dtype=torch.bfloat16)
    check_refused(model, "fp8", data, "model.spare", "never reached", "exclude")
    qi.quantize_(model, "fp8", exclude=["lm_head", "*spare"], calibration=data)
    assert type(model.model.spare) is nn.Linear


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("scheme", STATIC)
def test_data_that_is_not_finite_is_refused(scheme: str, value: float, llama: Llama, data: list[Tensor]) -> None:
    """In one batch of several, and not in the last."""
    embedded = [llama().model.embed_tokens(ids).detach() for ids in data]
    embedded[0][1, 2, 3] = value
    check_refused(llama(), scheme, [{"inputs_embeds": x} for x in embedded], Q, "not finite")


def test_an_input_that_becomes_infinite_on_the_way_is_named(llama: Llama, data: list[Tensor]) -> None:
    """float16 ends at 65504: the product of gate and up is beyond."""
    model = llama(torch.float16)
    model.model.layers[1].mlp.gate_proj.weight.data.fill_(3e3)
    model.model.layers[1].mlp.up_proj.weight.data.fill_(3e3)
    check_refused(model, "fp8", data, DOWN, "not finite")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("scheme", ["fp8", "mxfp4", "int8_weight_only"])
def test_a_weight_that_is_not_finite_is_refused(scheme: str, value: float, llama: Llama, data: list[Tensor]) -> None:
    model = llama()
    model.get_submodule(DOWN).weight.data[5, 6] = value
    with pytest.raises(ConfigError, match=rf"{DOWN}: the weight holds a NaN or an infinity"):
        qi.quantize_(model, scheme, calibration=data)
    assert not any(isinstance(m, QuarkLinear) for m in model.modules())


def test_an_error_of_the_model_passes_through_and_leaves_no_hook(llama: Llama) -> None:
    model = llama().train()
    with pytest.raises(IndexError):
        qi.quantize_(model, "fp8", calibration=[torch.tensor([[1000]])])
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(m.training for m in model.modules())
