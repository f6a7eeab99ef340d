"""The corrections of Triton's interpreter, by ml_dtypes and float64: kernels that are tested by it are tested."""

import itertools
from collections.abc import Callable, Iterator
from fractions import Fraction
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

NUMPY: dict[torch.dtype, Any] = {
    torch.float64: np.float64,
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.bfloat16: ml_dtypes.bfloat16,
    torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn,
    torch.float8_e5m2: ml_dtypes.float8_e5m2,
    torch.float8_e4m3fnuz: ml_dtypes.float8_e4m3fnuz,
    torch.float8_e5m2fnuz: ml_dtypes.float8_e5m2fnuz,
}
FP8 = [dtype for dtype in NUMPY if dtype.itemsize == 1]
NARROW = [dtype for dtype in NUMPY if dtype.itemsize <= 2]
BYTES = {1: torch.uint8, 2: torch.uint16}
HEADER = """
import triton
import triton.language as tl
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.triton_helpers import libdevice, math as tl_math
"""
CAST = """
@triton.jit
def kernel(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))
"""


@pytest.fixture
def run(interpreter: Any) -> Callable[..., Any]:
    """``run(source, out=..., ...)``: the ``out`` of the function ``kernel``, which gets all arguments."""

    def call(source: str, *, grid: tuple[int, ...] = (1,), **arguments: Any) -> Tensor:
        return interpreter.run(HEADER + source, "kernel", arguments, grid)["out"]

    return call


def elementwise(expression: str) -> str:
    """A kernel that computes an expression of ``x``, ``y`` and ``z``, which are blocks of N elements, or of ``x``."""
    return f"""
@triton.jit
def kernel(x, out, N: tl.constexpr, y=None, z=None):
    i = tl.arange(0, N)
    o = out + i
    x = tl.load(x + i)
    if y is not None:
        y = tl.load(y + i)
    if z is not None:
        z = tl.load(z + i)
    tl.store(o, {expression})
"""


def to_numpy(x: Tensor) -> np.ndarray:
    """By ml_dtypes where numpy has no such dtype."""
    if x.dtype not in NUMPY or x.dtype.itemsize > 2:
        return x.numpy()
    return x.contiguous().view(BYTES[x.dtype.itemsize]).numpy().view(NUMPY[x.dtype])


def from_numpy(x: np.ndarray, dtype: torch.dtype) -> Tensor:
    """The tensor of this dtype, which is the array's."""
    return torch.from_numpy(x.view(f"u{x.itemsize}").copy()).view(dtype)


def astype(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """A cast by ml_dtypes."""
    with np.errstate(all="ignore"):
        return x.astype(NUMPY[dtype])


def same(got: Tensor, want: np.ndarray) -> np.ndarray:
    """Where two are equal: zeros of their sign, and NaN of any kind."""
    with np.errstate(invalid="ignore"):  # of NaN
        values = to_numpy(got).astype(np.float64), want.astype(np.float64)
    equal = (values[0] == values[1]) & (np.signbit(values[0]) == np.signbit(values[1]))
    return equal | (np.isnan(values[0]) & np.isnan(values[1]))


def assert_same(got: Tensor, want: np.ndarray) -> None:
    bad = ~same(got, want)
    assert not bad.any(), f"{bad.sum()} of {bad.size}: {to_numpy(got)[bad][:5]} is not {want[bad][:5]}"


def codes(dtype: torch.dtype) -> Tensor:
    """All numbers of a dtype of 8 or 16 bits."""
    bits = torch.arange(1 << 8 * dtype.itemsize, dtype=torch.int32)
    return bits.to(torch.uint8 if dtype.itemsize == 1 else torch.uint16).view(dtype)


def float32s() -> Tensor:
    """65536 numbers: bits at random, ties and what is next to them, of every exponent, small integers."""
    generator = np.random.default_rng(0)
    chosen = generator.integers(0, 1 << 32, 40960, dtype=np.uint32)
    high = generator.integers(0, 1 << 12, 8192, dtype=np.uint32) << 20  # sign, exponent, three bits
    near = np.concatenate([high + 0x80000, high + 0x7FFFF, high + 0x80001])
    near = generator.choice(near, 12288)
    half = generator.integers(0, 1 << 16, 8192, dtype=np.uint32) << 16
    bits = np.concatenate([chosen, near, half + 0x8000, generator.integers(0, 64, 4096, dtype=np.uint32)])
    special = np.array(
        [0, -0.0, np.inf, -np.inf, np.nan, 448, 464, 465, 480, 240, 248, 57344, 61440, 65520], np.float32
    )
    bits[: len(special)] = special.view(np.uint32)
    return torch.from_numpy(bits[:65536].view(np.float32).copy())


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_casts_of_float32(run: Callable[..., Tensor], dtype: torch.dtype) -> None:
    x = float32s()
    assert_same(run(CAST, x=x, out=torch.zeros(len(x)).to(dtype), N=len(x)), astype(x.numpy(), dtype))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_casts_of_all_codes(run: Callable[..., Tensor], dtype: torch.dtype) -> None:
    x = codes(dtype)
    wide = to_numpy(x).astype(np.float32)
    for to in NUMPY.keys() - {dtype}:
        assert_same(run(CAST, x=x, out=torch.zeros(len(x)).to(to), N=len(x)), astype(wide, to))


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=str)
def test_float64_is_rounded_once(run: Callable[..., Tensor], dtype: torch.dtype) -> None:
    if dtype == torch.float32:
        numbers = np.sort(np.random.default_rng(0).random(4096, np.float32))
        numbers = np.stack([numbers, np.nextafter(numbers, np.float32(2))], axis=1)
    else:
        finite = np.unique(codes(dtype).double().numpy())
        finite = finite[np.isfinite(finite) & (finite >= 0)]
        numbers = np.stack([finite[:-1], finite[1:]], axis=1)[-4096:]
    low, high = numbers.astype(np.float64).T
    middle = (low + high) / 2
    for towards, want in ((-np.inf, low), (np.inf, high)):
        x = np.zeros(4096)
        x[: len(middle)] = np.nextafter(middle, towards)
        got = run(CAST, x=torch.from_numpy(x), out=torch.zeros(4096).to(dtype), N=4096)
        assert_same(got[: len(want)], want)


def test_rounding_towards_zero(run: Callable[..., Tensor]) -> None:
    x = float32s()
    source = elementwise("x.to(tl.bfloat16, fp_downcast_rounding='rtz')")
    got = run(source, x=x, out=torch.zeros(len(x), dtype=torch.bfloat16), N=len(x))
    bits = (x.numpy().view(np.uint32) & 0xFFFF0000).view(np.float32)
    # A NaN of which only low bits are set would be infinity.
    assert_same(got, np.where(np.isnan(x.numpy()), np.float32(np.nan), bits))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_casts_of_integers(run: Callable[..., Tensor], dtype: torch.dtype, to: torch.dtype) -> None:
    low, high = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    # Numbers that float64 holds, and of those next to ties of BF16 many.
    near = [sign * ((1 << n) + (1 << max(0, n - 8)) + d) for n in range(50) for d in (-1, 0, 1) for sign in (1, -1)]
    chosen = [n for n in near if low <= n <= high]
    x = torch.tensor((chosen * 512)[:512], dtype=dtype)
    got = run(CAST, x=x, out=torch.zeros(len(x), dtype=to), N=len(x))
    assert_same(got, np.array([float(nearest(Fraction(int(n)), to)) for n in x.tolist()]))


def nearest(number: Fraction, dtype: torch.dtype) -> float:
    """An integer, rounded once, half to even."""
    bits = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}[dtype]
    step = Fraction(2) ** max(0, abs(int(number)).bit_length() - bits)
    rounded = float(round(number / step) * step)
    return rounded if abs(rounded) <= torch.finfo(dtype).max else rounded * float("inf")


def test_casts_to_integers(run: Callable[..., Tensor]) -> None:
    x = torch.linspace(-127, 127, 1024).to(torch.bfloat16)
    for dtype in (torch.int8, torch.int32):
        got = run(CAST, x=x, out=torch.zeros(1024, dtype=dtype), N=1024)
        assert torch.equal(got, x.double().trunc().to(dtype))
    got = run(CAST, x=x.abs(), out=torch.zeros(1024, dtype=torch.uint8), N=1024)
    assert torch.equal(got, x.double().abs().trunc().to(torch.uint8))


@pytest.fixture(scope="module")
def stock(interpreter_worker: ModuleType) -> Iterator[Any]:
    with interpreter_worker.Interpreter(corrected=False) as started:
        yield started


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="Triton's interpreter truncates: correct() is needed")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_the_stock_interpreter_casts(stock: Any, dtype: torch.dtype) -> None:
    x = torch.linspace(-400, 400, 1024)
    arguments = {"x": x, "out": torch.zeros(1024).to(dtype), "N": 1024}
    assert_same(stock.run(HEADER + CAST, "kernel", arguments, (1,))["out"], astype(x.numpy(), dtype))


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="Triton's interpreter multiplies the bits of BF16")
def test_the_stock_interpreter_multiplies(stock: Any) -> None:
    a = torch.randn(16, 16, generator=torch.manual_seed(0)).to(torch.bfloat16)
    arguments = {"a": a, "b": a, "out": torch.zeros(16, 16), "M": 16, "N": 16, "K": 16}
    got = stock.run(HEADER + DOT, "kernel", arguments, (1,))["out"]
    torch.testing.assert_close(got.double(), a.double() @ a.double(), rtol=1e-6, atol=1e-6)


def pairs(dtype: torch.dtype, n: int = 4096) -> tuple[Tensor, Tensor]:
    """Operands of which many have about the same exponent, and a few are special."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, generator=generator).to(dtype) for _ in range(2))
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1.0]).to(dtype)
    for index, (a, b) in enumerate(itertools.product(range(6), repeat=2)):
        x[index], y[index] = special[a], special[b]
    return x, y


@pytest.mark.parametrize("operator", ["+", "-", "*", "/"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_arithmetic(run: Callable[..., Tensor], dtype: torch.dtype, operator: str) -> None:
    x, y = pairs(dtype)
    got = run(elementwise(f"x {operator} y"), x=x, y=y, out=torch.zeros(len(x), dtype=dtype), N=len(x))
    with np.errstate(all="ignore"):
        exact = eval(f"x {operator} y", {"x": x.double().numpy(), "y": y.double().numpy()})
    # Float64 rounded to float32 is exact enough: no quotient of so few bits is next to a tie.
    assert_same(got, astype(exact.astype(np.float32), dtype))


@pytest.mark.parametrize("operator", ["<", "<=", ">", ">=", "==", "!="])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fnuz, torch.uint8], ids=str)
def test_comparisons(run: Callable[..., Tensor], dtype: torch.dtype, operator: str) -> None:
    if dtype.itemsize == 1:
        x, y = codes(dtype).repeat(256), codes(dtype).repeat_interleave(256)
    else:
        x, y = pairs(dtype)
    got = run(elementwise(f"x {operator} y"), x=x, y=y, out=torch.zeros(len(x), dtype=torch.bool), N=len(x))
    values = {name: to_numpy(value).astype(np.float64) for name, value in (("x", x), ("y", y))}
    assert np.array_equal(got.numpy(), eval(f"x {operator} y", values))


def test_a_comparison_is_a_number(run: Callable[..., Tensor]) -> None:
    x, y = pairs(torch.float32)
    got = run(elementwise("(x < y).to(tl.float32) - (x > y)"), x=x, y=y, out=torch.zeros(len(x)), N=len(x))
    assert torch.equal(got, (x < y).float() - (x > y).float())
    source = elementwise("(i < N // 2) & (tl.sum(x, 0) > 3.0)")
    for total in (2.0, 4.0):
        x = torch.full((8,), total / 8)
        got = run(source, x=x, out=torch.ones(8, dtype=torch.bool), N=8)
        assert got.tolist() == [total > 3] * 4 + [False] * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_nan(run: Callable[..., Tensor], dtype: torch.dtype) -> None:
    x, y = pairs(dtype)
    out = torch.zeros(len(x))
    a, b = x.float().numpy(), y.float().numpy()

    def result(expression: str) -> np.ndarray:
        return run(elementwise(expression), x=x, y=y, out=out, N=len(x)).numpy()

    for name, numbers, everything in (("minimum", np.fmin, np.minimum), ("maximum", np.fmax, np.maximum)):
        np.testing.assert_array_equal(result(f"tl.{name}(x, y)"), numbers(a, b))
        np.testing.assert_array_equal(result(f"tl.{name}(x, y, propagate_nan=tl.PropagateNan.ALL)"), everything(a, b))
        np.testing.assert_array_equal(result(f"triton_helpers.{name}(x, y)"), everything(a, b))
    clamped = np.clip(a, -0.5, 0.75)
    np.testing.assert_array_equal(result("tl.clamp(x, -0.5, 0.75, propagate_nan=tl.PropagateNan.ALL)"), clamped)
    np.testing.assert_array_equal(result("tl.clamp(x, -0.5, 0.75)"), np.where(np.isnan(a), np.float32(-0.5), clamped))
    np.testing.assert_array_equal(result("tl.abs(x)"), np.abs(a))
    np.testing.assert_array_equal(result("tl.where(x != x, 0.0, x)"), np.where(np.isnan(a), np.float32(0), a))


@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_abs_of_all_codes(run: Callable[..., Tensor], dtype: torch.dtype) -> None:
    got = run(elementwise("tl.abs(x)"), x=codes(dtype), out=codes(dtype), N=256)
    assert_same(got, np.abs(to_numpy(codes(dtype)).astype(np.float32)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_fma_rounds_once(run: Callable[..., Tensor], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2048, generator=generator).to(dtype) for _ in range(2))
    # What is left of most products is what rounding them would lose. The first float32 is above a tie that a sum in
    # float64 is on.
    z = -(x.double() * y.double()).to(dtype)
    z[1024:] = torch.randn(1024, generator=generator).to(dtype)
    if dtype == torch.float32:
        x[0], y[0], z[0] = 2.0**-30 + 2.0**-53, 2.0**-30, 1 + 2.0**-23
        x[1], y[1], z[1] = 2.0**-24, 1 + 2.0**-23, 1.0
        x[2], y[2], z[2] = 1.0 + 2.0**-23, 2.0**-24 - 2.0**-48, 1.0
        x[3], y[3], z[3] = 2.0**-24, 1.0, 1.0
        x[4], y[4], z[4] = 2.0**-40, 2.0**-40, 1.0 + 2.0**-23
    got = run(elementwise("tl.fma(x, y, z)"), x=x, y=y, z=z, out=torch.zeros(2048, dtype=dtype), N=2048)
    exact = [
        Fraction(a) * Fraction(b) + Fraction(c) for a, b, c in zip(x.tolist(), y.tolist(), z.tolist(), strict=True)
    ]
    bits = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}[dtype]
    smallest = Fraction(2) ** {torch.float32: -149, torch.float16: -24, torch.bfloat16: -133}[dtype]
    for sum_, rounded in zip(exact, got.tolist(), strict=True):
        step = smallest
        while abs(sum_) / step >= 1 << bits:
            step *= 2
        assert Fraction(rounded) == round(sum_ / step) * step
    assert not torch.equal(got, (x * y + z).to(dtype))


REDUCE = """
@triton.jit
def larger(a, b):
    return tl.where(a > b, a, b)

@triton.jit
def kernel(x, out, M: tl.constexpr, N: tl.constexpr, AXIS: tl.constexpr, KEEP: tl.constexpr):
    block = tl.load(x + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :])
    result = {reduction}
    if KEEP:
        result = tl.reshape(result, (M * N // (N if AXIS == 1 else M),))
    n: tl.constexpr = M if AXIS == 1 else N
    tl.store(out + tl.arange(0, n), result)
"""
REDUCTIONS = {
    "tl.max(block, AXIS, keep_dims=KEEP)": lambda x, axis: x.amax(axis),
    "tl.min(block, AXIS, keep_dims=KEEP)": lambda x, axis: x.amin(axis),
    "tl.sum(block, AXIS, keep_dims=KEEP)": lambda x, axis: x.sum(axis),
    "tl.reduce(block, AXIS, larger, keep_dims=KEEP)": lambda x, axis: x.amax(axis),
    "triton_helpers.max2(block, AXIS)": lambda x, axis: x.amax(axis),
}


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.uint8], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions(run: Callable[..., Tensor], reduction: str, dtype: torch.dtype, axis: int) -> None:
    # Integers of which BF16 holds every sum.
    x = torch.randint(0 if dtype == torch.uint8 else -8, 9, (16, 32), generator=torch.manual_seed(0)).to(dtype)
    out = torch.zeros(32 if axis == 0 else 16, dtype=torch.float64)
    keep = "keep_dims" in reduction
    source = REDUCE.replace("{reduction}", reduction)
    got = run(source, x=x, out=out, M=16, N=32, AXIS=axis, KEEP=keep)
    assert torch.equal(got, REDUCTIONS[reduction](x.double(), axis))
    got = run(source.replace(", keep_dims=KEEP", ""), x=x, out=out, M=16, N=32, AXIS=axis, KEEP=False)
    assert torch.equal(got, REDUCTIONS[reduction](x.double(), axis))


def test_reductions_of_everything(run: Callable[..., Tensor]) -> None:
    source = """
@triton.jit
def first(a, b):
    return a

@triton.jit
def both(a, i, b, j):
    swap = b > a
    return tl.where(swap, b, a), tl.where(swap, j, i)

@triton.jit
def kernel(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    block = tl.load(x + i)
    tl.store(out, tl.max(block))
    tl.store(out + 1, tl.reduce(block, None, first))
    value, index = tl.reduce((block, i), 0, both)
    tl.store(out + 2, value)
    tl.store(out + 3, index)
    tl.store(out + 4, tl.argmax(block, 0))
"""
    x = torch.randn(64, generator=torch.manual_seed(0))
    top, index = x.max(0)
    want = torch.stack([top, x[0], top, index.float(), index.float()])
    assert torch.equal(run(source, x=x, out=torch.zeros(5), N=64), want)


DOT = """
@triton.jit
def kernel(a, b, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    acc = tl.full((M, N), 3, out.dtype.element_ty)
    x = tl.load(a + m[:, None] * K + k[None, :])
    acc = tl.dot(x, tl.load(b + k[:, None] * N + n[None, :]), acc, out_dtype=out.dtype.element_ty)
    tl.store(out + m[:, None] * N + n[None, :], acc)
"""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, *FP8], ids=str)
def test_dot(run: Callable[..., Tensor], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(16, 64, generator=generator).to(dtype), torch.randn(64, 32, generator=generator).to(dtype)
    got = run(DOT, a=a, b=b, out=torch.zeros(16, 32), M=16, N=32, K=64)
    want = to_numpy(a).astype(np.float64) @ to_numpy(b).astype(np.float64) + 3
    np.testing.assert_allclose(got.numpy(), want, rtol=2.0**-23, atol=0)


def test_dot_of_integers(run: Callable[..., Tensor]) -> None:
    a, b = torch.full((16, 1024), -128, dtype=torch.int8), torch.full((1024, 16), 127, dtype=torch.int8)
    a[1:] = torch.randint(-128, 128, (15, 1024), generator=torch.manual_seed(0))
    got = run(DOT, a=a, b=b, out=torch.zeros(16, 16, dtype=torch.int32), M=16, N=16, K=1024)
    assert torch.equal(got.long(), a.long() @ b.long() + 3)


DOT_SCALED = """
@triton.jit
def kernel(
    a, sa, b, sb, out, A: tl.constexpr, B: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    KA: tl.constexpr, KB: tl.constexpr, GROUP: tl.constexpr, SCALED_A: tl.constexpr, SCALED_B: tl.constexpr,
):
    m, n, g = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K // GROUP)
    x = tl.load(a + m[:, None] * KA + tl.arange(0, KA)[None, :])
    w = tl.load(b + n[None, :] * KB + tl.arange(0, KB)[:, None])
    x_scale, w_scale = None, None
    if SCALED_A:
        x_scale = tl.load(sa + m[:, None] * (K // GROUP) + g[None, :])
    if SCALED_B:
        w_scale = tl.load(sb + n[:, None] * (K // GROUP) + g[None, :])
    acc = tl.zeros((M, N), tl.float32)
    acc = tl.dot_scaled(x, x_scale, A_FORMAT, w, w_scale, B_FORMAT, acc)
    tl.store(out + m[:, None] * N + n[None, :], acc)
"""
FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "bf16": torch.bfloat16, "fp16": torch.float16}


def operand(name: str, rows: int, k: int, generator: torch.Generator) -> tuple[Tensor, np.ndarray]:
    """Codes and their numbers."""
    if name == "e2m1":
        packed = torch.randint(0, 256, (rows, k // 2), dtype=torch.uint8, generator=generator)
        nibbles = np.stack([packed.numpy() & 15, packed.numpy() >> 4], axis=-1).reshape(rows, k)
        return packed, nibbles.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    x = torch.randn(rows, k, generator=generator).to(FORMATS[name])
    return x, to_numpy(x).astype(np.float64)


@pytest.mark.parametrize("sides", ["both", "a", "b"])
@pytest.mark.parametrize(
    ("formats", "scales"),
    [
        ("e2m1 e2m1", "e4m3"),  # NVFP4
        ("e2m1 e2m1", "e8m0"),
        ("e4m3 e2m1", "e8m0"),
        ("e4m3 e4m3", "e8m0"),
        ("e5m2 e4m3", "e8m0"),
        ("e2m1 e5m2", "e8m0"),
        ("bf16 e2m1", "e8m0"),
        ("e2m1 bf16", "e8m0"),
        ("fp16 e4m3", "e8m0"),
    ],
)
def test_dot_scaled(run: Callable[..., Tensor], formats: str, scales: str, sides: str) -> None:
    m, n, k, group = 16, 32, 128, 32 if scales == "e8m0" else 16
    generator = torch.Generator().manual_seed(0)
    left, right = formats.split()
    (a, x), (b, w) = operand(left, m, k, generator), operand(right, n, k, generator)
    codes_of = {"e8m0": (100, 140), "e4m3": (1, 127)}[scales]
    sa, sb = (torch.randint(*codes_of, (r, k // group), dtype=torch.uint8, generator=generator) for r in (m, n))
    number = ml_dtypes.float8_e8m0fnu if scales == "e8m0" else ml_dtypes.float8_e4m3fn
    for values, scale, side in ((x, sa, "a"), (w, sb, "b")):
        if sides in ("both", side):
            values *= np.repeat(scale.numpy().view(number).astype(np.float64), group, axis=1)
    if scales == "e4m3":
        sa, sb = sa.view(torch.float8_e4m3fn), sb.view(torch.float8_e4m3fn)
    source = DOT_SCALED.replace("A_FORMAT", repr(left)).replace("B_FORMAT", repr(right))
    on = {"SCALED_A": sides != "b", "SCALED_B": sides != "a"}
    sizes = {"A": 0, "B": 0, "M": m, "N": n, "K": k, "KA": a.shape[1], "KB": b.shape[1], "GROUP": group}
    got = run(source, a=a, sa=sa, b=b, sb=sb, out=torch.zeros(m, n), **sizes, **on)
    np.testing.assert_allclose(got.numpy(), x @ w.T, rtol=2.0**-23, atol=0)


def test_dot_scaled_by_every_scale(run: Callable[..., Tensor]) -> None:
    a = torch.full((256, 16), 0x22, dtype=torch.uint8)  # 1 and 1
    sa = torch.arange(256, dtype=torch.uint8)[:, None]
    b = torch.zeros(16, 32, dtype=torch.bfloat16)
    b[:, 5] = torch.linspace(1, 2, 16).to(torch.bfloat16)
    source = DOT_SCALED.replace("A_FORMAT", "'e2m1'").replace("B_FORMAT", "'bf16'")
    sizes = {"A": 0, "B": 0, "M": 256, "N": 16, "K": 32, "KA": 16, "KB": 32, "GROUP": 32}
    out = torch.zeros(256, 16)
    got = run(source, a=a, sa=sa, b=b, sb=sa, out=out, **sizes, SCALED_A=True, SCALED_B=False)
    scale = sa.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    assert scale[0] == 2.0**-127
    assert np.isnan(scale[255])
    want = torch.from_numpy(scale * b[:, 5].double().numpy()).float()
    np.testing.assert_array_equal(got.numpy(), want.numpy())


def test_dot_scaled_packed_by_rows(run: Callable[..., Tensor]) -> None:
    source = """
@triton.jit
def kernel(a, b, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(a + tl.arange(0, M // 2)[:, None] * K + k[None, :])
    w = tl.load(b + k[:, None] * (N // 2) + tl.arange(0, N // 2)[None, :])
    acc = tl.dot_scaled(x, None, "e2m1", w, None, "e2m1", lhs_k_pack=False, rhs_k_pack=False)
    tl.store(out + m[:, None] * N + n[None, :], acc)
"""
    generator = torch.Generator().manual_seed(0)
    (a, x), (b, w) = operand("e2m1", 64, 16, generator), operand("e2m1", 64, 32, generator)
    # Of a matrix [K, rows]: rows are packed.
    got = run(source, a=a.T.contiguous(), b=b, out=torch.zeros(16, 32), M=16, N=32, K=64)
    np.testing.assert_array_equal(got.numpy(), x.T @ w)


def test_bits(run: Callable[..., Tensor]) -> None:
    source = """
@triton.jit
def halves(packed):
    return packed & 15, packed >> 4

@triton.jit
def kernel(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    packed = tl.load(x + i)
    low, high = halves(packed)
    codes = tl.reshape(tl.join(low, high), (2 * N,))
    even, odd = tl.split(tl.reshape(codes, (N, 2)))
    again = even | (odd << 4)
    tl.store(out + tl.arange(0, 2 * N), codes)
    tl.store(out + 2 * N + i, again)
    tl.store(out + 3 * N + i, ~packed)
    wide = (packed.to(tl.uint16) << 7).to(tl.bfloat16, bitcast=True)
    tl.store(out + 4 * N + i, (wide.to(tl.float32).to(tl.uint32, bitcast=True) >> 23).to(tl.uint8))
    tl.store(out + 5 * N + i, (packed.to(tl.int8, bitcast=True) >> 1).to(tl.uint8, bitcast=True))
    tl.store(out + 6 * N + i, packed << 1)
    tl.store(out + 7 * N + i, (packed.to(tl.int32) << 24 >> 28).to(tl.uint8))
    swapped = tl.trans(tl.reshape(packed, (16, N // 16)))
    tl.store(out + 8 * N + i, tl.reshape(swapped, (N,)))
    tl.store(out + 9 * N + i, tl.permute(tl.reshape(packed, (4, 2, N // 8)), (2, 0, 1)).reshape(N))
"""
    x = torch.arange(256, dtype=torch.uint8)
    got = run(source, x=x, out=torch.zeros(10 * 256, dtype=torch.uint8), N=256)
    codes_, again, inverted, exponent, signed, shifted, arithmetic, swapped, permuted = got.split([512] + [256] * 8)
    assert torch.equal(codes_, torch.stack([x & 15, x >> 4], dim=-1).flatten())
    assert torch.equal(again, x)
    assert torch.equal(inverted, 255 - x)
    assert torch.equal(exponent, x)
    assert torch.equal(signed, (x.view(torch.int8) >> 1).view(torch.uint8))
    assert torch.equal(shifted, ((x.int() * 2) % 256).to(torch.uint8))
    assert torch.equal(arithmetic, ((x.view(torch.int8) >> 4).int() % 256).to(torch.uint8))
    assert torch.equal(swapped, x.view(16, 16).T.flatten())
    assert torch.equal(permuted, x.view(4, 2, 32).permute(2, 0, 1).flatten())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float32, torch.bfloat16, *FP8], ids=str)
def test_masks(run: Callable[..., Tensor], dtype: torch.dtype) -> None:
    source = """
@triton.jit
def kernel(x, out, n, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i, mask=i < n, other=1.0).to(tl.float32))
    tl.store(out + N + i, tl.load(x + i, mask=i < n).to(tl.float32), mask=i >= 3)
    tl.store(out + 2 * N, tl.load(x, mask=n > 4, other=0.0).to(tl.float32))
"""
    if not dtype.is_floating_point:
        source = source.replace("1.0", "1").replace("0.0", "0")
    x = torch.tensor([2, 3, 4, 5]).to(dtype)
    got = run(source, x=x, out=torch.ones(17), n=4, N=8)
    assert got[:8].tolist() == [2, 3, 4, 5, 1, 1, 1, 1]
    assert got[8:12].tolist() == [1, 1, 1, 5]
    assert got[16] == 0
    # Nothing says what those are. A kernel that depends on them is not to pass for one that depends on zeros.
    assert (got[12:16] != 0).all()


def test_constants(run: Callable[..., Tensor]) -> None:
    source = """
@triton.jit
def kernel(x, out, factor, flag, n, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x + i)
    full = tl.full((N,), 1.5, tl.bfloat16) + tl.zeros((N,), tl.bfloat16)
    tl.store(out + i, full.to(tl.float32))
    tl.store(out + N + i, (x * 1.01).to(tl.float32))
    tl.store(out + 2 * N + i, (x * factor).to(tl.float32))
    if flag:
        tl.store(out + 3 * N + i, -x)
    tl.store(out + 4 * N + i, (n >> 1) + i * 0)
"""
    x = torch.linspace(1, 2, 64).to(torch.bfloat16)
    got = run(source, x=x, out=torch.zeros(5 * 64), factor=1.01, flag=True, n=2**31 + 6, N=64).view(5, 64)
    assert (got[0] == 1.5).all()
    # A constant has the tensor's dtype, an argument is float32.
    assert torch.equal(got[1], (x * torch.tensor(1.01).to(torch.bfloat16)).float())
    assert torch.equal(got[2], x.float() * 1.01)
    assert torch.equal(got[3], -x.float())
    assert (got[4] == 2**30 + 3).all()


def test_grids_and_loops(run: Callable[..., Tensor]) -> None:
    source = """
@triton.jit
def kernel(out, n, BLOCK: tl.constexpr, UNROLLED: tl.constexpr):
    STEP : tl.constexpr = 2
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    total = 0
    for k in tl.range(0, tl.cdiv(n, BLOCK), num_stages=3):
        total += k
    for k in tl.static_range(UNROLLED):
        total += 100 * k
    for k in range(0, n, STEP):
        total += 10000
    if tl.num_programs(1) == 3 and UNROLLED > 1:
        total += 1000000
    place = (x * tl.num_programs(1) + y) * tl.num_programs(2) + z
    tl.store(out + place, total + x * 2000000 + y * 4000000 + z * 8000000)
"""
    got = run(source, out=torch.zeros(2, 3, 4, dtype=torch.int32), n=17, BLOCK=4, UNROLLED=3, grid=(2, 3, 4))
    base = (0 + 1 + 2 + 3 + 4) + 300 + 9 * 10000 + 1000000
    x, y, z = torch.meshgrid(torch.arange(2), torch.arange(3), torch.arange(4), indexing="ij")
    assert torch.equal(got.long(), base + x * 2000000 + y * 4000000 + z * 8000000)


EPILOGUES: dict[str, Callable[[Tensor], Tensor]] = {
    "tl.sigmoid(x)": torch.sigmoid,
    "x * tl.sigmoid(x)": torch.nn.functional.silu,
    "tl_math.exp(x)": torch.exp,
    "tl.exp2(x)": torch.exp2,
    "libdevice.tanh(x)": torch.tanh,
    "x * 0.5 * (1.0 + libdevice.erf(x * 0.7071067811865476))": torch.nn.functional.gelu,
    "x * 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))": torch.nn.functional.gelu,
    "libdevice.rsqrt(tl_math.abs(x))": lambda x: torch.rsqrt(x.abs()),
    "libdevice.nearbyint(x * 4)": lambda x: torch.round(x * 4),
    "libdevice.pow(x, 2.0)": lambda x: x**2,
    "tl.where(libdevice.isnan(x).to(tl.int1), 0.0, x)": lambda x: x,
    "triton_helpers.maximum(tl.full([1], 0, tl.int32), x)": torch.relu,
    "tl.div_rn(x, 3.0)": lambda x: x / 3,
    "tl.floor(x) + tl.ceil(x)": lambda x: x.floor() + x.ceil(),
    "tl.sqrt_rn(tl.abs(x))": lambda x: x.abs().sqrt(),
    "libdevice.llrint(x * 4).to(tl.int8).to(tl.float32)": lambda x: torch.round(x * 4),
}


@pytest.mark.parametrize("expression", EPILOGUES)
def test_epilogues(run: Callable[..., Tensor], expression: str) -> None:
    x = torch.linspace(-9, 9, 4096)
    got = run(elementwise(expression), x=x, out=torch.zeros(4096), N=4096)
    torch.testing.assert_close(got.double(), EPILOGUES[expression](x.double()), rtol=1e-6, atol=1e-6)


# What Inductor generates, shortened: of a layer_norm, and of a silu_and_mul.
GENERATED = """
from torch._inductor.runtime import triton_heuristics
from torch._inductor.runtime.hints import ReductionHint, DeviceProperties
triton_helpers.set_driver_to_gpu()

@triton_heuristics.persistent_reduction(
    size_hints={'x': 8, 'r0_': 64},
    reduction_hint=ReductionHint.INNER,
    filename=__file__,
    triton_meta={'device': DeviceProperties(type='cuda', index=0, multi_processor_count=132, cc=90)},
    inductor_meta={'grid_type': 'Grid1D'},
)
@triton.jit
def kernel(in_ptr0, in_ptr1, out_ptr0, out, out_ptr4, xnumel, r0_numel, XBLOCK : tl.constexpr):
    xnumel = 6
    r0_numel = 64
    R0_BLOCK: tl.constexpr = 64
    xoffset = tl.program_id(0) * XBLOCK
    xindex = xoffset + tl.arange(0, XBLOCK)[:, None]
    xmask = xindex < xnumel
    r0_index = tl.arange(0, R0_BLOCK)[None, :]
    r0_1 = r0_index
    x0 = xindex
    tmp0 = tl.load(in_ptr0 + (r0_1 + 64*x0), xmask, eviction_policy='evict_first', other=0.0).to(tl.float32)
    tmp34 = tl.load(in_ptr1 + (tl.broadcast_to(r0_1, [XBLOCK, R0_BLOCK])), xmask, eviction_policy='evict_last')
    tmp10 = tl.broadcast_to(tmp0, [XBLOCK, R0_BLOCK])
    tmp12 = tl.where(xmask, tmp10, float("-inf"))
    tmp13 = triton_helpers.max2(tmp12, 1)[:, None].to(tl.float32)
    tmp16 = tl.where(xmask, tmp10, 0)
    tmp20 = tl.sum(tmp16, 1)[:, None].to(tl.float32)
    tmp21 = (tl.full([1, 1], 64, tl.int32)).to(tl.float32)
    tmp22 = (tmp20 / tmp21)
    tmp23 = tmp10 - tmp22
    tmp27 = tl.where(xmask, tmp23 * tmp23, 0)
    tmp28 = tl.sum(tmp27, 1)[:, None].to(tl.float32)
    tmp7 = tl.full([1, 1], 1.0, tl.float32)
    tmp30 = libdevice.exp(-tmp0)
    tmp32 = (tmp0 / (tmp30 + tmp7))
    tmp35 = tmp32.to(tl.float32) * tmp34
    tmp41 = libdevice.rsqrt(tmp28 / tl.full([1, 1], 64.0, tl.float32) + tl.full([1, 1], 1e-05, tl.float32))
    tl.store(out + (r0_1 + 64*x0), tmp35, xmask)
    tl.store(out_ptr4 + (r0_1 + 64*x0), (tmp0 - tmp22) * tmp41, xmask)
    tl.store(out_ptr0 + (x0), tmp13, xmask)
"""


def test_generated_code(interpreter: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 64, generator=generator).bfloat16(), torch.randn(64, generator=generator).bfloat16()
    arguments = {"in_ptr0": x, "in_ptr1": y, "out_ptr0": torch.zeros(6), "out": x + 1, "out_ptr4": x.float()}
    sizes = {"xnumel": 6, "r0_numel": 64, "XBLOCK": 4}
    got = interpreter.run(HEADER + GENERATED, "kernel", {**arguments, **sizes}, (2,))
    assert torch.equal(got["out_ptr0"], x.float().amax(-1))
    torch.testing.assert_close(got["out_ptr4"], torch.nn.functional.layer_norm(x.float(), (64,)))
    torch.testing.assert_close(got["out"], (torch.nn.functional.silu(x.float()) * y).bfloat16())


def test_errors(run: Callable[..., Tensor], interpreter_worker: ModuleType) -> None:
    x, out = torch.ones(8), torch.zeros(8)
    error = interpreter_worker.KernelError
    with pytest.raises(error, match="reads 8 of 16 elements outside"):
        run(CAST, x=x, out=torch.zeros(16), N=16)
    with pytest.raises(error, match="writes 4 of 8 elements outside"):
        run(CAST, x=x, out=torch.zeros(16)[:4], N=8)
    for expression in ("not (x > 0)", "(x > 0) and (x < 2)"):
        with pytest.raises(error, match="one bool of a block"):
            run(elementwise(expression), x=x, out=out, N=8)
    with pytest.raises(error, match="no argument missing"):
        run(CAST, x=x, out=out, N=8, missing=1)
    with pytest.raises(error, match=r"libdevice\.erfinv is not interpreted"):
        run(elementwise("libdevice.erfinv(x)"), x=x, out=out, N=8)
    for dtype in (torch.float8_e8m0fnu, torch.float4_e2m1fn_x2):
        with pytest.raises(error, match=rf"Triton has no {dtype}"):
            run(CAST, x=torch.ones(8, dtype=torch.uint8).view(dtype), out=out, N=8)
    assert torch.equal(run(CAST, x=x, out=out, N=8), x)


def test_arguments_keep_their_strides(run: Callable[..., Tensor]) -> None:
    x, out = torch.arange(16.0).view(4, 4)[:, 1], torch.zeros(4, 8).T[2]
    source = """
@triton.jit
def kernel(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i * 8, tl.load(x + i * 4))
"""
    got = run(source, x=x, out=out, N=4)
    assert torch.equal(got, x)
    assert got.stride() == (8,)
    assert not out.any()


def test_an_interpreter_that_dies(interpreter_worker: ModuleType) -> None:
    with interpreter_worker.Interpreter() as started:
        with pytest.raises(RuntimeError, match="the interpreter ended in kernel, with 7"):
            started.run("import os; os._exit(7)", "kernel", {}, (1,))
        process = started._process
    assert process.poll() == 7


def test_an_interpreter_that_hangs(interpreter_worker: ModuleType) -> None:
    with interpreter_worker.Interpreter() as started:
        with pytest.raises(TimeoutError, match=r"kernel ran for more than 0\.1 s"):
            started.run("while True: pass", "kernel", {}, (1,), timeout=0.1)
        assert started._process.poll() is not None
