"""What the rules left becomes plain aten, unless it has a kernel, and the result is that of eager code."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.virtualized import V
from torch.fx.experimental.proxy_tensor import make_fx

from quark_inductor.lowering import target
from quark_inductor.patterns.late_decomposition import late_decomposition

q = torch.ops.quark_inductor


def ours(graph: torch.fx.Graph) -> list[str]:
    return [str(n.target) for n in graph.nodes if str(n.target).startswith("quark_inductor.")]


def special(*shape: int) -> Tensor:
    """Ordinary numbers, and among them everything the quantize treats in a way of its own."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x.view(-1)[:8] = torch.tensor([float("nan"), float("inf"), 0.0, -0.0, 3e38, 1e-38, 0.25, 5.0])
    x[-1] = 0.0
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["fake", "symbolic"])
def test_bit_for_bit(dtype: torch.dtype, mode: str) -> None:
    """The graph made of plain ops computes the same bits as the ops' own implementation."""

    def fn(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes, scales = q.block_quantize(x, "mxfp4", "even")
        return codes, scales, q.block_dequantize(codes, scales, "mxfp4", str(dtype).removeprefix("torch."))

    x = special(4, 64).to(dtype)
    gm = make_fx(fn, tracing_mode=mode)(x)
    # As Inductor runs its passes.
    with V.set_fake_mode(detect_fake_mode([n.meta["val"] for n in gm.graph.find_nodes(op="placeholder")])):
        assert late_decomposition(gm.graph) == 2
    assert ours(gm.graph) == []
    gm.graph.lint()
    gm.recompile()
    for got, expected in zip(gm(x), fn(x), strict=True):
        assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize(
    ("arch", "format", "rule", "stays"),
    [
        ("gfx950", "mxfp4", "even", True),
        ("sm_80", "mxfp6_e3m2", "even", True),
        ("gfx950", "mxfp4", "ceil", False),
        ("gfx950", "mxfp8_e4m3", "even", False),
        ("sm_70", "mxfp4", "even", False),
    ],
)
def test_a_quantize_that_has_a_kernel_stays(
    monkeypatch: pytest.MonkeyPatch, arch: str, format: str, rule: str, stays: bool
) -> None:
    """Its dequantize has none."""

    def fn(x: Tensor) -> Tensor:
        return q.block_dequantize(*q.block_quantize(x, format, rule), format, "float32")

    monkeypatch.setattr(target, "current", lambda device_type: target.Target(device_type="cuda", arch=arch))
    gm = make_fx(fn, tracing_mode="fake")(special(4, 64))
    with V.set_fake_mode(detect_fake_mode([n.meta["val"] for n in gm.graph.find_nodes(op="placeholder")])):
        assert late_decomposition(gm.graph) == 2 - stays
    assert ours(gm.graph) == ["quark_inductor.block_quantize.default"] * stays
    gm.graph.lint()


def test_nothing_to_do() -> None:
    gm = make_fx(lambda x: x + 1, tracing_mode="fake")(torch.ones(2))
    before = str(gm.graph)
    assert late_decomposition(gm.graph) == 0
    assert str(gm.graph) == before


class Keep(CustomGraphPass):
    """Runs after ours, where Inductor lowers next."""

    def __init__(self) -> None:
        self.left: list[list[str]] = []

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.left.append(ours(graph))

    def uuid(self) -> Any:
        return None


@pytest.mark.parametrize("preset", ["mxfp4", "ptpc_fp8"])
def test_the_compiled_emulation_is_eager_code(linear: Callable[..., Any], preset: str) -> None:
    """In float32: the codes are computed alike, and the GEMM is the same call of the same library."""
    model, x, keep = linear(preset), torch.randn(5, 64), Keep()
    options = {"quark.provider": "emulation", "post_grad_custom_post_pass": keep}
    compiled = torch.compile(model, backend="quark", fullgraph=True, options=options)
    assert torch.equal(compiled(x), model(x))
    assert keep.left == [[]]


def test_a_quantize_that_nobody_multiplies() -> None:
    """No rule is about it, and on CPU no kernel of ours makes codes alone."""

    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        codes, scales = q.block_quantize(x, "mxfp4", "even")
        return codes, scales

    x = special(4, 64)
    for got, expected in zip(torch.compile(fn, backend="quark", fullgraph=True)(x), fn(x), strict=True):
        assert torch.equal(got, expected)
