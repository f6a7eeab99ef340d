"""The passes together: what they report, what they refuse to be silent about, and what the caches know of them."""

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import quark_inductor
from quark_inductor.lowering import cpp
from quark_inductor.lowering.base import (
    GemmProblem,
    No,
    Provider,
    provider_names,
    register_provider,
    unregister_provider,
)
from quark_inductor.lowering.target import Target
from quark_inductor.patterns import nearest, pipeline
from quark_inductor.patterns.base import Options, PassResult, Refusal, registered_rules
from quark_inductor.patterns.pipeline import GraphResult, LateDecompositionPass, RulesPass, collect_results
from quark_inductor.schemes.base import QuarkLinear
from quark_inductor.schemes.errors import NotFusedError, TrainingError

FIXTURES = Path(__file__).parents[1] / "fixtures"
PRESETS = ["mxfp4", "fp8", "fp8_dynamic", "ptpc_fp8", "ptpc_int8"]
# Of a Linear with a quantized activation, when nobody may make kernels.
OPS = "prologue_gemm, quantized_gemm, weight_only_gemm"
EMULATED = f"{OPS}: {', '.join(provider_names()[:-1])}: option quark.provider is 'emulation': leave it out to ask all"


class Mlp(nn.Module):
    """Linears in every kind of container, one of them not quantized."""

    def __init__(self, linear: Callable[..., QuarkLinear], preset: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"up": linear(preset, 64, 96)}), linear(preset, 96, 64)])
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(64, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers[1](self.layers[0]["up"](x)))


# --- what is fused, and what is said of the rest


@pytest.mark.parametrize("name", ["mxfp4", "ptpc_fp8"])
def test_every_linear_of_a_model_has_its_name(rewrite: Callable[..., Any], name: str) -> None:
    """tests/test_compiled_model.py checks that they are fused."""
    model = quark_inductor.load(FIXTURES / name)
    linears = {n for n, m in model.named_modules() if isinstance(m, QuarkLinear)}
    done = rewrite(model, torch.arange(12).reshape(2, 6), provider="emulation")
    assert done.fused().keys() <= {"block_quantize", "block_dequantize", "unpack_weight"}
    assert len(done.result.unfused) == 14
    assert {u.layer for u in done.result.unfused} == linears
    assert {u.reason for u in done.result.unfused} == {EMULATED}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_refused_layer_is_named(
    rewrite: Callable[..., Any],
    linear: Callable[..., QuarkLinear],
    preset: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, x = Mlp(linear, preset), torch.randn(3, 64)
    with caplog.at_level(logging.WARNING, logger="quark_inductor"):
        done = rewrite(model, x, provider="emulation")
    names = ["layers.0.up", "layers.1"]
    assert [u.layer for u in done.result.unfused] == names
    # Once a reason.
    messages = [r.getMessage() for r in caplog.records if r.name.startswith("quark_inductor")]
    assert messages == [f"layers.0.up and 1 more run as emulation: {EMULATED}"]
    assert torch.equal(done.output, model(x))


# One of each way to store a weight and to quantize an activation.
WAYS = ["mxfp4_weight_only", "mxfp4_fp8", "mxfp6_e2m3", "mxfp8", "nvfp4", "nvfp4_weight_only", "amdfp4"]
WAYS += ["fp8_weight_only", "fp8_e5m2", "int8", "ptpc_int8", "int8_weight_only", "int4_wo_32", "uint4_wo_32"]
WAYS += ["uint4_wo_per_channel", "int4_fp8"]


@pytest.mark.parametrize("preset", WAYS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_that_no_rule_takes_is_found_by_its_codes(
    rewrite: Callable[..., Any],
    linear: Callable[..., QuarkLinear],
    monkeypatch: pytest.MonkeyPatch,
    preset: str,
    bias: bool,
) -> None:
    for module in (pipeline, nearest):
        monkeypatch.setattr(module, "registered_rules", lambda: ())
    model, x = nn.Sequential(linear(preset, bias=bias), nn.Linear(48, 8)), torch.randn(3, 64)
    done = rewrite(model, x)
    assert [(u.layer, u.reason, u.rule) for u in done.result.unfused] == [("0", "no rule's pattern is this graph", "")]
    (result,) = done.result.linears
    assert (result.layer, result.provider, result.rules, result.shape) == ("0", "emulation", (), (48, 64))
    assert (result.problem, result.fused) == (None, False)
    assert done.fused().keys() <= {"block_quantize", "block_dequantize", "int4_unpack"}
    assert torch.equal(done.output, model(x))


def test_a_weight_dequantized_at_load_is_a_float_weight(
    rewrite: Callable[..., Any], linear: Callable[..., QuarkLinear]
) -> None:
    layer, x = linear("mxfp4"), torch.randn(3, 64)
    layer.dequantize_()
    done = rewrite(layer, x)
    assert done.fused() == {"block_quantize": 1, "block_dequantize": 1}
    assert done.result.unfused == ()
    torch.testing.assert_close(done.output, layer(x))


def test_codes_behind_another_product_are_not_a_weights(rewrite: Callable[..., Any]) -> None:
    """An attention's scores: their second operand was computed by a GEMM, whose own weight has codes."""
    codes, x = torch.ones(16, 16, dtype=torch.int8), torch.randn(4, 16)

    def scores(x: Tensor) -> Tensor:
        key = x @ codes.float().t()
        return x @ key.t()

    assert len(rewrite(scores, x).result.unfused) == 1


def test_a_mask_or_token_ids_are_no_codes(rewrite: Callable[..., Any]) -> None:
    table, x = torch.randn(32, 16), torch.randn(4, 16)

    def embed(x: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return x @ torch.nn.functional.embedding(ids, table).t(), x @ (mask * 2.0).t()

    done = rewrite(embed, x, torch.arange(6), torch.ones(5, 16, dtype=torch.bool))
    assert done.result.unfused == ()


def test_a_model_that_is_fused_logs_nothing(
    rewrite: Callable[..., Any], linear: Callable[..., QuarkLinear], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="quark_inductor"):
        rewrite(Mlp(linear, "mxfp4"), torch.randn(3, 64))
    assert [r for r in caplog.records if r.name.startswith("quark_inductor")] == []


def test_strict_names_every_layer(rewrite: Callable[..., Any], linear: Callable[..., QuarkLinear]) -> None:
    model = Mlp(linear, "mxfp4")
    options = {"quark.provider": "emulation", "quark.strict": True}
    with pytest.raises(BackendCompilerFailed) as error:
        torch.compile(model, backend="quark", options=options)(torch.randn(3, 64))
    cause: Any = error.value.inner_exception
    while not isinstance(cause, NotFusedError):
        cause = cause.__cause__
    for message in (str(error.value), str(cause)):
        assert "2 quantized Linears were not fused, and quark.strict asks for all of them" in message
        assert f"\n  layers.0.up: {EMULATED}" in message
        assert f"\n  layers.1: {EMULATED}" in message
    assert rewrite(model, torch.randn(3, 64), strict=True).result.unfused == ()


def test_two_layers_keep_their_own_reasons(
    rewrite: Callable[..., Any], linear: Callable[..., QuarkLinear], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One refused by the provider for its size, one that no rule knows, one fused."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small, self.large = linear("ptpc_fp8", 64, 64), linear("ptpc_fp8", 64, 96)
            self.strange = nn.Module()
            self.strange.weight = nn.Buffer(torch.ones(8, 64).to(torch.float8_e4m3fn))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return self.small(x), self.large(x), x @ self.strange.weight.float().t()

    monkeypatch.setattr(cpp.Cpp, "can_run", lambda self, target, p: No("too large") if p.n > 64 else None)
    done = rewrite(Mixed(), torch.randn(3, 64))
    assert done.fused() == {"prologue_gemm": 1}
    assert {(u.layer, u.reason.split("; ")[-1]) for u in done.result.unfused if u.layer} == {
        ("large", f"{OPS}: cpp: too large"),
    }
    assert {u.reason.partition(";")[0] for u in done.result.unfused if not u.layer} == {
        "no rule's pattern is this graph",
    }


def test_a_float_model_is_left_alone(rewrite: Callable[..., Any]) -> None:
    model, x = nn.Sequential(nn.Linear(8, 4), nn.Tanh()), torch.randn(3, 8)
    done = rewrite(model, x)
    assert done.fused() == {}
    assert done.result.unfused == ()
    # Nothing matched, and every pass says so.
    others = {
        "hoist_selects",
        "hoist_views",
        "cse",
        "decode_attention",
        "decode_linear",
        "grouped_linear",
        "quantize_before_gather",
        "select_providers",
    }
    rules = {rule.name for rule in registered_rules()}
    assert {(p.name, p.matches) for p in done.result.passes} == {(name, 0) for name in rules | others}
    assert done.result.linears == done.result.left == ()
    torch.testing.assert_close(done.output, model(x))


# --- results


def test_every_graph_leaves_a_result(linear: Callable[..., QuarkLinear], rewrite: Callable[..., Any]) -> None:
    with collect_results() as outer:
        inner = rewrite(linear("mxfp4"), torch.randn(3, 64))
    assert outer == []  # the innermost collector has it
    assert inner.result.matches("block_weight") == 1
    assert inner.result.matches("no such rule") == 0
    assert all(p.ms >= 0 for p in inner.result.passes)


def test_matches_are_summed() -> None:
    passes = (PassResult("a", 2, (), 0.1), PassResult("b", 5, (), 0.1), PassResult("a", 1, (), 0.1))
    assert GraphResult(passes, (), (), (), 0.0).matches("a") == 3


# --- training


def test_a_gradient_through_codes_is_an_error(linear: Callable[..., QuarkLinear]) -> None:
    """MXFP4 codes have no gradient: eager and compiled say so."""
    model, x = linear("mxfp4"), torch.randn(3, 64, requires_grad=True)
    with torch.enable_grad():
        with pytest.raises(TrainingError, match="inference"):
            model(x)
        with pytest.raises(Exception, match="Quantized Linears are for inference"):
            torch.compile(model, backend="quark", fullgraph=True)(x)


def test_a_training_graph_stays_emulated(
    linear: Callable[..., QuarkLinear], interpreted: list[torch.fx.GraphModule], caplog: pytest.LogCaptureFixture
) -> None:
    """A dequantize lets a gradient of the activation through; no fused op does, so no rule may run."""
    model, x = linear("fp8_weight_only"), torch.randn(3, 64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    with torch.enable_grad(), collect_results() as results, caplog.at_level(logging.WARNING, logger="quark_inductor"):
        model(y).square().sum().backward()
        out = torch.compile(model, backend="quark", fullgraph=True)(x)
        out.square().sum().backward()
    assert results == []
    assert len(interpreted) == 2  # forward and backward
    assert "quark_inductor." not in "".join(str(gm.graph) for gm in interpreted)
    assert "a training graph: no rule runs, the quantized Linears stay emulated" in caplog.text
    assert torch.equal(x.grad, y.grad)


# --- what the caches know


def uuid(options: Options = Options(), kind: type = RulesPass) -> Any:  # noqa: B008
    return kind(options).uuid()


def test_the_uuid_knows_the_options() -> None:
    every = [Options(), Options(strict=True), Options(provider="cpp"), Options(provider="emulation")]
    assert len({uuid(o) for o in every}) == len(every)
    assert uuid(Options(strict=True)) == uuid(Options(strict=True))


def test_the_uuid_knows_which_pass_it_is() -> None:
    assert uuid() != uuid(kind=LateDecompositionPass)


def test_the_uuid_knows_the_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    before = uuid()
    monkeypatch.setattr(pipeline, "registered_rules", lambda: ())
    assert uuid() != before


def test_the_uuid_knows_the_providers() -> None:
    """One that is registered now may run what nobody could when a graph was cached."""

    class Late(Provider):
        name = "late"

        def can_run(self, target: Target, problem: GemmProblem) -> No | None:
            return None

        def lower(self, target: Target, problem: GemmProblem, args: Any) -> Any:
            raise NotImplementedError

    before = uuid()
    register_provider(Late)
    try:
        assert uuid() != before
    finally:
        unregister_provider(Late.name)


def test_the_uuid_knows_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    before = uuid()
    other = Target(device_type="cpu", arch="riscv64", isa="portable")
    monkeypatch.setattr(pipeline.targets, "current", lambda device_type="cpu": other)
    assert uuid() != before


def test_the_uuid_knows_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which files count is tests/test_cache.py's to check."""
    before = uuid()
    monkeypatch.setattr(pipeline, "source_hash", lambda: "another")
    assert uuid() != before


def test_refusals_compare() -> None:
    assert Refusal("a", "b") == Refusal("a", "b", "")
    assert Refusal("a", "b") != Refusal("a", "c")


def named_unfused(done: Any) -> list[str]:
    return [u.layer for u in done.result.unfused]


a_global_model: Any = None


def test_names_have_nothing_of_dynamo(
    rewrite: Callable[..., Any], linear: Callable[..., QuarkLinear], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However a model is called: as a module of torch's own, by its method, or from a function."""
    x = torch.randn(3, 64)
    block = nn.Sequential(nn.Identity(), nn.ModuleDict({"up": linear("mxfp4")})["up"])
    model = Mlp(linear, "mxfp4")
    options = {"provider": "emulation"}
    assert named_unfused(rewrite(block, x, **options)) == ["1"]
    assert named_unfused(rewrite(model.forward, x, **options)) == ["layers.0.up", "layers.1"]
    monkeypatch.setitem(globals(), "a_global_model", model)
    ways = (lambda x: model(x), (x,)), (lambda x, m: m(x), (x, model)), (lambda x: a_global_model(x), (x,))
    for function, args in ways:
        names = named_unfused(rewrite(function, *args, **options))
        # With or without the variable's name before it.
        names = [re.sub(r"^(model|m|a_global_model)\.", "", name) for name in names]
        assert names == ["layers.0.up", "layers.1"]
