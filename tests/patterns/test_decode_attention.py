"""Attention of one token: rewritten where it may be, with the numbers of torch's kernel and of float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from quark_inductor.patterns import late_decomposition
from quark_inductor.testing import rewrite

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Of a product of two numbers rounded to the dtype; sums of a few hundred of them are in float32.
TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-20}


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """As models with fewer heads of keys than of queries write it."""
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1:
        k, v = (t[:, :, None].expand(-1, -1, repeats, -1, -1).reshape(t.shape[0], -1, *t.shape[2:]) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def in_float64(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    repeats = q.shape[1] // k.shape[1]
    q, k, v = (t.double() for t in (q, k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    return torch.nan_to_num(scores.softmax(-1)) @ v


def rewritten(done: object) -> int:
    (result,) = [p for p in done.result.passes if p.name == "decode_attention"]  # type: ignore[attr-defined]
    return result.matches


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", ["none", "bool", "float"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
def test_one_token(dtype: torch.dtype, masked: str, heads: int, kv_heads: int) -> None:
    q, k, v = randn(2, heads, 1, 32, dtype=dtype), randn(2, kv_heads, 70, 32, dtype=dtype), randn(2, kv_heads, 70, 32)
    seen = torch.arange(70).view(1, 1, 1, 70) < torch.tensor([40, 70]).view(2, 1, 1, 1)
    mask = {"none": None, "bool": seen, "float": torch.where(seen, randn(2, 1, 1, 70), -torch.inf).to(dtype)}[masked]
    args = (q, k, v.to(dtype)) if mask is None else (q, k, v.to(dtype), mask)
    done = rewrite(attention, *args)
    assert rewritten(done) == 1
    assert "flash_attention" not in done.after_text
    assert done.output.dtype == dtype
    expected = in_float64(q, k, v.to(dtype), mask)
    assert (done.output.double() - expected).abs().max() <= TOLERANCE[dtype] * v.abs().max()


def test_what_is_alike_is_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of a model; another scale, or more keys, are another graph."""
    traced, fwd_only = [], late_decomposition.fwd_only
    monkeypatch.setattr(late_decomposition, "fwd_only", lambda *args: (traced.append(args), fwd_only(*args))[1])
    q, k, more = randn(1, 2, 1, 32), randn(1, 2, 9, 32), randn(1, 2, 11, 32)

    def layers(q: Tensor, k: Tensor, more: Tensor) -> tuple[Tensor, ...]:
        of_one_scale = (F.scaled_dot_product_attention(q, keys, keys) for keys in (k, k + 1, more))
        return (*of_one_scale, F.scaled_dot_product_attention(q, k, k, scale=3.0))

    done = rewrite(layers, q, k, more)
    assert rewritten(done) == 4
    assert len(traced) == 3
    expected = [in_float64(q, keys, keys, None) for keys in (k, k + 1, more)]
    expected.append(in_float64(q * 3.0 * 32**0.5, k, k, None))
    for output, right in zip(done.output, expected, strict=True):
        assert (output.double() - right).abs().max() <= TOLERANCE[torch.float32] * (right.abs().max() + 1)


def test_a_row_that_sees_nothing_is_zero() -> None:
    q, k, v = randn(1, 2, 1, 32), randn(1, 2, 9, 32), randn(1, 2, 9, 32)
    mask = torch.zeros(1, 1, 1, 9, dtype=torch.bool)
    done = rewrite(attention, q, k, v, mask)
    assert rewritten(done) == 1
    assert torch.equal(done.output, torch.zeros_like(q))
    assert torch.equal(attention(q, k, v, mask), torch.zeros_like(q))


def test_a_nan_stays_in_its_row() -> None:
    q, k, v = randn(2, 2, 1, 32), randn(2, 2, 9, 32), randn(2, 2, 9, 32)
    q[1, 0] = torch.nan
    done = rewrite(attention, q, k, v)
    assert done.output[1, 0].isnan().all()
    assert done.output[0].isfinite().all()
    assert done.output[1, 1].isfinite().all()


def test_the_scale_that_is_given() -> None:
    q, k, v = randn(1, 2, 1, 32), randn(1, 2, 9, 32), randn(1, 2, 9, 32)
    done = rewrite(lambda *args: F.scaled_dot_product_attention(*args, scale=0.5), q, k, v)
    assert rewritten(done) == 1
    expected = (q.double() @ k.double().transpose(-1, -2) * 0.5).softmax(-1) @ v.double()
    assert (done.output.double() - expected).abs().max() <= 2**-20


@pytest.mark.parametrize("case", ["tokens", "causal", "unknown"])
def test_what_stays(case: str) -> None:
    tokens = 1 if case == "causal" else 3
    q, k, v = randn(1, 2, tokens, 32), randn(1, 2, 9, 32), randn(1, 2, 9, 32)
    causal = case == "causal"
    done = rewrite(
        lambda *args: F.scaled_dot_product_attention(*args, is_causal=causal), q, k, v, dynamic=case == "unknown"
    )
    assert rewritten(done) == 0
    assert torch.equal(done.output, F.scaled_dot_product_attention(q, k, v, is_causal=causal))
