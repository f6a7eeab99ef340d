"""Every kind of quantized Linear is fused, in every dtype, with and without a bias, however many dimensions x has."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quark_inductor.schemes.base import QuarkLinear
from quark_inductor.schemes.ops import dtype_name

ROWS = ((5,), (2, 3))  # 2-D, and 3-D
# The first in every run: rules look at dtypes one by one, so the others are for completeness.
DTYPES = [
    torch.bfloat16,
    pytest.param(torch.float16, marks=pytest.mark.fuzz),
    pytest.param(torch.float32, marks=pytest.mark.fuzz),
]


class EveryForm(nn.Module):
    """Linears with a bias and without, of inputs of two and three dimensions: one graph of them."""

    def __init__(self, quantized: Callable[..., QuarkLinear], spec: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.linears = nn.ModuleDict(
            {name: quantized(spec, dtype, bias=name == "bias") for name in ("bias", "no_bias")}
        )

    def call(self, layer: Any, x: Tensor) -> Tensor:
        y: Tensor = layer(x)
        return y

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return [self.call(layer, x) for layer in self.linears.values() for x in inputs]


class PlainTorch(EveryForm):
    """The same without the module: quantized and dequantized in the input's own shape, then any form of a product."""

    def call(self, layer: Any, x: Tensor) -> Tensor:
        torch._check(x.shape[-1] == layer.in_features)
        x, weight = layer.scheme.fake_quantize_input(layer, x), layer.scheme.dequantize_weight(layer, x.dtype)
        if x.ndim == 2:
            return x @ weight.t() if layer.bias is None else x @ weight.t() + layer.bias
        return F.linear(x, weight, layer.bias)


def inputs(features: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(*rows, features, generator=generator).to(dtype) for rows in ROWS]


def assert_all_fused(done: Any, count: int) -> None:
    """Every quantized Linear, by one kernel: nothing of it runs as emulation."""
    assert done.result.unfused == ()
    assert [linear.fused for linear in done.result.linears] == [True] * count
    gemms = sum(n for op, n in done.fused().items() if op.endswith("gemm"))
    assert gemms == count


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_every_linear_is_fused(
    rewrite: Callable[..., Any], specs: Any, spec_name: str, dtype: torch.dtype, dynamic: bool
) -> None:
    """``rewrite`` refuses more graphs than one. A spec without a weight is a float Linear."""
    spec = specs.SPECS[spec_name]
    model = EveryForm(specs.quantized, spec, dtype)
    args = inputs(specs.K, dtype)
    done = rewrite(model, *args, dynamic=dynamic)
    assert_all_fused(done, 0 if spec.weight is None else len(ROWS) * len(model.linears))
    for got, expected in zip(done.output, model(*args), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_products_in_plain_torch(rewrite: Callable[..., Any], specs: Any, spec_name: str, dtype: torch.dtype) -> None:
    """``x @ w.t()``, ``x @ w.t() + b``, and ``F.linear`` of three dimensions."""
    spec = specs.SPECS[spec_name]
    if spec.weight is None:
        pytest.skip("a float Linear")
    model = PlainTorch(specs.quantized, spec, dtype)
    args = inputs(specs.K, dtype)
    done = rewrite(model, *args)
    assert_all_fused(done, len(ROWS) * len(model.linears))
    assert len(done.output) == len(ROWS) * len(model.linears)


@pytest.mark.parametrize("form", [EveryForm, PlainTorch])
@pytest.mark.parametrize(("name", "group"), [("fp8_block128", 128), ("int4_wa_64", 64)])
def test_one_group(
    rewrite: Callable[..., Any],
    specs: Any,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    group: int,
    form: type[EveryForm],
) -> None:
    """A row that is one group; and one row, as of a token that is decoded, whose view is like that of one group."""
    monkeypatch.setattr(specs, "K", group)
    model = form(specs.quantized, specs.SPECS[name], torch.bfloat16)
    args = [*inputs(group, torch.bfloat16), torch.randn(2, 1, group).bfloat16(), torch.randn(1, 1, group).bfloat16()]
    done = rewrite(model, *args)
    assert_all_fused(done, len(args) * len(model.linears))
    for got, expected in zip(done.output, model(*args), strict=True):
        assert torch.equal(got, expected)
