"""Every kind of quantized Linear there is, by name, and a random one of each.

A module of its own, given to tests by the fixture ``specs``; a test with the argument ``spec_name`` runs for each name.
"""

import dataclasses

import pytest
import torch
from torch import nn

import quark_inductor as qi
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


SPECS = {**PRESETS, **OTHERS}


def quantized(spec: LinearSpec, dtype: torch.dtype, *, bias: bool = True) -> QuarkLinear:
    """A random Linear of a spec, from ``K`` features to ``N``."""
    torch.manual_seed(3)
    float_linear = nn.Linear(K, N, bias=bias, dtype=dtype)
    if spec.weight is None:
        layer = QuarkLinear(K, N, scheme_for(spec), bias=bias, dtype=dtype)
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
