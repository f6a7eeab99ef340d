"""What is around the kernels: epilogues, strange inputs, and what a compiler and its sanitizers say of the headers."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor import cpp_builder
from torch._inductor.utils import run_and_get_code

import quark_inductor as qi
import quark_inductor.lowering.cpp
from quark_inductor.lowering import target
from quark_inductor.schemes import registry  # noqa: F401

q = torch.ops.quark_inductor
FP8 = torch.float8_e4m3fn
HEADERS = Path(quark_inductor.lowering.cpp.__file__).parent
U32 = 2.0**-24
K, N = 96, 40


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mxfp4_gemm(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """The fused GEMM of a float activation, both in MXFP4."""
    by_weight = weight, scale, None, None, bias
    return q.prologue_gemm(x, None, None, None, *by_weight, "mxfp4", "even", 0, "mxfp4")


def fp8_gemm(
    x: Tensor, scale: Tensor | None, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """The fused GEMM of a float activation, both in FP8, by a given scale or one of each row."""
    by_weight = weight, weight_scale, None, None, bias
    rule = "amax" if scale is None else "given"
    return q.prologue_gemm(x, scale, None, None, *by_weight, "fp8_e4m3", rule, 0, "fp8_e4m3")


def fp8_codes_gemm(x: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """The fused GEMM of FP8 codes."""
    by_weight = weight, weight_scale, None, None, None
    return q.quantized_gemm(x, scale, None, None, *by_weight, "fp8_e4m3", "fp8_e4m3", "float32")


def int4_gemm(x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None = None) -> Tensor:
    """The fused GEMM of a float activation that stays one, by integers."""
    return q.weight_only_gemm(x, weight, scale, None, zero_point, bias, "uint4")


def mxfp4(bias: Tensor | None) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A fused GEMM of a float activation, and the largest magnitudes a float64 sum may have: ``|x| @ |weight|.T``."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randint(0, 256, (N, K // 2), generator=generator, dtype=torch.uint8)
    scale = torch.full((N, K // 32), 124, dtype=torch.uint8)
    return lambda x: mxfp4_gemm(x, weight, scale, bias), q.block_dequantize(weight, scale, "mxfp4", "float32")


def fp8(bias: Tensor | None) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    weight, scale = randn(N, K, seed=5).to(FP8), randn(N, seed=6).abs()
    return lambda x: fp8_gemm(x, None, weight, scale, bias), weight.float() * scale[:, None]


def uint4(bias: Tensor | None) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Of a float activation as it is, by ``generic.h``."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randint(-(2**31), 2**31, (N, K // 8), generator=generator).to(torch.int32)
    zero_point = torch.full((N // 8,), 0x77777777, dtype=torch.int32)
    scale = randn(N, seed=6).abs()
    codes, offset = q.int4_unpack(weight, "uint4"), q.int4_unpack(zero_point, "uint4")
    values = (codes - offset[:, None]) * scale[:, None]
    return lambda x: int4_gemm(x, weight, scale, zero_point, bias), values


def gemm_error(x: Tensor, weight: Tensor) -> Tensor:
    """What two float32 GEMMs of one quantized activation may differ by.

    Each sums K products and a bias, and scales twice. A quantized number is below twice the largest of its row.
    """
    n = 2 * (K + 3)
    return n * U32 / (1 - n * U32) * (2 * x.abs().amax(-1, keepdim=True) * weight.abs().sum(-1) + 1)


@pytest.mark.parametrize("make", [mxfp4, fp8, uint4])
def test_an_epilogue_is_fused(compiled: Callable[..., Any], make: Callable[..., Any]) -> None:
    bias = randn(N, seed=1)
    gemm, weight = make(bias)

    def fn(x: Tensor, residual: Tensor) -> Tensor:
        return F.silu(gemm(x)) + residual

    x, residual = randn(5, K), randn(5, N, seed=2)
    y = compiled(fn, x, residual)
    assert counters["inductor"]["cpp_templated_kernel_counter"] == 1
    assert counters["inductor"]["cpp_epilogue_fusion_counter"] >= 1
    # |silu'| < 1.1; silu and the sum round a few times more, relative to their results (exp: below 4 ulp).
    bound = 1.1 * gemm_error(x, weight) + 16 * U32 * (gemm(x).abs() + residual.abs() + 1)
    assert ((y - fn(x, residual)).abs() <= bound).all()


def test_an_epilogue_is_part_of_the_kernel(isa: str) -> None:
    """Nothing is left that another kernel would do."""
    gemm, _ = mxfp4(None)
    function = torch.compile(lambda x, r: F.silu(gemm(x)) + r, backend="quark", fullgraph=True)
    _, (code,) = run_and_get_code(function, randn(5, K), randn(5, N))
    assert code.count("async_compile.cpp_pybinding(") == 1
    assert len(re.findall(r"quark::mxfp4::tile<", code)) == 1
    assert ("#define QUARK_AVX512" in code) == (isa != "portable")


# What is fused is decided before either kind of code is written: one format tells of the second, which takes long.
@pytest.mark.parametrize(
    ("make", "aot"),
    [
        *((make, False) for make in (mxfp4, fp8, uint4)),
        (mxfp4, True),
        *(pytest.param(make, True, marks=pytest.mark.fuzz) for make in (fp8, uint4)),
    ],
)
def test_an_epilogue_of_an_epilogue_that_is_turned(
    compiled: Callable[..., Any], make: Callable[..., Any], aot: bool, tmp_path: Path
) -> None:
    """As attention turns its heads: what reads the first epilogue elsewhere than it writes is no epilogue."""
    gemm, weight = make(None)

    class Turned(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = F.silu(gemm(x.flatten(0, -2)).unflatten(0, x.shape[:-1]))
            heads = y.unflatten(-1, (4, -1)).transpose(-2, -3)
            return F.gelu(heads).transpose(-2, -3).flatten(-2)

    fn, x = Turned(), randn(2, 3, 8, K).bfloat16()
    if aot:
        package = torch._inductor.aoti_compile_and_package(
            torch.export.export(fn, (x,)),
            package_path=str(tmp_path / "turned.pt2"),
            inductor_configs={**qi.aoti_configs(), "emulate_precision_casts": True},  # see test_two_users_of_the_result
        )
        y = torch._inductor.aoti_load_package(package)(x)
    else:
        y = compiled(fn, x, emulate_precision_casts=True)
        assert counters["inductor"]["cpp_templated_kernel_counter"] == 1
    # |silu'| < 1.1 and |gelu'| < 1.2. Three roundings to bfloat16 (2^-9) on each side, of no more than the sum.
    bound = 1.1 * 1.2 * gemm_error(x.float(), weight)
    bound += 1.1 * 1.2 * 6 * 2.0**-9 * gemm(x.flatten(0, -2)).float().abs().view(y.shape)
    assert ((y - fn(x)).abs() <= bound).all()


@pytest.mark.parametrize("make", [mxfp4, fp8, uint4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_users_of_the_result(compiled: Callable[..., Any], make: Callable[..., Any], dtype: torch.dtype) -> None:
    gemm, weight = make(None)

    def fn(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = gemm(x)
        return y, torch.relu(y) * 2, y.sum(-1)

    x = randn(5, K).to(dtype)
    # The option makes FP8 operands those of eager code: rounded to the dtype.
    y, doubled, sums = compiled(fn, x, emulate_precision_casts=True)
    assert counters["inductor"]["cpp_templated_kernel_counter"] == 1
    eager = fn(x)[0]
    # One rounding to bfloat16 (2^-8) on each side. The second result is made of the same number, rounded or not yet.
    rounding = 0.0 if dtype is torch.float32 else 2.0**-7
    bound = gemm_error(x.float(), weight) + rounding * eager.abs().float()
    assert ((y - eager).abs() <= bound).all()
    assert ((doubled - 2 * eager.relu()).abs() <= 2 * bound + rounding).all()
    assert ((sums - eager.float().sum(-1)).abs() <= bound.sum(-1) + rounding * (eager.float().abs().sum(-1) + 1)).all()


def test_one_result_goes_into_the_next(compiled: Callable[..., Any]) -> None:
    """Two GEMMs after each other, residual added: the second reads what the first's epilogue wrote."""
    generator = torch.Generator().manual_seed(3)
    first, second = (torch.randint(0, 256, (64, 32), generator=generator, dtype=torch.uint8) for _ in range(2))
    scale = torch.full((64, 2), 122, dtype=torch.uint8)

    def fn(x: Tensor) -> Tensor:
        y = x + mxfp4_gemm(x, first, scale)
        return y + mxfp4_gemm(y, second, scale)

    # Small integers: every number on the way is exact in float32, so eager and compiled agree bit by bit.
    x = torch.randint(-4, 5, (5, 64), generator=generator).float()
    assert torch.equal(compiled(fn, x), fn(x))
    assert counters["inductor"]["cpp_templated_kernel_counter"] == 2


# --- inputs


def strange(x: Tensor) -> dict[str, Tensor]:
    """The same numbers in other places of memory."""
    m, k = x.shape
    wide, tall = torch.full((m, 2 * k), 9.0), torch.full((m + 2, k), 9.0)
    wide[:, ::2], tall[1:-1] = x, x
    return {
        "columns": wide[:, ::2],
        "rows": tall[1:-1],
        "transposed": x.t().contiguous().t(),
        "expanded": x[:1].expand(m, k),
    }


@pytest.mark.parametrize("make", [mxfp4, fp8, uint4])
def test_strides_and_offsets(make: Callable[..., Any]) -> None:
    gemm, _ = make(None)
    inputs = strange(randn(5, K))
    together = torch.compile(lambda *xs: [gemm(x) for x in xs], backend="quark", fullgraph=True)
    straight = torch.compile(gemm, backend="quark", fullgraph=True)
    for (name, x), y in zip(inputs.items(), together(*inputs.values()), strict=True):
        assert torch.equal(y, straight(x.contiguous())), name


def test_weights_in_another_order() -> None:
    """A weight stored transposed is brought into the order the kernels read."""
    weight, scale, x = randn(N, K).to(FP8), torch.rand(N) + 0.5, randn(5, K)
    gemm = torch.compile(lambda x, w, s: fp8_gemm(x, None, w, s), backend="quark", fullgraph=True)
    transposed, spread = weight.t().contiguous().t(), torch.stack((scale, scale + 9), 1)[:, 0]
    assert not transposed.is_contiguous()
    assert not spread.is_contiguous()
    assert torch.equal(gemm(x, transposed, spread), gemm(x, weight, scale))


def test_integers_are_read_by_their_strides(compiled: Callable[..., Any]) -> None:
    """Codes, scales and zero points of 8-bit integers, stored transposed, or with something between them.

    All numbers are small integers and the scales powers of two: every sum is exact, whatever its order.
    """
    generator = torch.Generator().manual_seed(9)
    codes = torch.randint(-8, 8, (N, K), generator=generator, dtype=torch.int8)
    zero_point = torch.randint(-3, 4, (N, 4), generator=generator, dtype=torch.int8)
    scale = torch.exp2(torch.randint(-2, 3, (N, 4), generator=generator))
    x = torch.randint(-6, 7, (5, K), generator=generator).float()

    def gemm(x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        return q.weight_only_gemm(x, weight, scale, None, zero_point, None, "int8")

    def spread(tensor: Tensor) -> Tensor:
        return torch.stack((tensor, tensor + 1), -1)[..., 0]

    forms = [
        (codes.t().contiguous().t(), scale.t().contiguous().t(), zero_point.t().contiguous().t()),
        (spread(codes), spread(scale), spread(zero_point)),
        (codes.t().contiguous().t(), scale, zero_point.t().contiguous().t()),
        (spread(codes), spread(scale)[:, 0], spread(zero_point)[:, 0]),
        (codes, spread(scale)[:, 1], None),
    ]
    assert not any(tensor.is_contiguous() for tensor in (*forms[0], *forms[1]))
    results = compiled(lambda x, forms: [gemm(x, *form) for form in forms], x, forms)
    for y, (weight, by, offset) in zip(results, forms, strict=True):
        columns = by.repeat_interleave(K // 4, 1) if by.ndim == 2 else by[:, None]
        offsets = 0 if offset is None else offset.repeat_interleave(K // 4, 1) if by.ndim == 2 else offset[:, None]
        assert torch.equal(y, x @ ((weight.float() - offsets) * columns).t())


def test_a_part_of_a_tensor_is_read_where_it_begins(compiled: Callable[..., Any]) -> None:
    """Each operand in turn, sliced inside the graph, where a slice is no copy but an offset.

    All numbers are small integers, or powers of two as scales: every sum is exact, whatever its order.
    """
    generator = torch.Generator().manual_seed(8)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-6, 7, shape, generator=generator).float()

    def powers(*shape: int) -> Tensor:
        return torch.exp2(torch.randint(-2, 3, shape, generator=generator))

    x, weight, scale, bias = integers(8, K), integers(2, N, K).to(FP8), powers(2, N), integers(2, N)
    codes, scales = integers(2, 5, K).to(FP8), torch.tensor([1.0, 2.0**-7, 2.0])
    packed = torch.randint(0, 256, (2, N, K // 2), generator=generator, dtype=torch.uint8)
    exponents = torch.randint(125, 130, (2, N, K // 32), generator=generator, dtype=torch.uint8)
    words = torch.randint(-(2**31), 2**31, (2, N, K // 8), generator=generator).to(torch.int32)
    zero_points = torch.randint(-(2**31), 2**31, (2, N // 8), generator=generator).to(torch.int32)
    e4m3 = powers(N, K // 16).to(FP8)
    int8, offsets = integers(2, N, K).to(torch.int8), integers(2, N).to(torch.int8)

    def int8_gemm(x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        return q.weight_only_gemm(x, weight, scale, None, zero_point, None, "int8")

    def parts(x: Tensor, i: int) -> list[Tensor]:
        rows = slice(3 * i, 3 * i + 5)
        return [
            fp8_gemm(x[rows], scales[0], weight[0], scale[0]),
            fp8_gemm((x + 1)[rows], scales[0], weight[0], scale[0]),
            fp8_gemm(x, scales[0], weight[i], scale[0]),
            fp8_gemm(x, scales[0], weight[0], scale[i]),
            fp8_gemm(x, scales[0], weight[0], scale[0], bias[i]),
            fp8_gemm(x, scales[i], weight[0], scale[0]),
            fp8_codes_gemm(codes[i], scales[1 + i], weight[0], scale[0]),
            mxfp4_gemm(x[rows], packed[0], exponents[0]),
            mxfp4_gemm(x, packed[i], exponents[0]),
            mxfp4_gemm(x, packed[0], exponents[i]),
            int4_gemm(x[rows], words[0], scale[0], zero_points[0]),
            int4_gemm(x, words[i], scale[0], zero_points[0]),
            int4_gemm(x, words[0], scale[i], zero_points[0]),
            int4_gemm(x, words[0], scale[0], zero_points[i]),
            int8_gemm(x, int8[i], scale[0], offsets[0]),
            int8_gemm(x, int8[0], scale[i], offsets[0]),
            int8_gemm(x, int8[0], scale[0], offsets[i]),
            # Both global scales are parts of one tensor.
            q.prologue_gemm(
                x,
                None,
                scales[i],
                None,
                packed[0],
                e4m3,
                scales[2 * i],
                None,
                None,
                "nvfp4",
                "sequential",
                0,
                "nvfp4",
            ),
        ]

    wrong = []
    for i, (y, eager, other) in enumerate(
        zip(compiled(lambda x: parts(x, 1), x), parts(x, 1), parts(x, 0), strict=True)
    ):
        assert not torch.equal(eager, other), i
        if not torch.equal(y, eager):
            wrong.append(f"part {i} {'is read from the beginning' if torch.equal(y, other) else 'is wrong'}")
    assert wrong == []


def test_a_part_that_begins_where_only_run_time_knows() -> None:
    weight, scale = randn(N, K, seed=1).to(FP8), torch.rand(N) + 0.5

    def gemm(x: Tensor) -> Tensor:
        return fp8_gemm(x, None, weight, scale)

    of_half = torch.compile(lambda x: gemm(x[x.shape[0] // 2 :]), backend="quark", fullgraph=True)
    straight = torch.compile(gemm, backend="quark", fullgraph=True)
    for rows in (6, 11, 20):
        x = randn(rows, K)
        half = x[rows // 2 :].clone()
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(half, 0)
        assert torch.equal(of_half(x), straight(half))


def test_one_tensor_given_twice() -> None:
    """As both scales, and as both operands: a kernel has one argument for it then."""
    x, scale = randn(5, K).to(FP8), torch.tensor(0.5)
    y = torch.compile(lambda x, s: fp8_codes_gemm(x, s, x, s), backend="quark", fullgraph=True, dynamic=False)(x, scale)
    # Codes have 4 bits and a half is exact: 96 products of up to 2^12, all multiples of 2^-20.
    torch.testing.assert_close(y, x.float() @ x.float().t() / 4, rtol=(K + 3) * U32, atol=2.0**-12)


def test_any_number_of_threads() -> None:
    """More rows than are prepared at a time; the result does not depend on who computes what."""
    gemm, _ = mxfp4(None)
    x, before = randn(1100, K), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            torch._dynamo.reset()
            function = torch.compile(gemm, backend="quark", fullgraph=True, dynamic=False)
            y, (code,) = run_and_get_code(function, x)
            assert ("num_threads(5)" in code) == (count == 5)
            results.append(y)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_both_instruction_sets_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit where sums are exact: integers by powers of two."""
    if not target.current().has("avx512_vnni"):
        pytest.skip("this CPU has no AVX512-VNNI")
    generator = torch.Generator().manual_seed(4)
    x = torch.randint(-6, 7, (9, 160), generator=generator).float()
    packed = torch.randint(0, 256, (33, 80), generator=generator, dtype=torch.uint8)
    scales = torch.randint(126, 129, (33, 5), generator=generator, dtype=torch.uint8)
    weight, one = torch.randint(-8, 9, (33, 160), generator=generator).float().to(FP8), (torch.ones(()), torch.ones(()))
    results = []
    for name in ("", "portable"):
        monkeypatch.setenv("QUARK_INDUCTOR_ISA", name)
        target.current.cache_clear()
        torch._dynamo.reset()

        def both(x: Tensor) -> tuple[Tensor, Tensor]:
            first = mxfp4_gemm(x, packed, scales)
            return first, fp8_gemm(x, one[0], weight, one[1])

        results.append(torch.compile(both, backend="quark", fullgraph=True)(x))
    for fast, portable in zip(*results, strict=True):
        assert torch.equal(fast, portable)
    assert torch.equal(results[0][1], x @ weight.float().t())


# --- what a compiler says of the headers

DRIVER = r"""
#include "common.h"
#include "mxfp4.h"
#include "fp8.h"
#include "generic.h"
#include <sys/mman.h>
#include <unistd.h>
#include <cstdio>

// Every buffer is exactly as large as the kernels may touch, and ends where a page begins that nobody may: the address
// sanitizer does not see masked vector loads.
template <typename T>
struct buffer {
  explicit buffer(int64_t n) : bytes(n * sizeof(T)) {
    const int64_t page = sysconf(_SC_PAGESIZE);
    mapped = quark::round_up(bytes, page) + page;
    memory = static_cast<char*>(mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (memory == MAP_FAILED || mprotect(memory + mapped - page, page, PROT_NONE)) std::abort();
    data = reinterpret_cast<T*>(memory + mapped - page - bytes);
  }
  ~buffer() { munmap(memory, mapped); }
  T* get() const { return data; }
  T& operator[](int64_t i) const { return data[i]; }
  int64_t bytes, mapped;
  char* memory;
  T* data;
};

static uint32_t state = 1;
static uint32_t next() { return state = state * 1664525u + 1013904223u, state >> 8; }
static float number() { return (int(next() % 2001) - 1000) / 256.0f; }

static int64_t wrong = 0;
static void expect(double got, double exact, double magnitude, int64_t k) {
  // gamma_(K + 3): K additions, two scales.
  if (!(std::abs(got - exact) <= (k + 4) * 0x1p-24 * magnitude)) wrong++;
}

static double fp4(int code) {
  const double magnitude[8] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
  return code & 8 ? -magnitude[code & 7] : magnitude[code & 7];
}

template <int MT, typename T>
void mxfp4_case(int64_t n, int64_t k) {
  using namespace quark::mxfp4;
  const buffer<T> x(MT * k);
  for (int64_t i = 0; i < MT * k; i++) x[i] = T(number());
  const buffer<uint8_t> weight(n * k / 2), scale(n * k / 32);
  for (int64_t i = 0; i < n * k / 2; i++) weight[i] = uint8_t(next());
  for (int64_t i = 0; i < n * k / 32; i++) scale[i] = uint8_t(120 + next() % 12);
  const buffer<uint8_t> codes(MT * k / 2), scales(MT * k / 32);
  for (int64_t i = 0; i < MT * k / 2; i++) codes[i] = uint8_t(next());
  for (int64_t i = 0; i < MT * k / 32; i++) scales[i] = uint8_t(120 + next() % 12);
  const auto rows = quark::scratch(MT * row_bytes(k));
  const buffer<float> out(MT * n);
  for (int m = 0; m < MT; m++) quantize_row(x.get() + m * k, k, rows.get() + m * row_bytes(k));
  tile<MT>(rows.get(), k, weight.get(), scale.get(), n, out.get(), n);
  zero_row(rows.get(), k);
  for (int m = 0; m < MT; m++)
    load_row(codes.get() + m * (k / 2), scales.get() + m * (k / 32), k, rows.get() + m * row_bytes(k));
  tile<MT>(rows.get(), k, weight.get(), scale.get(), n, out.get(), n);
  for (int m = 0; m < MT; m++)
    for (int64_t j = 0; j < n; j++) {
      double exact = 0, magnitude = 0;
      for (int64_t i = 0; i < k; i++) {
        const int a = codes[(m * k + i) / 2] >> (i % 2 * 4) & 15, b = weight[(j * k + i) / 2] >> (i % 2 * 4) & 15;
        const double term = fp4(a) * fp4(b) * std::exp2(scales[(m * k + i) / 32] + scale[(j * k + i) / 32] - 254.0);
        exact += term, magnitude += std::abs(term);
      }
      expect(out[m * n + j], exact, magnitude, k);
    }
}

template <int MT, typename T>
void fp8_case(int64_t n, int64_t k) {
  using namespace quark::fp8;
  const buffer<T> x(MT * k);
  for (int64_t i = 0; i < MT * k; i++) x[i] = T(number());
  const buffer<at::Float8_e4m3fn> weight(n * k), codes(MT * k);
  for (int64_t i = 0; i < n * k; i++) weight[i] = at::Float8_e4m3fn(number());
  for (int64_t i = 0; i < MT * k; i++) codes[i] = at::Float8_e4m3fn(number());
  const buffer<T> scale(n);
  for (int64_t i = 0; i < n; i++) scale[i] = T(0.25f + float(next() % 64) / 64.0f);
  const auto rows = quark::scratch(MT * row_bytes(k));
  const buffer<float> out(MT * n);
  for (int m = 0; m < MT; m++) {
    const T* row = x.get() + m * k;
    quantize_row(row, k, dynamic_scale(row, k), rows.get() + m * row_bytes(k));
    dequantize_row<T>(k, rows.get() + m * row_bytes(k));
  }
  tile<MT, Rounded<T>>(rows.get(), k, weight.get(), scale.get(), 1, n, out.get(), n);
  for (int m = 0; m < MT; m++) zero_row(rows.get() + m * row_bytes(k), k);
  for (int m = 0; m < MT; m++) load_row(codes.get() + m * k, k, 0.5f, rows.get() + m * row_bytes(k));
  tile<MT, Exact>(rows.get(), k, weight.get(), scale.get(), 1, n, out.get(), n);
  for (int m = 0; m < MT; m++)
    for (int64_t j = 0; j < n; j++) {
      double exact = 0, magnitude = 0;
      for (int64_t i = 0; i < k; i++) {
        const double term = double(float(codes[m * k + i])) * float(weight[j * k + i]) * float(scale[j]) * 0.5;
        exact += term, magnitude += std::abs(term);
      }
      expect(out[m * n + j], exact, magnitude, k);
    }
}

// The sum of a prepared row and a decoded one, in double.
static double product(const float* a, const float* b, int64_t k, double* magnitude) {
  double exact = 0;
  *magnitude = 0;
  for (int64_t i = 0; i < k; i++) exact += double(a[i]) * b[i], *magnitude += std::abs(double(a[i]) * b[i]);
  return exact;
}

template <typename T, typename Prepare, typename Decode>
void generic_gemm(int rows, int64_t n, int64_t k, Prepare prepare, Decode decode) {
  using namespace quark::generic;
  const auto prepared = quark::scratch(rows * row_bytes(k));
  const auto weight = quark::scratch(AT_ONCE * row_bytes(k));
  const buffer<float> out(rows * n);
  for (int m = 0; m < rows; m++) zero_row(prepared.get() + m * row_bytes(k), k);
  for (int m = 0; m < rows; m++) prepare(m, prepared.get() + m * row_bytes(k));
  tile(prepared.get(), rows, k, 0, n, floats(weight.get()), out.get(), n, decode);
  for (int64_t j = 0; j < n; j++) {
    decode(j, floats(weight.get()));
    for (int m = 0; m < rows; m++) {
      double magnitude;
      const double exact = product(floats(prepared.get() + m * row_bytes(k)), floats(weight.get()), k, &magnitude);
      expect(out[m * n + j], exact, magnitude, k);
    }
  }
}

template <typename E, int SIZE, typename S, typename Rule, typename T>
void generic_blocks(int rows, int64_t n, int64_t k, int bits, float global) {
  using namespace quark::generic;
  const buffer<T> x(rows * k);
  for (int64_t i = 0; i < rows * k; i++) x[i] = T(number());
  const buffer<uint8_t> codes(n * k * bits / 8), scales(n * k / SIZE);
  for (int64_t i = 0; i < n * k * bits / 8; i++) codes[i] = uint8_t(next() & 0x77);  // no NaN
  for (int64_t i = 0; i < n * k / SIZE; i++) scales[i] = uint8_t(60 + next() % 12);
  const auto decode = [&](int64_t j, float* w) {
    decode_blocks<E, SIZE, S, T>(codes.get() + j * k * bits / 8, scales.get() + j * k / SIZE, k, global, 0.0f, w);
  };
  const auto quantize = [&](int m, uint8_t* row) {
    quantize_blocks<E, SIZE, Rule>(x.get() + m * k, k, global, 0x1p-23f, row);
  };
  generic_gemm<T>(rows, n, k, quantize, decode);
  generic_gemm<T>(rows, n, k, [&](int m, uint8_t* row) { decode(m % n, floats(row)); }, decode);
}

template <typename T>
void generic_integers(int rows, int64_t n, int64_t k, int64_t group) {
  using namespace quark::generic;
  const int64_t groups = k / group;
  const buffer<T> x(rows * k), scale(n * groups);
  for (int64_t i = 0; i < rows * k; i++) x[i] = T(number());
  for (int64_t i = 0; i < n * groups; i++) scale[i] = T(0.25f + float(next() % 64) / 64.0f);
  const buffer<int8_t> weight(n * k), zero_point(n * groups);
  for (int64_t i = 0; i < n * k; i++) weight[i] = int8_t(next());
  for (int64_t i = 0; i < n * groups; i++) zero_point[i] = int8_t(next());
  const buffer<at::Float8_e5m2> fp8(n * k);
  for (int64_t i = 0; i < n * k; i++) fp8[i] = at::Float8_e5m2(number());
  const auto row_of = [&](int m) { return x.get() + m * k; };
  const auto by_group = [&](int64_t j, float* w) {  // [N, K]
    const int64_t g = j * groups;
    decode_integers<T>(weight.get() + j * k, 1, scale.get() + g, 1, zero_point.get() + g, 1, k, group, w);
  };
  const auto transposed = [&](int64_t j, float* w) {  // [K, N]
    decode_integers<T>(weight.get() + j, n, scale.get() + j, n, zero_point.get() + j, n, k, group, w);
  };
  const auto per_channel = [&](int64_t j, float* w) {
    decode_integers<T>(weight.get() + j * k, 1, scale.get() + j, 0, (const int8_t*)nullptr, 0, k, k, w);
  };
  const auto blocks = [&](int64_t j, float* w) {  // the last one cut off
    decode_fp8<Fp8E5M2, T>(fp8.get() + j * k, scale.get(), k, k == 1 ? 1 : k - 1, w);
  };
  generic_gemm<T>(rows, n, k, [&](int m, uint8_t* row) { copy_row(row_of(m), k, row); }, by_group);
  generic_gemm<T>(rows, n, k, [&](int m, uint8_t* row) {
    quantize_fp8<Fp8E4M3>(row_of(m), k, fp8_scale<Fp8E4M3>(row_of(m), k), row);
  }, transposed);
  generic_gemm<T>(rows, n, k, [&](int m, uint8_t* row) {
    quantize_fp8_groups<Fp8E5M2>(row_of(m), k, group, row);
  }, per_channel);
  generic_gemm<T>(rows, n, k, [&](int m, uint8_t* row) {
    quantize_integer_groups<0, 255, false>(row_of(m), k, group, row);
  }, per_channel);
  if (n * groups > 1 || k == 1)
    generic_gemm<T>(rows, n, k, [&](int m, uint8_t* row) {
      quantize_integer_row<-128, 127>(row_of(m), k, integer_grid<-128, 127, true>(row_of(m), k), row);
    }, blocks);
}

template <typename T>
void generic_int4(int rows, int64_t n, int64_t k, int64_t group) {
  using namespace quark::generic;
  const int64_t groups = k / group;
  const buffer<T> x(rows * k), scale(n * groups), channel(n);
  for (int64_t i = 0; i < rows * k; i++) x[i] = T(number());
  for (int64_t i = 0; i < n * groups; i++) scale[i] = T(0.25f + float(next() % 64) / 64.0f);
  for (int64_t i = 0; i < n; i++) channel[i] = scale[i];
  const buffer<float> scale_2(n);
  for (int64_t i = 0; i < n; i++) scale_2[i] = 0.5f + float(next() % 64);
  const buffer<int32_t> words(n * k / 8), zero_point(groups * n / 8), zero_points(n / 8);
  for (int64_t i = 0; i < n * k / 8; i++) words[i] = int32_t(next() * 2654435761u);
  for (int64_t i = 0; i < groups * n / 8; i++) zero_point[i] = int32_t(next() * 2654435761u);
  for (int64_t i = 0; i < n / 8; i++) zero_points[i] = zero_point[i];
  const auto copy = [&](int m, uint8_t* row) { copy_row(x.get() + m * k, k, row); };
  generic_gemm<T>(rows, n, k, copy, [&](int64_t j, float* w) {
    decode_int4_groups<false, true, T>(words.get(), scale.get(), zero_point.get(), j, n, k, group, w);
  });
  if (k % 8) return;
  generic_gemm<T>(rows, n, k, copy, [&](int64_t j, float* w) {
    decode_int4<true, false, T>(words.get() + j * k / 8, channel.get(), zero_points.get(), j, k, w);
  });
  generic_gemm<T>(rows, n, k, copy, [&](int64_t j, float* w) {
    decode_int4_fp8<T>(words.get() + j * k / 8, 0.5f, scale_2.get(), zero_points.get(), j, k, w);
  });
}

template <typename T>
void generic_cases(int rows) {
  using namespace quark::generic;
  for (int64_t n : {1, 5})
    for (int64_t k : {32, 96}) {
      generic_blocks<Fp4, 16, E4M3, Sequential, T>(rows, n, k, 4, 0.37f);
      generic_blocks<Fp4, 32, E5M3, Nearest, T>(rows, n, k, 4, 1.0f);
      generic_blocks<Fp6E2M3, 32, E8M0, Even, T>(rows, n, k, 6, 1.0f);
      generic_blocks<Fp6E3M2, 32, E8M0, Even, T>(rows, n, k, 6, 1.0f);
      generic_blocks<Fp8E4M3, 32, E8M0, Rceil, T>(rows, n, k, 8, 1.0f);
      generic_blocks<Fp8E5M2, 16, E4M3, Combined, T>(rows, n, k, 8, 0.37f);
    }
  for (int64_t n : {1, 5})
    for (int64_t k : {1, 15, 33, 100}) generic_integers<T>(rows, n, k, k % 5 ? k : 5);
  for (int64_t n : {8, 24})
    for (int64_t k : {5, 8, 40}) generic_int4<T>(rows, n, k, k % 5 ? k : 5);
}

template <int MT>
void all() {
  for (int64_t n : {1, 5, 32})
    for (int64_t k : {32, 64, 96, 160}) {
      mxfp4_case<MT, float>(n, k);
      mxfp4_case<MT, at::BFloat16>(n, k);
      mxfp4_case<MT, at::Half>(n, k);
    }
  for (int64_t n : {1, 5, 32})
    for (int64_t k : {1, 15, 16, 17, 31, 32, 33, 100}) {
      fp8_case<MT, float>(n, k);
      fp8_case<MT, at::BFloat16>(n, k);
      fp8_case<MT, at::Half>(n, k);
    }
}

int main() {
  all<1>(), all<3>(), all<8>();
  for (int rows : {1, 8, 11}) {
    generic_cases<float>(rows);
    generic_cases<at::BFloat16>(rows);
  }
  std::printf("wrong: %ld\n", long(wrong));
  return wrong != 0;
}
"""


def compiler() -> str:
    """The compiler Inductor uses."""
    found = shutil.which(cpp_builder.get_cpp_compiler())
    assert found
    return found


def includes() -> list[str]:
    root = Path(torch.__file__).parent / "include"
    return [f"-I{HEADERS}", f"-I{root}", f"-I{root / 'torch/csrc/api/include'}"]


def build(source: str, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    (folder / "driver.cpp").write_text(source)
    command = [compiler(), "-std=c++20", *flags, *includes(), str(folder / "driver.cpp")]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)


def test_the_portable_kernels_need_no_vector_extension(tmp_path: Path) -> None:
    """Compiled for the plainest CPU of this architecture, with nothing of AVX to be had, and without a warning."""
    result = build(DRIVER, tmp_path, "-fsyntax-only", "-Wall", "-Wextra", "-Wno-unused")
    assert result.returncode == 0, result.stderr
    ours = [line for line in result.stderr.splitlines() if str(HEADERS) in line and "warning" in line]
    assert ours == []
    headers = ["common.h", "generic.h", *sorted(h.name for h in HEADERS.glob("*.h"))]
    everything = "".join(f'#include "{name}"\n' for name in headers)
    result = build(everything, tmp_path, "-E", "-P")
    assert result.returncode == 0, result.stderr
    assert "_mm512" not in result.stdout


@pytest.fixture(params=["portable", "fast"])
def architecture(request: pytest.FixtureRequest) -> list[str]:
    """Compiler flags of one kind of kernels."""
    if request.param == "fast" and not target.current().has("avx512_vnni"):
        pytest.skip("this CPU has no AVX512-VNNI: the fast kernels cannot run here")
    return [] if request.param == "portable" else ["-DQUARK_AVX512", "-march=native"]


@pytest.mark.slow
def test_the_kernels_stay_inside_their_memory(architecture: list[str], tmp_path: Path) -> None:
    """Under the address and undefined-behaviour sanitizers, with ragged sizes; and they compute what they should."""
    flags = "-fsanitize=address,undefined", "-fno-sanitize-recover=all"
    if build("int main() {}", tmp_path, *flags).returncode != 0:
        pytest.skip(f"{compiler()} has no address and undefined-behaviour sanitizers")
    result = build(DRIVER, tmp_path, "-O1", "-g", *flags, *architecture, "-o", "driver")
    assert result.returncode == 0, result.stderr
    result = subprocess.run([tmp_path / "driver"], capture_output=True, text=True, check=False, timeout=300)
    assert (result.returncode, result.stdout, result.stderr) == (0, "wrong: 0\n", "")
