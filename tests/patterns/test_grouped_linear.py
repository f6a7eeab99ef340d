"""The rule that makes one grouped GEMM of a Linear of each expert: its steps, what it refuses, what the report says."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import quark_inductor as qi
from quark_inductor.lowering import providers  # noqa: F401  their layouts
from quark_inductor.schemes.base import QuarkLinear, scheme_for, set_parameters
from quark_inductor.schemes.errors import NotFusedError
from quark_inductor.schemes.experts import QuarkExperts
from quark_inductor.schemes.spec import PRESETS, TensorSpec

E, H, I = 4, 128, 64  # noqa: E741
SIZES = {"gate_proj": (I, H), "up_proj": (I, H), "down_proj": (H, I)}
WEIGHT_ONLY = ("mxfp4_weight_only", "fp8_weight_only", "int8_weight_only", "uint4_wo_32", "int4_wo_per_channel")
PROLOGUE = ("mxfp4", "mxfp4_fp8", "mxfp8", "amdfp4", "fp8", "ptpc_fp8", "int8", "ptpc_int8", "int4_wa_64")
# One scale for all rows of an expert, computed from them.
OF_ALL_ROWS = ("fp8_dynamic", "mxfp4_fp8_dynamic", "int8_dynamic", "int4_fp8")
NO_RULE = "no rule knows what one expert computes"


class Gated(nn.Module):
    has_gate = True

    def _apply_gate(self, y: Tensor) -> Tensor:
        gate, up = y.chunk(2, -1)
        return F.silu(gate) * up


class Layer(nn.Module):
    """Experts where a model has them."""

    def __init__(self, experts: QuarkExperts) -> None:
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.experts = experts

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        result: Tensor = self.mlp.experts(x, index, weights)  # type: ignore[operator]
        return result


Change = Callable[[QuarkLinear, str], None]


@pytest.fixture
def layer(linear: Callable[..., QuarkLinear]) -> Callable[..., Layer]:
    """Grouped experts of a preset; one's biases and static scales are another's no more."""

    def make(preset: str, change: Change = lambda linear, name: None, packed: bool = True) -> Layer:
        experts = []
        for e in range(E):
            linears = {}
            for name, (n, k) in SIZES.items():
                made = linears[name] = linear(preset, k, n, dtype=torch.bfloat16)
                for held in ("bias", "input_scale"):
                    if held in made._parameters:
                        tensor = getattr(made, held).data
                        set_parameters(made, **{held: (tensor * (1 + e / 2)).to(tensor.dtype)})
                change(made, name)
                if packed:
                    made.pack_()
            experts.append(linears)
        module = QuarkExperts(experts, Gated())
        module.group_()
        assert module.refusal == ""
        return Layer(module)

    return make


def routed(tokens: int = 11, k: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    index = torch.rand(tokens, E, generator=generator).argsort(1)[:, :k]
    index[0, 0] = E  # of nobody
    # Rows of unlike sizes: a scale of several experts' rows is not that of one's.
    x = torch.randn(tokens, H, generator=generator) * torch.logspace(-1, 1, tokens)[:, None]
    return x.bfloat16(), index, torch.rand(tokens, k, generator=generator).bfloat16()


def matches(done: Any) -> int:
    result: int = done.result.matches("grouped_linear")
    return result


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "as stored"])
@pytest.mark.parametrize("preset", [*WEIGHT_ONLY, *PROLOGUE])
def test_one_gemm_a_projection(
    rewrite: Callable[..., Any], layer: Callable[..., Layer], preset: str, packed: bool
) -> None:
    """The last step is taken, and all of its operands are those of all experts."""
    model, args = layer(preset, packed=packed), routed()
    done = rewrite(model, *args)
    op = "weight_only_gemm" if preset in WEIGHT_ONLY else "prologue_gemm"
    assert (done.fused(), matches(done)) == ({op: 2}, 2)
    assert done.result.unfused == done.result.left == ()
    rows = {r.layer: r for r in done.result.linears}
    assert {name: row.shape for name, row in rows.items()} == {
        "mlp.experts.gate_up_proj": (2 * I, H),
        "mlp.experts.down_proj": (H, I),
    }
    for row in rows.values():
        assert row.provider == "cpp"
        assert [rule.rpartition("_")[2] for rule in row.rules] == (
            ["weight"] if preset in WEIGHT_ONLY else ["weight", "activation", "prologue"]
        )
        assert (row.problem.op, row.problem.experts, row.problem.grouped) == (op, E, True)
        assert str(row.problem).endswith(f", {E} experts")
    for node in done.graph.find_nodes(op="call_function", target=getattr(torch.ops.quark_inductor, op).default):
        named = dict(zip([a.name for a in node.target._schema.arguments], node.args, strict=True))
        for name, value in named.items():
            if isinstance(value, torch.fx.Node) and (name.startswith("weight") or name == "bias"):
                assert value.meta["val"].shape[0] == E
        assert named["offsets"].meta["val"].shape == (E,)
        if preset in ("fp8", "int8", "mxfp4_fp8"):
            assert named["x_scale"].meta["val"].shape == (E,)
        assert bool(named["weight_layout"]) is packed
    assert torch.equal(done.output, model(*args))


@pytest.mark.parametrize("preset", ["mxfp4", "ptpc_fp8", "ptpc_int8"])
def test_the_activation_is_quantized_outside(
    rewrite: Callable[..., Any], layer: Callable[..., Layer], preset: str, materialized: str
) -> None:
    """Row by row, once for all experts, where a provider has no prologue."""
    model, args = layer(preset), routed()
    done = rewrite(model, *args, provider=materialized)
    assert done.fused().get("quantized_gemm") == 2
    assert "grouped_linear" not in done.fused()
    assert [row.rules[-1].rpartition("_")[2] for row in done.result.linears] == ["activation"] * 2
    assert torch.equal(done.output, model(*args))


@pytest.mark.parametrize("preset", ["fp8", "int8"])
def test_each_expert_has_a_scale_and_there_is_no_prologue(
    rewrite: Callable[..., Any], layer: Callable[..., Layer], preset: str, materialized: str
) -> None:
    """Rows cannot be quantized outside by scales of experts: the op stays."""
    model, args = layer(preset), routed()
    done = rewrite(model, *args, provider=materialized)
    assert done.fused() == {"grouped_linear": 2}
    assert torch.equal(done.output, model(*args))
    assert [row.provider for row in done.result.linears] == ["emulation"] * 2
    assert all("materialized: has no prologue" in refusal.reason for refusal in done.result.unfused)


@pytest.mark.parametrize("preset", OF_ALL_ROWS)
def test_a_scale_of_all_rows_is_that_of_an_experts(
    rewrite: Callable[..., Any], layer: Callable[..., Layer], preset: str
) -> None:
    """Not of the rows of all experts, nor of nobody's, which are loud: each has one of its own."""
    model, (x, index, weights) = layer(preset), routed()
    x = x * torch.logspace(-2, 2, len(x))[:, None].to(x.dtype)
    done = rewrite(model, x, index, weights)
    assert torch.equal(done.output, model(x, index, weights))
    assert set(done.fused()) == {"prologue_gemm"}
    assert done.result.unfused == done.result.left == ()
    for node in done.graph.find_nodes(op="call_function", target=torch.ops.quark_inductor.prologue_gemm.default):
        named = dict(zip([a.name for a in node.target._schema.arguments], node.args, strict=True))
        assert (named["x_scale"].meta["val"].shape, named["scale_rule"]) == ((E,), "given")


def test_any_number_of_tokens(rewrite: Callable[..., Any], layer: Callable[..., Layer]) -> None:
    for preset in ("mxfp4", "fp8", "fp8_dynamic"):
        model, args = layer(preset), routed(23)
        done = rewrite(model, *args, dynamic=True)
        assert matches(done) == 2
        assert torch.equal(done.output, model(*args))


# --- what stays


def quantized_output(linear: QuarkLinear, name: str) -> None:
    if name == "down_proj":
        output = TensorSpec(dtype="fp8_e4m3", qscheme="per_tensor")
        linear.scheme = scheme_for(dataclasses.replace(PRESETS["ptpc_fp8"], output=output))
        set_parameters(linear, output_scale=torch.tensor(0.25).bfloat16())


def test_a_quantized_output_stays(rewrite: Callable[..., Any], layer: Callable[..., Layer]) -> None:
    model, args = layer("ptpc_fp8", quantized_output), routed()
    done = rewrite(model, *args)
    assert done.fused() == {"prologue_gemm": 1, "grouped_linear": 1}
    (refusal,) = done.result.unfused
    assert (refusal.layer, refusal.reason) == ("mlp.experts.down_proj", NO_RULE)
    assert done.result.left == ()
    assert torch.equal(done.output, model(*args))


def test_weights_that_were_dequantized_at_load_stay(rewrite: Callable[..., Any], layer: Callable[..., Layer]) -> None:
    model, args = layer("mxfp4", lambda linear, name: linear.dequantize_()), routed()
    done = rewrite(model, *args)
    assert done.fused() == {"grouped_linear": 2}
    assert {refusal.reason for refusal in done.result.unfused} == {NO_RULE}
    assert torch.equal(done.output, model(*args))


@pytest.mark.parametrize("preset", ["mxfp4", "fp8"])
def test_nobody_may_make_kernels(rewrite: Callable[..., Any], layer: Callable[..., Layer], preset: str) -> None:
    model, args = layer(preset), routed()
    done = rewrite(model, *args, provider="emulation")
    assert done.fused() == {"grouped_linear": 2}
    assert torch.equal(done.output, model(*args))
    assert {row.layer: (row.provider, row.fused, row.partly) for row in done.result.linears} == {
        f"mlp.experts.{name}": ("emulation", False, False) for name in ("gate_up_proj", "down_proj")
    }
    assert all("option quark.provider is 'emulation'" in refusal.reason for refusal in done.result.unfused)
    assert done.result.left == ()


def test_strict(rewrite: Callable[..., Any], layer: Callable[..., Layer]) -> None:
    rewrite(layer("mxfp4"), *routed(), strict=True)
    with pytest.raises(NotFusedError, match=r"2 quantized Linears(.|\n)*mlp\.experts\.gate_up_proj: .*'emulation'"):
        rewrite(layer("mxfp4"), *routed(), provider="emulation", strict=True)


# --- the report


@pytest.mark.usefixtures("interpreted")
def test_the_report_has_a_row_a_projection(layer: Callable[..., Layer]) -> None:
    report = qi.explain(layer("mxfp4"), *routed())
    rules = "block_weight", "block_activation", "block_prologue"
    assert [(r.name, r.scheme, r.shape, r.provider, r.op, r.rules, r.fused, r.refusals) for r in report.linears] == [
        ("mlp.experts.gate_up_proj", "w4a4_mxfp4", (2 * I, H), "cpp", "prologue_gemm", rules, True, ()),
        ("mlp.experts.down_proj", "w4a4_mxfp4", (H, I), "cpp", "prologue_gemm", rules, True, ()),
    ]
    assert (report.graphs, report.left, report.rules["grouped_linear"]) == (1, (), 2)
    assert str(report).startswith("2 of 2 quantized Linears fused")


@pytest.mark.usefixtures("interpreted")
def test_the_report_says_why_not(layer: Callable[..., Layer]) -> None:
    report = qi.explain(layer("mxfp4"), *routed(), options={"quark.provider": "emulation"})
    assert [(r.name, r.scheme, r.provider, r.fused) for r in report.linears] == [
        ("mlp.experts.gate_up_proj", "w4a4_mxfp4", "emulation", False),
        ("mlp.experts.down_proj", "w4a4_mxfp4", "emulation", False),
    ]
    assert all("option quark.provider is 'emulation'" in r.refusals[0] for r in report.linears)
    assert report.left == ()
    (row, _) = qi.explain(layer("ptpc_fp8", quantized_output), *routed()).linears
    assert row.fused
