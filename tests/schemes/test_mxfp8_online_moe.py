"""MXFP8 experts from float ones: each is what the Linear of this scheme computes, by ml_dtypes and float64."""

import re

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from quark_inductor.schemes.errors import CheckpointError, ShapeError
from quark_inductor.schemes.mxfp8_online_moe import Mxfp8OnlineMoEMethod

E, H, INTERMEDIATE, T = 3, 64, 96, 7


def layer(dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    module = nn.Module()
    Mxfp8OnlineMoEMethod().create_weights(
        module, num_experts=E, hidden_size=H, intermediate_size_per_partition=INTERMEDIATE, params_dtype=dtype
    )
    for name, p in module.named_parameters():
        p.data.normal_(std=0.3)
        assert p.shape == {"w13_weight": (E, 2 * INTERMEDIATE, H), "w2_weight": (E, H, INTERMEDIATE)}[name]
    return module, module.w13_weight.data.clone(), module.w2_weight.data.clone()  # type: ignore[union-attr, operator]


def mxfp8(x: Tensor) -> Tensor:
    """Quantized and dequantized in numpy: scales ``2**ceil(log2(amax / 448))``, elements rounded by ml_dtypes."""
    blocks = x.double().numpy().reshape(*x.shape[:-1], -1, 32)
    mantissa, exponent = np.frexp(np.abs(blocks).max(-1, keepdims=True) / 448)
    scale = np.ldexp(1.0, np.where(mantissa == 0.5, exponent - 1, exponent))
    values = (blocks / scale).astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale
    return torch.from_numpy(values.reshape(x.shape))


def test_each_expert_is_the_linear_of_this_scheme() -> None:
    module, w13, w2 = layer()
    method = Mxfp8OnlineMoEMethod()
    method.process_weights_after_loading(module)
    assert dict(module.named_parameters(recurse=False)) == {}
    x = torch.randn(T, H, dtype=torch.bfloat16)
    ids = torch.tensor([[0, 1], [2, 0], [1, 2], [0, 1], [2, 1], [0, 2], [2, 0]])
    weights = torch.rand(T, 2)
    y = method.apply_weights(module, x, weights, ids)
    expected = torch.zeros(T, H, dtype=torch.float64)
    for token, (experts, factors) in enumerate(zip(ids.tolist(), weights.tolist(), strict=True)):
        for e, factor in zip(experts, factors, strict=True):
            into = (mxfp8(w13[e]) @ mxfp8(x[token])).to(torch.bfloat16)
            gate, up = into.chunk(2)
            h = (torch.nn.functional.silu(gate) * up)[None]
            expected[token] += factor * (mxfp8(w2[e]) @ mxfp8(h[0])).to(torch.bfloat16).double()
    # Results are rounded to bfloat16 three times, and a sum that lies on a tie may round another way.
    assert (y.double() - expected).abs().max() <= 2.0**-7 * expected.abs().max()
    assert y.abs().max() > 0.1


@pytest.mark.parametrize(("h", "i", "name"), [(48, 96, "hidden_size is 48"), (64, 40, "intermediate_size_per_par")])
def test_sizes_are_multiples_of_a_block(h: int, i: int, name: str) -> None:
    module = nn.Module()
    with pytest.raises(ShapeError, match=rf"{name}.*multiple of 32"):
        Mxfp8OnlineMoEMethod().create_weights(
            module, num_experts=E, hidden_size=h, intermediate_size_per_partition=i, params_dtype=torch.bfloat16
        )
    assert dict(module.named_parameters()) == {}


def test_a_nan_is_refused() -> None:
    module, _, _ = layer()
    module.w2_weight.data[1, 2, 3] = float("nan")  # type: ignore[union-attr, operator, index]
    with pytest.raises(CheckpointError, match=re.escape("w2_weight holds a NaN")):
        Mxfp8OnlineMoEMethod().process_weights_after_loading(module)


def test_what_is_compiled_is_the_same() -> None:
    module, _, _ = layer()
    method = Mxfp8OnlineMoEMethod()
    method.process_weights_after_loading(module)
    x, ids, weights = torch.randn(T, H, dtype=torch.bfloat16), torch.randint(0, E, (T, 1)), torch.rand(T, 1)
    compiled = torch.compile(
        lambda x: method.apply_weights(module, x, weights, ids),
        backend="quark",
        fullgraph=True,
        options={"quark.strict": True, "emulate_precision_casts": True},
    )
    assert torch.equal(compiled(x), method.apply_weights(module, x, weights, ids))
