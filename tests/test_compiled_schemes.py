"""Every scheme compiles to one graph for any number of tokens, and the compiled code gives the emulation's numbers.

``emulate_precision_casts`` makes Inductor round where eager code rounds: the quantized activations are then the same
codes, and what is left is the order in which a GEMM adds up K products. The bound is that of two such sums in float32,
``2 K 2**-24 sum |x w|``, and in bfloat16 the two roundings of the result.
"""

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from quark_inductor.patterns.pipeline import collect_results


def test_the_scheme_names_and_more(specs: Any) -> None:
    assert not set(specs.OTHERS) & set(specs.PRESETS)
    assert not set(specs.OTHERS.values()) & set(specs.PRESETS.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype",
    [pytest.param(torch.float32, marks=pytest.mark.fuzz), torch.bfloat16],
    ids=["float32", "bfloat16"],
)
def test_one_graph_with_the_emulations_numbers(specs: Any, spec_name: str, dtype: torch.dtype) -> None:
    spec, features = specs.SPECS[spec_name], specs.K
    layer = specs.quantized(spec, dtype)
    torch._dynamo.reset()
    counters.clear()
    options = {"emulate_precision_casts": True}
    compiled = torch.compile(layer, backend="quark", fullgraph=True, dynamic=True, options=options)
    with torch.inference_mode(), collect_results() as results:
        for tokens in (5, 37):
            x = (torch.randn(tokens, features) * torch.logspace(-2, 2, tokens)[:, None]).to(dtype)
            x[1] = 0
            ours, emulated = compiled(x), layer(x)
            operand = layer.scheme.fake_quantize_input(layer, x).double()
            weight = layer.scheme.dequantize_weight(layer, dtype).double()
            assert layer.bias is not None
            bound = (operand.abs() @ weight.T.abs() + layer.bias.double().abs()) * 2 * features * 2.0**-24
            if dtype == torch.bfloat16:
                bound += 2 * emulated.double().abs() * 2.0**-8
            if spec.output is not None:
                # A sum may fall on either side of a tie of the output's FP8: one step, or half the smallest.
                bound = bound * (1 + 2.0**-3) + (emulated.double().abs() * 2.0**-3).clamp(min=0.25 * 2.0**-9)
            assert ((ours.double() - emulated.double()).abs() <= bound).all()
    assert counters["stats"]["unique_graphs"] == 1
    # No result if the graph came from the cache.
    for result in results:
        assert [linear.provider for linear in result.linears] == ["cpp"] * (spec.weight is not None)
        assert result.unfused == ()
