"""The FP8 kernels against float64 products of operands that ml_dtypes and numpy quantize and dequantize."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

q = torch.ops.quark_inductor
FIXTURES = Path(__file__).parents[2] / "fixtures"
FP8 = torch.float8_e4m3fn
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NUMPY = {torch.bfloat16: ml_dtypes.bfloat16, torch.float16: np.float16, torch.float32: np.float32}
U32 = 2.0**-24
# Half an ulp of 1: what rounding to the dtype may change, relative to the result. Float32 sums are rounded already.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0.0}


def prologue_gemm(x: Tensor, scale: Tensor | None, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """The fused GEMM of a float activation, by a given scale or one of each row."""
    by_weight = weight, weight_scale, None, None, bias
    rule = "amax" if scale is None else "given"
    return q.prologue_gemm(x, scale, None, None, *by_weight, "fp8_e4m3", rule, 0, "fp8_e4m3")


def quantized_gemm(
    x: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The fused GEMM of codes."""
    by_weight = weight, weight_scale, None, None, bias
    name = str(dtype).removeprefix("torch.")
    return q.quantized_gemm(x, scale, None, None, *by_weight, "fp8_e4m3", "fp8_e4m3", name)


# --- the oracle: nothing here is ours


def values(codes: Tensor) -> np.ndarray:
    return codes.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float64)


def rounded(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """To the dtype and back: float64 operands have far more bits than twice the dtype's, so one rounding is one."""
    with np.errstate(over="ignore"):
        return x.astype(np.float32).astype(NUMPY[dtype]).astype(np.float64)


def dynamic_scale(x: Tensor) -> np.ndarray:
    """``amax / 448`` of each row, divided in float32 and rounded to the dtype; 2^-23 in place of 0."""
    amax = np.abs(x.float().numpy()).max(-1, keepdims=True)
    scale = rounded(amax / np.float32(448.0), x.dtype)
    return np.where(scale == 0.0, 2.0**-23, scale)


def codes_of(x: Tensor, scale: np.ndarray) -> np.ndarray:
    """The quotient rounded to the dtype, saturated, rounded to E4M3."""
    with np.errstate(over="ignore", invalid="ignore"):
        quotient = rounded(x.float().numpy() / scale.astype(np.float32), x.dtype)
    return np.clip(quotient, -448.0, 448.0).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)


def check(y: Tensor, x: np.ndarray, weight: np.ndarray, bias: Tensor | None) -> None:
    """``|y - x @ weight.T - bias|`` within what the arithmetic of the kernels allows.

    The products of codes are exact. What rounds are K additions in float32, the multiplications by the two scales and
    the addition of the bias (``gamma_n = n u / (1 - n u)``), and the cast to the result's dtype (whose subnormals have
    an absolute error: 2^-25 in float16).
    """
    added = np.zeros(1) if bias is None else bias.double().numpy()
    exact = x @ weight.T + added
    n = x.shape[1] + 3
    sums = n * U32 / (1 - n * U32) * (np.abs(x) @ np.abs(weight.T) + np.abs(added))
    bound = sums + ROUNDING[y.dtype] * (np.abs(exact) + sums) + (2.0**-25 if y.dtype is torch.float16 else 0)
    error = np.abs(y.double().numpy() - exact)
    assert y.shape == exact.shape
    assert (error <= bound).all(), f"{error.max()} where {bound.flat[error.argmax()]} is allowed"


# --- shapes


class Gemms(nn.Module):
    """Many GEMMs in one graph; granularities, dtype and bias change from one to the next."""

    def __init__(self, shapes: list[tuple[int, int]], op: str) -> None:
        super().__init__()
        self.shapes, self.op = shapes, op
        self.weights, self.scales, self.biases = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        generator = torch.Generator().manual_seed(7)
        for i, (n, k) in enumerate(shapes):
            weight = (torch.randn(n, k, generator=generator) * 30).to(FP8)
            scale = (torch.rand(n if i % 2 else (), generator=generator) / 16 + 2**-9).to(self.dtype(i))
            bias = torch.randn(n, generator=generator).to(self.dtype(i)) if self.has_bias(i) else torch.empty(0)
            for held, tensor in ((self.weights, weight), (self.scales, scale), (self.biases, bias)):
                held.append(nn.Parameter(tensor, requires_grad=False))

    def dtype(self, i: int) -> torch.dtype:
        return DTYPES[i % 3]

    def has_bias(self, i: int) -> bool:
        return i // 2 % 2 == 0

    def per_token(self, i: int) -> bool:
        return i % 4 in (0, 3)

    def inputs(self, *rows_of_each: int) -> list[tuple[Tensor, Tensor | None]]:
        """Of each GEMM the activation, float or codes, and its scale if given; the last number is for the rest too."""
        generator = torch.Generator().manual_seed(rows_of_each[0])
        made: list[tuple[Tensor, Tensor | None]] = []
        for i, (_, k) in enumerate(self.shapes):
            m = rows_of_each[min(i, len(rows_of_each) - 1)]
            rows = torch.randn(m, 1, generator=generator).exp()
            x = (torch.randn(m, k, generator=generator) * rows).to(self.dtype(i))
            x[::5] = 0.0
            one = torch.tensor(0.013).to(x.dtype)
            if self.op == "prologue_gemm":
                made.append((x, None if self.per_token(i) else one))
            else:
                made.append(((x * 50).to(FP8), (rows / 50).to(x.dtype) if self.per_token(i) else one))
        return made

    def forward(self, inputs: list[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
        outputs = []
        for i, (x, scale) in enumerate(inputs):
            args = x, scale, self.weights[i], self.scales[i], self.biases[i] if self.has_bias(i) else None
            prologue = self.op == "prologue_gemm"
            outputs.append(prologue_gemm(*args) if prologue else quantized_gemm(*args, self.dtype(i)))
        return outputs

    def check(self, inputs: list[tuple[Tensor, Tensor | None]], outputs: list[Tensor]) -> None:
        for i, ((x, given), y) in enumerate(zip(inputs, outputs, strict=True)):
            scale = dynamic_scale(x) if given is None else given.double().numpy()
            operand = (codes_of(x, scale) if self.op == "prologue_gemm" else values(x)) * scale
            channels = self.scales[i].double().numpy().reshape(-1, 1)
            assert y.dtype is self.dtype(i)
            check(y, operand, values(self.weights[i]) * channels, self.biases[i] if self.has_bias(i) else None)


def any_m(inputs: list[Any]) -> list[Any]:
    """Mark the number of rows of every tensor as not known before run time."""
    for tensor in torch.utils._pytree.tree_leaves(inputs):
        if tensor is not None and tensor.ndim:
            torch._dynamo.mark_dynamic(tensor, 0)
    return inputs


# K below, at and above a chunk of 32, and of several; N below, at and above a tile of 32.
SHAPES = [(1, 1), (31, 17), (32, 33), (33, 100), (64, 32), (100, 160), (192, 64), (32, 576)]


@pytest.mark.parametrize("op", ["prologue_gemm", "quantized_gemm"])
def test_any_number_of_rows(isa: str, op: str) -> None:
    """One kernel for every M; 600 is more than the 512 rows prepared at a time."""
    model = Gemms(SHAPES[2:6] if isa == "portable" else SHAPES, op)
    compiled = torch.compile(model, backend="quark", fullgraph=True)
    first = any_m(model.inputs(5))
    model.check(first, compiled(first))
    with torch.compiler.set_stance("fail_on_recompile"):
        for m in (2, 3, 7, 8, 9, 16, 33, 600):
            inputs = model.inputs(m)
            model.check(inputs, compiled(inputs))


def test_a_number_of_rows_known_when_compiling(isa: str) -> None:
    """Up to 8 rows a tile of just so many, above that tiles of 8."""
    shapes = [(33, 100), (33, 33), (33, 17), (1, 64), (100, 32), (33, 100), (32, 17)]
    model = Gemms(shapes, "prologue_gemm")
    inputs = model.inputs(1, 1, 2, 3, 7, 8, 9)
    model.check(inputs, torch.compile(model, backend="quark", fullgraph=True, dynamic=False)(inputs))


@pytest.mark.parametrize("given", [True, False])
def test_no_rows(given: bool) -> None:
    weight, scale = torch.ones(33, 100).to(FP8), torch.tensor(0.5) if given else None
    compiled = torch.compile(
        lambda x: prologue_gemm(x, scale, weight, torch.ones(33), None),
        backend="quark",
        fullgraph=True,
    )
    assert compiled(torch.empty(0, 100)).shape == (0, 33)


# --- the codes of the prologue


def reveal(x: Tensor, scale: Tensor | None) -> Tensor:
    """The quantized activation, as the result of a GEMM with the identity."""
    identity = torch.eye(x.shape[1]).to(FP8)
    one = torch.ones((), dtype=x.dtype)
    compiled = torch.compile(lambda x: prologue_gemm(x, scale, identity, one, None), backend="quark", fullgraph=True)
    torch._dynamo.mark_dynamic(x, 0)
    return compiled(x)


@pytest.mark.parametrize("fixture", ["fp8", "fp8_fp32"])
def test_codes_of_edge_cases_by_a_given_scale(isa: str, fixture: str) -> None:
    """What amd-quark makes of ties, subnormals, saturation, NaN and infinity. K is 1: each number shows itself."""
    reference = load_file(FIXTURES / fixture / "reference.safetensors")
    x, expected = (reference[f"special.{name}"].clone().reshape(-1, 1) for name in ("input", "input_qdq"))
    assert expected.isnan().any()
    assert x.isinf().any()
    got = reveal(x, reference["special.input_scale"].clone().reshape(()))
    # An infinity saturates to a number, a NaN stays one; -0.0 counts as 0.0 (a sum that begins at 0.0 has no -0.0).
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("fixture", ["ptpc_fp8", "ptpc_fp8_fp32"])
def test_codes_of_edge_cases_by_a_scale_of_each_row(isa: str, fixture: str) -> None:
    reference = load_file(FIXTURES / fixture / "reference.safetensors")
    x, expected = (reference[f"special.{name}"].clone().reshape(-1, 128) for name in ("input", "input_qdq"))
    got, finite = reveal(x, None), x.isfinite().all(-1)
    assert 0 < finite.sum() < len(finite)
    assert torch.equal(got[finite], expected[finite])
    # The scale of such a row is one too: nothing finite can come of it.
    assert not got[~finite].isfinite().any()


def every_bfloat16() -> Tensor:
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [0.013, 1.0])
def test_codes_of_every_bfloat16_by_a_given_scale(isa: str, dtype: torch.dtype, scale: float) -> None:
    x, given = every_bfloat16()[:, None].to(dtype), torch.tensor(scale).to(dtype)
    got = reveal(x, given)
    expected = codes_of(x, given.double().numpy()) * given.double().numpy()
    # A code times a scale has at most 4 + 24 bits: float32 rounds it once.
    expected = torch.from_numpy(rounded(expected, dtype)).to(dtype)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_codes_of_every_bfloat16_by_a_scale_of_each_row(isa: str, dtype: torch.dtype) -> None:
    """Every number as the largest of its row."""
    ratios = torch.tensor([1, -1, 0, *(i / 14 * (-1) ** i for i in range(14))], dtype=torch.float64)
    x = (every_bfloat16().double()[:, None] * ratios).to(dtype)
    finite = x.isfinite().all(-1)
    got = reveal(x, None)
    assert not got[~finite].isfinite().any()
    x, got = x[finite], got[finite]
    scale = dynamic_scale(x)
    expected = torch.from_numpy(rounded(codes_of(x, scale) * scale, dtype)).to(dtype)
    assert torch.equal(got, expected)


# --- numbers


@pytest.mark.parametrize("emulate", [False, True])
def test_every_product_of_two_codes(isa: str, emulate: bool) -> None:
    """All 65536, with NaN codes among them, by scales that are no powers of two.

    ``emulate_precision_casts`` asks for the roundings of eager code: each operand to the dtype, then the product.
    """
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(FP8)[:, None]
    # 0.637 is 163 / 256 in bfloat16: times a code of 1.5 it is a tie, which rounds to even.
    scales = [tuple(torch.tensor(v).to(dtype) for v in (0.013, 0.637)) for dtype in DTYPES]

    def products(codes: Tensor, weight: Tensor) -> list[Tensor]:
        return [quantized_gemm(codes, x, weight, w, None, x.dtype) for x, w in scales]

    compiled = torch.compile(
        products, backend="quark", fullgraph=True, options={"emulate_precision_casts": emulate}, dynamic=False
    )
    for dtype, y, of in zip(DTYPES, compiled(codes, codes.clone()), scales, strict=True):
        x, weight = (values(codes) * scale.double().numpy() for scale in of)
        nan = np.isnan(x) | np.isnan(weight.T)
        assert nan.sum() == 4 * 256 - 4
        assert np.array_equal(y.isnan().numpy(), nan)
        if emulate:
            expected = torch.from_numpy(rounded(rounded(x, dtype) * rounded(weight, dtype).T, dtype)).to(dtype)
            torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
        else:
            check(y.nan_to_num(), np.nan_to_num(x), np.nan_to_num(weight), None)


@pytest.mark.parametrize("k", [1, 40])
def test_a_nan_in_the_weight(isa: str, k: int) -> None:
    """Its channel is NaN, also for an activation of zeros; the others are not."""
    weight = torch.ones(5, k).to(FP8)
    weight.view(torch.uint8)[1, k - 1], weight.view(torch.uint8)[3, 0] = 0x7F, 0xFF
    x, one = torch.zeros(3, k), torch.ones(())
    y = torch.compile(lambda x: prologue_gemm(x, None, weight, one, None), backend="quark", fullgraph=True)(x)
    assert y.isnan().tolist() == [[False, True, False, True, False]] * 3
    assert y[:, ::2].tolist() == [[0.0] * 3] * 3


def test_a_nan_or_an_infinity_in_a_row(isa: str) -> None:
    """Rows are apart; with a scale given an infinity is the largest number, else nothing of its row is finite."""
    weight, one = torch.ones(5, 40).to(FP8), torch.ones(())
    x = torch.ones(4, 40)
    x[1, 39], x[2, 7] = float("nan"), -float("inf")
    for scale in (torch.tensor(0.25), None):
        y = torch.compile(
            lambda x, scale=scale: prologue_gemm(x, scale, weight, one, None),
            backend="quark",
            fullgraph=True,
        )(x)
        assert y[[0, 3]].tolist() == [[40.0] * 5] * 2
        assert y[1].isnan().all()
        assert y[2].isnan().all() if scale is None else y[2].tolist() == [39.0 - 448 * 0.25] * 5


@pytest.mark.parametrize(("x", "weight_scale"), [(2.0**124, 2.0**-40), (2.0**-120, 2.0**30)])
def test_the_scales_neither_overflow_nor_vanish(isa: str, x: float, weight_scale: float) -> None:
    """The result is ordinary, though the codes' sum times one of the scales is not (or has lost its bits)."""
    weight, scale = torch.full((3, 64), 256.0).to(FP8), torch.tensor(weight_scale)
    activation = torch.full((2, 64), x)
    y = torch.compile(lambda x: prologue_gemm(x, None, weight, scale, None), backend="quark", fullgraph=True)(
        activation
    )
    row = dynamic_scale(activation)
    check(y, codes_of(activation, row) * row, values(weight) * weight_scale, None)
