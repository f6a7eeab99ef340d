"""MXFP8 quantized from a float model. amd-quark exports no such weights: the oracle is ml_dtypes."""

import ml_dtypes
import numpy as np
import pytest
import torch

from quark_inductor.schemes import registry  # noqa: F401
from quark_inductor.schemes.base import QuarkLinear, scheme_for, set_parameters
from quark_inductor.schemes.mxfp8_online import Mxfp8OnlineLinearMethod
from quark_inductor.schemes.ocp_mx import QuarkOCP_MX
from quark_inductor.schemes.spec import PRESETS

SCHEME = scheme_for(PRESETS["mxfp8"])


def numpy_mxfp8(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scale bytes and values of float32 ``[N, K]``: the smallest power of two by which nothing saturates."""
    blocks = x.astype(np.float64).reshape(len(x), -1, 32)
    amax = np.abs(blocks).max(-1)
    exponent = np.zeros(amax.shape, int) - 127
    while (too_small := np.ldexp(448.0, exponent) < amax).any():
        exponent += too_small
    quotients = blocks / np.ldexp(1.0, exponent)[..., None]
    codes = quotients.astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    values = codes.astype(np.float64) * np.ldexp(1.0, exponent)[..., None]
    return codes.view(np.uint8).reshape(x.shape), exponent + 127, values.reshape(x.shape)


def weight(dtype: torch.dtype) -> torch.Tensor:
    w = torch.randn(24, 96, generator=torch.Generator().manual_seed(5)) * torch.logspace(-8, 8, 24)[:, None]
    w[2], w[3, :32] = 0.0, 448.0
    w[4, 32:64] = torch.nextafter(torch.tensor(448.0), torch.tensor(500.0))
    return w.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_quantize_weight_is_numpys(dtype: torch.dtype) -> None:
    w = weight(dtype)
    codes, scales, values = numpy_mxfp8(w.float().numpy())
    quantized = SCHEME.quantize_weight(w)
    assert quantized.keys() == {"weight", "weight_scale"}
    np.testing.assert_array_equal(quantized["weight_scale"].numpy(), scales)
    np.testing.assert_array_equal(quantized["weight"].view(torch.uint8).numpy(), codes)
    layer = QuarkLinear(96, 24, SCHEME, bias=False, dtype=dtype)
    set_parameters(layer, **quantized)
    np.testing.assert_array_equal(SCHEME.dequantize_weight(layer, torch.float64).numpy(), values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_activation_is_quantized_the_same_way(dtype: torch.dtype) -> None:
    layer = QuarkLinear(96, 24, SCHEME, bias=False, dtype=dtype)
    x = weight(dtype)
    values = SCHEME.fake_quantize_input(layer, x)
    assert values.dtype == dtype
    np.testing.assert_array_equal(values.double().numpy(), numpy_mxfp8(x.float().numpy())[2])


def test_nothing_saturates() -> None:
    x = torch.randn(512, 96, generator=torch.Generator().manual_seed(6)) * torch.logspace(-20, 20, 512)[:, None]
    values = SCHEME.fake_quantize_input(QuarkLinear(96, 8, SCHEME, bias=False, dtype=torch.float32), x)
    amax = x.abs().unflatten(-1, (-1, 32)).amax(-1, keepdim=True)
    error = (values - x).abs().unflatten(-1, (-1, 32))
    assert (error <= amax * 2.0**-4).all()


def test_it_takes_its_preset_and_leaves_the_rest_to_its_base() -> None:
    assert type(SCHEME) is Mxfp8OnlineLinearMethod
    assert Mxfp8OnlineLinearMethod.refuses(PRESETS["mxfp8"]) is None
    assert issubclass(Mxfp8OnlineLinearMethod, QuarkOCP_MX)
    for name in PRESETS.keys() - {"mxfp8"}:
        assert Mxfp8OnlineLinearMethod.refuses(PRESETS[name]) == f"takes only [{PRESETS['mxfp8']}]"
