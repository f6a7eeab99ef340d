"""The MXFP4 kernels against float64 products of operands that ml_dtypes and numpy quantize and dequantize."""

from collections.abc import Callable
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
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
U32 = 2.0**-24
# Half an ulp of 1: what rounding to the dtype may change, relative to the result. Float32 sums are rounded already.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0.0}


def prologue_gemm(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The fused GEMM of a float activation."""
    by_weight = weight, scale, None, None, bias
    return q.prologue_gemm(x, None, None, None, *by_weight, "mxfp4", "even", 0, "mxfp4")


def quantized_gemm(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The fused GEMM of codes."""
    by_weight = weight, scale, None, None, bias
    return q.quantized_gemm(x, x_scale, None, None, *by_weight, "mxfp4", "mxfp4", str(dtype).removeprefix("torch."))


# --- the oracle: nothing here is ours


def fp4_values(packed: np.ndarray) -> np.ndarray:
    """uint8 ``[..., K/2]`` to float64 ``[..., K]``."""
    codes = np.stack((packed & 15, packed >> 4), -1).reshape(*packed.shape[:-1], -1)
    return codes.view(ml_dtypes.float4_e2m1fn).astype(np.float64)


def dequantize(packed: Tensor, scales: Tensor) -> np.ndarray:
    powers = scales.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    return fp4_values(packed.numpy()) * np.repeat(powers, 32, -1)


def quantize_dequantize(x: Tensor) -> np.ndarray:
    """MXFP4 of finite numbers, scale rule "even": amax's exponent rounds up from a fraction of 1.75."""
    blocks = x.double().numpy().reshape(*x.shape[:-1], -1, 32)
    amax = np.abs(blocks).max(-1, keepdims=True)
    fraction, exponent = np.frexp(amax)  # fraction in [0.5, 1)
    power = np.maximum(exponent - 1 + (fraction >= 0.875) - 2, -127)
    # amd-quark rounds amax in float32: what rounds up to 2^128 is infinite then, and has the largest scale there is.
    scale = np.exp2(np.where(amax >= 1.75 * 2.0**127, 127, power))
    rounded = np.clip(blocks / scale, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float64)
    return (rounded * scale).reshape(x.shape)


def check(y: Tensor, x: np.ndarray, weight: np.ndarray, bias: Tensor | None) -> None:
    """``|y - x @ weight.T - bias|`` within what the arithmetic of the kernels allows.

    A block's dot product is an integer, its scales are powers of two: exact. What rounds are the additions in float32,
    of K / 32 blocks and the bias (``gamma_n = n u / (1 - n u)``, n additions), and the cast to the result's dtype
    (whose subnormals have an absolute error: 2^-25 in float16).
    """
    added = np.zeros(1) if bias is None else bias.double().numpy()
    exact = x @ weight.T + added
    n = x.shape[1] // 32 + 1
    sums = n * U32 / (1 - n * U32) * (np.abs(x) @ np.abs(weight.T) + np.abs(added))
    bound = sums + ROUNDING[y.dtype] * (np.abs(exact) + sums) + (2.0**-25 if y.dtype is torch.float16 else 0)
    error = np.abs(y.double().numpy() - exact)
    assert y.shape == exact.shape
    assert (error <= bound).all(), f"{error.max()} where {bound.flat[error.argmax()]} is allowed"


# --- shapes


class Gemms(nn.Module):
    """Many GEMMs in one graph, each with its weight, bias or none, and dtype."""

    def __init__(self, shapes: list[tuple[int, int]], *, prologue: bool) -> None:
        super().__init__()
        self.shapes, self.prologue = shapes, prologue
        self.dtypes = [DTYPES[i % 3] for i in range(len(shapes))]
        self.weights, self.scales, self.biases = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        generator = torch.Generator().manual_seed(7)
        for i, (n, k) in enumerate(shapes):
            weight = torch.randint(0, 256, (n, k // 2), generator=generator, dtype=torch.uint8)
            scale = torch.randint(122, 130, (n, k // 32), generator=generator, dtype=torch.uint8)
            bias = torch.randn(n, generator=generator).to(self.dtypes[i]) if i % 2 else torch.empty(0)
            for held, tensor in ((self.weights, weight), (self.scales, scale), (self.biases, bias)):
                held.append(nn.Parameter(tensor, requires_grad=False))

    def bias(self, i: int) -> Tensor | None:
        return self.biases[i] if i % 2 else None

    def inputs(self, *rows_of_each: int) -> list[Any]:
        """Of each GEMM: a float activation, or codes and scales. The last number is for the rest too."""
        generator = torch.Generator().manual_seed(rows_of_each[0])
        made: list[Any] = []
        for i, (_, k) in enumerate(self.shapes):
            m = rows_of_each[min(i, len(rows_of_each) - 1)]
            if self.prologue:
                x = torch.randn(m, k, generator=generator)
                x *= (
                    torch.exp2(torch.randint(-6, 3, (m, k // 32, 1), generator=generator))
                    .expand(-1, -1, 32)
                    .reshape(m, k)
                )
                x[::5, :32] = 0.0
                made.append(x.to(self.dtypes[i]))
            else:
                codes = torch.randint(0, 256, (m, k // 2), generator=generator, dtype=torch.uint8)
                made.append((codes, torch.randint(120, 128, (m, k // 32), generator=generator, dtype=torch.uint8)))
        return made

    def forward(self, inputs: list[Any]) -> list[Tensor]:
        outputs = []
        for i, x in enumerate(inputs):
            weight, scale, bias = self.weights[i], self.scales[i], self.bias(i)
            if self.prologue:
                outputs.append(prologue_gemm(x, weight, scale, bias))
            else:
                outputs.append(quantized_gemm(*x, weight, scale, bias, self.dtypes[i]))
        return outputs

    def check(self, inputs: list[Any], outputs: list[Tensor]) -> None:
        for i, (x, y) in enumerate(zip(inputs, outputs, strict=True)):
            operand = quantize_dequantize(x) if self.prologue else dequantize(*x)
            assert y.dtype is self.dtypes[i]
            check(y, operand, dequantize(self.weights[i], self.scales[i]), self.bias(i))


def any_m(inputs: list[Any]) -> list[Any]:
    """Mark the number of rows of every tensor as not known before run time."""
    for tensor in torch.utils._pytree.tree_leaves(inputs):
        torch._dynamo.mark_dynamic(tensor, 0)
    return inputs


# K of half a chunk of 64, a whole one, and both; N below, at and above a tile of 32.
SHAPES = [(1, 32), (31, 64), (32, 96), (33, 160), (64, 576), (100, 32), (192, 64)]


@pytest.mark.parametrize("prologue", [True, False])
def test_any_number_of_rows(isa: str, prologue: bool) -> None:
    """One kernel for every M; 600 is more than the 512 rows prepared at a time."""
    shapes = SHAPES if prologue else SHAPES[2:5]
    model = Gemms(shapes[1::2] if isa == "portable" else shapes, prologue=prologue)
    compiled = torch.compile(model, backend="quark", fullgraph=True)
    first = any_m(model.inputs(5))
    model.check(first, compiled(first))
    with torch.compiler.set_stance("fail_on_recompile"):
        for m in (2, 3, 7, 8, 9, 16, 33, 600):
            inputs = model.inputs(m)
            model.check(inputs, compiled(inputs))


def test_a_number_of_rows_known_when_compiling(isa: str) -> None:
    """Up to 8 rows a tile of just so many, above that tiles of 8."""
    model = Gemms([(33, 96), (1, 32), (33, 64), (31, 96), (100, 160), (32, 32), (33, 96)], prologue=True)
    inputs = model.inputs(1, 1, 2, 3, 7, 8, 9)
    model.check(inputs, torch.compile(model, backend="quark", fullgraph=True, dynamic=False)(inputs))


def test_no_rows() -> None:
    model = Gemms([(33, 96)], prologue=True)
    (y,) = torch.compile(model, backend="quark", fullgraph=True)(model.inputs(0))
    assert y.shape == (0, 33)


# --- the codes of the prologue


def revealing() -> Callable[[Tensor], Tensor]:
    """A GEMM whose result is its quantized activation: blocks ``[M, 32]`` times the identity."""
    identity = torch.zeros(32, 32, dtype=torch.uint8)
    identity.fill_diagonal_(2)  # FP4 code of 1.0
    packed = identity[:, ::2] | identity[:, 1::2] << 4
    scale = torch.full((32, 1), 127, dtype=torch.uint8)
    compiled = torch.compile(
        lambda x: prologue_gemm(x, packed, scale, None),
        backend="quark",
        fullgraph=True,
    )

    def reveal(blocks: Tensor) -> Tensor:
        torch._dynamo.maybe_mark_dynamic(blocks, 0)
        return compiled(blocks)

    return reveal


def assert_blocks(x: Tensor, got: Tensor, expected: Tensor) -> None:
    """Of a block with an infinity or a NaN in it every number is one; all others are equal, number by number.

    Which of the two comes out may differ: a GEMM sums the whole block, and zero times infinity is NaN. -0.0 counts as
    0.0: a sum of zeros has no sign. Numbers so large that their FP4 number times its scale is 2^128 are infinite too.
    """
    finite = x.isfinite().all(-1)
    assert finite.any()
    assert torch.equal(got[finite], expected[finite])
    assert not got[~finite].isfinite().any()


@pytest.mark.parametrize("fixture", ["mxfp4", "mxfp4_fp32"])
def test_codes_of_edge_cases(isa: str, fixture: str) -> None:
    """What amd-quark itself makes of ties, scale boundaries, subnormals, zeros, huge numbers, NaN and infinity."""
    reference = load_file(FIXTURES / fixture / "reference.safetensors")
    x, expected = (reference[f"special.{name}"].clone().reshape(-1, 32) for name in ("input", "input_qdq"))
    assert_blocks(x, revealing()(x), expected)


def test_codes_of_every_bfloat16(isa: str) -> None:
    """Every number as the largest of its block, with the others from it down to nothing; against ml_dtypes."""
    numbers = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    ratios = torch.tensor([1, -1, 0, *(i / 29 * (-1) ** i for i in range(29))], dtype=torch.float64)
    for dtype in (torch.bfloat16, torch.float32):
        x = (numbers.double()[:, None] * ratios).to(dtype)
        expected = torch.from_numpy(quantize_dequantize(x.nan_to_num())).to(dtype)
        assert_blocks(x, revealing()(x), expected)


@pytest.mark.parametrize("k", [32, 96])
def test_every_scale_byte_of_a_weight(isa: str, k: int) -> None:
    """E8M0: 0 is the subnormal 2^-127, 254 is 2^127, 255 is NaN."""
    weight = torch.zeros(256, k // 2, dtype=torch.uint8)
    weight[:, k // 2 - 16] = 2  # 1.0 at the start of the last block
    scale = torch.full((256, k // 32), 127, dtype=torch.uint8)
    scale[:, -1] = torch.arange(256)
    x = torch.zeros(1, k)
    x[0, k - 32] = 1.0
    y = torch.compile(
        lambda x: prologue_gemm(x, weight, scale, None),
        backend="quark",
        fullgraph=True,
    )(x)
    assert y[0, 255].isnan()
    expected = np.arange(255, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    assert y[0, :255].tolist() == expected.tolist()


def test_every_scale_byte_of_an_activation(isa: str) -> None:
    """Codes that come from elsewhere: 255 is NaN there, and nothing else in its row matters."""
    codes = torch.full((256, 16), 0x22, dtype=torch.uint8)  # 1.0
    weight, one = torch.zeros(1, 16, dtype=torch.uint8), torch.full((1, 1), 127, dtype=torch.uint8)
    weight[0, 0] = 2
    y = torch.compile(
        lambda scales: quantized_gemm(codes, scales, weight, one, None, torch.float32),
        backend="quark",
        fullgraph=True,
    )(torch.arange(256, dtype=torch.uint8)[:, None])
    assert y[255].isnan().all()
    expected = np.arange(255, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    assert y[:255, 0].tolist() == expected.tolist()


def test_every_product_of_two_codes(isa: str) -> None:
    """All 256, in both nibbles; exact."""
    codes = torch.arange(16, dtype=torch.uint8)
    x, weight = torch.zeros(16, 16, dtype=torch.uint8), torch.zeros(16, 16, dtype=torch.uint8)
    x[:, 3] = weight[:, 3] = codes
    one, as_one = torch.full((16, 1), 127, dtype=torch.uint8), torch.full((16, 1), 127, dtype=torch.uint8)
    gemm = torch.compile(
        lambda x, weight: quantized_gemm(x, one, weight, as_one, None, torch.float32),
        backend="quark",
        fullgraph=True,
    )
    values = codes.numpy().view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    for shift in (0, 4):
        assert gemm(x << shift, weight << shift).tolist() == np.outer(values, values).tolist()
