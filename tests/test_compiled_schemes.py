"""Every scheme compiles to one graph for any number of tokens, and the compiled code gives the emulation's numbers.

``emulate_precision_casts`` makes Inductor round where eager code rounds: the quantized activations are then the same
codes, and what is left is the order in which a GEMM adds up K products. The bound is that of two such sums in float32,
``2 K 2**-24 sum |x w|``, and in bfloat16 the two roundings of the result.
"""

import dataclasses

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import quark_inductor as qi
from quark_inductor.patterns.pipeline import collect_results
from quark_inductor.schemes.base import QuarkLinear, scheme_for, set_parameters
from quark_inductor.schemes.spec import PRESETS, LinearSpec, TensorSpec

K, N = 256, 24
_FP8_OUTPUT = TensorSpec(dtype="fp8_e4m3", qscheme="per_tensor")


def _changed(spec: LinearSpec, *, weight: dict[str, object] | None = None, **both: object) -> LinearSpec:
    assert spec.weight is not None
    w = dataclasses.replace(spec.weight, **{**both, **(weight or {})})  # type: ignore[arg-type]
    x = spec.input and dataclasses.replace(spec.input, **both)  # type: ignore[arg-type]
    return dataclasses.replace(spec, weight=w, input=x)


# What fixtures have and no preset has.
OTHERS: dict[str, LinearSpec] = {
    "mxfp4_floor": _changed(PRESETS["mxfp4"], scale_calculation_mode="floor"),
    "mxfp4_ceil": _changed(PRESETS["mxfp4"], scale_calculation_mode="ceil"),
    "mxfp8_e5m2": _changed(PRESETS["mxfp6_e2m3"], dtype="fp8_e5m2"),
    "int8_asymmetric": _changed(PRESETS["int8"], symmetric=False),
    "uint8": _changed(PRESETS["int8"], symmetric=False, dtype="uint8"),
    "fp8_float32_scale": _changed(PRESETS["fp8"], scale_type="float32"),
    "uint4_wo_32_order": dataclasses.replace(PRESETS["uint4_wo_32"], pack_method="order"),
    "fp8_kv_fp8": dataclasses.replace(PRESETS["fp8"], output=_FP8_OUTPUT),
    "unquantized_kv_fp8": LinearSpec(weight=None, output=_FP8_OUTPUT),
}


def test_the_scheme_names_and_more() -> None:
    assert not set(OTHERS) & set(PRESETS)
    assert not set(OTHERS.values()) & set(PRESETS.values())


def quantized(spec: LinearSpec, dtype: torch.dtype) -> QuarkLinear:
    """A random Linear of a spec."""
    torch.manual_seed(3)
    float_linear = nn.Linear(K, N, dtype=dtype)
    if spec.weight is None:
        layer = QuarkLinear(K, N, scheme_for(spec), bias=True, dtype=dtype)
        layer.load_state_dict({**float_linear.state_dict(), "output_scale": torch.tensor(0.25, dtype=dtype)})
        return layer
    model = nn.Sequential(float_linear)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "this one", dataclasses.replace(spec, output=None))
        qi.quantize_(model, "this one", exclude=(), calibration=[torch.randn(7, K, dtype=dtype)])
    layer = model[0]
    assert isinstance(layer, QuarkLinear)
    if spec.output is not None:
        layer.scheme = scheme_for(spec)
        set_parameters(layer, output_scale=torch.tensor(0.25, dtype=dtype))
    return layer


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*PRESETS, *OTHERS])
def test_one_graph_with_the_emulations_numbers(name: str, dtype: torch.dtype) -> None:
    spec = {**PRESETS, **OTHERS}[name]
    layer = quantized(spec, dtype)
    torch._dynamo.reset()
    counters.clear()
    options = {"emulate_precision_casts": True}
    compiled = torch.compile(layer, backend="quark", fullgraph=True, dynamic=True, options=options)
    with torch.inference_mode(), collect_results() as results:
        for tokens in (5, 37):
            x = (torch.randn(tokens, K) * torch.logspace(-2, 2, tokens)[:, None]).to(dtype)
            x[1] = 0
            ours, emulated = compiled(x), layer(x)
            operand = layer.scheme.fake_quantize_input(layer, x).double()
            weight = layer.scheme.dequantize_weight(layer, dtype).double()
            assert layer.bias is not None
            bound = (operand.abs() @ weight.T.abs() + layer.bias.double().abs()) * 2 * K * 2.0**-24
            if dtype == torch.bfloat16:
                bound += 2 * emulated.double().abs() * 2.0**-8
            if spec.output is not None:
                # A sum may fall on either side of a tie of the output's FP8: one step, or half the smallest.
                bound = bound * (1 + 2.0**-3) + (emulated.double().abs() * 2.0**-3).clamp(min=0.25 * 2.0**-9)
            assert ((ours.double() - emulated.double()).abs() <= bound).all()
    assert counters["stats"]["unique_graphs"] == 1
    # Fused where a rule does it, else said. No result if the graph came from the cache.
    fused = (layer.scheme.fused_op is not None and name != "fp8_float32_scale") or name in ("mxfp4_floor", "mxfp4_ceil")
    for result in results:
        assert bool(result.unfused) == (spec.weight is not None and not fused)
        assert all(refusal.reason for refusal in result.unfused)
