"""The product of one row by a float weight: rewritten where it may be, with the numbers of float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quark_inductor.testing import Rewrite, rewrite

N, K = 4096, 256


def rewritten(done: Rewrite) -> int:
    (result,) = [p for p in done.result.passes if p.name == "decode_linear"]
    return result.matches


def linear(dtype: torch.dtype, bias: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(K, N, bias=bias, dtype=dtype).requires_grad_(False)


@pytest.mark.parametrize("shape", [(1, K), (1, 1, K), (K,)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_row(dtype: torch.dtype, bias: bool, shape: tuple[int, ...]) -> None:
    model, x = linear(dtype, bias), torch.randn(shape).to(dtype)
    done = rewrite(model, x)
    assert rewritten(done) == 1
    assert done.output.dtype == dtype
    assert done.output.shape == (*shape[:-1], N)
    expected = F.linear(x.double(), model.weight.double(), model.bias.double() if bias else None)
    # One rounding to the dtype of sums in float32.
    assert (done.output.double() - expected).abs().max() <= torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("case", ["rows", "float32", "small", "computed", "unknown"])
def test_what_stays(case: str) -> None:
    dtype = torch.float32 if case == "float32" else torch.bfloat16
    model = nn.Linear(K, 16, bias=False, dtype=dtype).requires_grad_(False) if case == "small" else linear(dtype)
    x = torch.randn(2 if case in ("rows", "unknown") else 1, K).to(dtype)

    def computed(x: Tensor) -> Tensor:
        return F.linear(x, model.weight + 1)

    done = rewrite(computed if case == "computed" else model, x, dynamic=case == "unknown")
    assert rewritten(done) == 0


def test_nan_and_infinity_are_as_they_were() -> None:
    model, x = linear(torch.bfloat16), torch.randn(1, K).bfloat16()
    model.weight[3, 5], model.weight[7, 1] = torch.nan, torch.inf
    done = rewrite(model, x)
    assert rewritten(done) == 1
    plain = model(x)
    assert torch.equal(done.output.isnan(), plain.isnan())
    assert torch.equal(done.output.isinf(), plain.isinf())
