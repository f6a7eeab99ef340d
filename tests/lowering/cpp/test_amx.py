"""The kernels that multiply by AMX, compiled: when they are made, and their numbers against float64.

Their arithmetic is tested by itself in ``test_harness.py``.
"""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from quark_inductor.lowering import target

SCHEMES = ("mxfp4", "nvfp4", "mxfp8", "mxfp4_fp8_dynamic", "ptpc_fp8", "fp8_block128", "ptpc_int8", "int4_wo_32")
_PERMIT = "quark::amx::permit();"


@pytest.fixture(autouse=True)
def amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU with AMX, without what a user may have chosen."""
    monkeypatch.delenv("QUARK_INDUCTOR_ISA", raising=False)
    target.current.cache_clear()
    if not target.current().has("amx"):
        pytest.skip("this CPU has no AMX, or the system does not let processes use it")


class Linears(nn.Module):
    """Of each scheme one Linear, all of one input."""

    def __init__(self, specs: Any, names: tuple[str, ...]) -> None:
        super().__init__()
        # Weight-only kernels are for bfloat16 activations alone; the others' numbers say more in float32.
        self.dtypes = [torch.bfloat16 if "_wo_" in name else torch.float32 for name in names]
        self.layers = nn.ModuleList(
            specs.quantized(specs.SPECS[name], dtype) for name, dtype in zip(names, self.dtypes, strict=True)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x.to(dtype)) for layer, dtype in zip(self.layers, self.dtypes, strict=True)]


def assert_near(layer: Any, x: Tensor, got: Tensor) -> None:
    operand = layer.scheme.fake_quantize_input(layer, x).double()
    weight = layer.scheme.dequantize_weight(layer, x.dtype).double()
    exact, magnitude = operand @ weight.T + layer.bias.double(), operand.abs() @ weight.T.abs() + layer.bias.abs()
    bound = magnitude * 2 * x.shape[1] * 2.0**-24
    if x.dtype == torch.bfloat16:
        # The emulation's weights are rounded, and the result.
        bound += magnitude * 2.0**-8
    assert ((got.double() - exact).abs() <= bound).all()


@pytest.mark.slow
def test_any_number_of_tokens(specs: Any) -> None:
    model = Linears(specs, SCHEMES)
    x = torch.randn(70, specs.K) * torch.logspace(-2, 2, 70)[:, None]
    x[1] = 0
    compiled = torch.compile(model, backend="quark", fullgraph=True, dynamic=True)
    with torch.inference_mode():
        results, (code,) = run_and_get_code(compiled, x)
        assert code.count(_PERMIT) == len(SCHEMES)
        for count in (2, 5, 16, 17, 33):
            results = compiled(x[:count])
            for layer, dtype, got in zip(model.layers, model.dtypes, results, strict=True):
                assert_near(layer, x[:count].to(dtype), got)
        # Other code's tiles are its own.
        big = torch.randn(64, 64).bfloat16()
        assert torch.allclose((big @ big).float(), big.float() @ big.float(), rtol=2.0**-7, atol=0.1)


@pytest.mark.parametrize(("count", "isa", "made"), [(1, "amx", False), (16, "amx", True), (16, "avx512_bf16", False)])
def test_when_they_are_made(specs: Any, monkeypatch: pytest.MonkeyPatch, count: int, isa: str, made: bool) -> None:
    """Not for one token, nor where a user chose a lower level."""
    monkeypatch.setenv("QUARK_INDUCTOR_ISA", isa)
    target.current.cache_clear()
    model = Linears(specs, ("ptpc_int8", "ptpc_fp8"))
    x = torch.randn(count, specs.K)
    with torch.inference_mode():
        results, (code,) = run_and_get_code(torch.compile(model, backend="quark", fullgraph=True, dynamic=False), x)
    assert (_PERMIT in code) == (re.search("tdpbf16ps", code) is not None) == made
    for layer, got in zip(model.layers, results, strict=True):
        assert_near(layer, x, got)
