"""The kernels for CPUs with AVX2, chosen as a user would: every scheme, compiled, against float64."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from quark_inductor.lowering import target

# No kernel at all: two libraries round their logarithms differently; no weight.
WITHOUT = {"mxfp4_floor", "mxfp4_ceil", "unquantized_kv_fp8"}


class All(nn.Module):
    def __init__(self, layers: dict[str, Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.layers.values()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        pytest.param(torch.bfloat16, {"emulate_precision_casts": True}, marks=pytest.mark.fuzz),
    ],
    ids=["float32", "bfloat16, rounded"],
)
def test_every_scheme(specs: Any, dtype: torch.dtype, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    if not target.current().has("avx2"):
        pytest.skip("this CPU has no AVX2, FMA and F16C")
    monkeypatch.setenv("QUARK_INDUCTOR_ISA", "avx2")
    target.current.cache_clear()
    assert target.current().isa == "avx2"
    model = All({name: specs.quantized(spec, dtype) for name, spec in specs.SPECS.items() if name not in WITHOUT})
    compiled = torch.compile(model, backend="quark", fullgraph=True, dynamic=True, options=options)
    code: list[str] = []
    for tokens in (5, 37):
        x = (torch.randn(tokens, specs.K) * torch.logspace(-2, 2, tokens)[:, None]).to(dtype)
        x[1] = 0
        if not code:
            torch._dynamo.mark_dynamic(x, 0)
            ours, code = run_and_get_code(compiled, x)
        else:
            ours = compiled(x)
        for (name, layer), y in zip(model.layers.items(), ours, strict=True):
            operand = layer.scheme.fake_quantize_input(layer, x).double()
            weight = layer.scheme.dequantize_weight(layer, dtype).double()
            exact, emulated = operand @ weight.T + layer.bias.double(), layer(x).double()
            # K sums in float32, a few roundings of scales; those of the result.
            bound = (operand.abs() @ weight.T.abs() + layer.bias.double().abs()) * (specs.K + 4) * 2.0**-24
            bound += 0 if dtype == torch.float32 else exact.abs() * 2.0**-8
            if specs.SPECS[name].output is not None:
                # A sum may fall on either side of a tie of the output's FP8: one step, or half the smallest.
                exact, bound = emulated, 2 * bound + (emulated.abs() * 2.0**-3).clamp(min=0.25 * 2.0**-9)
            assert ((y.double() - exact).abs() <= bound).all(), name
    kernels = {"mxfp4", "fp32"} if options else {"mxfp4", "nvfp4", "int8", "fp32"}
    assert set(re.findall(r"quark::(\w+::\w+)::tile<", code[0])) == {f"avx2::{name}" for name in kernels}
    assert "quark::portable::tile<" not in code[0]
