"""The forms in which transformers runs experts, of weights that somebody else dequantizes: grouped, and one by one."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quark_inductor.schemes import ops  # noqa: F401
from quark_inductor.schemes.numerics import block
from quark_inductor.testing import rewrite

E, H, INTERMEDIATE, T, K = 4, 64, 96, 11, 2
_ops = torch.ops.quark_inductor


class Experts(nn.Module):
    """What transformers' grouped form reads of a module, its weights dequantized whenever they are read."""

    has_gate, has_bias, is_transposed, has_post_expert_norm, _is_expert_parallel = True, False, False, False, False
    num_experts = E

    def __init__(self, format: str) -> None:
        super().__init__()
        self.format = format
        for name, shape in {"gate_up_proj": (E, 2 * INTERMEDIATE, H), "down_proj": (E, H, INTERMEDIATE)}.items():
            weight = torch.randn(shape, generator=torch.Generator().manual_seed(len(name))) * 0.2
            if format == "fp8":
                scale = weight.abs().amax(-1, keepdim=True) / 448
                codes = (weight / scale).to(torch.float8_e4m3fn)
            else:
                codes, scale = block.quantize(weight, format, "even")
            self.register_buffer(f"{name}_codes", codes)
            self.register_buffer(f"{name}_scale", scale)

    def __getattr__(self, name: str) -> Any:
        if name not in ("gate_up_proj", "down_proj"):
            return super().__getattr__(name)
        codes, scale = getattr(self, f"{name}_codes"), getattr(self, f"{name}_scale")
        if self.format == "fp8":
            return (codes.float() * scale).to(torch.bfloat16)
        return _ops.block_dequantize(codes, scale, self.format, "bfloat16")

    def _apply_gate(self, y: Tensor) -> Tensor:
        gate, up = y.chunk(2, -1)
        return F.silu(gate) * up


@pytest.fixture(params=["mxfp4", "mxfp6_e2m3", "fp8"])
def experts(request: pytest.FixtureRequest) -> Experts:
    return Experts(request.param)


@pytest.fixture
def routed() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(T, H, generator=generator).to(torch.bfloat16)
    index = torch.stack([torch.randperm(E - 1, generator=generator)[:K] for _ in range(T)])  # the last is never hit
    return x, index, torch.rand(T, K, generator=generator).to(torch.bfloat16)


def test_grouped(experts: Experts, routed: tuple[Tensor, Tensor, Tensor]) -> None:
    """Transformers' own function: both products become grouped GEMMs of the codes."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    done = rewrite(lambda *given: grouped_mm_experts_forward(experts, *given), *routed)
    rule = "fp8_weight" if experts.format == "fp8" else "block_weight"
    assert done.matches[rule] == 2
    fused = [n for n in done.after.nodes if n.target is _ops.weight_only_gemm.default]
    assert [n.args[-1] is not None for n in fused] == [True, True]
    assert not [n for n in done.after.nodes if n.target is torch.ops.aten._grouped_mm.default]
    assert done.refusals == ()


def test_grouped_numbers(experts: Experts, routed: tuple[Tensor, Tensor, Tensor]) -> None:
    """Against a loop in float64: what is between the GEMMs is rounded to bfloat16, 8 bits, a few times."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    x, index, weights = routed
    compiled = torch.compile(
        lambda *given: grouped_mm_experts_forward(experts, *given),
        backend="quark",
        fullgraph=True,
        options={"quark.strict": True},
    )
    into, down = experts.gate_up_proj.double(), experts.down_proj.double()
    expected = torch.zeros(T, H, dtype=torch.float64)
    for token in range(T):
        for e, weight in zip(index[token].tolist(), weights[token].double(), strict=True):
            gate, up = (into[e] @ x[token].double()).chunk(2)
            expected[token] += weight * (down[e] @ (F.silu(gate) * up))
    assert (compiled(*routed).double() - expected).abs().max() <= 2.0**-6 * expected.abs().max()


def test_one_by_one(experts: Experts, routed: tuple[Tensor, Tensor, Tensor]) -> None:
    """A loop that takes each expert's weight out of those of all: only that one is dequantized, and its GEMM fused."""
    x, index, weights = routed

    def loop(x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for e in range(E):
            routed_weight = (weights * (index == e)).sum(-1, keepdim=True)
            h = experts._apply_gate(F.linear(x, experts.gate_up_proj[e]))
            y = y + F.linear(h, experts.down_proj[e]) * routed_weight
        return y

    done = rewrite(loop, x)
    rule = "fp8_weight" if experts.format == "fp8" else "block_weight"
    assert done.matches[rule] == 2 * E
    left = [n for n in done.after.nodes if n.target is _ops.block_dequantize.default]
    assert left == []
    compiled = torch.compile(loop, backend="quark", fullgraph=True, options={"emulate_precision_casts": True})
    assert torch.equal(compiled(x), loop(x))


def test_another_product_of_groups_stays() -> None:
    """Of three dimensions each, without offsets: ``bmm`` by another name, but no rule is about it."""
    experts = Experts("mxfp4")
    x = torch.randn(E, T, H, dtype=torch.bfloat16)
    done = rewrite(lambda x: torch.ops.aten._grouped_mm(x, experts.gate_up_proj.transpose(1, 2)), x)
    assert "block_weight" not in done.matches
    assert any("2, 3 and offsets" in r.reason for r in done.refusals)
