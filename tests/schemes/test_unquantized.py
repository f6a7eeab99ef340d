"""A float weight whose Linear's output is quantized."""

import dataclasses
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from quark_inductor.schemes import registry  # noqa: F401
from quark_inductor.schemes.base import PER_CALL, QuarkLinear, scheme_for, set_parameters
from quark_inductor.schemes.errors import CheckpointError, ShapeError
from quark_inductor.schemes.spec import PRESETS, LinearSpec, TensorSpec
from quark_inductor.schemes.unquantized import QuarkUnquantized

Make = Callable[..., Any]
OUTPUT = TensorSpec(dtype="fp8_e4m3", qscheme="per_tensor")
SPEC = LinearSpec(weight=None, output=OUTPUT)


def layer(n: int = 16, scale: float = 0.25) -> QuarkLinear:
    made = QuarkLinear(32, n, scheme_for(SPEC), bias=True, dtype=torch.float32)
    generator = torch.Generator().manual_seed(n)
    weight, bias = torch.randn(n, 32, generator=generator), torch.randn(n, generator=generator)
    set_parameters(made, **made.scheme.quantize_weight(weight), bias=bias, output_scale=torch.tensor(scale))
    made.scheme.process_weights_after_loading(made)
    return made


def test_create_weights_has_the_checkpoints_layout(layout: Make) -> None:
    weight, f16 = ((24, 33), torch.float16), torch.float16
    assert layout(SPEC, [24], 33) == {"weight": weight, "output_scale": ((), f16)}
    assert layout(SPEC, [16, 8], 33) == {"weight": weight, "output_scale": ((2,), f16)}
    wide = dataclasses.replace(SPEC, output=dataclasses.replace(OUTPUT, scale_type="float32"))
    assert layout(wide, [24], 33)["output_scale"] == ((), torch.float32)


def test_only_an_output_is_taken() -> None:
    assert QuarkUnquantized.refuses(SPEC) is None
    assert scheme_for(SPEC).get_min_capability() == 0
    for spec in (*PRESETS.values(), LinearSpec(weight=None), dataclasses.replace(SPEC, input=OUTPUT)):
        assert QuarkUnquantized.refuses(spec) == "takes a quantized output only"


def test_the_output_is_numpys() -> None:
    made, x = layer(), torch.randn(7, 32, generator=torch.Generator().manual_seed(3))
    x[2] *= 100.0  # saturates
    y = F.linear(x, made.weight, made.bias).numpy()
    codes = np.clip(y / np.float32(0.25), -448, 448).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(made(x).numpy(), codes.astype(np.float32) * np.float32(0.25))
    assert np.abs(made(x).numpy()).max() == 112


def test_there_is_nothing_to_dequantize_at_load() -> None:
    made, x = layer(), torch.randn(7, 32)
    y = made(x)
    made.dequantize_()
    assert made.emulation == PER_CALL
    assert torch.equal(made(x), y)


def test_fused_shards_have_one_output_scale() -> None:
    parts, x = [layer(16), layer(8)], torch.randn(7, 32)
    fused = QuarkLinear.fuse(parts)
    assert fused.output_scale.shape == ()
    torch.testing.assert_close(fused(x), torch.cat([m(x) for m in parts], -1), atol=0.26, rtol=2**-3)
    assert torch.equal(fused.weight, torch.cat([m.weight for m in parts]))
    with pytest.raises(ShapeError, match=r"output_scale differs between shards \(\[0.25, 0.5\]\)"):
        QuarkLinear.fuse([layer(16), layer(8, 0.5)])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0, 0.0])
def test_damaged_numbers_are_refused_after_loading(bad: float) -> None:
    made = layer()
    made.output_scale.data.fill_(bad)
    with pytest.raises(CheckpointError, match=r"^output_scale holds a"):
        made.scheme.process_weights_after_loading(made)
