"""Who gets what the rules made, and what becomes of it when nobody takes it: toy providers that refuse some ops."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quark_inductor.lowering import base
from quark_inductor.lowering.base import GemmProblem, No, Provider, register_provider
from quark_inductor.lowering.target import Target
from quark_inductor.schemes.base import QuarkLinear

# The most that the rules make of a Linear first.
OPS = ("prologue_gemm", "quantized_gemm", "weight_only_gemm")
aten = torch.ops.aten


@pytest.fixture
def providers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Registers a provider of a name that runs what a predicate takes; no other is known."""
    monkeypatch.setattr(base, "_PROVIDERS", {})

    def register(name: str, takes: Callable[[GemmProblem], bool]) -> None:
        class Toy(Provider):
            def can_run(self, target: Target, problem: GemmProblem) -> No | None:
                return None if takes(problem) else No("not that")

            def lower(self, target: Target, problem: GemmProblem, args: Mapping[str, Any]) -> Any:
                raise NotImplementedError

        Toy.name = name
        register_provider(Toy)

    return register


def of_ops(*ops: str) -> Callable[[GemmProblem], bool]:
    return lambda problem: problem.op in ops


@pytest.mark.parametrize("preset", ["ptpc_fp8", "mxfp4", "ptpc_int8"])
@pytest.mark.parametrize("refused", range(4), ids=["no_op", "prologue", "quantized_too", "all"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_what_is_refused_becomes_what_it_was(
    rewrite: Callable[..., Any],
    linear: Callable[..., QuarkLinear],
    providers: Callable[..., None],
    preset: str,
    refused: int,
    bias: bool,
) -> None:
    """``prologue_gemm`` -> ``quantized_gemm`` -> ``weight_only_gemm`` -> the GEMM of the graph before."""
    providers("toy", of_ops(*OPS[refused:]))
    model, x = linear(preset, bias=bias), torch.randn(3, 64)
    done = rewrite(model, x)
    gemms = {op: count for op, count in done.fused().items() if op in OPS}
    assert gemms == ({OPS[refused]: 1} if refused < 3 else {})
    assert done.count(aten.addmm.default) + done.count(aten.mm.default) == (refused == 3)
    (result,) = done.result.linears
    assert result.provider == ("toy" if refused < 3 else "emulation")
    # Values for a GEMM of values are computed as the emulation does it: that is half a kernel.
    assert (result.fused, result.partly) == (refused < 2, refused == 2)
    family = {"ptpc_fp8": "fp8", "mxfp4": "block", "ptpc_int8": "integer"}[preset]
    rules = tuple(f"{family}_{stage}" for stage in ("weight", "activation", "prologue"))
    assert result.rules == rules[: 3 - refused]
    # Who refused a better form, once a reason.
    assert result.refusals == ((f"{', '.join(OPS[:refused])}: toy: not that",) if refused else ())
    assert result.problem.op == OPS[min(refused, 2)] if refused < 3 else result.problem is not None
    assert result.shape == (48, 64)
    # Codes for a GEMM of codes may be made outside.
    assert bool(done.result.unfused) is (refused >= 2)
    # All of what the rules made is gone, but for what runs.
    if refused == 3:
        assert done.fused().keys() <= {"block_quantize", "block_dequantize"}
    assert torch.equal(done.output, model(x))


def test_a_better_form_comes_before_a_preferred_provider(
    rewrite: Callable[..., Any], linear: Callable[..., QuarkLinear], providers: Callable[..., None]
) -> None:
    providers("first", of_ops("quantized_gemm", "weight_only_gemm"))
    providers("second", of_ops("prologue_gemm"))
    done = rewrite(linear("ptpc_fp8"), torch.randn(3, 64))
    (result,) = done.result.linears
    assert (result.provider, result.problem.op, result.refusals) == ("second", "prologue_gemm", ())
    assert done.result.unfused == ()


def test_the_order_of_providers_is_that_of_preference(
    rewrite: Callable[..., Any], linear: Callable[..., QuarkLinear], providers: Callable[..., None]
) -> None:
    for name in ("first", "second"):
        providers(name, of_ops(*OPS))
    (result,) = rewrite(linear("ptpc_fp8"), torch.randn(3, 64)).result.linears
    assert result.provider == "first"
    (result,) = rewrite(linear("ptpc_fp8"), torch.randn(3, 64), provider="second").result.linears
    assert result.provider == "second"


def test_only_a_forced_provider_is_asked(
    rewrite: Callable[..., Any], linear: Callable[..., QuarkLinear], providers: Callable[..., None]
) -> None:
    providers("first", of_ops(*OPS))
    providers("second", of_ops("weight_only_gemm"))
    model, x = linear("ptpc_fp8"), torch.randn(3, 64)
    done = rewrite(model, x, provider="second")
    (result,) = done.result.linears
    assert (result.provider, result.problem.op) == ("second", "weight_only_gemm")
    assert any("first: option quark.provider is 'second'" in refusal for refusal in result.refusals)
    assert any("second: not that" in refusal for refusal in result.refusals)
    assert torch.equal(done.output, model(x))


def test_each_linear_is_asked_for_by_itself(
    rewrite: Callable[..., Any], linear: Callable[..., QuarkLinear], providers: Callable[..., None]
) -> None:
    """Three that share a quantized input, of which one is too large: the quantize stays, for that one alone."""
    providers("toy", lambda problem: problem.op == "quantized_gemm" or problem.n <= 32)

    class Qkv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = linear("mxfp4"), linear("mxfp4", n=16), linear("mxfp4", n=32, bias=False)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return self.q(x), self.k(x), self.v(x)

    model, x = Qkv(), torch.randn(2, 3, 64)
    done = rewrite(model, x)
    assert done.fused() == {"block_quantize": 1, "quantized_gemm": 1, "prologue_gemm": 2}
    assert {result.layer: result.problem.op for result in done.result.linears} == {
        "q": "quantized_gemm",
        "k": "prologue_gemm",
        "v": "prologue_gemm",
    }
    assert done.result.unfused == ()
    for got, expected in zip(done.output, model(x), strict=True):
        assert torch.equal(got, expected)


def test_a_weight_without_an_activation(
    rewrite: Callable[..., Any], linear: Callable[..., QuarkLinear], providers: Callable[..., None]
) -> None:
    providers("toy", of_ops("prologue_gemm"))
    model, x = linear("int4_wo_32"), torch.randn(3, 64)
    done = rewrite(model, x)
    (result,) = done.result.linears
    assert (result.provider, result.rules) == ("emulation", ())
    assert result.refusals == ("weight_only_gemm: toy: not that",)
    assert [refusal.reason for refusal in done.result.unfused] == ["weight_only_gemm: toy: not that"]
    assert torch.equal(done.output, model(x))


def test_a_fused_op_that_no_rule_made(rewrite: Callable[..., Any], providers: Callable[..., None]) -> None:
    """Somebody else wrote it: there is nothing to go back to."""
    providers("toy", of_ops("prologue_gemm"))
    weight, scale = torch.randn(48, 64).to(torch.float8_e4m3fn), torch.rand(48)

    def fn(x: Tensor) -> Tensor:
        return torch.ops.quark_inductor.weight_only_gemm(x, weight, scale, None, None, None, "fp8_e4m3")

    x = torch.randn(3, 64)
    done = rewrite(fn, x)
    assert done.fused() == {"weight_only_gemm": 1}
    (result,) = done.result.linears
    assert (result.provider, result.rules, result.refusals) == (
        "emulation",
        (),
        ("weight_only_gemm: toy: not that",),
    )
    assert torch.equal(done.output, fn(x))
